# SPDX-License-Identifier: BSD-3-Clause
"""dynamic_conv2d against one static convolution of the same shape, the grouped-convolution way, and the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynconv_ext import dynamic_conv2d, reference
from timed import DIRECTIONS, DTYPES

# batch, channels, size, output channels, groups; kernel 3, padding 1, 4 kernels, softmax
CASES = {
    "32x3x64x64-64": (32, 3, 64, 64, 1),
    "16x64x31x31-64": (16, 64, 31, 64, 1),
    "16x128x16x16-128": (16, 128, 16, 128, 1),
    "16x256x8x8-256": (16, 256, 8, 256, 1),
    "16x512x4x4-512": (16, 512, 4, 512, 1),
    "16x256x16x16-depthwise": (16, 256, 16, 256, 256),
}
KERNELS, TEMPERATURE = 4, 30.0
IMPLS = [
    "ours",
    "conv2d",
    "grouped",
    "reference",
    "ours_channels_last",
    "conv2d_channels_last",
    "ours_float32",
]


def tensors(case: str, dtype: torch.dtype, channels_last: bool) -> list[Tensor]:
    """input, weight, attention, bias, gradient of the output. The attention is float32, as autocast leaves it."""
    batch, channels, size, out_channels, groups = CASES[case]
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    x, grad = normal(batch, channels, size, size).to(dtype), normal(batch, out_channels, size, size).to(dtype)
    if channels_last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    group_channels = channels // groups
    weight = (normal(KERNELS, out_channels, group_channels, 3, 3) / (9 * group_channels) ** 0.5).to(dtype)
    return [x, weight, normal(batch, KERNELS), normal(KERNELS, out_channels).to(dtype), grad]


def static(values: list[Tensor]) -> list[Tensor]:
    """The tensors of one convolution with the first kernel of the bank."""
    x, weight, _, bias, grad = values
    channels_last = not x.is_contiguous()
    kernel = weight[0].contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return [x, kernel, bias[0], grad]


def ours(x: Tensor, weight: Tensor, attention: Tensor, bias: Tensor) -> Tensor:
    groups = x.shape[1] // weight.shape[2]
    return dynamic_conv2d(x, weight, attention, bias, padding=1, groups=groups, temperature=TEMPERATURE)


def slow(x: Tensor, weight: Tensor, attention: Tensor, bias: Tensor) -> Tensor:
    groups = x.shape[1] // weight.shape[2]
    return reference.dynamic_conv2d(x, weight, attention, bias, padding=1, groups=groups, temperature=TEMPERATURE)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.conv2d(x, weight, bias, padding=1, groups=x.shape[1] // weight.shape[1])


def grouped(x: Tensor, weight: Tensor, attention: Tensor, bias: Tensor) -> Tensor:
    """All samples' kernels by a matrix product, then one convolution, groups by sample: what CondConv layers do."""
    batch, channels, height, width = x.shape
    kernels, out_channels = weight.shape[:2]
    mix = torch.softmax(attention / TEMPERATURE, dim=1).to(x.dtype)
    mixed = (mix @ weight.reshape(kernels, -1)).reshape(batch * out_channels, *weight.shape[2:])
    groups = batch * (channels // weight.shape[2])
    out = nn.functional.conv2d(
        x.reshape(1, batch * channels, height, width), mixed, (mix @ bias).reshape(-1), padding=1, groups=groups
    )
    return out.reshape(batch, out_channels, height, width)


def contenders(case: str, dtype: torch.dtype, direction: str) -> dict[str, Callable[[], Any]]:
    make = DIRECTIONS[direction]
    values, last = tensors(case, dtype, False), tensors(case, dtype, True)
    found = {
        "ours": make(ours, values),
        "conv2d": make(plain, static(values)),
        "grouped": make(grouped, values),
        "ours_channels_last": make(ours, last),
        "conv2d_channels_last": make(plain, static(last)),
    }
    if dtype == torch.float32:
        found["reference"] = make(slow, values)
    else:
        found["ours_float32"] = make(ours, tensors(case, torch.float32, False))
    return found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES)
def test_dynamic_conv2d(race, case, direction, dtype, impl):
    race(
        lambda: contenders(case, DTYPES[dtype], direction),
        impl,
        op="dynamic_conv2d",
        case=case,
        dtype=dtype,
        direction=direction,
    )
