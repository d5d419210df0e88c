# SPDX-License-Identifier: BSD-3-Clause
"""What the layers share: the settings of a convolution, checked, and shown as nn.Conv2d shows them."""

from __future__ import annotations

from torch import nn

from dynconv_ext._registration import is_whole, pair


def at_least_one(**counts: int) -> None:
    """Raises ValueError unless every argument is a whole number >= 1."""
    for name, value in counts.items():
        if not is_whole(value) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected at least 1, a whole number")


def _pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    height, width = pair(name, value)
    if height < least or width < least:
        raise ValueError(f"{name}: got {(height, width)}, expected values >= {least}")
    return height, width


class ConvLayer(nn.Module):
    """Base of the layers; parameters are the subclasses'.

    Attributes:
        in_channels: C.
        out_channels: O.
        groups: G.
        kernel_size, stride, padding, dilation: pairs (vertical, horizontal).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        padding: int | tuple[int, int],
        dilation: int | tuple[int, int],
        groups: int,
    ) -> None:
        super().__init__()
        at_least_one(groups=groups)
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not is_whole(value) or value < 1 or value % groups != 0:
                raise ValueError(f"{name}: got {value!r}, expected a positive multiple of groups = {groups}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.padding = _pair("padding", padding, 0)
        self.dilation = _pair("dilation", dilation, 1)

    def extra_repr(self) -> str:
        """The settings that differ from nn.Conv2d's defaults."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}" if self.padding != (0, 0) else ""
        text += f", dilation={self.dilation}" if self.dilation != (1, 1) else ""
        return text + (f", groups={self.groups}" if self.groups != 1 else "")
