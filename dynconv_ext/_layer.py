# SPDX-License-Identifier: BSD-3-Clause
"""What the layers share: the settings of a convolution, checked, and shown as nn.Conv2d shows them."""

from __future__ import annotations

from torch import nn

from dynconv_ext._registration import pair


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
        if groups < 1:
            raise ValueError(f"groups: got {groups}, expected at least 1")
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if value < 1 or value % groups != 0:
                raise ValueError(f"{name}: got {value}, expected a positive multiple of groups = {groups}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = tuple(pair("kernel_size", kernel_size))
        self.stride = tuple(pair("stride", stride))
        self.padding = tuple(pair("padding", padding))
        self.dilation = tuple(pair("dilation", dilation))

    def extra_repr(self) -> str:
        """The settings that differ from nn.Conv2d's defaults."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        text += f", padding={self.padding}" if self.padding != (0, 0) else ""
        text += f", dilation={self.dilation}" if self.dilation != (1, 1) else ""
        return text + (f", groups={self.groups}" if self.groups != 1 else "")
