# SPDX-License-Identifier: BSD-3-Clause
"""A network of four convolutions, plain, deformable or dynamic, for images of any size: ours in Task II.

What it changes in the source report's network: batch norm instead of norms over whole maps, which take one image size
only and are most of its parameters; the parameters so saved go into width; statistics of the last two maps, means and
maxima, go to the classifier; every convolution has a norm and an activation; the deformable ones stand where maps are
small, and each predicts its own offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynconv_ext import DeformableConv2d, DynamicConv2d

from .layout import MapNorm, pixel_maxima, pixel_means
from .registry import register_model
from .task2_published import CBAM, PixelAttention

CONVOLUTIONS = ("plain", "deformable", "dynamic")
ATTENTIONS = ("none", "channel", "pixel", "cbam")
NORMS = ("batch", "group", "map")
POOLINGS = ("mean", "mean_max")

_STAGES = 4
_GROUPS = 8
#: Narrowing of the attentions, and of group norm: widths are multiples of it.
_REDUCTION = 8


class ChannelGate(nn.Module):
    """One gate a channel from the means over pixels: ``x * sigmoid(fc2(relu(fc1(mean))))``.

    Args:
        channels: Channels of the input; the bottleneck has ``channels // reduction`` of them.
        reduction: How much narrower the bottleneck is.

    Source: Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, arXiv:1709.01507.
    """

    def __init__(self, channels: int, reduction: int = _REDUCTION) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Gate the channels of ``x`` (N, C, H, W); the shape stays."""
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(pixel_means(x)))))
        return x * gate[:, :, None, None]


def _attention(name: str, channels: int) -> nn.Module:
    if name == "channel":
        return ChannelGate(channels)
    if name == "pixel":
        return PixelAttention(channels)
    return CBAM(channels, _REDUCTION) if name == "cbam" else nn.Identity()


def _norm(name: str, channels: int, size: int) -> nn.Module:
    if name == "map":
        return MapNorm([channels, size, size])
    return nn.GroupNorm(_GROUPS, channels) if name == "group" else nn.BatchNorm2d(channels)


