# SPDX-License-Identifier: BSD-3-Clause
"""The temperature of an attention's softmax, with the schedule that dynamic convolutions are trained by."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dynconv_ext._registration import number


class AnnealedTemperature(nn.Module):
    """Base of modules with a softmax temperature: a buffer, hence in the state_dict, and its schedule.

    It starts high, so that the mixture is near uniform and all kernels learn, and goes down to 1 early in training:
    call :meth:`anneal` before every step or epoch, or :meth:`set_temperature` for a schedule of your own.

    Attributes:
        temperature: buffer, one number.
        initial_temperature: where the schedule starts; not in the state_dict.

    Example:
        >>> class Attention(AnnealedTemperature):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_temperature(31.0)
        >>> attention = Attention()
        >>> attention.anneal(progress=0.25, until=0.5)
        >>> attention.temperature
        tensor(16.)

    Source: Chen et al. 2020, arXiv:1912.03458: near-uniform attention in early epochs.
    """

    temperature: Tensor
    initial_temperature: float

    def register_temperature(
        self, initial: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Makes the buffer; a subclass calls it once, in its constructor.

        Args:
            initial: the temperature to start with, a finite number > 0.
            device, dtype: of the buffer.

        Raises:
            TypeError: initial is no number.
            ValueError: initial is out of range.
        """
        self.initial_temperature = _checked(initial)
        self.register_buffer("temperature", torch.tensor(self.initial_temperature, device=device, dtype=dtype))

    def set_temperature(self, temperature: float) -> None:
        """Sets the softmax temperature, a finite number > 0.

        Raises:
            TypeError: temperature is no number.
            ValueError: temperature is out of range.
        """
        self.temperature.fill_(_checked(temperature))

    def anneal(self, progress: float, until: float = 1 / 3) -> None:
        """Linear schedule: from the initial temperature at progress 0 down to 1 at ``until``, then 1.

        Args:
            progress: part of the training done, in 0..1, for instance epoch / epochs.
            until: part of the training over which the temperature falls.

        Raises:
            ValueError: progress is not in 0..1 or until not in (0, 1].
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress: got {progress}, expected 0 <= progress <= 1")
        if not 0 < until <= 1:
            raise ValueError(f"until: got {until}, expected 0 < until <= 1")
        rest = max(0.0, 1 - progress / until)
        self.set_temperature(1 + (self.initial_temperature - 1) * rest)


def _checked(temperature: float) -> float:
    value = number("temperature", temperature)
    if not 0 < value < math.inf:
        raise ValueError(f"temperature: got {temperature!r}, expected a finite number > 0")
    return value
