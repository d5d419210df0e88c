# SPDX-License-Identifier: BSD-3-Clause
"""Named geometries of dynamic_conv2d's tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from op_cases import ConvCase


@dataclass(frozen=True)
class DynamicCase(ConvCase):
    """A geometry of dynamic_conv2d."""

    batch: int = 3
    out_channels: int = 8
    num_kernels: int = 4
    temperature: float | None = 2.0
    bias: bool = True

    names = ("input", "weight", "attention", "bias")

    @property
    def geometry(self) -> tuple:
        """What follows the tensors in dynamic_conv2d's arguments."""
        return self.stride, self.padding, self.dilation, self.groups, self.temperature

    def call(self, function: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> Tensor:
        return function(*tensors, *self.geometry)

    def tensors(
        self,
        dtype: torch.dtype,
        channels_last: bool = False,
        attention_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> list[Tensor | None]:
        """Random input, weight, attention, bias; each requires its gradient."""
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        group_channels = self.channels // self.groups
        weight = normal(self.num_kernels, self.out_channels, group_channels, *self.kernel)
        tensors = [
            normal(self.batch, self.channels, *self.size).to(dtype),
            (weight / (group_channels * self.kernel[0] * self.kernel[1]) ** 0.5).to(dtype),
            normal(self.batch, self.num_kernels).to(attention_dtype or dtype),
            normal(self.num_kernels, self.out_channels).to(dtype) if self.bias else None,
        ]
        if channels_last:
            tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
        return [None if t is None else t.requires_grad_() for t in tensors]


DYNAMIC_CASES = [
    DynamicCase("small"),
    # No two numbers agree, so that a swapped pair cannot hide.
    DynamicCase("all_different", 19, 6, (13, 9), 14, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, num_kernels=5),
    DynamicCase("no_bias_mixing_weights_as_given", bias=False, temperature=None),
    DynamicCase("one_kernel", num_kernels=1),
    DynamicCase("sixteen_kernels", num_kernels=16, temperature=30.0),
    DynamicCase("depthwise", channels=7, out_channels=7, groups=7),
    DynamicCase(
        "depthwise_several_vectors", 2, 37, (11, 19), 37, (3, 5), (2, 1), (1, 2), (1, 2), groups=37, num_kernels=3
    ),
    DynamicCase("depthwise_same_size", 2, 32, (9, 18), 32, groups=32),
    DynamicCase("depthwise_wide_padding", 2, 5, (4, 3), 5, (2, 3), padding=(3, 2), groups=5, temperature=None),
    DynamicCase("depthwise_multiplier", channels=3, out_channels=12, groups=3),
    DynamicCase("few_output_channels", out_channels=3),
    DynamicCase("pointwise", channels=37, kernel=(1, 1), padding=(0, 0), out_channels=11),
    DynamicCase("kernel_larger_than_a_chunk_by_samples", kernel=(19, 19), padding=(9, 9), channels=2, batch=2),
    DynamicCase("one_vector_of_pixels_many_samples", batch=37, channels=20, size=(4, 4), out_channels=37),
    DynamicCase("one_pixel", channels=40, size=(1, 1), kernel=(1, 1), padding=(0, 0)),
    DynamicCase("several_chunks_of_channels", channels=70, size=(5, 5), out_channels=40),
    DynamicCase("several_tiles_of_pixels", batch=2, channels=5, size=(33, 37), out_channels=9),
    DynamicCase("several_tiles_blocks_and_groups", batch=3, channels=6, size=(31, 37), out_channels=70, groups=2),
    DynamicCase("several_tiles_with_stride", batch=2, channels=33, size=(47, 50), stride=(2, 1), out_channels=9),
    DynamicCase("one_sample_shared_by_threads", batch=1, channels=33, size=(30, 31), out_channels=70),
    DynamicCase("one_sample_one_tile", batch=1, channels=18, size=(6, 6), out_channels=70),
    DynamicCase("wide_kernel", kernel=(1, 7), padding=(0, 3), dilation=(1, 2), size=(9, 21)),
    DynamicCase("padding_larger_than_kernel", padding=(4, 3), size=(3, 2)),
    DynamicCase("large_channels_and_map", batch=2, channels=64, size=(17, 16), out_channels=64, num_kernels=2),
]

# On a GPU, where DYNCONV_DYNAMIC_CONV2D_CUDA decides; and a geometry that can be computed in each.
CUDA_WAYS = ("direct", "mixed_first", "mixed", "wide")
ANY_WAY = DynamicCase("any_way", 1, 8, (5, 4), num_kernels=3)
