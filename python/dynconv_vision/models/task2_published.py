# SPDX-License-Identifier: BSD-3-Clause
"""The source report's network of Task II: four convolutions, one of them deformable, against ResNet-34.

Submodules carry the published names, so a published ``state_dict`` loads. The names hide three things worth knowing:
``bn1``, ``bn`` and ``bn2`` are layer norms over whole feature maps (which ties the parameters to one image size and
makes up most of them), ``layer3`` has neither norm nor activation, and ``dropout`` is never used in the forward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynconv_ext import DeformableConv2d

from .layout import MapNorm, pixel_maxima, pixel_means
from .registry import register_model

# Strided and pooled four times: layer1 halves, pool1 and pool2 floor.
_MIN_IMAGE_SIZE = 7


class PixelAttention(nn.Module):
    """One gate per channel and pixel: ``x * sigmoid(conv(relu(conv(x))))`` with 1x1 convolutions.

    Args:
        channels: Channels of the input; the bottleneck has ``channels // reduction`` of them.
        reduction: How much narrower the bottleneck is.
    """

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.attention = nn.Sequential(
            nn.Conv2d(channels, channels // reduction, kernel_size=1),
            nn.ReLU(),
            nn.Conv2d(channels // reduction, channels, kernel_size=1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x`` (N, C, H, W); the shape stays."""
        return x * self.attention(x)


class ChannelAttention(nn.Module):
    """CBAM's channel half: one MLP on the max-pooled and on the average-pooled vector, added, sigmoid, times ``x``.

    Source: Woo et al., CBAM: Convolutional Block Attention Module, ECCV 2018, equation 2.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.linear = nn.Sequential(
            nn.Linear(channels, channels // reduction),
            nn.ReLU(inplace=True),
            nn.Linear(channels // reduction, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Gate the channels of ``x`` (N, C, H, W); the shape stays."""
        gate = self.linear(pixel_maxima(x)) + self.linear(pixel_means(x))
        return torch.sigmoid(gate)[:, :, None, None] * x


class SpatialAttention(nn.Module):
    """CBAM's spatial half: a 7x7 convolution of [max over channels, mean over channels], sigmoid, times ``x``.

    Source: Woo et al., CBAM: Convolutional Block Attention Module, ECCV 2018, equation 3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size=7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Gate the pixels of ``x`` (N, C, H, W); the shape stays."""
        # max, not amax: see pixel_maxima.
        summary = torch.cat((x.max(dim=1, keepdim=True).values, x.mean(dim=1, keepdim=True)), dim=1)
        return torch.sigmoid(self.conv(summary)) * x


class CBAM(nn.Module):
    """Channel, then spatial attention, plus the input: ``sam(cam(x)) + x``.

    The added input is the source report's; the paper's block has none.

    Args:
        channels: Channels of the input.
        reduction: How much narrower the bottleneck of the channel attention is.

    Source: Woo et al., CBAM: Convolutional Block Attention Module, ECCV 2018, arXiv:1807.06521.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.sam = SpatialAttention()
        self.cam = ChannelAttention(channels, reduction)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to ``x`` (N, C, H, W); the shape stays."""
        return self.sam(self.cam(x)) + x


class Task2Published(nn.Module):
    """The published network of Task II.

    ``layer1 bn1 GELU attention1 pool1 | layer2 bn GELU | layer3 | layer4 bn2 GELU attention2 pool2 | mean, fc1``

    With 50 classes it has 1,109,879 parameters at 128x128 and 1,053,431 at 124x124.

    Args:
        num_classes: Number of classes.
        image_size: Height and width of the images, in pixels; the layer norms are over whole feature maps, so the
            network takes this size only.

    Raises:
        ValueError: If the images are too small for the two poolings.
    """

    def __init__(self, num_classes: int = 50, image_size: int = 128) -> None:
        super().__init__()
        if image_size < _MIN_IMAGE_SIZE:
            raise ValueError(f"image_size: got {image_size}, expected at least {_MIN_IMAGE_SIZE}")
        self.image_size = image_size
        half = (image_size + 1) // 2  # 5x5, stride 2, padding 2
        quarter = half // 2  # max-pooling floors: 124 -> 62 -> 31 -> 15

        self.layer1 = nn.Conv2d(3, 64, kernel_size=5, stride=2, padding=2)
        self.attention1 = PixelAttention(64)
        self.bn1 = MapNorm([64, half, half])
        self.pool1 = nn.MaxPool2d(2)

        self.layer2 = nn.Conv2d(64, 64, kernel_size=3, padding=1)
        self.bn = MapNorm([64, quarter, quarter])

        self.layer3 = nn.Conv2d(64, 64, kernel_size=3, padding=1)
        self.layer4 = DeformableConv2d(64, 128, kernel_size=3, padding=1)
        self.attention2 = CBAM(128, reduction=2)
        self.pool2 = nn.MaxPool2d(2)
        self.bn2 = MapNorm([128, quarter, quarter])

        self.dropout = nn.Dropout(0.5)  # published, and never applied
        self.pooling = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: (N, 3, S, S) with S = ``image_size``.

        Returns:
            Logits (N, num_classes).

        Raises:
            ValueError: If the images have another size or channel count.
        """
        if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] != self.image_size or x.shape[3] != self.image_size:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected (N, 3, image_size, image_size) with image_size = "
                f"{self.image_size}; the layer norms of this network fix it: build it with the image_size of the data"
            )
        x = self.pool1(self.attention1(F.gelu(self.bn1(self.layer1(x)))))
        x = F.gelu(self.bn(self.layer2(x)))
        x = self.layer3(x)
        x = self.pool2(self.attention2(F.gelu(self.bn2(self.layer4(x)))))
        return self.fc1(self.pooling(x).flatten(1))


@register_model("task2_published", task="task2")
def task2_published(num_classes: int = 50, image_size: int = 128) -> Task2Published:
    """Build :class:`Task2Published`.

    Args:
        num_classes: Number of classes.
        image_size: Height and width of the images, in pixels, at least 7; the network takes this size only.

    Returns:
        A network from images (N, 3, S, S) to logits (N, num_classes).

    Raises:
        ValueError: If the images are too small for the two poolings.
    """
    return Task2Published(num_classes, image_size)
