# SPDX-License-Identifier: BSD-3-Clause
"""A convolution over any subset of its named input channels, with K learned kernels mixed per sample.

N batch, C the channels of the table, m of them present in an input, O output channels, K kernels, G groups.

    W[n] = (C / m) * sum_k a[n, k] * weight[k][:, present channels]        a[n] = softmax(logits[n] / temperature)
    out[n] = conv2d(input[n], W[n], sum_k a[n, k] * bias[k])

- ``weight`` (K, O, C / G, kH, kW) holds, for every named channel, K kernels: the layout of ``nn.Conv2d.weight`` with K
  in front. An input takes the slices of its channels, so their order does not matter.
- The factor C / m keeps the size of the output when channels are missing.
- The attention describes each channel by its mean and standard deviation, passes every description through the same
  small network and averages over the channels: it depends neither on their number nor on their order.

Source: the mixture of kernels and its temperature are Chen et al., Dynamic Convolution: Attention over Convolution
Kernels, CVPR 2020; sampling the number of channels before the channels is Bao et al., Channel Vision Transformers,
ICLR 2024.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynconv_ext
from dynconv_ext.temperature import AnnealedTemperature


def sample_channels(
    channels: Sequence[str] = ("R", "G", "B"), generator: torch.Generator | None = None
) -> tuple[str, ...]:
    """Draw a subset of channels for one training step: m uniform in 1..C, then m of the C channels, uniformly.

    A coin for every channel would draw middling numbers of channels most of the time; this draws one channel as often
    as all of them.

    Args:
        channels: The names to choose from.
        generator: A CPU generator; the global one if None.

    Returns:
        The chosen names, in the order of ``channels``.

    Raises:
        ValueError: If there are no channels.

    Example:
        >>> sample_channels(("R",))
        ('R',)
    """
    if not channels:
        raise ValueError("channels: got none, expected at least one name")
    count = int(torch.randint(1, len(channels) + 1, (), generator=generator))
    chosen = torch.randperm(len(channels), generator=generator)[:count].sort().values
    return tuple(channels[index] for index in chosen.tolist())


class SharedChannelAttention(nn.Module):
    """Kernel logits from the channels of an input, whatever their number and order.

    Mean and standard deviation of a channel -> Linear -> ReLU, shared by all; mean over the channels -> Linear.

    Args:
        num_kernels: K, the number of logits.
        hidden: Width of the shared layer.
    """

    def __init__(self, num_kernels: int, hidden: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, hidden)
        self.fc2 = nn.Linear(hidden, num_kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Logits.

        Args:
            x: (N, m, H, W), any m >= 1.

        Returns:
            (N, K).
        """
        # A mean over a large plane loses digits in half precision.
        plane = x.flatten(2) if x.dtype in (torch.float32, torch.float64) else x.flatten(2).float()
        variance, mean = torch.var_mean(plane, dim=2, correction=0)
        # The epsilon keeps the gradient of the root finite on a constant channel.
        statistics = torch.stack((mean, (variance + 1e-6).sqrt()), dim=2).to(self.fc1.weight.dtype)
        return self.fc2(F.relu(self.fc1(statistics)).mean(dim=1))


