# SPDX-License-Identifier: BSD-3-Clause
"""Networks of four convolutions, deformable and dynamic ones among them, for images of any size: ours in Task II."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynconv_ext import DeformableConv2d, DynamicConv2d

from .registry import register_model
from .task2_published import CBAM, PixelAttention

CONVOLUTIONS = ("plain", "deformable", "dynamic")
ATTENTIONS = ("none", "channel", "pixel", "cbam")
NORMS = ("batch", "group", "none")
POOLINGS = ("mean", "mean_max", "moments")


class ChannelGate(nn.Module):
    """One gate a channel from the means over pixels: ``x * sigmoid(fc2(relu(fc1(mean))))``.

    Args:
        channels: Channels of the input.
        reduction: How much narrower the bottleneck is.

    Source: Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, arXiv:1709.01507.
    """

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Gate the channels of ``x`` (N, C, H, W); the shape stays."""
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


def _attention(name: str, channels: int) -> nn.Module:
    if name == "channel":
        return ChannelGate(channels)
    if name == "pixel":
        return PixelAttention(channels)
    return CBAM(channels, reduction=8) if name == "cbam" else nn.Identity()


def _norm(name: str, channels: int) -> nn.Module:
    if name == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(8, channels) if name == "group" else nn.Identity()


def _convolution(
    kind: str, channels: int, out: int, size: int, stride: int, bias: bool, kernels: int, modulation: bool
) -> nn.Module:
    geometry = {"kernel_size": size, "stride": stride, "padding": size // 2, "bias": bias}
    if kind == "dynamic":
        layer: nn.Module = DynamicConv2d(channels, out, num_kernels=kernels, **geometry)
        for kernel in layer.weight:
            nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")
    elif kind == "deformable":
        layer = DeformableConv2d(channels, out, modulation=modulation, **geometry)
        nn.init.kaiming_normal_(layer.regular_conv.weight, mode="fan_out", nonlinearity="relu")
    else:
        layer = nn.Conv2d(channels, out, **geometry)
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class FourConvStage(nn.Module):
    """Convolution, norm, GELU, attention and max-pooling."""

    def __init__(
        self,
        channels: int,
        out: int,
        size: int,
        stride: int,
        kind: str,
        attention: str,
        norm: str,
        pool: bool,
        kernels: int,
        modulation: bool,
        skip: bool,
    ) -> None:
        super().__init__()
        self.conv = _convolution(kind, channels, out, size, stride, norm == "none", kernels, modulation)
        self.norm = _norm(norm, out)
        self.attention = _attention(attention, out)
        self.pool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        self.skip = skip and channels == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(F.gelu(self.norm(self.conv(x))))
        return self.pool(x + y if self.skip else y)


class FourConvNet(nn.Module):
    """Four convolutions, then a linear classifier on statistics of the maps."""

    def __init__(
        self,
        num_classes: int = 50,
        widths: Sequence[int] = (64, 128, 192, 256),
        kinds: Sequence[str] = ("plain", "plain", "deformable", "deformable"),
        sizes: Sequence[int] = (5, 3, 3, 3),
        pools: Sequence[bool] = (False, True, True, False),
        attention: str = "channel",
        norm: str = "batch",
        pooling: str = "mean_max",
        levels: int = 2,
        num_kernels: int = 4,
        modulation: bool = True,
        dropout: float = 0.1,
        skip: bool = True,
    ) -> None:
        super().__init__()
        self.pooling, self.levels = pooling, levels
        stages, channels = [], 3
        for i, (width, kind, size, pool) in enumerate(zip(widths, kinds, sizes, pools, strict=True)):
            stages.append(
                FourConvStage(
                    channels,
                    width,
                    size,
                    2 if i == 0 else 1,
                    kind,
                    attention if i else "none",
                    norm,
                    pool,
                    num_kernels,
                    modulation,
                    skip,
                )
            )
            channels = width
        self.stages = nn.ModuleList(stages)
        each = {"mean": 1, "mean_max": 2, "moments": 2}[pooling]
        features = each * sum(widths[-levels:])
        self.norm = nn.BatchNorm1d(features)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        parts = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i >= len(self.stages) - self.levels:
                parts.append(x.mean((2, 3)))
                if self.pooling == "mean_max":
                    parts.append(x.amax((2, 3)))
                elif self.pooling == "moments":
                    parts.append(x.var((2, 3)).add(1e-4).sqrt())
        return torch.cat(parts, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.norm(self.features(x))))


@register_model("four_conv", task="task2")
def four_conv(num_classes: int = 50, image_size: int = 64, **options: object) -> FourConvNet:
    return FourConvNet(num_classes, **options)
