# SPDX-License-Identifier: BSD-3-Clause
"""The source report's network of Task I, with the defect that made it fail, kept as a baseline.

Published behaviour, reproduced:

- The K kernels are drawn anew in every forward pass. They are no parameters and never learn; the layers behind them
  train on a random projection that changes with every batch.
- The attention is created in the first forward pass, after the optimiser was built, so it never learns either; it is
  drawn anew whenever the number of channels changes.
- The temperature stays at 30.
- The network sees how many channels there are, and not which.

Changed, so that optimisers, ``state_dict`` and checkpoints work: the attention's two weight matrices are kept outside
of the module's parameters and buffers. Registering them as the published code did makes the set of parameters depend
on the inputs seen so far; a checkpoint then loads only into a network that has seen as many channels. Hence two
consequences: ``parameters()`` counts 11,192,754 with 50 classes where the report's notebook counts 11,192,775 (the 21
attention weights of three channels, :meth:`PublishedVariableInputConv.num_drawn_weights`), and a loaded network draws
a new attention, as a published network does after each change of channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynconv_ext

from .registry import register_model
from .resnet import VariableChannelResNet, check_sizes


class PublishedVariableInputConv(nn.Module):
    """The published VariableInputConv: kernels drawn at random in every forward pass, mixed by an untrained attention.

    Stride 1 and an output of the input's size only: the published reshaping is wrong otherwise. It has no parameters.

    Args:
        out_channels: O.
        kernel_size: Odd; height and width of the kernels.
        num_kernels: K.
        temperature: Of the softmax.

    Raises:
        ValueError: If ``kernel_size`` is not odd.
    """

    #: Names used for counting only: any one to three channels may come.
    channels = ("R", "G", "B")

    def __init__(
        self, out_channels: int, kernel_size: int = 3, num_kernels: int = 4, temperature: float = 30.0
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: got {kernel_size}, expected a positive odd number")
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.num_kernels = num_kernels
        self.temperature = temperature
        # A tuple of plain tensors, which nn.Module does not register.
        self._attention: tuple[Tensor, Tensor] | None = None

    def extra_repr(self) -> str:
        """Arguments, for ``repr``."""
        return (
            f"{self.out_channels}, kernel_size={self.kernel_size}, num_kernels={self.num_kernels}, "
            f"temperature={self.temperature}"
        )

    def num_drawn_weights(self, in_channels: int = 3) -> int:
        """How many attention weights a forward pass draws for ``in_channels`` channels; the report counted them."""
        return in_channels * in_channels + in_channels * self.num_kernels

    def forward(self, x: Tensor, channels: Sequence[str] | None = None) -> Tensor:
        """Convolve with random kernels.

        Args:
            x: (N, m, H, W) with 1 <= m <= 3.
            channels: Accepted for the sake of one calling convention, checked against ``x``, and of no influence.

        Returns:
            (N, O, H, W).

        Raises:
            ValueError: If ``x`` has another number of channels, or ``channels`` does not fit it.
        """
        if x.dim() != 4 or not 1 <= x.shape[1] <= len(self.channels):
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, 1 to {len(self.channels)} channels, H, W)")
        if channels is not None and len(channels) != x.shape[1]:
            raise ValueError(
                f"channels: got {tuple(channels)!r}, expected {x.shape[1]} names, one for each channel of x"
            )
        in_channels = x.shape[1]
        if self._attention is None or self._attention[0].shape[1] != in_channels:
            self._attention = (
                nn.init.kaiming_normal_(torch.empty(in_channels, in_channels, device=x.device), mode="fan_out"),
                nn.init.kaiming_normal_(torch.empty(self.num_kernels, in_channels, device=x.device), mode="fan_out"),
            )
        reduce, expand = (weight.to(x.device, x.dtype) for weight in self._attention)
        logits = F.linear(F.relu(F.linear(x.mean(dim=(2, 3)), reduce)), expand)
        shape = (self.num_kernels, self.out_channels, in_channels, self.kernel_size, self.kernel_size)
        bound = (6 / (in_channels * self.kernel_size**2)) ** 0.5  # kaiming_uniform of each kernel
        weight = torch.empty(shape, device=x.device, dtype=x.dtype).uniform_(-bound, bound)
        return dynconv_ext.dynamic_conv2d(
            x, weight, logits, padding=self.kernel_size // 2, temperature=self.temperature
        )


@register_model("task1_published", task="task1")
def task1_published(
    num_classes: int = 50, image_size: int = 64, layers: Sequence[int] = (2, 2, 2, 2), width: int = 64
) -> VariableChannelResNet:
    """The published network of Task I: ResNet-18 behind a :class:`PublishedVariableInputConv`, defect included.

    Args:
        num_classes: Number of classes.
        image_size: Not used; the network takes images of any size.
        layers, width: As in :class:`~dynconv_vision.models.BasicResNet`.

    Returns:
        A network from images (N, 1 to 3, H, W) to logits (N, num_classes).

    Raises:
        ValueError: As :class:`~dynconv_vision.models.BasicResNet`.
    """
    check_sizes(layers, width)
    return VariableChannelResNet(num_classes, PublishedVariableInputConv(width), layers=layers, width=width)
