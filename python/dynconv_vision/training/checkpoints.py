# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoint files: reading them safely, and rebuilding the network that one holds."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynconv_vision.models.weights import read_weights

from .config import StudyError

_FORMAT = 1
_KEY = "dynconv_vision"
_PREFIX = "model."
_AVERAGE = "average.module."


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

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Keyword arguments of `load_list` and `PreprocessConfig` that make images what the network was trained on."""
        return {"image_size": self.image_size, "denoise": self.denoise, "normalize": self.normalize}

    def to_dict(self) -> dict[str, Any]:
        """The card as plain values, which `torch.load(weights_only=True)` reads."""
        return {"format": _FORMAT} | dataclasses.asdict(self) | {"classes": list(self.classes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "checkpoint") -> ModelCard:
        """The inverse of `to_dict`.

        Args:
            values: What `to_dict` gave.
            where: What error texts start with.

        Raises:
            StudyError: The values come from another version, or one is missing or of another type.
        """
        if not isinstance(values, dict):
            raise StudyError(f"{where}: got a card that is a {type(values).__name__}, expected a dictionary")
        if values.get("format") != _FORMAT:
            raise StudyError(f"{where}: got format {values.get('format')!r}, expected {_FORMAT}")
        if missing := [name for name in _CARD_TYPES if name not in values]:
            raise StudyError(f"{where}: {', '.join(missing)} missing")
        for name, kind in _CARD_TYPES.items():
            if not isinstance(values[name], kind):
                raise StudyError(f"{where}: {name}: got {values[name]!r}, expected a {kind.__name__}")
        return cls(**{name: values[name] for name in _CARD_TYPES} | {"classes": tuple(values["classes"])})


_CARD_TYPES = {
    "task": str,
    "model": str,
    "options": dict,
    "classes": list,
    "image_size": int,
    "denoise": bool,
    "normalize": bool,
}


def read_card(path: Path) -> ModelCard:
    """The card in a checkpoint.

    Args:
        path: A best.ckpt or last.ckpt.

    Raises:
        StudyError: See `read_checkpoint` and `ModelCard.from_dict`.
    """
    return ModelCard.from_dict(read_checkpoint(path)[_KEY], f"checkpoint: {path}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint that a study wrote; nothing in the file is executed.

    Args:
        path: A best.ckpt or last.ckpt, or a safetensors file that experiments/export_weights.py wrote.

    Returns:
        Its entries; "state_dict" and "dynconv_vision", the card, among them.

    Raises:
        StudyError: The file is missing, cannot be read, or was not written by a study.
    """
    if not path.is_file():
        raise StudyError(f"checkpoint: {path} is not a file")
    if path.suffix == ".safetensors":
        try:
            weights, card = read_weights(path)
        except ValueError as error:
            raise StudyError(f"checkpoint: {error}") from None
        return {_KEY: card, "state_dict": {_PREFIX + name: value for name, value in weights.items()}}
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own text tells how to run code from the file
        reason = "not only tensors and plain values are in it"
        raise StudyError(f"checkpoint: {path} cannot be read: damaged, or no torch checkpoint ({reason})") from None
    except Exception as error:  # zip, pickle and torch raise many types for a broken or foreign file
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise StudyError(f"checkpoint: {path} cannot be read: damaged, or no torch checkpoint ({reason})") from None
    if not isinstance(checkpoint, dict) or _KEY not in checkpoint or "state_dict" not in checkpoint:
        raise StudyError(f"checkpoint: {path} was not written by a study of this project: it has no {_KEY!r} entry")
    if not isinstance(checkpoint["state_dict"], dict):
        kind = type(checkpoint["state_dict"]).__name__
        raise StudyError(f"checkpoint: {path}: state_dict: got a {kind}, expected a dictionary of tensors")
    return checkpoint


def load_network(path: Path) -> tuple[nn.Module, ModelCard]:
    """The network of a checkpoint, in evaluation mode on the CPU, and its card.

    Args:
        path: A best.ckpt or last.ckpt.

    Returns:
        The network, from images (B, 3, S, S) in [0, 1] to logits (B, num_classes), and the card.

    Raises:
        StudyError: See `read_checkpoint`; or the network is unknown here, or the weights do not fit it.
    """
    from dynconv_vision.models import create_model

    checkpoint = read_checkpoint(path)
    card = ModelCard.from_dict(checkpoint[_KEY], f"checkpoint: {path}")
    try:
        model = create_model(card.model, card.num_classes, card.image_size, **card.options)
    except (ValueError, TypeError) as error:
        raise StudyError(f"checkpoint: {path} holds {card.model!r}, which cannot be built here: {error}") from None
    load_weights(model, checkpoint, f"checkpoint: {path} does not fit {card.model!r} with {card.num_classes} classes")
    return model.eval(), card


def load_weights(model: nn.Module, checkpoint: dict[str, Any], complaint: str) -> None:
    """Copy a checkpoint's weights into `model`: their moving averages if it has them.

    Raises:
        StudyError: Names or shapes differ; the text starts with `complaint` and names the first difference.
    """
    saved = checkpoint["state_dict"]
    prefix = _AVERAGE if any(name.startswith(_AVERAGE) for name in saved) else _PREFIX
    weights = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        if name not in weights:
            raise StudyError(f"{complaint}: {name} is missing")
        if name not in own:
            raise StudyError(f"{complaint}: {name} is unknown to the network")
        if not isinstance(weights[name], torch.Tensor):
            raise StudyError(f"{complaint}: {name}: got a {type(weights[name]).__name__}, expected a tensor")
        if own[name].shape != weights[name].shape:
            got, expected = tuple(weights[name].shape), tuple(own[name].shape)
            raise StudyError(f"{complaint}: {name}: got shape {got}, expected {expected}")
    model.load_state_dict(weights)
