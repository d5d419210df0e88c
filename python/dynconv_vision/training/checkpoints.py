# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoint files: reading them safely, and rebuilding the network that one holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import StudyError

_FORMAT = 1
_KEY = "dynconv_vision"
_PREFIX = "model."


@dataclass(frozen=True)
class ModelCard:
    """What a checkpoint says about its network: all that is needed to use it on other images.

    Attributes:
        task: "task1" or "task2".
        model: Name for `dynconv_vision.models.create_model`.
        options: Further keyword arguments of `create_model`.
        classes: Names of the classes, by label.
        image_size: Height and width of the images, in pixels.
        denoise, normalize: The preprocessing that the images went through.
    """

    task: str
    model: str
    options: dict[str, Any]
    classes: tuple[str, ...]
    image_size: int
    denoise: bool
    normalize: bool

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def to_dict(self) -> dict[str, Any]:
        """The card as plain values, which `torch.load(weights_only=True)` reads."""
        return {"format": _FORMAT} | dataclasses.asdict(self) | {"classes": list(self.classes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelCard:
        """The inverse of `to_dict`.

        Raises:
            StudyError: The values come from another version, or some are missing.
        """
        if values.get("format") != _FORMAT:
            raise StudyError(f"checkpoint format: got {values.get('format')!r}, expected {_FORMAT}")
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in values]:
            raise StudyError(f"checkpoint: {', '.join(missing)} missing")
        return cls(**{name: values[name] for name in names} | {"classes": tuple(values["classes"])})


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint that a study wrote; nothing in the file is executed.

    Raises:
        StudyError: The file is missing, cannot be read, or was not written by a study.
    """
    if not path.is_file():
        raise StudyError(f"checkpoint: {path} is not a file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch raise many types for a broken or foreign file
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise StudyError(f"checkpoint: {path} cannot be read: damaged, or no torch checkpoint ({reason})") from None
    if not isinstance(checkpoint, dict) or _KEY not in checkpoint or "state_dict" not in checkpoint:
        raise StudyError(f"checkpoint: {path} was not written by a study of this project: it has no {_KEY!r} entry")
    return checkpoint


def load_network(path: Path) -> tuple[nn.Module, ModelCard]:
    """The network of a checkpoint, in evaluation mode on the CPU, and its card.

    Raises:
        StudyError: See `read_checkpoint`; or the network is unknown here, or the weights do not fit it.
    """
    from dynconv_vision.models import create_model

    checkpoint = read_checkpoint(path)
    card = ModelCard.from_dict(checkpoint[_KEY])
    try:
        model = create_model(card.model, card.num_classes, card.image_size, **card.options)
    except (ValueError, TypeError) as error:
        raise StudyError(f"checkpoint: {path} holds {card.model!r}, which cannot be built here: {error}") from None
    load_weights(model, checkpoint, f"checkpoint: {path} does not fit {card.model!r} with {card.num_classes} classes")
    return model.eval(), card


def load_weights(model: nn.Module, checkpoint: dict[str, Any], complaint: str) -> None:
    """Copy a checkpoint's weights into `model`.

    Raises:
        StudyError: Names or shapes differ; the text starts with `complaint` and names the first difference.
    """
    weights = {k.removeprefix(_PREFIX): v for k, v in checkpoint["state_dict"].items() if k.startswith(_PREFIX)}
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights:
            raise StudyError(f"{complaint}: {name} is missing")
        if name not in own:
            raise StudyError(f"{complaint}: {name} is unknown to the network")
        if own[name].shape != weights[name].shape:
            got, expected = tuple(weights[name].shape), tuple(own[name].shape)
            raise StudyError(f"{complaint}: {name}: got shape {got}, expected {expected}")
    model.load_state_dict(weights)
