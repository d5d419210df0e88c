# SPDX-License-Identifier: BSD-3-Clause
"""ResNet-18 and ResNet-34, torchvision's own, with a stem that can be replaced and may take named channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from .channels import RGB, ChannelNorm, StaticChannelConv
from .registry import is_positive_integer, register_model
from .variable_input_conv import VariableInputConv


def small_stem(width: int = 64) -> nn.Conv2d:
    """The source report's stem of Task I: 3x3, stride 1, padding 1. Batch norm, ReLU and max-pooling 3/2/1 follow."""
    return _drawn(nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False))


def _drawn(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution, its kernels as torchvision draws those of its own stem."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def check_sizes(layers: Sequence[int], width: int) -> None:
    """What :class:`BasicResNet` takes; stems are made before it is.

    Raises:
        ValueError: If layers are not four positive integers, or width is no positive integer.
    """
    if len(layers) != 4 or not all(is_positive_integer(each) for each in layers):
        raise ValueError(f"layers: got {layers!r}, expected four positive integers")
    if not is_positive_integer(width):
        raise ValueError(f"width: got {width!r}, expected a positive integer")


class BasicResNet(ResNet):
    """torchvision's ResNet of basic blocks, of any depth and width.

    Args:
        layers: Blocks of two convolutions in each of four stages: (2, 2, 2, 2) is ResNet-18, (3, 4, 6, 3) ResNet-34.
        num_classes: Number of classes.
        width: Channels of the stem and of the first stage; each later stage has twice those of the one before.
        stem: ``"small"`` (3x3, stride 1), ``"torchvision"`` (7x7, stride 2) or a module from images to ``width``
            channels.

    Raises:
        ValueError: If the stem is unknown, layers are not four positive integers, or width is no positive integer.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385.
    """

    def __init__(
        self, layers: Sequence[int], num_classes: int, width: int = 64, stem: str | nn.Module = "torchvision"
    ) -> None:
        check_sizes(layers, width)
        if not isinstance(stem, nn.Module) and stem not in ("small", "torchvision"):
            raise ValueError(
                f"stem: got {stem!r}, expected 'small', 'torchvision' or a module from images to {width} channels"
            )
        self._width = width
        # Drawn before the rest: what a seed gives must not change.
        conv1 = small_stem(width) if stem == "small" else stem
        super().__init__(BasicBlock, list(layers), num_classes=num_classes)
        if width != 64:
            self.bn1 = nn.BatchNorm2d(width)
            self.fc = nn.Linear(8 * width, num_classes)
            if stem == "torchvision":
                conv1 = _drawn(nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False))
        if isinstance(conv1, nn.Module):
            self.conv1 = conv1

    def _make_layer(
        self, block: type[BasicBlock], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        # torchvision asks for stages of 64, 128, 256 and 512.
        if planes == 64:
            self.inplanes = self._width
        return super()._make_layer(block, planes // 64 * self._width, blocks, stride, dilate)


@register_model("resnet18", task="task1")
def resnet18(
    num_classes: int = 50,
    image_size: int = 64,
    stem: str | nn.Module = "small",
    layers: Sequence[int] = (2, 2, 2, 2),
    width: int = 64,
) -> BasicResNet:
    """Plain ResNet-18, the baseline of Task I.

    Args:
        num_classes: Number of classes.
        image_size: Not used; the network takes images of any size.
        stem: ``"small"`` (3x3, stride 1: 11,194,482 parameters with 50 classes), ``"torchvision"`` (7x7, stride 2:
            11,202,162) or a module from images to ``width`` channels.
        layers, width: As in :class:`BasicResNet`; smaller ones make smaller networks of its family.

    Returns:
        A network from images (N, 3, H, W) to logits (N, num_classes).

    Raises:
        ValueError: As :class:`BasicResNet`.
    """
    return BasicResNet(layers, num_classes, width, stem)


@register_model("resnet34", task="task2")
def resnet34(
    num_classes: int = 50,
    image_size: int = 64,
    stem: str | nn.Module = "torchvision",
    layers: Sequence[int] = (3, 4, 6, 3),
    width: int = 64,
) -> BasicResNet:
    """ResNet-34, the baseline of Task II: 21,310,322 parameters with torchvision's own stem and 50 classes.

    Args:
        num_classes: Number of classes.
        image_size: Not used; the network takes images of any size.
        stem: As in :func:`resnet18`.
        layers, width: As in :class:`BasicResNet`; smaller ones make smaller networks of its family.

    Returns:
        A network from images (N, 3, H, W) to logits (N, num_classes).

    Raises:
        ValueError: As :class:`BasicResNet`.
    """
    return BasicResNet(layers, num_classes, width, stem)


class VariableChannelResNet(BasicResNet):
    """ResNet-18 whose stem takes images of any set of named channels.

    Args:
        num_classes: Number of classes.
        stem: A module ``(x, channels) -> (N, width, H, W)`` with an attribute ``channels``, the names it knows; one
            that is called with sets a sample also takes ``present``.
        norm: A module ``(x, channels) -> x`` in front of it.
        layers, width: As in :class:`BasicResNet`.

    Raises:
        ValueError: As :class:`BasicResNet`.
    """

    def __init__(
        self,
        num_classes: int,
        stem: nn.Module,
        norm: ChannelNorm | None = None,
        layers: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
    ) -> None:
        super().__init__(layers, num_classes, width, stem)
        self.norm = norm
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
    num_classes: int = 50,
    image_size: int = 64,
    channels: Sequence[str] = RGB,
    rescale: bool = True,
    layers: Sequence[int] = (2, 2, 2, 2),
    width: int = 64,
) -> VariableChannelResNet:
    """ResNet-18 with a plain convolution as its stem, over any set of its channels: the baseline for variable channels.

    Channels are normalised, missing ones are zeros, the others are scaled by C / m. Trained on one set of channels, it
    is that set's specialist; trained on sets drawn by :func:`sample_channel_sets`, it takes them all.

    Args:
        num_classes: Number of classes.
        image_size: Not used; the network takes images of any size.
        channels: Names of the channels.
        rescale: Whether to scale by C / m.
        layers, width: As in :class:`BasicResNet`.

    Returns:
        A network from images (N, m, H, W) and their channels' names to logits (N, num_classes).

    Raises:
        ValueError: If a name comes twice, and as :class:`BasicResNet`.

    Source: the stem of Bao et al., Channel Vision Transformers, ICLR 2024, table 2, in a ResNet.
    """
    check_sizes(layers, width)
    stem = _drawn(StaticChannelConv(width, 3, padding=1, bias=False, channels=channels, rescale=rescale))
    return VariableChannelResNet(num_classes, stem, ChannelNorm(channels), layers, width)


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
    imputation: bool = True,
    layers: Sequence[int] = (2, 2, 2, 2),
    width: int = 64,
) -> VariableChannelResNet:
    """ResNet-18 with a :class:`VariableInputConv` stem (3x3, stride 1, padding 1, no bias: batch norm follows).

    Train it on sets of channels drawn a sample, see :func:`sample_channel_sets`.

    Args:
        num_classes: Number of classes.
        image_size: Not used; the network takes images of any size.
        num_kernels: Kernels of the stem.
        temperature: Of the stem's softmax, at first.
        channels: Names of the channels.
        attention, residual, gain, imputation: Parts of the stem that can be left out.
        layers, width: As in :class:`BasicResNet`.

    Returns:
        A network from images (N, m, H, W) and their channels' names to logits (N, num_classes).

    Raises:
        ValueError: If a number is out of range, or a name comes twice; as :class:`BasicResNet`.
    """
    check_sizes(layers, width)
    stem = VariableInputConv(
        width,
        3,
        padding=1,
        bias=False,
        num_kernels=num_kernels,
        temperature=temperature,
        channels=channels,
        attention=attention,
        residual=residual,
        gain=gain,
        imputation=imputation,
    )
    return VariableChannelResNet(num_classes, stem, ChannelNorm(channels), layers, width)
