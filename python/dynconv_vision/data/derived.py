# SPDX-License-Identifier: BSD-3-Clause
"""More channels than three, computed from a photograph's own: for networks over any set of named channels.

======= ================================================================================================================
name    channel
======= ================================================================================================================
R, G, B red, green, blue
L       luminance, 0.299 R + 0.587 G + 0.114 B
X, Y    its gradient to the right and downwards: differences of the neighbours on both sides, borders replicated
r, g, b near-duplicates of R, G and B: a 3x3 binomial mean, borders replicated
======= ================================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Every channel that :func:`derive_channels` knows.
CHANNEL_NAMES = ("R", "G", "B", "L", "X", "Y", "r", "g", "b")

_LUMINANCE = (0.299, 0.587, 0.114)


def derive_channels(images: Tensor, names: Sequence[str]) -> Tensor:
    """Channels of photographs by name.

    Args:
        images: (N, 3, H, W), red first, floating point.
        names: m names out of :data:`CHANNEL_NAMES`, each at most once.

    Returns:
        (N, m, H, W); the images themselves for R, G, B.

    Raises:
        ValueError: If a name is unknown or comes twice, or there is none.

    Example:
        >>> derive_channels(torch.ones(1, 3, 2, 2), ("B", "X")).sum((0, 2, 3))
        tensor([4., 0.])
    """
    names = tuple(names)
    unknown = [name for name in names if name not in CHANNEL_NAMES]
    if not names or unknown or len(set(names)) != len(names):
        raise ValueError(f"channels: got {names!r}, expected different names out of {', '.join(CHANNEL_NAMES)}")
    if names == ("R", "G", "B"):
        return images
    if set(names) <= {"R", "G", "B"}:
        return images[:, ["RGB".index(name) for name in names]]
    made = {name: images[:, place : place + 1] for place, name in enumerate("RGB")}
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    if {"L", "X", "Y"} & set(names):
        weights = images.new_tensor(_LUMINANCE).view(1, 3, 1, 1)
        luminance = (padded * weights).sum(1, keepdim=True)
        made["L"] = luminance[:, :, 1:-1, 1:-1]
        made["X"] = luminance[:, :, 1:-1, 2:] - luminance[:, :, 1:-1, :-2]
        made["Y"] = luminance[:, :, 2:, 1:-1] - luminance[:, :, :-2, 1:-1]
    for place, name in enumerate("rgb"):
        if name in names:
            plane = padded[:, place : place + 1]
            rows = plane[:, :, :-2] + 2 * plane[:, :, 1:-1] + plane[:, :, 2:]
            made[name] = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16
    return torch.cat([made[name] for name in names], dim=1)


def channel_sets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Every set of channels, smaller ones first, each in the order of ``names``.

    Example:
        >>> ["".join(names) for names in channel_sets("RGB")]
        ['R', 'G', 'B', 'RG', 'RB', 'GB', 'RGB']
    """
    return [chosen for count in range(1, len(names) + 1) for chosen in combinations(names, count)]


def channel_statistics(images: Tensor, names: Sequence[str] = CHANNEL_NAMES) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation, over all pixels of all images, of the channels that are asked for.

    Args:
        images: (N, 3, H, W), red first, floating point.
        names: As in :func:`derive_channels`.

    Returns:
        (mean, standard deviation) by name; the deviation is at least 1e-3.

    Raises:
        ValueError: As :func:`derive_channels`.
    """
    std, mean = torch.std_mean(derive_channels(images, names).double(), dim=(0, 2, 3), correction=0)
    return {name: (float(mean[place]), max(float(std[place]), 1e-3)) for place, name in enumerate(names)}


def channel_correlation(images: Tensor, names: Sequence[str] = CHANNEL_NAMES) -> Tensor:
    """Correlations, over all pixels of all images, between the channels that are asked for.

    Args:
        images: (N, 3, H, W), red first, floating point.
        names: C of them, as in :func:`derive_channels`.

    Returns:
        (C, C), float32, ones on the diagonal; a channel that is constant correlates with no other.

    Raises:
        ValueError: As :func:`derive_channels`.

    Example:
        >>> channel_correlation(torch.rand(2, 1, 8, 8).expand(2, 3, 8, 8), ("R", "G")).round(decimals=3)
        tensor([[1., 1.],
                [1., 1.]])
    """
    plane = derive_channels(images, names).double().transpose(0, 1).flatten(1)
    plane = plane - plane.mean(dim=1, keepdim=True)
    plane = plane / plane.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-9)
    return (plane @ plane.t()).fill_diagonal_(1).float()