class VariableInputConv(AnnealedTemperature):
    """Convolution over any subset of named channels, with K learned kernels mixed per sample.

    All parameters exist from construction on, so optimisers and checkpoints see the same ones whatever the inputs are.

    Args:
        out_channels: O.
        kernel_size: kH, kW.
        stride: As in ``nn.Conv2d``.
        padding: As in ``nn.Conv2d``; zeros, in pixels.
        dilation: As in ``nn.Conv2d``.
        groups: G. Channel i of the table feeds group ``i // (C / G)``, as in ``nn.Conv2d``, also when others are
            missing; the scale is then each group's own, and a group without channels gives its bias alone.
        bias: Whether there is one.
        num_kernels: K.
        temperature: Of the softmax, at first; see :meth:`anneal` and :meth:`set_temperature`.
        channels: Names of the C channels of the table.

    Shape:
        input (N, m, H, W), output (N, O, Ho, Wo) with Ho and Wo as of ``nn.Conv2d``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> conv = VariableInputConv(8, kernel_size=3, padding=1)
        >>> conv(torch.ones(2, 3, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
        >>> conv(torch.ones(2, 2, 5, 5), channels=("B", "R")).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        num_kernels: int = 4,
        temperature: float = 30.0,
        channels: Sequence[str] = ("R", "G", "B"),
    ) -> None:
        super().__init__()
        channels = tuple(channels)
        if not channels or len(set(channels)) != len(channels):
            raise ValueError(f"channels: got {channels!r}, expected at least one name, each once")
        if groups < 1 or len(channels) % groups or out_channels < 1 or out_channels % groups:
            raise ValueError(
                f"groups: got {groups}, expected a divisor of len(channels) = {len(channels)} and "
                f"out_channels = {out_channels}"
            )
        if num_kernels < 1:
            raise ValueError(f"num_kernels: got {num_kernels}, expected at least 1")
        self.out_channels = out_channels
        self.kernel_size = _pair("kernel_size", kernel_size, 1)
        self.stride = _pair("stride", stride, 1)
        self.padding = _pair("padding", padding, 0)
        self.dilation = _pair("dilation", dilation, 1)
        self.groups = groups
        self.num_kernels = num_kernels
        self.channels = channels
        self.weight = nn.Parameter(torch.empty(num_kernels, out_channels, len(channels) // groups, *self.kernel_size))
        if bias:
            self.bias = nn.Parameter(torch.empty(num_kernels, out_channels))
        else:
            self.register_parameter("bias", None)
        self.attention = SharedChannelAttention(num_kernels)
        self.register_temperature(temperature)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every kernel as ``nn.Conv2d`` does, and the attention as ``nn.Linear`` does."""
        bound = 1 / math.sqrt(self.weight[0, 0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self.attention.fc1.reset_parameters()
        self.attention.fc2.reset_parameters()

    def extra_repr(self) -> str:
        """Arguments, for ``repr``."""
        return (
            f"{self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"num_kernels={self.num_kernels}, temperature={float(self.temperature):g}, channels={self.channels}"
        )

    def forward(self, x: Tensor, channels: Sequence[str] | None = None) -> Tensor:
        """Convolve.

        Args:
            x: (N, m, H, W).
            channels: Names of the m channels of ``x``, in their order in ``x``; None means all, in the table's order.

        Returns:
            (N, O, Ho, Wo).

        Raises:
            ValueError: If the names do not fit ``x`` or the table.
        """
        index = self._channel_index(x, channels)
        # Divided here: a number for the operator would mean reading the buffer back from the device.
        return self._convolve(x, index, self.attention(x) / self.temperature, None, temperature=1.0)

    def convolve(
        self, x: Tensor, mix: Tensor, channels: Sequence[str] | None = None, scale: float | None = None
    ) -> Tensor:
        """Convolve with given mixing weights in place of the attention's.

        Args:
            x: (N, m, H, W).
            mix: (N, K), any real numbers.
            channels: As in :meth:`forward`.
            scale: Factor of the kernels (not of the bias) in place of C / m.

        Returns:
            (N, O, Ho, Wo).

        Raises:
            ValueError: If the names do not fit ``x`` or the table.
        """
        return self._convolve(x, self._channel_index(x, channels), mix, scale, temperature=None)

    def _channel_index(self, x: Tensor, channels: Sequence[str] | None) -> list[int]:
        """Place in the table of every channel of ``x``."""
        if x.dim() != 4:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, channels, H, W)")
        if channels is None:
            if x.shape[1] != len(self.channels):
                raise ValueError(
                    f"channels: got None for an x of {x.shape[1]} channels, expected their names out of {self.channels}"
                )
            return list(range(len(self.channels)))
        channels = tuple(channels)
        for name in channels:
            if name not in self.channels:
                near = difflib.get_close_matches(str(name), self.channels, n=1, cutoff=0.3)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"channels: got {name!r}, expected names out of {self.channels}{hint}")
        if not channels or len(set(channels)) != len(channels) or len(channels) != x.shape[1]:
            raise ValueError(
                f"channels: got {channels!r}, expected {x.shape[1]} names, one for each channel of x, each once"
            )
        return [self.channels.index(name) for name in channels]

    def _convolve(
        self, x: Tensor, index: list[int], attention: Tensor, scale: float | None, temperature: float | None
    ) -> Tensor:
        total = len(self.channels)
        weight = self.weight
        if self.groups == 1:
            if index != list(range(total)):
                weight = weight[:, :, index]
            factor = total / len(index) if scale is None else scale
            if factor != 1:
                weight = weight * factor
        elif index != list(range(total)) or scale is not None:
            # Channels stay in their groups: fill the missing ones with zeros, which add nothing.
            per_group = total // self.groups
            present = [sum(place // per_group == group for place in index) for group in range(self.groups)]
            factors = [per_group / present[place // per_group] if scale is None else scale for place in index]
            x = x * x.new_tensor(factors)[:, None, None]
            x = x.new_zeros(x.shape[0], total, *x.shape[2:]).index_copy(1, torch.tensor(index, device=x.device), x)
        return dynconv_ext.dynamic_conv2d(
            x,
            weight,
            attention,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            temperature=temperature,
        )

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        num_kernels: int = 4,
        temperature: float = 30.0,
        channels: Sequence[str] = ("R", "G", "B"),
    ) -> VariableInputConv:
        """A module that gives what ``conv`` gives on the full set of channels: all K kernels are copies of its kernel.

        The copies part in training as soon as the samples' mixing weights differ.

        Args:
            conv: The convolution; ``padding_mode`` must be ``"zeros"`` and ``padding`` given in pixels.
            num_kernels: K.
            temperature: Of the softmax.
            channels: Names of the input channels of ``conv``.

        Returns:
            The module, on the device and of the dtype of ``conv``.

        Raises:
            ValueError: If the names do not fit, or the padding is of another kind.
        """
        if len(tuple(channels)) != conv.in_channels:
            raise ValueError(f"channels: got {tuple(channels)!r}, expected conv.in_channels = {conv.in_channels} names")
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(
                f"conv: got padding_mode={conv.padding_mode!r}, padding={conv.padding!r}, expected zeros, in pixels"
            )
        module = cls(
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            num_kernels,
            temperature,
            channels,
        ).to(conv.weight.device, conv.weight.dtype)
        with torch.no_grad():
            module.weight.copy_(conv.weight.expand_as(module.weight))
            if module.bias is not None and conv.bias is not None:
                module.bias.copy_(conv.bias.expand_as(module.bias))
        return module

    def to_conv2d(self, channels: Sequence[str] | None = None, mix: Sequence[float] | None = None) -> nn.Conv2d:
        """The plain convolution of one set of channels under one mixture.

        Args:
            channels: Names of its input channels, in their order; None means all of the table.
            mix: K mixing weights; 1 / K each if None.

        Returns:
            A convolution that gives what :meth:`convolve` gives with this mixture for all samples.

        Raises:
            ValueError: If the names do not fit the table, the mixture has not K weights, or there are groups and the
                channels are not all there in the table's order.
        """
        names = self.channels if channels is None else tuple(channels)
        index = self._channel_index(self.weight.new_empty(0, len(names), 1, 1), names)
        if self.groups > 1 and index != list(range(len(self.channels))):
            raise ValueError(
                f"channels: got {names!r}, expected {self.channels}: with groups a convolution needs them all"
            )
        weights = self.weight.new_full((self.num_kernels,), 1 / self.num_kernels) if mix is None else None
        if weights is None:
            weights = self.weight.new_tensor(list(mix or ()))
        if weights.shape != (self.num_kernels,):
            raise ValueError(f"mix: got {len(weights)} weights, expected num_kernels = {self.num_kernels}")
        conv = nn.Conv2d(
            len(index),
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            weight = torch.tensordot(weights, self.weight, dims=1)
            if self.groups == 1:
                weight = weight[:, index] * (len(self.channels) / len(index))
            conv.weight.copy_(weight)
            if conv.bias is not None and self.bias is not None:
                conv.bias.copy_(weights @ self.bias)
        return conv


def _pair(argument: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(each, int) and each >= least for each in pair):
        raise ValueError(f"{argument}: got {value!r}, expected an integer >= {least}, or two of them")
    return pair[0], pair[1]
