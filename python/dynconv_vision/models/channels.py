# SPDX-License-Identifier: BSD-3-Clause
"""What networks over named channels share: finding names, drawing sets of channels, normalisation, a static stem.

Conventions, the same in every class with ``forward(x, channels, present)``:

- x (N, m, H, W); ``channels`` names its m channels. ``None`` as a name stands for a channel of unknown identity.
- ``channels=None``: the first m that are known; a single channel is one of unknown identity, unless only one is known.
- ``present`` (N, m), bool: which of the named channels each sample has; None: all. What x holds for an absent channel
  must be finite and does not matter otherwise. Sets that differ from sample to sample let batch norm see in training
  the mixture of sets that its running statistics describe; one set a step would leave them behind. Keep ``present`` on
  the CPU: it is read there.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: The channels of a photograph, in their order.
RGB = ("R", "G", "B")


def checked_names(channels: Sequence[str]) -> tuple[str, ...]:
    """The names of a table of channels.

    Raises:
        ValueError: If there is none, or one comes twice or is no text.
    """
    names = tuple(channels)
    if not names or len(set(names)) != len(names) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"channels: got {names!r}, expected at least one name, each once")
    return names


def channel_places(x: Tensor, channels: Sequence[str | None] | None, known: Sequence[str]) -> list[int]:
    """Place of every channel of ``x`` in the table of known channels; ``len(known)`` is that of unknown ones.

    Args:
        x: (N, m, H, W).
        channels: Names of its channels, see the head of this module.
        known: Names of the table.

    Returns:
        m places.

    Raises:
        ValueError: If the names do not fit ``x`` or the table.
    """
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, channels, H, W)")
    count, unknown = x.shape[1], len(known)
    if channels is None:
        if count > len(known):
            raise ValueError(
                f"channels: got None for an x of {count} channels, expected their names, out of {tuple(known)} or None "
                "for a channel of unknown identity"
            )
        return [unknown] if count == 1 < len(known) else list(range(count))
    channels = tuple(channels)
    for name in channels:
        if name is not None and name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"channels: got {name!r}, expected names out of {tuple(known)}, or None{hint}")
    named = [name for name in channels if name is not None]
    if len(set(named)) != len(named) or len(channels) != count:
        raise ValueError(f"channels: got {channels!r}, expected {count} names, one for each channel of x, each once")
    return [unknown if name is None else known.index(name) for name in channels]


def check_present(x: Tensor, present: Tensor | None) -> None:
    """Check which channels each sample has.

    Raises:
        ValueError: If ``present`` is no bool tensor of shape (N, m).
    """
    if present is not None and (present.dtype != torch.bool or present.shape != x.shape[:2]):
        raise ValueError(
            f"present: got {present.dtype} of shape {tuple(present.shape)}, expected torch.bool of shape "
            f"(N, channels) = {tuple(x.shape[:2])}"
        )


def sample_channels(channels: Sequence[str] = RGB, generator: torch.Generator | None = None) -> tuple[str, ...]:
    """Draw a set of channels: m uniform in 1..C, then m of the C channels, uniformly.

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

    Source: Bao et al., Channel Vision Transformers, ICLR 2024: hierarchical channel sampling.
    """
    if not channels:
        raise ValueError("channels: got none, expected at least one name")
    (chosen,) = sample_channel_sets(1, len(channels), generator).tolist()
    return tuple(name for name, drawn in zip(channels, chosen, strict=True) if drawn)


def sample_channel_sets(
    count: int, channels: int, generator: torch.Generator | None = None, full_share: float = 0.0
) -> Tensor:
    """Draw a set of channels for every sample, each as :func:`sample_channels` does.

    Args:
        count: N, the number of samples.
        channels: C, at least 1.
        generator: A CPU generator; the global one if None.
        full_share: Share of the samples, in 0..1, that keep all channels without a draw.

    Returns:
        ``present`` (N, C), bool, on the CPU; at least one in each row.

    Example:
        >>> sample_channel_sets(2, 1)
        tensor([[True],
                [True]])
    """
    size = torch.randint(1, channels + 1, (count, 1), generator=generator)
    rank = torch.rand(count, channels, generator=generator).argsort(dim=1).argsort(dim=1)
    if full_share:
        size[torch.rand(count, generator=generator) < full_share] = channels
    return rank < size


class ChannelNorm(nn.Module):
    """Every known channel less the mean and over the standard deviation that it has on the training images.

    A channel of unknown identity takes the mean and standard deviation of the image that it is in.

    The statistics are buffers, so a checkpoint carries them. They start as those of photographs in [0, 1]; set those of
    the training images with :meth:`set_statistics`.

    Args:
        channels: Names of the C known channels.

    Shape:
        x (N, m, H, W), output the same.

    Example:
        >>> norm = ChannelNorm(("R", "G"))
        >>> norm.set_statistics({"R": (0.5, 0.25), "G": (0.0, 1.0)})
        >>> norm(torch.ones(1, 2, 1, 1), channels=("G", "R")).flatten()
        tensor([1., 2.])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: Sequence[str] = RGB) -> None:
        super().__init__()
        self.channels = checked_names(channels)
        self.register_buffer("mean", torch.full((len(self.channels),), 0.45))
        self.register_buffer("std", torch.full((len(self.channels),), 0.25))

    def extra_repr(self) -> str:
        """Arguments, for ``repr``."""
        return f"channels={self.channels}"

    def set_statistics(self, statistics: dict[str, tuple[float, float]]) -> None:
        """Take the mean and standard deviation of every known channel.

        Args:
            statistics: (mean, standard deviation) by name; further names do not matter.

        Raises:
            ValueError: If a channel is missing, or a standard deviation is not positive.
        """
        for place, name in enumerate(self.channels):
            if name not in statistics or not statistics[name][1] > 0:
                raise ValueError(
                    f"statistics: got {statistics.get(name)!r} for channel {name!r}, expected (mean, std) with std > 0"
                )
            self.mean[place], self.std[place] = statistics[name]

    def forward(self, x: Tensor, channels: Sequence[str | None] | None = None) -> Tensor:
        """Normalise.

        Raises:
            ValueError: If the names do not fit ``x`` or the known channels.
        """
        places = channel_places(x, channels, self.channels)
        unknown = [index for index, place in enumerate(places) if place == len(self.channels)]
        # Places beyond the table are overwritten below.
        table = [min(place, len(self.channels) - 1) for place in places]
        mean, std = self.mean, self.std
        if table != list(range(len(self.channels))):
            mean, std = mean[table], std[table]
        factor = std.reciprocal()
        shift = -mean * factor
        if not unknown:
            return torch.addcmul(shift[:, None, None], x, factor[:, None, None])
        factor, shift = (each.expand(x.shape[:2]).clone() for each in (factor, shift))
        variance, own_mean = torch.var_mean(x[:, unknown].float(), dim=(2, 3), correction=0)
        # The constant keeps a flat channel finite.
        factor[:, unknown] = (variance + 1e-4).rsqrt().to(factor.dtype)
        shift[:, unknown] = -own_mean.to(shift.dtype) * factor[:, unknown]
        return torch.addcmul(shift[:, :, None, None], x, factor[:, :, None, None])


