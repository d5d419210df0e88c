# SPDX-License-Identifier: BSD-3-Clause
"""ResNet-18 and ResNet-34, torchvision's own, with a stem that can be replaced and may take named channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from .channels import RGB, ChannelNorm, StaticChannelConv
from .registry import register_model
from .variable_input_conv import VariableInputConv


def small_stem() -> nn.Conv2d:
    """The source report's stem of Task I: 3x3, stride 1, padding 1. Batch norm, ReLU and max-pooling 3/2/1 follow."""
    conv = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as torchvision draws its own
    return conv


def _stem(stem: str | nn.Module) -> nn.Module | None:
    """The module for ``stem``; None stands for torchvision's own."""
    if isinstance(stem, nn.Module):
        return stem
    if stem == "small":
        return small_stem()
    if stem == "torchvision":
        return None
    raise ValueError(f"stem: got {stem!r}, expected 'small', 'torchvision' or a module from images to 64 channels")


def _resnet(layers: list[int], num_classes: int, stem: str | nn.Module) -> ResNet:
    conv1 = _stem(stem)
    network = ResNet(BasicBlock, layers, num_classes=num_classes)
    if conv1 is not None:
        network.conv1 = conv1
    return network


@register_model("resnet18", task="task1")
def resnet18(num_classes: int = 50, image_size: int = 64, stem: str | nn.Module = "small") -> ResNet:
    """Plain ResNet-18, the baseline of Task I.

    Args:
        num_classes: Number of classes.
        image_size: Not used; the network takes images of any size.
        stem: ``"small"`` (3x3, stride 1: 11,194,482 parameters with 50 classes), ``"torchvision"`` (7x7, stride 2:
            11,202,162) or a module from images to 64 channels.

    Returns:
        A network from images (N, 3, H, W) to logits (N, num_classes).

    Raises:
        ValueError: If the stem is unknown.
    """
    return _resnet([2, 2, 2, 2], num_classes, stem)


@register_model("resnet34", task="task2")
def resnet34(
    num_classes: int = 50,
    image_size: int = 64,
    stem: str | nn.Module = "torchvision",
    layers: Sequence[int] = (3, 4, 6, 3),
) -> ResNet:
    """ResNet-34, the baseline of Task II: 21,310,322 parameters with torchvision's own stem and 50 classes.

    Args:
        num_classes: Number of classes.
        image_size: Not used; the network takes images of any size.
        stem: As in :func:`resnet18`.
        layers: Blocks of two convolutions in each of the four stages; fewer make the smaller networks of its family.

    Returns:
        A network from images (N, 3, H, W) to logits (N, num_classes).

    Raises:
        ValueError: If the stem is unknown, or layers are not four positive integers.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385.
    """
    if len(layers) != 4 or any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in layers):
        raise ValueError(f"layers: got {layers!r}, expected four positive integers")
    return _resnet(list(layers), num_classes, stem)


class VariableChannelResNet18(ResNet):
    """ResNet-18 whose stem takes images of any set of named channels.

    Args:
        num_classes: Number of classes.
        stem: A module ``(x, channels) -> (N, 64, H, W)`` with an attribute ``channels``, the names it knows; one that
            is called with sets a sample also takes ``present``.
        norm: A module ``(x, channels) -> x`` in front of it.
    """

    def __init__(self, num_classes: int, stem: nn.Module, norm: ChannelNorm | None = None) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
        self.norm = norm
        self.conv1 = stem
        #: Names of the channels that the network knows.
        self.channels: tuple[str, ...] = tuple(stem.channels)
        #: Whether it also takes channels of unknown identity, named None.
        self.takes_unknown: bool = getattr(stem, "takes_unknown", False)

    def forward(self, x: Tensor, channels: Sequence[str | None] | None = None, present: Tensor | None = None) -> Tensor:
        """Classify images.

        Args:
            x: (N, m, H, W).
            channels: Names of the m channels of ``x``; if not given, as the stem has it.
            present: (N, m), bool: which of the named channels each sample has; None: all.

        Returns:
            Logits (N, num_classes).

        Raises:
            ValueError: If the names do not fit ``x``, or are not the stem's.
        """
        if self.norm is not None:
            x = self.norm(x, channels)
        x = self.conv1(x, channels) if present is None else self.conv1(x, channels, present)
        x = self.maxpool(self.relu(self.bn1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


@register_model("static_resnet18", task="task1")
def static_resnet18(
    num_classes: int = 50, image_size: int = 64, channels: Sequence[str] = RGB, rescale: bool = True
) -> VariableChannelResNet18:
    """ResNet-18 with a plain convolution as its stem, over any set of its channels: the baseline for variable channels.

    Channels are normalised, missing ones are zeros, the others are scaled by C / m. Trained on one set of channels, it
    is that set's specialist; trained on sets drawn by :func:`sample_channel_sets`, it takes them all.

    Args:
        num_classes: Number of classes.
        image_size: Not used; the network takes images of any size.
        channels: Names of the channels.
        rescale: Whether to scale by C / m.

    Returns:
        A network from images (N, m, H, W) and their channels' names to logits (N, num_classes).

    Raises:
        ValueError: If a name comes twice.

    Source: the stem of Bao et al., Channel Vision Transformers, ICLR 2024, table 2, in a ResNet.
    """
    stem = StaticChannelConv(64, 3, padding=1, bias=False, channels=channels, rescale=rescale)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as torchvision draws its own
    return VariableChannelResNet18(num_classes, stem, ChannelNorm(channels))


@register_model("variable_resnet18", task="task1")
def variable_resnet18(
    num_classes: int = 50,
    image_size: int = 64,
    num_kernels: int = 4,
    temperature: float = 30.0,
    channels: Sequence[str] = RGB,
    attention: bool = True,
    residual: bool = True,
    gain: bool = True,
) -> VariableChannelResNet18:
    """ResNet-18 with a :class:`VariableInputConv` stem (3x3, stride 1, padding 1, no bias: batch norm follows).

    Train it on sets of channels drawn a sample, see :func:`sample_channel_sets`.

    Args:
        num_classes: Number of classes.
        image_size: Not used; the network takes images of any size.
        num_kernels: Kernels of the stem.
        temperature: Of the stem's softmax, at first.
        channels: Names of the channels.
        attention, residual, gain: Parts of the stem that can be left out.

    Returns:
        A network from images (N, m, H, W) and their channels' names to logits (N, num_classes).

    Raises:
        ValueError: If a number is out of range, or a name comes twice.
    """
    stem = VariableInputConv(
        64,
        3,
        padding=1,
        bias=False,
        num_kernels=num_kernels,
        temperature=temperature,
        channels=channels,
        attention=attention,
        residual=residual,
        gain=gain,
    )
    return VariableChannelResNet18(num_classes, stem, ChannelNorm(channels))
