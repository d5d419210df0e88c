# SPDX-License-Identifier: BSD-3-Clause
"""What the operators' benchmarks time: a function of tensors forward, or forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def forward(function: Callable[..., Tensor], values: list[Tensor]) -> Callable[[], Any]:
    """Calls function on all values but the last, the gradient of its output, without autograd."""

    def run() -> Tensor:
        with torch.no_grad():
            return function(*values[:-1])

    return run


def forward_backward(function: Callable[..., Tensor], values: list[Tensor]) -> Callable[[], Any]:
    """The same with the gradients of all its arguments; the last value goes into the backward.

    Returns the output and the gradients.
    """
    *inputs, grad = values
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]

    def run() -> list[Tensor]:
        for t in leaves:
            t.grad = None
        out = function(*leaves)
        out.backward(grad)
        return [out.detach(), *(t.grad for t in leaves)]

    return run


DIRECTIONS = {"forward": forward, "forward+backward": forward_backward}
