# SPDX-License-Identifier: BSD-3-Clause
"""Trained weights in safetensors files of half the size, with what is needed to rebuild the network.

Kernels and matrices are stored as float16; vectors and buffers, which weigh little and reach further, as they are. The
metadata entry ``dynconv_vision`` is the card of :class:`dynconv_vision.training.ModelCard`, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

#: Where the weights that come with the package are, ``<model>.safetensors``.
FOLDER = Path(__file__).parent / "pretrained"
_KEY = "dynconv_vision"


def write_weights(path: Path, state_dict: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write weights and card.

    Args:
        path: The file.
        state_dict: The network's.
        card: Plain values; ``model``, ``options``, ``classes`` and ``image_size`` among them.

    Raises:
        ValueError: If a weight is too large for float16.
    """
    tensors = {}
    for name, value in state_dict.items():
        halved = value.half() if value.dim() >= 2 and value.is_floating_point() else value
        if not torch.isfinite(halved).all():
            raise ValueError(f"{name}: has values that float16 cannot hold")
        tensors[name] = halved.contiguous().cpu().clone()
    save_file(tensors, path, metadata={_KEY: json.dumps(card)})


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of :func:`write_weights`, in float32.

    Returns:
        The state_dict and the card.

    Raises:
        ValueError: If the file is missing, damaged, or has no card.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            card = (file.metadata() or {}).get(_KEY)
            if card is None:
                raise ValueError(f"{path} was not written by this project: it has no {_KEY!r} entry")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: damaged, or no safetensors file ({error})") from None
    state_dict = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    return state_dict, json.loads(card)
