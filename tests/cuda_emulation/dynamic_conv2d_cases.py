# SPDX-License-Identifier: BSD-3-Clause
"""CUDA kernels of aggregate_kernels and dynamic_conv2d against the reference, on the host emulation.

Not collected by itself: test_dynamic_conv2d_cuda.py runs it under the sanitizers, in processes of its own; under
ThreadSanitizer, where a block's threads are slow, only what is named after races.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

import dynamic_cases
import op_checks
import operators
from dynamic_cases import DYNAMIC_CASES, DynamicCase
from dynconv_ext import dynamic_conv2d, reference
from op_cases import TOLERANCE, TOLERANCE_TF32, case_id

torch.ops.load_library(os.environ["DYNCONV_EMULATED_OPERATORS"])
# The emulation's threads are one thread of the host.
torch.set_num_threads(1)

PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_shared = {case.name: case for case in DYNAMIC_CASES}

# ------------------------------------------------------------------------------------------------- aggregate_kernels

# Kernels of 16-bit numbers are done 1024 at a time, eight in 16 bytes; of 32-bit numbers 512.
BANKS = [
    DynamicCase("small"),
    DynamicCase("vectors_and_a_tail", channels=24, out_channels=16),
    DynamicCase("one_number_at_a_time", channels=19, out_channels=7, bias=False),
    DynamicCase("one_kernel", channels=5, out_channels=6, num_kernels=1),
    DynamicCase("one_sample", 1, channels=16, num_kernels=5),
    DynamicCase("samples_without_softmax", 21, out_channels=16, num_kernels=8, temperature=None),
    DynamicCase("sixteen_kernels", 9, channels=8, out_channels=16, num_kernels=16, temperature=30.0),
    DynamicCase("kernels_by_turns", 4, channels=3, out_channels=5, num_kernels=37),
    DynamicCase("more_kernels_than_threads", 2, 1, out_channels=2, kernel=(1, 2), num_kernels=300, temperature=None),
    DynamicCase("shares_of_samples", 70, 2, out_channels=4, kernel=(1, 2), num_kernels=2),
    DynamicCase("one_number", channels=1, out_channels=1, kernel=(1, 1)),
]


def check_bank(case: DynamicCase, tensors) -> None:
    zero = ("attention",) if case.num_kernels == 1 and case.temperature else ()
    op_checks.assert_aggregates_like_reference(
        operators.aggregate_kernels(), reference.aggregate_kernels, tensors, case.temperature, zero
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", BANKS, ids=case_id)
def test_aggregate_kernels_matches_reference(case, dtype):
    check_bank(case, case.tensors(dtype)[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_aggregate_kernels_away_from_16_bytes(dtype):
    _, weight, attention, bias = BANKS[1].tensors(dtype)
    weight = torch.cat([weight.detach().flatten()[:1], weight.detach().flatten()])[1:].view(weight.shape)
    assert weight.is_contiguous() and weight.data_ptr() % 16 != 0
    check_bank(BANKS[1], [weight.requires_grad_(), attention, bias])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_aggregate_kernels_with_float32_attention(dtype):
    check_bank(BANKS[0], BANKS[0].tensors(dtype, attention_dtype=torch.float32)[1:])


@pytest.mark.parametrize("wanted", range(3), ids=DynamicCase.names[1:])
def test_aggregate_kernels_computes_only_the_gradient_asked_for(wanted):
    tensors, expected = (BANKS[0].tensors(torch.float64)[1:] for _ in range(2))
    for i, t in enumerate(tensors):
        t.requires_grad_(i == wanted)
    for each, function in ((tensors, operators.aggregate_kernels()), (expected, reference.aggregate_kernels)):
        sum(t.square().sum() for t in function(*each, 2.0)).backward()
    for i, (t, e) in enumerate(zip(tensors, expected, strict=True)):
        if i == wanted:
            torch.testing.assert_close(t.grad, e.grad, rtol=1e-9, atol=1e-9)
        else:
            assert t.grad is None


@pytest.mark.parametrize("output", [0, 1], ids=["kernels", "biases"])
def test_aggregate_kernels_gradient_of_one_output(output):
    tensors, expected = (BANKS[0].tensors(torch.float64)[1:] for _ in range(2))
    for each, function in ((tensors, operators.aggregate_kernels()), (expected, reference.aggregate_kernels)):
        function(*each, 2.0)[output].square().sum().backward()
    for t, e in zip(tensors, expected, strict=True):
        torch.testing.assert_close(t.grad, torch.zeros_like(e) if e.grad is None else e.grad, rtol=1e-9, atol=1e-9)


def test_aggregate_kernels_of_no_samples():
    tensors = replace(BANKS[0], batch=0).tensors(torch.float32)[1:]
    kernels, biases = operators.aggregate_kernels()(*tensors, 2.0)
    assert kernels.shape == (0, *tensors[0].shape[1:]) and biases.shape == (0, tensors[0].shape[1])
    (kernels.sum() + biases.sum()).backward()
    assert all((t.grad == 0).all() for t in tensors)


def test_softmax_of_large_logits():
    bank = torch.arange(2.0).reshape(2, 1, 1, 1, 1)
    kernels, _ = operators.aggregate_kernels()(bank, torch.tensor([[-3e38, 3e38], [3e38, -3e38]]), None, 1.0)
    assert kernels.flatten().tolist() == [1.0, 0.0]
    kernels, _ = operators.aggregate_kernels()(bank, torch.tensor([[float("nan"), 0.0], [0.0, 0.0]]), None, 1.0)
    assert kernels[0].isnan().all() and kernels[1].item() == 0.5


# ---------------------------------------------------------------------------------------------------- dynamic_conv2d

ONE_PIXEL = {"kernel": (1, 1), "padding": (0, 0)}
# The emulated device has 4 multiprocessors: few blocks make it choose other tiles.
CASES = [
    # Direct kernels: up to 8 channels a group.
    replace(_shared["small"], size=(5, 4)),
    replace(_shared["all_different"], batch=3, size=(9, 6)),
    replace(_shared["sixteen_kernels"], size=(3, 3)),
    _shared["depthwise"],
    DynamicCase("depthwise_chunks", 3, 24, (7, 5), 24, stride=(2, 1), dilation=(1, 2), padding=(1, 2), groups=24),
    DynamicCase("depthwise_large_kernel", 1, 9, (8, 9), 9, (5, 7), padding=(2, 3), groups=9, num_kernels=2),
    _shared["depthwise_multiplier"],
    DynamicCase("few_inputs", 3, 3, (13, 12), 20, stride=(2, 2)),
    DynamicCase("few_outputs", 2, 10, (7, 6), 2),
    # Few pixels times kernels: the depth runs over the bank.
    DynamicCase("over_the_bank", 3, 16, (5, 4), 24),
    DynamicCase("over_the_bank_odd", 5, 11, (4, 3), 13, (1, 2), padding=(0, 1), bias=False, temperature=None),
    DynamicCase("one_pixel", 3, 40, (1, 1), 12, **ONE_PIXEL),
    # Kernels mixed on the way.
    DynamicCase("mixed", 3, 32, (7, 6), 24),
    DynamicCase("all_different_mixed", 3, 22, (13, 8), 26, (3, 2), (2, 1), (1, 0), (2, 1), groups=2, num_kernels=5),
    DynamicCase("one_kernel", 2, 9, (13, 10), 10, num_kernels=1, **ONE_PIXEL),
    DynamicCase("sixteen_kernels_mixed", 2, 10, (4, 3), 12, num_kernels=16, temperature=30.0),
    DynamicCase("several_chunks_and_a_tail", 2, 72, (8, 6), 10, (1, 2), padding=(0, 1)),
    DynamicCase("several_tiles_of_outputs", 2, 16, (7, 6), 150, **ONE_PIXEL),
    DynamicCase("several_tiles_of_pixels", 2, 16, (13, 12), 16, num_kernels=2, bias=False, **ONE_PIXEL),
    DynamicCase("groups_of_whole_chunks", 2, 64, (6, 6), 48, (2, 2), groups=2, temperature=None),
    DynamicCase("samples_share_a_block", 19, 16, (7, 6), 16, **ONE_PIXEL),
    DynamicCase("samples_share_a_large_tile", 13, 9, (10, 9), 10, **ONE_PIXEL),
    DynamicCase("large_tiles", 2, 9, (26, 21), 10, num_kernels=2, **ONE_PIXEL),
    DynamicCase("stride_leaves_pixels_out", 2, 16, (11, 14), 16, stride=(2, 3), padding=(1, 0), num_kernels=8),
    DynamicCase("stride_and_dilation", 2, 10, (11, 10), 12, stride=(3, 2), dilation=(2, 3), padding=(2, 3)),
    DynamicCase("stride_larger_than_kernel", 2, 16, (9, 8), 16, (1, 2), stride=(3, 3), padding=(0, 0)),
    DynamicCase("padding_larger_than_kernel", 2, 10, (3, 2), 11, padding=(4, 3)),
    # Mixed first: an ordinary convolution.
    DynamicCase("one_sample", 1, 16, (6, 5), 40),
    DynamicCase("one_sample_several_tiles", 1, 11, (13, 12), 9, **ONE_PIXEL),
]
_cases = {case.name: case for case in CASES}
# In float64, where the emulation is slow.
SMALLER = {
    "all_different": replace(_cases["all_different"], batch=2),
    "all_different_mixed": replace(_cases["all_different_mixed"], batch=2, kernel=(1, 2), padding=(0, 0), size=(11, 8)),
    "over_the_bank_biased": DynamicCase("over_the_bank_biased", 2, 9, (3, 2), 10, (1, 2), padding=(0, 1)),
    "one_sample": replace(_cases["one_sample"], channels=9, out_channels=10, kernel=(1, 2)),
}
# Everything for these.
THOROUGH = ("small", "mixed")


def combinations():
    """The other cases take one exact precision and one of the tensor cores', and one layout, by turns."""
    for number, case in enumerate(CASES):
        kept = (("float64", "bfloat16"), ("float32", "tf32"), ("float32", "bfloat16"), ("float64", "tf32"))[number % 4]
        for precision in PRECISIONS:
            for channels_last in (False, True):
                turn = (number // 4 + (precision in ("tf32", "bfloat16"))) % 2 == channels_last
                if case.name in THOROUGH or (precision in kept and turn):
                    layout = "channels_last" if channels_last else "contiguous"
                    yield pytest.param(case, precision, channels_last, id=f"{case.name}-{precision}-{layout}")


def check(case: DynamicCase, precision: str, channels_last: bool, **options) -> None:
    dtype = PRECISIONS[precision]
    tf32 = precision == "tf32"
    # One kernel under a softmax has the weight 1 whatever its logit.
    zero = ("attention",) if case.num_kernels == 1 and case.temperature else ()
    op_checks.assert_matches_reference(
        case,
        operators.dynamic_conv2d(tf32),
        reference.dynamic_conv2d,
        case.tensors(dtype, channels_last, **options),
        TOLERANCE_TF32 if tf32 else TOLERANCE[dtype],
        zero,
    )


@pytest.mark.parametrize(("case", "precision", "channels_last"), list(combinations()))
def test_matches_reference(case, precision, channels_last):
    check(case, precision, channels_last)


@pytest.mark.parametrize("way", dynamic_cases.CUDA_WAYS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_way_gives_the_same(monkeypatch, way, precision):
    monkeypatch.setenv("DYNCONV_DYNAMIC_CONV2D_CUDA", way)
    check(dynamic_cases.ANY_WAY, precision, channels_last=precision == "bfloat16")


def test_a_way_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("DYNCONV_DYNAMIC_CONV2D_CUDA", "samples")
    with pytest.raises(RuntimeError, match="DYNCONV_DYNAMIC_CONV2D_CUDA: got samples, expected direct, mixed_first, "):
        check(dynamic_cases.ANY_WAY, "float32", channels_last=False)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.parametrize("shared_bytes", [227 * 1024, 99 * 1024], ids=["9.0", "8.9"])
@pytest.mark.parametrize("name", ["samples_share_a_block", "samples_share_a_large_tile", "large_tiles"])
def test_tiles_that_fit_the_device(monkeypatch, name, shared_bytes, precision):
    # One multiprocessor has work enough for large tiles.
    monkeypatch.setenv("DYNCONV_EMULATION_MULTIPROCESSORS", "1")
    monkeypatch.setenv("DYNCONV_EMULATION_SHARED_BYTES", str(shared_bytes))
    check(_cases[name], precision, channels_last=precision == "bfloat16")


@pytest.mark.parametrize("name", ["over_the_bank", "depthwise_chunks"])
def test_float32_attention_beside_half(name):
    check(_cases[name], "bfloat16", channels_last=True, attention_dtype=torch.float32)


@pytest.mark.parametrize("name", ["all_different", "over_the_bank_biased", "all_different_mixed", "one_sample"])
@pytest.mark.parametrize("wanted", range(4), ids=DynamicCase.names)
def test_only_the_gradient_asked_for(wanted, name):
    op_checks.assert_computes_only_the_gradient(
        wanted, SMALLER[name], operators.dynamic_conv2d(), reference.dynamic_conv2d
    )


@pytest.mark.parametrize("name", ["all_different", "all_different_mixed"])
def test_any_strides(name):
    op_checks.assert_takes_any_strides(SMALLER[name], operators.dynamic_conv2d())


@pytest.mark.parametrize("name", ["all_different", "over_the_bank_biased"])
def test_expanded_gradient(name):
    op_checks.assert_takes_an_expanded_gradient(SMALLER[name], operators.dynamic_conv2d(), reference.dynamic_conv2d)


@pytest.mark.parametrize("name", ["depthwise", "over_the_bank"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_last_gradient", "contiguous_gradient"])
def test_gradient_in_the_other_layout(channels_last, name):
    op_checks.assert_takes_a_gradient_in_the_other_layout(
        _cases[name], operators.dynamic_conv2d(), reference.dynamic_conv2d, channels_last
    )


@pytest.mark.parametrize("name", ["small", "mixed"])
def test_empty_batch(name):
    case = replace(_cases[name], batch=0)
    tensors = case.tensors(torch.float32)
    out = case.call(operators.dynamic_conv2d(), tensors)
    assert out.shape == case.out_shape
    out.sum().backward()
    assert all((t.grad == 0).all() for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_weight", [False, True], ids=["in_images", "in_weight"])
@pytest.mark.parametrize("channels", [5, 9], ids=["direct", "mixed"])
def test_non_finite_values_stay_where_they_belong(channels, in_weight, dtype):
    # Without padding, where an infinite weight may meet a zero or nothing at all.
    case = DynamicCase("odd", 6, channels, (5, 9), channels, (1, 2), padding=(0, 0), num_kernels=3)
    op_checks.assert_keeps_non_finite_values_apart(case, operators.dynamic_conv2d(), dynamic_conv2d, dtype, in_weight)


# ------------------------------------------------------------------------------------------------------------- races


# Several blocks, warps and samples a warp: every barrier has work before and after.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_races_of_aggregate_kernels(dtype):
    case = DynamicCase("races", 5, channels=15, out_channels=8, num_kernels=5)
    check_bank(case, case.tensors(dtype)[1:])


RACES = [
    DynamicCase("mixed", 3, 72, (7, 5), 9, (1, 2), padding=(0, 1)),
    DynamicCase("over_the_bank", 3, 72, (4, 3), 9, **ONE_PIXEL),
    DynamicCase("direct", 3, 8, (4, 3), 8, groups=4),
]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", RACES, ids=case_id)
def test_races(case, precision):
    check(case, precision, channels_last=precision == "bfloat16")