class StaticChannelConv(nn.Conv2d):
    """A plain convolution over any set of named channels: missing ones are zeros, the rest is scaled by C / m.

    Args:
        out_channels, kernel_size, stride, padding, bias: As in ``nn.Conv2d``.
        channels: Names of the C input channels.
        rescale: Whether to scale by C / m.

    Shape:
        x (N, m, H, W), output (N, O, Ho, Wo).

    Example:
        >>> conv = StaticChannelConv(8, 3, padding=1)
        >>> conv(torch.ones(2, 2, 5, 5), channels=("B", "R")).shape
        torch.Size([2, 8, 5, 5])
    """

    #: There is no kernel for channels of unknown identity.
    takes_unknown = False

    def __init__(
        self,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
        channels: Sequence[str] = RGB,
        rescale: bool = True,
    ) -> None:
        self.channels = checked_names(channels)
        self.rescale = rescale
        super().__init__(len(self.channels), out_channels, kernel_size, stride, padding, bias=bias)

    def forward(self, x: Tensor, channels: Sequence[str | None] | None = None, present: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            x: (N, m, H, W).
            channels, present: See the head of this module; there is no kernel for channels of unknown identity, so a
                single channel wants its name, unless only one is known.

        Raises:
            ValueError: If the names do not fit ``x`` or the known channels, or one is None.
        """
        known = len(self.channels)
        places = channel_places(x, channels, self.channels)
        if known in places:
            raise ValueError(f"channels: got {channels!r}, expected names out of {self.channels}")
        check_present(x, present)
        weight = self.weight if places == list(range(known)) else self.weight[:, places]
        if present is not None:
            kept = present.to(x.device, x.dtype)
            x = x * (kept * (known / kept.sum(1, keepdim=True)) if self.rescale else kept)[:, :, None, None]
        elif self.rescale and len(places) < known:
            weight = weight * (known / len(places))
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)
