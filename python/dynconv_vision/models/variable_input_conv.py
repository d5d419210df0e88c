# SPDX-License-Identifier: BSD-3-Clause
"""A convolution over any set of input channels, with K learned kernels mixed per sample and a generated residual.

N batch, C channels of the table, m of them in the set s of an input, O output channels, K kernels, G groups; e_c is the
identity of channel c, a learned vector; one more stands for unknown channels.

    W[n, :, c] = sum_k a[n, k] * sum_j T[j, c] * weight[k, :, j] + residual(e_c, s)    a[n] = softmax(logits[n] / T)
    out[n] = gain[m] * (conv2d(input[n], W[n]) + sum_k a[n, k] * bias[k])

- ``weight`` (K, O, C / G, kH, kW) holds K kernels for every known channel: the layout of ``nn.Conv2d.weight`` with K in
  front.
- T (C, m) imputes: a known channel j that is missing is estimated from those that are there, by linear regression from
  the channels' correlations, and its kernels act on the estimate. What follows thus sees the same features whatever
  the set, as far as channels tell of each other: of red alone, those of a grey image. That is done on the kernels, so
  it costs nothing for every pixel. Until correlations are known, they are all 1: a missing channel is the mean of the
  others. An unknown channel counts as one of the known ones, drawn at random; it has no kernels of the table, but takes
  part in imputing.
- Without imputation (an option): inputs times C / m, and an unknown channel takes the mean of the table.
- The residual comes from a small network whose last layer starts at zero. It sees the channel's identity, the mean
  identity of the set and its size, so the kernels of red alone need not be those of red beside green.
- The gain of a set size is learned and starts at 1.
- The attention describes each channel by its mean, its standard deviation and its identity, passes every description
  through the same small network and averages over the channels: neither their number nor their order matters.

All of it is one call of :func:`dynconv_ext.dynamic_conv2d`: its bank holds K kernels for each set of a batch, and the
residual of each set; a sample's mixing weights are its attention at the kernels of its set and a 1 at its residual,
times its gain.

Source: the mixture of kernels and its temperature are Chen et al., Dynamic Convolution: Attention over Convolution
Kernels, CVPR 2020; kernels generated from a channel's identity are Ha et al., HyperNetworks, ICLR 2017; sampling the
number of channels before the channels, and the scale, are Bao et al., Channel Vision Transformers, ICLR 2024; imputing
by the conditional mean is Little and Rubin, Statistical Analysis with Missing Data, chapter 11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dynconv_ext
from dynconv_ext.temperature import AnnealedTemperature

from .channels import RGB, channel_places, check_present, checked_names

#: Numbers in a channel's identity.
IDENTITY_SIZE = 8
#: Variance of the noise that imputation allows for in a channel of variance 1: near-duplicates share, none gets all.
IMPUTATION_NOISE = 0.01


class SharedChannelAttention(nn.Module):
    """Kernel logits from the channels of an input, whatever their number and order.

    Mean, standard deviation and identity of a channel -> Linear -> ReLU, shared by all; mean over channels -> Linear.

    Args:
        num_kernels: K, the number of logits.
        identity_size: E.
        hidden: Width of the shared layer.
    """

    def __init__(self, num_kernels: int, identity_size: int = IDENTITY_SIZE, hidden: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 + identity_size, hidden)
        self.fc2 = nn.Linear(hidden, num_kernels)

    def forward(self, x: Tensor, identity: Tensor, present: Tensor | None = None) -> Tensor:
        """Logits.

        Args:
            x: (N, m, H, W), any m >= 1.
            identity: (m, E).
            present: (N, m), bool; None: all.

        Returns:
            (N, K).
        """
        # A mean over a large plane loses digits in half precision.
        plane = x.flatten(2) if x.dtype in (torch.float32, torch.float64) else x.flatten(2).float()
        variance, mean = torch.var_mean(plane, dim=2, correction=0)
        # The constant keeps the gradient of the root finite on a flat channel.
        statistics = torch.stack((mean, (variance + 1e-6).sqrt()), dim=2).to(self.fc1.weight.dtype)
        hidden = F.relu(self.fc1(torch.cat((statistics, identity.expand(len(x), -1, -1)), dim=2)))
        if present is None:
            return self.fc2(hidden.mean(dim=1))
        weight = present.to(hidden.device, hidden.dtype)
        return self.fc2((hidden * weight[:, :, None]).sum(dim=1) / weight.sum(dim=1, keepdim=True))


class KernelGenerator(nn.Module):
    """Kernels of a channel within a set: identity, mean identity of the set and its size -> Linear -> ReLU -> Linear.

    The last layer starts at zero.

    Args:
        size: Number of weights of one channel's kernels.
        identity_size: E.
        hidden: Width of the layer between.
    """

    def __init__(self, size: int, identity_size: int = IDENTITY_SIZE, hidden: int = 32) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * identity_size + 1, hidden)
        self.fc2 = nn.Linear(hidden, size, bias=False)
        nn.init.zeros_(self.fc2.weight)

    def forward(self, identity: Tensor, sets: Tensor, context: Tensor, reference: int) -> Tensor:
        """Kernels of every channel in every set.

        Args:
            identity: (m, E), of the channels that want kernels.
            sets: (S, M), bool: which channels each set has.
            context: (M, E), identities of the channels that the sets are of.
            reference: The number of channels that counts as size 1.

        Returns:
            (S, m, size).
        """
        member = sets.to(context.device, context.dtype)
        size = member.sum(dim=1, keepdim=True)
        described = torch.cat((member @ context / size, size / reference), dim=1)
        count = len(identity)
        pairs = torch.cat(
            (identity.expand(len(member), -1, -1), described[:, None].expand(-1, count, -1)),
            dim=2,
        )
        hidden = F.relu(self.fc1(pairs))
        # A mean, not a sum, over the hidden units: one step of an optimiser then moves a kernel as far as the table's.
        return self.fc2(hidden / hidden.shape[2])


class VariableInputConv(AnnealedTemperature):
    """Convolution over any set of named channels, with K learned kernels mixed per sample; see the head of this module.

    All parameters exist from construction on, so optimisers and checkpoints see the same ones whatever the inputs are.
    Train it on sets drawn by :func:`sample_channel_sets`, on normalised channels (:class:`ChannelNorm`), and call
    :meth:`anneal` as training goes on.

    Args:
        out_channels: O.
        kernel_size: kH, kW.
        stride: As in ``nn.Conv2d``.
        padding: As in ``nn.Conv2d``; zeros, in pixels.
        dilation: As in ``nn.Conv2d``.
        groups: G. Channel i of the table feeds group ``i // (C / G)``, as in ``nn.Conv2d``, also when others are
            missing; each group imputes from its own channels, or scales by their C / m, a group without channels gives
            its bias alone, and there is no place for channels of unknown identity.
        bias: Whether there is one.
        num_kernels: K.
        temperature: Of the softmax, at first; see :meth:`anneal` and :meth:`set_temperature`.
        channels: Names of the C channels of the table.
        attention: Whether the mixture depends on the input; without, it is 1 / K each.
        residual: Whether there is a generated residual.
        gain: Whether the gain of a set size is learned.
        imputation: Whether missing channels are imputed; without, inputs are scaled by C / m.

    Attributes:
        weight: (K, O, C / G, kH, kW).
        bias: (K, O) or None.
        identity: (C + 1, E), the last one that of unknown channels; None where nothing uses it.
        log_gain: (C,), the logarithm of the gain of sets of 1 to C channels; larger sets take the last. Or None.
        correlation: buffer (C, C), the channels' correlations, see :meth:`set_correlation`; None without imputation.
        temperature: buffer, one number.

    Shape:
        input (N, m, H, W), output (N, O, Ho, Wo) with Ho and Wo as of ``nn.Conv2d``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> conv = VariableInputConv(8, kernel_size=3, padding=1)
        >>> conv(torch.ones(2, 3, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
        >>> conv(torch.ones(2, 3, 5, 5), channels=("B", None, "R")).shape
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
        channels: Sequence[str] = RGB,
        attention: bool = True,
        residual: bool = True,
        gain: bool = True,
        imputation: bool = True,
    ) -> None:
        super().__init__()
        channels = checked_names(channels)
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
        #: Whether there are kernels for channels of unknown identity.
        self.takes_unknown = groups == 1
        self.weight = nn.Parameter(torch.empty(num_kernels, out_channels, len(channels) // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(num_kernels, out_channels)) if bias else None
        # A mixture of one kernel needs no attention.
        attention = attention and num_kernels > 1
        shape = (len(channels) + 1, IDENTITY_SIZE)
        self.identity = nn.Parameter(torch.empty(shape)) if attention or residual else None
        self.attention = SharedChannelAttention(num_kernels) if attention else None
        self.generator = KernelGenerator(out_channels // groups * math.prod(self.kernel_size)) if residual else None
        self.log_gain = nn.Parameter(torch.empty(len(channels))) if gain else None
        self.register_temperature(temperature)
        self.correlation: Tensor | None
        self.register_buffer("correlation", torch.ones(len(channels), len(channels)) if imputation else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every kernel as ``nn.Conv2d`` does and the small networks as ``nn.Linear`` does; no residual, gain 1."""
        bound = 1 / math.sqrt(self.weight[0, 0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.identity is not None:
            nn.init.normal_(self.identity)
        if self.attention is not None:
            self.attention.fc1.reset_parameters()
            self.attention.fc2.reset_parameters()
        if self.generator is not None:
            self.generator.fc1.reset_parameters()
            nn.init.zeros_(self.generator.fc2.weight)
        if self.log_gain is not None:
            nn.init.zeros_(self.log_gain)

    def set_correlation(self, correlation: Tensor) -> None:
        """Take the known channels' correlations, which :func:`~dynconv_vision.data.derived.channel_correlation` finds.

        Args:
            correlation: (C, C), in the order of the table.

        Raises:
            ValueError: If there is no imputation, or it is no matrix of correlations.
        """
        if self.correlation is None:
            raise ValueError("correlation: got one, expected none: this convolution has no imputation")
        given = correlation.detach().double().cpu()
        count = len(self.channels)
        if given.shape != (count, count) or not bool(
            torch.isfinite(given).all()
            and torch.allclose(given, given.t(), atol=1e-4)
            and torch.allclose(given.diagonal(), torch.ones(count).double(), atol=1e-4)
            and torch.linalg.eigvalsh(given)[0] > -1e-3
        ):
            raise ValueError(
                f"correlation: got {tuple(given.shape)} {given.tolist()}, expected a symmetric matrix "
                f"({count}, {count}) with ones on its diagonal and no negative eigenvalue"
            )
        self.correlation.copy_((given + given.t()) / 2)

    def extra_repr(self) -> str:
        """Arguments, for ``repr``."""
        parts = {
            "attention": self.attention,
            "residual": self.generator,
            "gain": self.log_gain,
            "imputation": self.correlation,
        }
        return (
            f"{self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"num_kernels={self.num_kernels}, temperature={float(self.temperature):g}, channels={self.channels}"
            + "".join(f", {name}=False" for name, part in parts.items() if part is None)
        )

    def forward(self, x: Tensor, channels: Sequence[str | None] | None = None, present: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            x: (N, m, H, W).
            channels: Names of the m channels of ``x``, in their order in ``x``, None for one of unknown identity. If
                not given: the first m of the table; a single channel is one of unknown identity, unless the table has
                only one.
            present: (N, m), bool, preferably on the CPU: which of the named channels each sample has. What ``x`` holds
                for the others must be finite and does not matter otherwise. None: all.

        Returns:
            (N, O, Ho, Wo).

        Raises:
            ValueError: If the names do not fit ``x`` or the table, or ``present`` does not fit ``x``.
        """
        places = self._places(x, channels)
        check_present(x, present)
        return self._convolve(x, places, present, self._mixture(x, places, present))

    def mixture(self, x: Tensor, channels: Sequence[str | None] | None = None, present: Tensor | None = None) -> Tensor:
        """The mixing weights that :meth:`forward` takes.

        Args:
            x, channels, present: As in :meth:`forward`.

        Returns:
            (N, K); each row sums to 1.

        Raises:
            ValueError: As :meth:`forward`.
        """
        check_present(x, present)
        return self._mixture(x, self._places(x, channels), present)

    def convolve(
        self,
        x: Tensor,
        mix: Tensor,
        channels: Sequence[str | None] | None = None,
        scale: float | None = None,
        context: Sequence[str | None] | None = None,
    ) -> Tensor:
        """Convolve with given mixing weights in place of the attention's.

        Args:
            x: (N, m, H, W).
            mix: (N, K), any real numbers.
            channels: As in :meth:`forward`.
            scale: Factor of the input in place of the gain, and of C / m without imputation.
            context: The set that imputation and residual see; that of ``x`` if None.

        Returns:
            (N, O, Ho, Wo).

        Raises:
            ValueError: If the names do not fit ``x`` or the table.
        """
        places = self._places(x, channels)
        around = None if context is None else self._places(x.new_empty(0, len(tuple(context)), 1, 1), context)
        return self._convolve(x, places, None, mix, scale, around)

    def _places(self, x: Tensor, channels: Sequence[str | None] | None) -> list[int]:
        places = channel_places(x, channels, self.channels)
        if self.groups > 1 and len(self.channels) in places:
            raise ValueError("channels: got one of unknown identity, for which a convolution with groups has no place")
        return places

    def _mixture(self, x: Tensor, places: list[int], present: Tensor | None) -> Tensor:
        if self.attention is None:
            return self.weight.new_full((len(x), self.num_kernels), 1 / self.num_kernels)
        logits = self.attention(x, self.identity[places], present)
        # Divided here: a number for the operator would mean reading the buffer back from the device.
        return torch.softmax(logits / self.temperature, dim=1)

    def _convolve(
        self,
        x: Tensor,
        places: list[int],
        present: Tensor | None,
        mix: Tensor,
        scale: float | None = None,
        context: list[int] | None = None,
    ) -> Tensor:
        if present is None:
            sets, which = torch.ones(1, len(places), dtype=torch.bool), torch.zeros(len(x), dtype=torch.int64)
        else:
            sets, which = torch.unique(present.cpu(), dim=0, return_inverse=True)
        factor = sets.float() if self.correlation is not None else self._factors(places, sets)
        if scale is not None:
            factor = sets * scale
        if present is not None or (factor != 1).any():
            x = x * factor[which].to(x.device, x.dtype)[:, :, None, None]
        if self.groups > 1 and places != list(range(len(self.channels))):
            # Channels stay in their groups: fill the missing ones with zeros, which add nothing.
            full = x.new_zeros(len(x), len(self.channels), *x.shape[2:])
            x = full.index_copy(1, torch.tensor(places, device=x.device), x)
        # The sets by the channels of `around`, which for a given context are not those of x.
        around, seen = places, sets
        if context is not None:
            around, seen = context, torch.ones(1, len(context), dtype=torch.bool)
        bank, bias = self._table(places, seen, around), self.bias
        chosen = F.one_hot(which, len(sets)).to(mix.device, mix.dtype)
        attention = mix
        if len(bank) > self.num_kernels:
            attention = (chosen[:, :, None] * mix[:, None]).flatten(1)
            bias = None if bias is None else bias.repeat(len(sets), 1)
        if self.generator is not None:
            bank = torch.cat((bank, self._residual(places, seen, around)))
            attention = torch.cat((attention, chosen), dim=1)
            bias = None if bias is None else torch.cat((bias, bias.new_zeros(len(sets), self.out_channels)))
        if self.log_gain is not None and scale is None:
            attention = attention * self._gain(sets)[which.to(mix.device), None]
        return dynconv_ext.dynamic_conv2d(
            x,
            bank,
            attention,
            bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def _slots(self, places: list[int]) -> list[int]:
        """The channels that the convolution itself gets: with groups all of the table, in its order."""
        return list(range(len(self.channels))) if self.groups > 1 else places

    def _factors(self, places: list[int], sets: Tensor) -> Tensor:
        """C / m for every channel that a set has, 0 for the others; of each group by itself. (S, m) -> (S, m)."""
        per_group = len(self.channels) // self.groups
        group = self._groups_of(places if self.groups > 1 else [0] * len(places))
        together = (group[:, None] == group).float()
        return sets * per_group / (sets.float() @ together).clamp(min=1)

    def _gain(self, sets: Tensor) -> Tensor:
        """The gain of each set's size, (S,)."""
        size = sets.sum(dim=1).clamp(max=len(self.channels))
        return self.log_gain[(size - 1).to(self.log_gain.device)].exp()

    def _table(self, places: list[int], sets: Tensor, around: list[int]) -> Tensor:
        """The kernels of the channels that the convolution gets, (K, O, channels / G, kH, kW).

        S times K of them where they differ from set to set.

        Args:
            places: The channels of the input.
            sets: (S, M), bool, which of the channels ``around`` each set has.
            around: M places.
        """
        slots, known, table = self._slots(places), len(self.channels), self.weight
        if self.correlation is not None and not (sets.all() and set(around) >= set(range(known))):
            return self._imputed(slots, sets, around)
        if slots == list(range(known)):
            return table
        if known in slots:
            mean = table.mean(dim=2, keepdim=True)
            table = torch.cat((table, mean if self.correlation is None else torch.zeros_like(mean)), dim=2)
        return table[:, :, slots]

    def _imputed(self, slots: list[int], sets: Tensor, around: list[int]) -> Tensor:
        """K kernels a set, with those of the missing channels passed on to the present ones."""
        known = len(self.channels)
        with torch.autocast(self.weight.device.type, enabled=False):
            # (S, known, M): what each channel that is there gives of each known one that is missing.
            shares = imputation_shares(self.correlation, sets, around, self._groups_of(range(known)))
            column = {place: number for number, place in enumerate(around)}
            slot_of = torch.tensor(slots, device=shares.device)
            passed = shares.new_zeros(len(sets), known, len(slots))
            there = [number for number, place in enumerate(slots) if place in column]
            passed[:, :, there] = shares[:, :, [column[slots[number]] for number in there]]
            passed = passed + (torch.arange(known, device=shares.device)[:, None] == slot_of).to(shares.dtype)
            per_group = known // self.groups
            if self.groups > 1:
                # (S, G, I, I): channels pass on to their own group's alone.
                blocks = passed.view(len(sets), self.groups, per_group, self.groups, per_group)
                passed = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
            else:
                passed = passed[:, None]
            grouped = self.weight.unflatten(1, (self.groups, -1))
            made = torch.einsum("sgji,kgojhw->skgoihw", passed.to(grouped.dtype), grouped)
        return made.flatten(2, 3).flatten(0, 1)

    def _groups_of(self, places: Sequence[int]) -> Tensor:
        return torch.tensor([place * self.groups // len(self.channels) for place in places])

    def _residual(self, places: list[int], sets: Tensor, context: list[int]) -> Tensor:
        """One kernel a set for the channels that the convolution gets, (S, O, channels / G, kH, kW)."""
        identity = self.identity[self._slots(places)]
        made = self.generator(identity, sets, self.identity[context], len(self.channels))
        # (S, G * channels / G, O / G * kH * kW): a channel makes kernels for the outputs of its own group.
        made = made.view(len(sets), self.groups, -1, self.out_channels // self.groups, *self.kernel_size)
        return made.transpose(2, 3).reshape(len(sets), self.out_channels, -1, *self.kernel_size)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        num_kernels: int = 4,
        temperature: float = 30.0,
        channels: Sequence[str] = RGB,
        attention: bool = True,
        residual: bool = True,
        gain: bool = True,
        imputation: bool = True,
    ) -> VariableInputConv:
        """A module that gives what ``conv`` gives on the full set of channels: all K kernels are copies of its kernel.

        The copies part in training as soon as the samples' mixing weights differ.

        Args:
            conv: The convolution; ``padding_mode`` must be ``"zeros"`` and ``padding`` given in pixels.
            num_kernels, temperature, attention, residual, gain, imputation: As of the class.
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
            attention,
            residual,
            gain,
            imputation,
        ).to(conv.weight.device, conv.weight.dtype)
        with torch.no_grad():
            module.weight.copy_(conv.weight.expand_as(module.weight))
            if module.bias is not None and conv.bias is not None:
                module.bias.copy_(conv.bias.expand_as(module.bias))
        return module

    @torch.no_grad()
    def to_conv2d(self, channels: Sequence[str | None] | None = None, mix: Sequence[float] | None = None) -> nn.Conv2d:
        """The plain convolution of one set of channels under one mixture: residual, scale and gain are in its kernel.

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
        places = self._places(self.weight.new_empty(0, len(names), 1, 1), names)
        if self.groups > 1 and places != list(range(len(self.channels))):
            raise ValueError(
                f"channels: got {names!r}, expected {self.channels}: with groups a convolution needs them all"
            )
        weights = self.weight.new_tensor([1 / self.num_kernels] * self.num_kernels if mix is None else list(mix))
        if weights.shape != (self.num_kernels,):
            raise ValueError(f"mix: got {len(weights)} weights, expected num_kernels = {self.num_kernels}")
        conv = nn.Conv2d(
            len(places),
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
        everything = torch.ones(1, len(places), dtype=torch.bool)
        weight = torch.tensordot(weights, self._table(places, everything, places), dims=1)
        if self.generator is not None:
            weight = weight + self._residual(places, everything, places)[0]
        gain = 1 if self.log_gain is None else self._gain(everything)
        scale = 1 if self.groups > 1 or self.correlation is not None else len(self.channels) / len(places)
        conv.weight.copy_(weight * scale * gain)
        if conv.bias is not None and self.bias is not None:
            conv.bias.copy_(weights @ self.bias * gain)
        return conv


def imputation_shares(correlation: Tensor, sets: Tensor, places: Sequence[int], groups: Tensor | None = None) -> Tensor:
    """What each channel that is there gives of each known channel that is missing: coefficients of linear regression.

    Channels have variance 1, and those that are there :data:`IMPUTATION_NOISE` more. An unknown one is one of the known
    ones, drawn at random.

    Args:
        correlation: (C, C), of the known channels.
        sets: (S, M), bool: which channels each set has.
        places: M places in the table, C for unknown channels.
        groups: (C,), a number a known channel: different ones are not imputed from each other; None: no groups.

    Returns:
        (S, C, M), zero in the columns of absent channels and in the rows of present ones. Nothing is checked:
        :meth:`VariableInputConv.set_correlation` has seen the correlations.

    Source: Little and Rubin, Statistical Analysis with Missing Data, chapter 11: the conditional mean.
    """
    count = len(correlation)
    among = correlation if correlation.dtype == torch.float64 else correlation.float()
    if groups is not None:
        among = among * (groups[:, None] == groups).to(among.device)
    # One more row and column, for unknown channels.
    one = among.mean(dim=0, keepdim=True)
    among = torch.cat((torch.cat((among, one)), torch.cat((one, one.mean(dim=1, keepdim=True)), dim=1).t()), dim=1)
    place = torch.tensor(list(places), device=among.device)
    member = sets.to(among.device, among.dtype)
    own = torch.eye(len(place), device=among.device, dtype=among.dtype)
    between = among[place][:, place] * (1 - own) + (1 + IMPUTATION_NOISE) * own
    # Absent channels are left with a 1 on the diagonal and no say.
    system = member[:, :, None] * between * member[:, None, :] + torch.diag_embed(1 - member)
    wanted = member[:, :, None] * among[place][:, :count]
    shares = torch.cholesky_solve(wanted, torch.linalg.cholesky_ex(system).L)
    # (M, C): which known channel each one is; unknown ones are none.
    known = (place[:, None] == torch.arange(count, device=place.device)).to(member.dtype)
    missing = 1 - member @ known
    return (shares * missing[:, None]).transpose(1, 2)


def _pair(argument: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(each, int) and each >= least for each in pair):
        raise ValueError(f"{argument}: got {value!r}, expected an integer >= {least}, or two of them")
    return pair[0], pair[1]