def _convolution(kind: str, channels: int, out: int, kernel_size: int, stride: int, **options: Any) -> nn.Module:
    """Without a bias, since a norm follows; drawn as torchvision draws ResNet's."""
    options |= {"kernel_size": kernel_size, "stride": stride, "padding": kernel_size // 2, "bias": False}
    if kind == "dynamic":
        layer: nn.Module = DynamicConv2d(channels, out, **options)
        weights = list(layer.weight)
    elif kind == "deformable":
        layer = DeformableConv2d(channels, out, **options)
        weights = [layer.regular_conv.weight]
    else:
        layer = nn.Conv2d(channels, out, **options)
        weights = [layer.weight]
    for weight in weights:
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    return layer


@register_model("four_conv", task="task2")
class FourConvNet(nn.Module):
    """``conv1 pool | conv2 | conv3 pool | conv4``, each with norm, GELU and attention; then a classifier.

    conv1 has stride 2 and both poolings are 3x3 maxima with stride 2, so at 64 pixels the maps are 32, 16, 16 and 8
    pixels wide. The classifier is linear, on batch-normalised means and maxima of the last maps.

    Args:
        num_classes: Number of classes.
        image_size: Height and width of the images, in pixels, where ``norm`` is ``"map"``. Otherwise not used: the
            network takes images of any size.
        widths: Channels of the four convolutions, multiples of 8.
        convolutions: Kind of each: ``"plain"``, ``"deformable"`` (modulated, predicting its own offsets) or
            ``"dynamic"``.
        kernel_sizes: Of the four convolutions, odd numbers.
        num_kernels: Kernels of a dynamic convolution.
        offset_groups: Groups of channels that a deformable convolution samples at places of their own.
        modulation: Whether deformable convolutions have a mask.
        attention: After each convolution but the first: ``"none"``, ``"channel"`` (squeeze and excitation), ``"pixel"``
            (the source report's) or ``"cbam"``.
        norm: ``"batch"``, ``"group"`` of 8 groups, or ``"map"``: over whole maps, as the source report's.
        pooling: ``"mean"``, or ``"mean_max"``: which statistics of a map go to the classifier.
        levels: Of how many maps, counted from the last one, 1 to 4.
        dropout: Share of the statistics that training leaves out.

    Attributes:
        stages: The four stages, each with ``conv``, ``norm``, ``attention`` and ``pool``.

    Raises:
        ValueError: If an argument is out of range.

    Source: the source report's network of Task II, changed as the head of this module says.
    """

    def __init__(
        self,
        num_classes: int = 50,
        image_size: int = 64,
        widths: Sequence[int] = (64, 128, 192, 256),
        convolutions: Sequence[str] = ("plain", "plain", "deformable", "deformable"),
        kernel_sizes: Sequence[int] = (5, 3, 3, 3),
        num_kernels: int = 4,
        offset_groups: int = 1,
        modulation: bool = True,
        attention: str = "channel",
        norm: str = "batch",
        pooling: str = "mean_max",
        levels: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if len(widths) != _STAGES or any(not isinstance(each, int) or each < 8 or each % 8 for each in widths):
            raise ValueError(f"widths: got {widths!r}, expected four positive multiples of 8")
        if len(convolutions) != _STAGES or not set(convolutions) <= set(CONVOLUTIONS):
            raise ValueError(f"convolutions: got {convolutions!r}, expected four out of {', '.join(CONVOLUTIONS)}")
        if len(kernel_sizes) != _STAGES or any(not isinstance(k, int) or k < 1 or k % 2 == 0 for k in kernel_sizes):
            raise ValueError(f"kernel_sizes: got {kernel_sizes!r}, expected four odd numbers")
        for name, value, known in (
            ("attention", attention, ATTENTIONS),
            ("norm", norm, NORMS),
            ("pooling", pooling, POOLINGS),
            ("levels", levels, range(1, _STAGES + 1)),
        ):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(str, known))}")
        self.pooling, self.levels = pooling, levels
        self.stages = nn.ModuleList()
        kinds: dict[str, dict[str, Any]] = {
            "deformable": {"offset_groups": offset_groups, "modulation": modulation},
            "dynamic": {"num_kernels": num_kernels},
        }
        channels, size = 3, image_size
        for place, (width, kind, kernel_size) in enumerate(zip(widths, convolutions, kernel_sizes, strict=True)):
            first, pooled = place == 0, place in (0, 2)
            size = (size + 1) // 2 if first else size
            parts = {
                "conv": _convolution(kind, channels, width, kernel_size, 2 if first else 1, **kinds.get(kind, {})),
                "norm": _norm(norm, width, size),
                "activation": nn.GELU(),
                "attention": nn.Identity() if first else _attention(attention, width),
                "pool": nn.MaxPool2d(3, stride=2, padding=1) if pooled else nn.Identity(),
            }
            self.stages.append(nn.Sequential())
            for name, part in parts.items():
                self.stages[-1].add_module(name, part)
            channels, size = width, (size + 1) // 2 if pooled else size
        features = (2 if pooling == "mean_max" else 1) * sum(widths[_STAGES - levels :])
        self.norm = nn.BatchNorm1d(features)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """What the classifier sees of images (N, 3, H, W): (N, features), means then maxima of each map."""
        found = []
        for place, stage in enumerate(self.stages):
            x = stage(x)
            if place >= _STAGES - self.levels:
                found.append(pixel_means(x))
                if self.pooling == "mean_max":
                    found.append(pixel_maxima(x))
        return torch.cat(found, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: (N, 3, H, W), of any size, or of ``image_size`` where ``norm`` is ``"map"``.

        Returns:
            Logits (N, num_classes).

        Raises:
            ValueError: If ``norm`` is ``"map"`` and the images have another size.
        """
        return self.fc(self.dropout(self.norm(self.features(x))))
