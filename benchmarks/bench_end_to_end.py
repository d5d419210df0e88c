# SPDX-License-Identifier: BSD-3-Clause
"""Training steps of whole networks: the operators where they are used, beside the same network on a peer's operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dynconv_ext import DeformableConv2d, reference
from dynconv_vision.models import create_model

BATCH, SIZE = 32, 64
DTYPES = ["float32", "bfloat16"]


class WithOperator(DeformableConv2d):
    """The layer with another function in the operator's place."""

    operator: Callable[..., Tensor]

    def forward(self, input: Tensor) -> Tensor:
        offset, mask = self.predict(input)
        conv = self.regular_conv
        return type(self).operator(
            input, offset, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, mask=mask
        )


class WithTorchvision(WithOperator):
    # torchvision's operator wants one dtype for all, and has no CPU autocast.
    operator = staticmethod(torchvision.ops.deform_conv2d)


class WithReference(WithOperator):
    operator = staticmethod(reference.deform_conv2d)


def network(name: str, layer: type[nn.Module] | None = None, image_size: int = SIZE) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name, num_classes=50, image_size=image_size)
    if layer is not None:
        for module in model.modules():
            if isinstance(module, DeformableConv2d):
                module.__class__ = layer
    return model.train()


def step(
    model: nn.Module,
    dtype: str,
    device: str = "cpu",
    batch: int = BATCH,
    image_size: int = SIZE,
    channels_last: bool = False,
    capturable: bool = False,
) -> Callable[[], Any]:
    """One training step, as the studies do it: autocast where it is bfloat16, fused Adam.

    capturable: into a CUDA graph.
    """
    torch.manual_seed(1)
    images = torch.rand(batch, 3, image_size, image_size, device=device)
    labels = torch.randint(50, (batch,), device=device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=capturable)

    def run() -> None:
        optimiser.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()

    return run


def task2(dtype: str) -> dict[str, Callable[[], Any]]:
    found = {"ours": step(network("task2_published"), dtype), "resnet34": step(network("resnet34"), dtype)}
    if dtype == "float32":
        found["torchvision"] = step(network("task2_published", WithTorchvision), dtype)
        found["reference"] = step(network("task2_published", WithReference), dtype)
    return found


def task1(dtype: str) -> dict[str, Callable[[], Any]]:
    return {"ours": step(network("variable_resnet18"), dtype), "resnet18": step(network("resnet18"), dtype)}


@pytest.mark.parametrize("impl", ["ours", "torchvision", "reference", "resnet34"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_task2_training_step(race, dtype, impl):
    race(lambda: task2(dtype), impl, op="task2_published", case="32x3x64x64", dtype=dtype, direction="training step")


@pytest.mark.parametrize("impl", ["ours", "resnet18"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_task1_training_step(race, dtype, impl):
    race(lambda: task1(dtype), impl, op="variable_resnet18", case="32x3x64x64", dtype=dtype, direction="training step")
