# SPDX-License-Identifier: BSD-3-Clause
"""Named geometries of the operator tests, and the one table of tolerances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

# Largest absolute error allowed, relative to the largest absolute value of the expected tensor. The expectation is
# the reference in float64 on the same (rounded) inputs, so what is left is the operator's own rounding: a few units in
# the last place of the compute type for sums of some hundred terms, and one rounding to the storage type.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    # 8 bits of mantissa: samples are rounded to bfloat16 before the matrix product, the result once more.
    torch.bfloat16: 1.5e-2,
    torch.float16: 2e-3,
}
# float32 with products rounded to TF32, which has float16's 10 bits of mantissa.
TOLERANCE_TF32 = 2e-3


@dataclass(frozen=True)
class ConvCase:
    """A geometry of an operator; the name says which path it takes."""

    name: str
    batch: int = 2
    channels: int = 4
    size: tuple[int, int] = (7, 6)
    out_channels: int = 5
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    #: Names of what `tensors` gives, in its order.
    names: ClassVar[tuple[str, ...]]

    @property
    def out_size(self) -> tuple[int, ...]:
        return tuple(
            (self.size[i] + 2 * self.padding[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in (0, 1)
        )

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.batch, self.out_channels, *self.out_size

    def tensors(self, dtype: torch.dtype, channels_last: bool = False) -> list[Tensor | None]:
        """Random arguments; each requires its gradient."""
        raise NotImplementedError

    def call(self, function: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> Tensor:
        """An operator or its reference on this geometry."""
        raise NotImplementedError


@dataclass(frozen=True)
class DeformCase(ConvCase):
    """A geometry of deform_conv2d."""

    offset_groups: int = 1
    mask: bool = True
    bias: bool = True
    spread: float = 2.0  # standard deviation of the offsets, in pixels

    names = ("input", "offset", "weight", "bias", "mask")

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return self.stride, self.padding, self.dilation

    def call(self, function: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> Tensor:
        input, offset, weight, bias, mask = tensors
        return function(input, offset, weight, bias, *self.geometry, mask)

    def tensors(
        self, dtype: torch.dtype, channels_last: bool = False, offset_dtype: torch.dtype | None = None, seed: int = 0
    ) -> list[Tensor | None]:
        """Random input, offset, weight, bias, mask; each requires its gradient."""
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        taps = self.kernel[0] * self.kernel[1]
        offset = normal(self.batch, 2 * self.offset_groups * taps, *self.out_size) * self.spread
        if self.spread:
            # Away from whole pixels, where the gradient jumps and rounding of the coordinate decides its side.
            offset = offset.floor() + (offset - offset.floor()).clamp(0.01, 0.99)
        group_channels = self.channels // self.groups
        tensors = [
            normal(self.batch, self.channels, *self.size),
            offset,
            normal(self.out_channels, group_channels, *self.kernel) / (group_channels * taps) ** 0.5,
            normal(self.out_channels) if self.bias else None,
            normal(self.batch, self.offset_groups * taps, *self.out_size) if self.mask else None,
        ]
        offset_dtype = offset_dtype or dtype
        dtypes = [dtype, offset_dtype, dtype, dtype, offset_dtype]
        tensors = [None if t is None else t.to(d) for t, d in zip(tensors, dtypes, strict=True)]
        if channels_last:
            tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
        return [None if t is None else t.requires_grad_() for t in tensors]


DEFORM_CASES = [
    DeformCase("small"),
    # No two numbers agree, so that a swapped pair cannot hide.
    DeformCase("all_different", 33, 6, (13, 8), 4, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, offset_groups=3),
    DeformCase("no_mask_no_bias", mask=False, bias=False),
    DeformCase("depthwise", channels=19, out_channels=19, groups=19, offset_groups=19),
    DeformCase("depthwise_one_offset_group", channels=34, out_channels=34, groups=34),
    DeformCase("depthwise_multiplier", channels=3, out_channels=6, groups=3),
    DeformCase("pointwise", kernel=(1, 1), padding=(0, 0), channels=17),
    DeformCase("one_channel", channels=1, out_channels=1, batch=1),
    DeformCase("vector_lengths_and_a_tail", channels=37, offset_groups=1),
    DeformCase("offset_groups_cross_groups", channels=12, groups=3, out_channels=6, offset_groups=4),
    DeformCase("one_image_shared_by_threads", batch=1, channels=16, size=(40, 41), out_channels=8),
    DeformCase("odd_batch_shared_by_threads", batch=3, channels=8, size=(31, 17), out_channels=8),
    DeformCase("several_tiles", batch=2, channels=64, size=(40, 40), out_channels=16),
    DeformCase("far_outside", spread=30.0),
    DeformCase("wide_kernel", kernel=(1, 7), padding=(0, 3), dilation=(1, 2), size=(9, 21)),
    DeformCase("output_of_one_pixel", size=(3, 3), padding=(0, 0), batch=5),
]


def case_id(case: ConvCase) -> str:
    return case.name


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().item()
    return (got.double() - expected.double()).abs().max().item() / (scale or 1.0)
