# SPDX-License-Identifier: BSD-3-Clause
"""Settings of one training run, frozen and saved as JSON beside its results."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dynconv_vision.data.derived import CHANNEL_NAMES

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "float32", "bf16")
SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adam", "adamw", "sgd")
AUGMENTATIONS = ("none", "light", "strong")
CHANNEL_SAMPLINGS = ("none", "step", "image")
MIXES = ("none", "mixup", "cutmix", "both")
_LARGEST_SEED = 2**63 - 1  # what torch.manual_seed takes


class StudyError(ValueError):
    """The user asked for something that cannot be done; the message is one line and says what to change."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. The defaults are the source report's for Task II.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per step and per process.
        optimizer: "adam", "adamw", or "sgd" with Nesterov's momentum of 0.9.
        learning_rate: The optimiser's step size (its peak under a schedule).
        offset_learning_rate: Step size of what predicts offsets and masks in `dynconv_ext.DeformableConv2d`, over
            `learning_rate`.
        weight_decay: As `torch.optim`'s class of the optimiser defines it; AdamW's is not a penalty.
        schedule: "constant" or "cosine" (to zero at the end of the last epoch).
        warmup_epochs: Epochs of linear warm-up from zero; may be a fraction.
        gradient_clip: Greatest L2 norm of all gradients together; None clips nothing.
        label_smoothing: Share of the target given to all classes evenly, in [0, 1).
        early_stop_patience: Stop after so many epochs in a row without a better validation accuracy; None never stops.
        augment: "none"; "light": random shifts and horizontal flips of the training images; "strong": crops of random
            size, flips, colours and erased boxes. Drawn per image, done on the device, see `.augmentation`.
        mix: Mixtures of two images and of their labels, one draw a batch: "none"; "mixup" (alpha 0.2); "cutmix" (alpha
            1); "both", one or the other at random. Training accuracy is then that of the image with the larger part.
        mix_share: Share of the batches that are mixed.
        distillation: Weight of a teacher's part of the loss, in [0, 1]; the labels' part has the rest. See
            `train_model`.
        distillation_temperature: Of both softmaxes in the teacher's part (Hinton et al. 2015, arXiv:1503.02531).
        ema_decay: Test and validate with exponential moving averages of weights and buffers, of this decay a step, or
            (1 + t) / (10 + t) after t steps where that is less; None takes the weights themselves.
        channels: Names of the channels that the images are given in, see `dynconv_vision.data.derive_channels`.
        channel_sampling: "none"; or train on random sets of the channels, one drawn for every "image" or one for all of
            a "step", see `dynconv_vision.models.sample_channels`. Validation is then on drawn sets as well, always the
            same for an image.
        full_share: With sets drawn an image: share of the images that keep all channels without a draw.
        unknown_share: Share of the steps in which one channel is shown without its name.
        temperature_anneal: Share of the epochs over which modules with a temperature schedule go from its start to its
            end; None leaves their temperature alone.
        seed: Decides the weights at the start, the order of the batches and everything drawn during training.
        device: One of DEVICES; "auto" takes CUDA, then MPS, then the CPU.
        precision: One of PRECISIONS; "bf16" is bfloat16 autocast over float32 weights, "auto" takes it where the
            hardware multiplies bfloat16 matrices natively (CUDA from Ampere on, CPUs with AMX or AVX512-BF16).
        channels_last: Keep images and weights in the channels-last memory format.
        checkpoint_minutes: Save `last.ckpt` inside an epoch whenever this long has passed since the last save.
        checkpoint_steps: Save `last.ckpt` inside an epoch every so many steps as well; None does not.
    """

    epochs: int = 30
    batch_size: int = 32
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    offset_learning_rate: float = 1.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_epochs: float = 0.0
    gradient_clip: float | None = None
    label_smoothing: float = 0.0
    early_stop_patience: int | None = None
    augment: str = "none"
    mix: str = "none"
    mix_share: float = 1.0
    distillation: float = 0.0
    distillation_temperature: float = 4.0
    ema_decay: float | None = None
    channels: tuple[str, ...] = ("R", "G", "B")
    channel_sampling: str = "none"
    full_share: float = 0.0
    unknown_share: float = 0.0
    temperature_anneal: float | None = 1 / 3
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    channels_last: bool = True
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int | None = None

    def __post_init__(self) -> None:
        _require_int(self, "epochs", 1)
        _require_int(self, "batch_size", 1)
        _require_int(self, "seed", 0, _LARGEST_SEED)
        _require_number(self, "learning_rate", 0.0, open_low=True)
        _require_number(self, "offset_learning_rate", 0.0)
        _require_number(self, "weight_decay", 0.0)
        _require_number(self, "warmup_epochs", 0.0)
        _require_number(self, "mix_share", 0.0, most=1.0)
        _require_number(self, "distillation", 0.0, most=1.0)
        _require_number(self, "distillation_temperature", 0.0, open_low=True)
        _require_number(self, "label_smoothing", 0.0, below=1.0)
        _require_number(self, "checkpoint_minutes", 0.0, open_low=True)
        if self.gradient_clip is not None:
            _require_number(self, "gradient_clip", 0.0, open_low=True)
        if self.temperature_anneal is not None:
            _require_number(self, "temperature_anneal", 0.0, open_low=True)
        if self.early_stop_patience is not None:
            _require_int(self, "early_stop_patience", 1)
        if self.checkpoint_steps is not None:
            _require_int(self, "checkpoint_steps", 1)
        if self.ema_decay is not None:
            _require_number(self, "ema_decay", 0.0, below=1.0)
        _require_number(self, "full_share", 0.0, below=1.0)
        _require_number(self, "unknown_share", 0.0, below=1.0)
        # From JSON it comes as a list.
        object.__setattr__(self, "channels", tuple(self.channels))
        names = self.channels
        if not names or len(set(names)) != len(names) or not set(names) <= set(CHANNEL_NAMES):
            raise StudyError(f"channels: got {names!r}, expected different names out of {', '.join(CHANNEL_NAMES)}")
        for name, allowed in (
            ("device", DEVICES),
            ("precision", PRECISIONS),
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("augment", AUGMENTATIONS),
            ("mix", MIXES),
            ("channel_sampling", CHANNEL_SAMPLINGS),
        ):
            if getattr(self, name) not in allowed:
                raise StudyError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if not isinstance(self.channels_last, bool):
            raise StudyError(f"channels_last: got {self.channels_last!r}, expected true or false")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return dataclasses.asdict(self) | {"channels": list(self.channels)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; a missing setting takes its default.

        Raises:
            StudyError: A name is unknown or a value is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise StudyError(f"{cls.__name__}: unknown settings {', '.join(unknown)}")
        return cls(**values)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON so that a kill leaves either the old file or the new one, never half of one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        StudyError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"{path}: no such file") from None
    except ValueError as error:
        raise StudyError(f"{path}: not a JSON file ({error})") from None


def _require_int(config: TrainConfig, name: str, low: int, high: int | None = None) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        upper = "" if high is None else f" and <= {high}"
        raise StudyError(f"{name}: got {value!r}, expected a whole number >= {low}{upper}")


def _require_number(
    config: TrainConfig,
    name: str,
    low: float,
    *,
    open_low: bool = False,
    below: float = math.inf,
    most: float = math.inf,
) -> None:
    value = getattr(config, name)
    number = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    if not number or value < low or (open_low and value == low) or value >= below or value > most:
        upper = f" and < {below}" if below < math.inf else f" and <= {most}" if most < math.inf else ""
        raise StudyError(f"{name}: got {value!r}, expected a number {'>' if open_low else '>='} {low}{upper}")
