# SPDX-License-Identifier: BSD-3-Clause
"""The operators' CUDA backends, host side and kernels, as operators on CPU tensors: torch.ops.dynconv_emulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

import build

CSRC = build.ROOT / "csrc"
OPERATORS = ("deform_conv2d", "dynamic_conv2d")


def build_operators(mode: build.Mode = "address") -> Path:
    """The shared library that registers the operators; schemas and host files are the real ones."""
    sources = [
        path
        for operator in OPERATORS
        for path in (
            CSRC / operator / f"{operator}.cpp",
            CSRC / operator / f"{operator}_cuda.cpp",
            *sorted((CSRC / operator).glob("*.cu")),
        )
    ]
    torch_library = Path(torch.__file__).parent / "lib"
    return build.build(
        "operators",
        sources,
        mode,
        shared=True,
        compile_flags=[
            "-fvisibility=hidden",
            "-DTORCH_STABLE_ONLY",
            "-DTORCH_TARGET_VERSION=0x020B000000000000",
            "-DDYNCONV_LIBRARY=dynconv_emulated",
            *(f"-isystem{path}" for path in include_paths()),
        ],
        link_flags=[f"-L{torch_library}", "-ltorch_cpu", "-lc10"],
    )


def _only_wanted(grads: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """None in place of the gradients that were not wanted, which have no elements."""
    assert all(w or g.numel() == 0 for g, w in zip(grads, wanted, strict=True))
    return [g if w else None for g, w in zip(grads, wanted, strict=True)]


class _DeformConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, offset, weight, bias, stride, padding, dilation, mask, allow_tf32, deterministic):
        ctx.save_for_backward(input, offset, weight, mask)
        ctx.rest = (stride, padding, dilation), allow_tf32, deterministic
        return torch.ops.dynconv_emulated.deform_conv2d(
            input, offset, weight, bias, stride, padding, dilation, mask, allow_tf32
        )

    @staticmethod
    def backward(ctx, grad_out):
        input, offset, weight, mask = ctx.saved_tensors
        geometry, allow_tf32, deterministic = ctx.rest
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 7)]
        grads = torch.ops.dynconv_emulated.deform_conv2d_backward(
            grad_out, input, offset, weight, *geometry, mask, wanted, allow_tf32, deterministic
        )
        grads = _only_wanted(grads, wanted)
        return *grads[:4], None, None, None, grads[4], None, None


def deform_conv2d(allow_tf32: bool = False, deterministic: bool = False) -> Callable[..., Tensor]:
    """The operator with its backward, both emulated."""

    def call(input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None):
        return _DeformConv2d.apply(
            input, offset, weight, bias, stride, padding, dilation, mask, allow_tf32, deterministic
        )

    return call


class _AggregateKernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, attention, bias, temperature):
        ctx.save_for_backward(weight, attention, bias)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        kernels, biases = torch.ops.dynconv_emulated.aggregate_kernels(weight, attention, bias, temperature)
        return kernels, None if bias is None else biases

    @staticmethod
    def backward(ctx, grad_kernels, grad_biases):
        weight, attention, bias = ctx.saved_tensors
        if grad_kernels is None:
            grad_kernels = weight.new_zeros((attention.shape[0], *weight.shape[1:]))
        wanted = list(ctx.needs_input_grad[:3])
        grads = torch.ops.dynconv_emulated.aggregate_kernels_backward(
            grad_kernels, grad_biases, weight, attention, bias, ctx.temperature, wanted
        )
        return *_only_wanted(grads, wanted), None


def aggregate_kernels() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The operator with its backward, both emulated."""

    def call(weight, attention, bias=None, temperature=None):
        return _AggregateKernels.apply(weight, attention, bias, temperature)

    return call


class _DynamicConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, attention, bias, stride, padding, dilation, groups, temperature, allow_tf32):
        ctx.save_for_backward(input, weight, attention, bias)
        ctx.rest = (stride, padding, dilation, groups, temperature), allow_tf32
        return torch.ops.dynconv_emulated.dynamic_conv2d(input, weight, attention, bias, *ctx.rest[0], allow_tf32)

    @staticmethod
    def backward(ctx, grad_out):
        geometry, allow_tf32 = ctx.rest
        wanted = list(ctx.needs_input_grad[:4])
        grads = torch.ops.dynconv_emulated.dynamic_conv2d_backward(
            grad_out, *ctx.saved_tensors, *geometry, wanted, allow_tf32
        )
        return *_only_wanted(grads, wanted), None, None, None, None, None, None


def dynamic_conv2d(allow_tf32: bool = False) -> Callable[..., Tensor]:
    """The operator with its backward, both emulated."""

    def call(
        input, weight, attention, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, temperature=None
    ):
        return _DynamicConv2d.apply(
            input, weight, attention, bias, stride, padding, dilation, groups, temperature, allow_tf32
        )

    return call
