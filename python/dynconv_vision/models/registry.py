# SPDX-License-Identifier: BSD-3-Clause
"""Networks by name: what a study, a checkpoint and a report all mean by ``"task2_published"``."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from .weights import FOLDER, read_weights

#: The two studies of the source report.
TASKS = ("task1", "task2")

_Builder = TypeVar("_Builder", bound=Callable[..., nn.Module])


@dataclass(frozen=True)
class _Entry:
    builder: Callable[..., nn.Module]
    tasks: tuple[str, ...]


_MODELS: dict[str, _Entry] = {}


def _task_name(task: str | int) -> str:
    name = f"task{task}" if isinstance(task, int) else task
    if name not in TASKS:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(map(repr, TASKS))}")
    return name


def register_model(name: str, *, task: str | int | tuple[str | int, ...] = ()) -> Callable[[_Builder], _Builder]:
    """Make a builder available to :func:`create_model` under ``name``.

    Args:
        name: The name; it must be free.
        task: The study or studies that the network belongs to, ``"task1"`` or ``"task2"``.

    Returns:
        A decorator for a builder ``(num_classes, image_size, **options) -> nn.Module``, which it leaves unchanged.

    Raises:
        ValueError: If the name is taken or a task is unknown.

    Example:
        >>> from torch import nn
        >>> @register_model("one_layer_for_this_example", task="task2")
        ... def one_layer(num_classes, image_size):
        ...     return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))
        >>> create_model("one_layer_for_this_example", num_classes=2, image_size=4)[1].out_features
        2
    """
    if name in _MODELS:
        raise ValueError(f"name: the model {name!r} is already registered")
    tasks = tuple(_task_name(each) for each in (task if isinstance(task, tuple) else (task,)))

    def decorator(builder: _Builder) -> _Builder:
        _MODELS[name] = _Entry(builder, tasks)
        return builder

    return decorator


def list_models(task: str | int | None = None) -> list[str]:
    """Names that :func:`create_model` knows, in the order of their registration.

    Args:
        task: Only the networks of this study (``"task1"``, ``"task2"``, or 1, 2); all of them if None.

    Returns:
        The names.

    Raises:
        ValueError: If the task is unknown.
    """
    if task is None:
        return list(_MODELS)
    wanted = _task_name(task)
    return [name for name, entry in _MODELS.items() if wanted in entry.tasks]


def create_model(
    name: str,
    num_classes: int | None = None,
    image_size: int | None = None,
    *,
    pretrained: bool | str | Path = False,
    **options: object,
) -> nn.Module:
    """Build a registered network.

    Args:
        name: One of :func:`list_models`.
        num_classes: Number of classes, at least 1; 50 if None.
        image_size: Height and width of the images, in pixels; 64 if None. Only the parameters of ``task2_published``
            depend on it.
        pretrained: True for the trained weights that come with the package, or a file that
            ``experiments/export_weights.py`` wrote. What is not given is then as the weights want it.
        **options: Passed to the network's builder.

    Returns:
        The network, in training mode, with fresh weights or trained ones.

    Raises:
        ValueError: If the name is unknown (the text names the near matches), a number is out of range, there are no
            trained weights, or they do not fit.
        TypeError: If the network has no such option.

    Example:
        >>> network = create_model("resnet18", num_classes=10)
        >>> network.fc.out_features
        10
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(
            f"name: got {name!r}, which is no known model; {hint}Known models: {', '.join(sorted(_MODELS))}"
        )
    weights = None
    if pretrained is not False:
        weights, card = _pretrained(name, pretrained)
        num_classes = len(card["classes"]) if num_classes is None else num_classes
        image_size = card["image_size"] if image_size is None else image_size
        options = card["options"] | options
    num_classes = 50 if num_classes is None else num_classes
    image_size = 64 if image_size is None else image_size
    for argument, value in (("num_classes", num_classes), ("image_size", image_size)):
        if not is_positive_integer(value):
            raise ValueError(f"{argument}: got {value!r}, expected a positive integer")
    builder = _MODELS[name].builder
    accepted = [key for key in inspect.signature(builder).parameters if key not in ("num_classes", "image_size")]
    for key in options:
        if key not in accepted:
            raise TypeError(
                f"{key}: no option of the model {name!r}, whose options are {', '.join(accepted) or 'none'}"
            )
    model = builder(num_classes=num_classes, image_size=image_size, **options)
    if weights is not None:
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"pretrained: the weights of {name!r} do not fit: {error}") from None
    return model


def is_positive_integer(value: object) -> bool:
    """Whether a number of something can be that; True and False count as no numbers."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _pretrained(name: str, source: bool | str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Trained weights and their card."""
    path = FOLDER / f"{name}.safetensors" if source is True else Path(source)
    if source is True and not path.is_file():
        have = sorted(each.stem for each in FOLDER.glob("*.safetensors"))
        raise ValueError(
            f"pretrained: no trained weights of {name!r} come with this version; it has those of "
            f"{', '.join(map(repr, have)) or 'no network'}"
        )
    weights, card = read_weights(path)
    if card.get("model") != name:
        raise ValueError(f"pretrained: {path} has weights of {card.get('model')!r}, expected {name!r}")
    return weights, card
