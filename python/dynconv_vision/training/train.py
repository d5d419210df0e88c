# SPDX-License-Identifier: BSD-3-Clause
"""Train one network, and measure one."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from .callbacks import BEST, LAST, EpochBar, EpochRecord, RunState, StopRequest, TrainingInterrupted
from .checkpoints import load_weights, read_checkpoint
from .config import StudyError, TrainConfig
from .datamodule import EVALUATION_BATCH_SIZE, Dataset, EvaluationLoader, ImageDataModule, Split, prepare_images
from .hardware import resolve_device, resolve_precision
from .matmul_conv import use_matmul_convolutions
from .module import ClassificationModule, select_channels, use_channels_last


@dataclass(frozen=True)
class TrainResult:
    """A finished training: its epochs, and the one whose weights the model now holds."""

    history: tuple[EpochRecord, ...]
    best: EpochRecord

    @property
    def seconds(self) -> float:
        """Time spent in all epochs, validation included, breaks left out."""
        return sum(record.seconds for record in self.history)


def train_model(
    model: nn.Module,
    dataset: Dataset,
    config: TrainConfig,
    folder: Path,
    *,
    card: dict[str, Any] | None = None,
    teacher: nn.Module | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train `model` and leave it with the weights of its best validation accuracy.

    Writes into `folder`: history.csv, best.ckpt, last.ckpt, and under logs/ what TensorBoard and CSV readers take.
    On a CPU, a run that was interrupted or killed and then resumed ends with the weights of an uninterrupted one, bit
    for bit, given the same number of threads.

    Args:
        model: Network from images (B, 3, S, S) in [0, 1] to logits.
        dataset: Images and labels.
        config: Settings.
        folder: The model's folder; it is created.
        card: Plain values to save in the checkpoints (see `ModelCard.to_dict`).
        teacher: A trained network from the same images to logits, which `model` learns from by the weight
            `config.distillation`; its parameters stop asking for gradients.
        resume: Go on from last.ckpt if there is one; a finished training is only read back.
        progress: Show a bar, where stderr is a terminal, and a line an epoch.

    Returns:
        All epochs, and the one whose weights the model now holds.

    Raises:
        StudyError: The folder holds another training, or training diverged.
        TrainingInterrupted: SIGINT or SIGTERM came; the state is saved.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / LAST
    if last.exists() and not resume:
        raise StudyError(f"{last} exists: resume that training, or choose another folder")

    if config.channels_last:
        use_channels_last(model)
        if teacher is not None:
            use_channels_last(teacher)
    if device == "cpu" and precision == "bf16":
        use_matmul_convolutions(model)
    module = ClassificationModule(model, config, len(dataset.classes), dataset.image_size, card, teacher)
    stop = StopRequest()
    bar = EpochBar() if progress and sys.stderr.isatty() else None

    def show(record: EpochRecord) -> None:
        line = (
            f"  epoch {record.epoch}/{config.epochs}: train {record.train_acc:.2f} % (loss {record.train_loss:.4f}), "
            f"val {record.val_acc:.2f} % (loss {record.val_loss:.4f}), {record.seconds:.1f} s"
        )
        print(line, flush=True) if bar is None else bar.print(line)

    state = RunState(folder, config, stop, show if progress else None)
    steps = 0
    if last.exists():
        checkpoint = read_checkpoint(last)
        if card is not None and checkpoint["dynconv_vision"] != card:
            raise StudyError(f"{last} holds another training than the one to resume; choose another folder")
        state.load_state_dict(checkpoint["callbacks"][state.state_key])
        steps = checkpoint["global_step"]
    if not state.finished:
        callbacks: list[Callback] = [state] if bar is None else [state, bar]
        if config.early_stop_patience is not None:
            callbacks.append(EarlyStopping("val_acc", mode="max", patience=config.early_stop_patience))
        with _quiet(), stop:
            trainer = pl.Trainer(
                accelerator="gpu" if device == "cuda" else device,
                # One process and one device, or what torchrun started.
                devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
                num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
                precision="bf16-mixed" if precision == "bf16" else "32-true",
                max_epochs=config.epochs,
                gradient_clip_val=config.gradient_clip,
                # TrainLoader knows its process's share.
                use_distributed_sampler=False,
                callbacks=callbacks,
                logger=[
                    TensorBoardLogger(folder, name="logs", version="tensorboard", purge_step=steps or None),
                    CSVLogger(folder, name="logs/csv", version=None),
                ],
                log_every_n_steps=10,
                num_sanity_val_steps=0,
                enable_progress_bar=bar is not None,
                enable_model_summary=False,
            )
            try:
                trainer.fit(
                    module,
                    datamodule=ImageDataModule(dataset, config),
                    ckpt_path=last if last.exists() else None,
                    weights_only=True,
                )
            except (KeyboardInterrupt, SystemExit):
                # Lightning exits on KeyboardInterrupt, which only a second signal raises.
                if stop.signal is None:
                    raise
                raise TrainingInterrupted(stop.signal) from None
        if stop.signal is not None:
            raise TrainingInterrupted(stop.signal)
    load_weights(model, read_checkpoint(folder / BEST), f"{folder / BEST} does not fit the network")
    return TrainResult(tuple(state.records), state.best)


@dataclass(frozen=True)
class Predictions:
    """What a network says of the images of a split.

    Attributes:
        labels: (N,) int64, the truth.
        classes: (N,) int64, the class of the greatest logit.
        losses: (N,) float32, cross-entropy.
    """

    labels: np.ndarray
    classes: np.ndarray
    losses: np.ndarray

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * float((self.labels == self.classes).mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return float(self.losses.mean(dtype=np.float64))


@torch.inference_mode()
def predict(
    model: nn.Module,
    split: Split,
    num_classes: int,
    *,
    channels: Sequence[str] | None = None,
    batch_size: int = EVALUATION_BATCH_SIZE,
    device: str = "auto",
    precision: str = "auto",
    channels_last: bool = True,
    seed: int = 0,
) -> Predictions:
    """What `model` says of every image of `split`, in the split's order.

    Args:
        model: The network; it is moved to the device and put into evaluation mode.
        split: Images and labels.
        num_classes: Number of classes.
        channels: Names, see `dynconv_vision.data.derive_channels`, that the network sees; missing ones are left out if
            it takes named channels and set to zero if not, and names that it does not know are channels of unknown
            identity to it. None calls it on R, G and B without names.
        batch_size: Images at a time.
        device, precision, channels_last: As in `TrainConfig`.
        seed: For networks that draw random numbers in evaluation.

    Returns:
        The predictions.

    Raises:
        StudyError: The split is empty or has a label out of range, or device, precision or channels are wrong.
    """
    if len(split) == 0:
        raise StudyError("images: got none, expected at least one")
    if split.labels.min() < 0 or split.labels.max() >= num_classes:
        raise StudyError(
            f"labels: got {split.labels.min()}..{split.labels.max()}, expected 0..{num_classes - 1}, "
            f"since the network has {num_classes} classes"
        )
    device = resolve_device(device)
    bf16 = resolve_precision(precision, device) == "bf16"
    model.to(device).eval()
    if channels_last:
        use_channels_last(model)
    parts = []
    for batch in EvaluationLoader(split, batch_size, seed):
        torch.manual_seed(batch.seed)
        images, labels = prepare_images(batch.images.to(device), channels_last), batch.labels.to(device)
        images, named = (images, {}) if channels is None else select_channels(model, images, channels)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            logits = model(images, **named).float()
        parts.append((labels, logits.argmax(1), nn.functional.cross_entropy(logits, labels, reduction="none")))
    return Predictions(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def evaluate_model(model: nn.Module, split: Split, num_classes: int, **settings: Any) -> dict[str, float]:
    """Accuracy, in percent, and mean cross-entropy of `model` on `split`, every call with counters of its own.

    Args:
        model, split, num_classes: As of `predict`.
        **settings: Passed to `predict`.

    Returns:
        {"accuracy": percent, "loss": mean cross-entropy}

    Raises:
        StudyError: As `predict`.
    """
    predictions = predict(model, split, num_classes, **settings)
    return {"accuracy": predictions.accuracy, "loss": predictions.loss}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's notes about hardware, workers and intervals off the screen; its errors stay."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module=r"lightning\.")
            # Data-parallel training of channels-last 1x1 kernels.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
