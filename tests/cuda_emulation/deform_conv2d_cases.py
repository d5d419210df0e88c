# SPDX-License-Identifier: BSD-3-Clause
"""deform_conv2d's CUDA kernels against the reference, on the host emulation.

Not collected by itself: test_deform_conv2d_cuda.py runs it under the sanitizers, in processes of its own; under
ThreadSanitizer, where a block's threads are slow, only what is named after races.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

import op_checks
import operators
from dynconv_ext import deform_conv2d, reference
from op_cases import DEFORM_CASES, TOLERANCE, TOLERANCE_TF32, DeformCase, case_id

torch.ops.load_library(os.environ["DYNCONV_EMULATED_OPERATORS"])
# The emulation's threads are one thread of the host.
torch.set_num_threads(1)

_shared = {case.name: case for case in DEFORM_CASES}
# More than 8 outputs a group: by tiles. Up to 8, from up to 16 channels: the direct way.
ALL_DIFFERENT = replace(_shared["all_different"], batch=2)
ALL_DIFFERENT_BY_TILES = replace(ALL_DIFFERENT, name="all_different_by_tiles", out_channels=18)
CASES = [
    *(replace(_shared[name], size=(5, 4)) for name in ("small", "no_mask_no_bias")),
    _shared["far_outside"],
    replace(_shared["offset_groups_cross_groups"], size=(4, 3)),
    replace(_shared["all_different"], batch=3, size=(9, 6)),
    replace(
        _shared["offset_groups_cross_groups"],
        name="cross_groups_by_tiles",
        size=(3, 2),
        kernel=(1, 2),
        padding=(0, 1),
        out_channels=27,
    ),
    replace(ALL_DIFFERENT_BY_TILES, size=(7, 5)),
    DeformCase("depthwise", channels=5, out_channels=5, groups=5, offset_groups=5, size=(3, 3)),
    # Two slabs of 256 channels, or five of 64.
    DeformCase("depthwise_many_channels", 1, 300, (3, 2), 300, groups=300, kernel=(1, 3), padding=(0, 1)),
    DeformCase("direct_multiplier", channels=9, size=(4, 3), out_channels=18, groups=9, offset_groups=3, mask=False),
    DeformCase("direct_groups_of_channels", channels=20, size=(4, 3), out_channels=20, groups=5, bias=False),
    DeformCase("direct_seven_outputs", channels=12, size=(4, 3), out_channels=28, groups=4, offset_groups=2),
    DeformCase("direct_shares_of_pixels", 5, 3, (15, 15), 3, (1, 1), padding=(0, 0), groups=3),
    DeformCase("chunks_read_at_once", channels=32, out_channels=24, size=(5, 4), offset_groups=2),
    DeformCase("groups_of_whole_chunks", channels=32, out_channels=32, size=(3, 4), groups=2, bias=False),
    DeformCase("several_chunks_and_a_tail", channels=72, size=(4, 3), kernel=(1, 2), padding=(0, 1)),
    DeformCase("wide_output", channels=8, out_channels=150, size=(5, 4), kernel=(1, 1), padding=(0, 0)),
    DeformCase("tiles_across_images", batch=7, channels=4, size=(13, 12), kernel=(1, 1), padding=(0, 0)),
]
PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Everything for these. The others alternate the layouts, and leave out float16: bfloat16 takes the same paths.
THOROUGH = ("small", "chunks_read_at_once", "direct_seven_outputs")


def combinations():
    for number, case in enumerate(CASES):
        for precision in PRECISIONS:
            for channels_last in (False, True):
                kept = precision != "float16" and (number + list(PRECISIONS).index(precision)) % 2 == channels_last
                if case.name in THOROUGH or kept:
                    layout = "channels_last" if channels_last else "contiguous"
                    yield pytest.param(case, precision, channels_last, id=f"{case.name}-{precision}-{layout}")


def check(case: DeformCase, precision: str, channels_last: bool, deterministic: bool = False, **options) -> None:
    dtype = PRECISIONS[precision]
    tf32 = precision == "tf32"
    op_checks.assert_matches_reference(
        case,
        operators.deform_conv2d(tf32, deterministic),
        reference.deform_conv2d,
        case.tensors(dtype, channels_last, **options),
        TOLERANCE_TF32 if tf32 else TOLERANCE[dtype],
    )


@pytest.mark.parametrize(("case", "precision", "channels_last"), list(combinations()))
def test_matches_reference(case, precision, channels_last):
    check(case, precision, channels_last)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["small", "offset_groups_cross_groups", "cross_groups_by_tiles", "chunks_read_at_once"]
)
def test_deterministic_way_matches_reference(name, precision):
    case = next(case for case in CASES if case.name == name)
    check(case, precision, channels_last=precision == "bfloat16", deterministic=True)


def test_float32_offset_beside_half():
    check(_shared["small"], "bfloat16", channels_last=True, offset_dtype=torch.float32)


@pytest.mark.parametrize("case", [ALL_DIFFERENT, ALL_DIFFERENT_BY_TILES], ids=case_id)
@pytest.mark.parametrize("wanted", range(5), ids=DeformCase.names)
def test_only_the_gradient_asked_for(wanted, case):
    op_checks.assert_computes_only_the_gradient(wanted, case, operators.deform_conv2d(), reference.deform_conv2d)


@pytest.mark.parametrize("case", [ALL_DIFFERENT, ALL_DIFFERENT_BY_TILES], ids=case_id)
def test_any_strides(case):
    op_checks.assert_takes_any_strides(case, operators.deform_conv2d())


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_last_gradient", "contiguous_gradient"])
def test_gradient_in_the_other_layout(channels_last):
    op_checks.assert_takes_a_gradient_in_the_other_layout(
        _shared["small"], operators.deform_conv2d(), reference.deform_conv2d, channels_last
    )


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0, 3.0, 1e30], ids=str)
def test_borders_and_unusual_coordinates_as_on_the_cpu(value, channels_last):
    results = []
    for function in (operators.deform_conv2d(), deform_conv2d):
        x = torch.arange(1.0, 73.0).reshape(1, 8, 3, 3)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        offset = torch.zeros(1, 2, 3, 3)
        offset[0, 0, 0, 0] = value
        offset[0, 1, 2, 1] = value
        tensors = [x.requires_grad_(), offset.requires_grad_(), torch.ones(2, 8, 1, 1, requires_grad=True)]
        mask = torch.full((1, 1, 3, 3), 0.5, requires_grad=True)
        out = function(*tensors, mask=mask)
        out.sum().backward()
        results.append([out.detach(), *(t.grad for t in (*tensors, mask))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_corner_outside_is_not_read():
    x = torch.full((1, 1, 2, 2), 3.0)
    x[0, 0, 0, 0] = float("inf")
    offset = torch.zeros(1, 2, 2, 2)
    offset[:, :, 1, 1] = 0.5
    assert operators.deform_conv2d()(x, offset, torch.ones(1, 1, 1, 1))[0, 0, 1, 1].item() == 0.75


def test_empty_batch():
    case = replace(_shared["small"], batch=0)
    tensors = case.tensors(torch.float32)
    out = case.call(operators.deform_conv2d(), tensors)
    assert out.shape == case.out_shape
    out.sum().backward()
    assert all((t.grad == 0).all() for t in tensors)


# Two offset groups of a chunk and a bit, two weight groups, two blocks of pixels: every barrier has work before and after.
RACES = DeformCase("races", 5, 8, (4, 4), 18, kernel=(1, 2), padding=(0, 1), groups=2, offset_groups=2)
# The direct way: two columns of threads; in the backward the taps don't fit into shared memory together.
RACES_DIRECT = DeformCase("races_direct", 1, 16, (3, 3), 32, (2, 4), padding=(1, 2), groups=16, offset_groups=2)


@pytest.mark.parametrize("deterministic", [False, True], ids=["any_order", "deterministic"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_races(precision, deterministic):
    check(RACES, precision, channels_last=precision == "bfloat16", deterministic=deterministic)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_races_of_the_direct_way(precision):
    check(RACES_DIRECT, precision, channels_last=precision == "bfloat16")
