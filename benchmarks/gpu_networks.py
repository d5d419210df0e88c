# SPDX-License-Identifier: BSD-3-Clause
"""Whole networks that the GPU suite races: ours, the same network on a peer's operator, and a plain one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bench_end_to_end as bench_network
from dynconv_ext import DynamicConv2d, dynamic_conv2d
from gpu_timing import Device, Run

Builder = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Network:
    """A network for images of a size; named contenders, of which those with _channels_last run in that layout."""

    name: str
    operator: str  # of ours that it uses
    batch: int
    size: int
    builders: dict[str, Builder]

    def text(self, direction: str, device: Device) -> str:
        batch, size = self.shape(device)
        return f"{'inference' if direction == 'forward' else 'training step'} {batch}x3x{size}x{size}"

    def shape(self, device: Device) -> tuple[int, int]:
        return (2, 32) if device.smoke else (self.batch, self.size)

    def contenders(
        self, dtype: str, direction: str, device: Device, with_ours: bool, graph: bool = False
    ) -> dict[str, Sequence[Run]]:
        """A run each: a training step, or the inference of a batch."""
        batch, size = self.shape(device)
        found: dict[str, Sequence[Run]] = {}
        for name, builder in self.builders.items():
            if name.startswith("ours") and not with_ours:
                continue
            model, last = builder(size).to(device.name), name.endswith("_channels_last")
            if direction == "forward":
                found[name] = [inference(model, dtype, device.name, batch, size, last)]
            else:
                found[name] = [bench_network.step(model, dtype, device.name, batch, size, last, graph)]
        return found


def inference(model: nn.Module, dtype: str, device: str, batch: int, size: int, channels_last: bool) -> Run:
    model.eval()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    images = torch.rand(batch, 3, size, size, device=device)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)

    def run() -> Tensor:
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=False):
            return model(images)

    return run


def task2(layer: type[nn.Module] | None = None) -> Builder:
    return lambda size: bench_network.network("task2_published", layer, size)


def plain(name: str) -> Builder:
    return lambda size: bench_network.network(name, None, size)


# ----------------------------------------------------------------------------------------------- dynamic convolution


class Grouped(DynamicConv2d):
    """The layer as public implementations have it: all samples' kernels, then one convolution with a group a sample."""

    def forward(self, input: Tensor) -> Tensor:
        mix = torch.softmax(self.attention(input), dim=1)
        batch, channels, height, width = input.shape
        kernels = torch.matmul(mix, self.weight.flatten(1)).reshape(-1, *self.weight.shape[2:])
        out = nn.functional.conv2d(
            input.reshape(1, batch * channels, height, width),
            kernels,
            None if self.bias is None else torch.matmul(mix, self.bias).flatten(),
            self.stride,
            self.padding,
            self.dilation,
            groups=batch * self.groups,
        )
        return out.reshape(batch, self.out_channels, *out.shape[2:])


def dynamic_resnet18(layer: type[DynamicConv2d]) -> Builder:
    """ResNet-18, stem and shortcuts too, of dynamic convolutions with 4 kernels."""

    def build(size: int) -> nn.Module:
        model = bench_network.network("resnet18", None, size)
        for parent in list(model.modules()):
            for name, conv in list(parent.named_children()):
                if isinstance(conv, nn.Conv2d):
                    dynamic = layer(
                        conv.in_channels,
                        conv.out_channels,
                        conv.kernel_size,
                        conv.stride,
                        conv.padding,
                        conv.dilation,
                        conv.groups,
                        bias=conv.bias is not None,
                    )
                    setattr(parent, name, dynamic)
        return model.train()

    return build


def routed(conv: Any, input: Tensor, routing_weights: Tensor) -> Tensor:
    """What timm's CondConv2d.forward computes, by our operator."""
    bank = conv.weight.view(conv.num_experts, *conv.weight_shape)
    return dynamic_conv2d(
        input, bank, routing_weights, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def efficientnet(name: str, ours: bool = False) -> Builder:
    """A network of timm; ours: with the convolutions of CondConv2d done by our operator."""

    def build(size: int) -> nn.Module:
        import timm
        from timm.layers import CondConv2d

        class Routed(CondConv2d):
            forward = routed

        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=50)
        for module in model.modules():
            if ours and isinstance(module, CondConv2d):
                if module.dynamic_padding:
                    raise ValueError(f"{name}: padding depends on the input's size")
                module.__class__ = Routed
        return model.train()

    return build


TASK2 = Network(
    "task2_published",
    "deform_conv2d",
    64,
    124,
    {
        "ours": task2(),
        "ours_channels_last": task2(),
        "torchvision": task2(bench_network.WithTorchvision),
        "resnet34": plain("resnet34"),
        "resnet34_channels_last": plain("resnet34"),
    },
)
DYNAMIC = Network(
    "dynamic_resnet18",
    "dynamic_conv2d",
    64,
    124,
    {
        "ours": dynamic_resnet18(DynamicConv2d),
        "ours_channels_last": dynamic_resnet18(DynamicConv2d),
        "static": plain("resnet18"),
        "static_channels_last": plain("resnet18"),
        "grouped": dynamic_resnet18(Grouped),
    },
)
CONDCONV = Network(
    "efficientnet_cc_b0_4e",
    "dynamic_conv2d",
    64,
    224,
    {
        "ours": efficientnet("efficientnet_cc_b0_4e", ours=True),
        "ours_channels_last": efficientnet("efficientnet_cc_b0_4e", ours=True),
        "condconv": efficientnet("efficientnet_cc_b0_4e"),
        "efficientnet_b0": efficientnet("efficientnet_b0"),
        "efficientnet_b0_channels_last": efficientnet("efficientnet_b0"),
    },
)


def has_timm() -> bool:
    return importlib.util.find_spec("timm") is not None
