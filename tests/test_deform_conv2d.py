# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import op_checks
from dynconv_ext import DeformableConv2d, DeformConv2d, deform_conv2d, reference
from op_cases import DEFORM_CASES, TOLERANCE, DeformCase, case_id, relative_error

CASES = {case.name: case for case in DEFORM_CASES}


def check(case: DeformCase, tensors, tolerance: float) -> None:
    """Output and all gradients against the reference in float64."""
    op_checks.assert_matches_reference(case, deform_conv2d, reference.deform_conv2d, tensors, tolerance)


# ------------------------------------------------------------------------------ forward and backward, the reference


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", DEFORM_CASES, ids=case_id)
def test_matches_reference(case, dtype, channels_last):
    check(case, case.tensors(dtype, channels_last), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_offset_beside_half(dtype):
    case = CASES["all_different"]
    check(case, case.tensors(dtype, offset_dtype=torch.float32), TOLERANCE[dtype])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_geometry_matches_reference(data):
    def pair(low, high):
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    groups = data.draw(st.integers(1, 3))
    channels = groups * data.draw(st.integers(1, 6))
    offset_groups = data.draw(st.sampled_from([d for d in range(1, channels + 1) if channels % d == 0]))
    kernel, dilation, padding = pair(1, 4), pair(1, 3), pair(0, 3)
    spans = [dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i] for i in (0, 1)]
    size = tuple(data.draw(st.integers(max(1, span), max(1, span) + 9)) for span in spans)
    case = DeformCase(
        "drawn", data.draw(st.integers(0, 4)), channels, size, groups * data.draw(st.integers(1, 5)), kernel,
        pair(1, 3), padding, dilation, groups, offset_groups, data.draw(st.booleans()), data.draw(st.booleans()),
        data.draw(st.sampled_from([0.0, 0.5, 3.0])),
    )  # fmt: skip
    check(case, case.tensors(torch.float64, data.draw(st.booleans())), TOLERANCE[torch.float64])


@pytest.mark.parametrize("case", DEFORM_CASES, ids=case_id)
def test_matches_torchvision(case):
    tensors = case.tensors(torch.float64)
    other = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out, expected = case.call(deform_conv2d, tensors), case.call(torchvision.ops.deform_conv2d, other)
    assert relative_error(out, expected) <= TOLERANCE[torch.float64]
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    for name, got, wanted in zip(case.names, tensors, other, strict=True):
        if got is not None:
            assert relative_error(got.grad, wanted.grad) <= TOLERANCE[torch.float64], name


def test_zero_offset_is_a_convolution():
    x, weight, bias = torch.randn(2, 8, 9, 7), torch.randn(4, 8, 3, 3), torch.randn(4)
    out = deform_conv2d(x, torch.zeros(2, 18, 9, 7), weight, bias, padding=1)
    torch.testing.assert_close(out, nn.functional.conv2d(x, weight, bias, padding=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [deform_conv2d, reference.deform_conv2d], ids=["operator", "reference"])
@pytest.mark.parametrize(
    ("shift", "value", "grad"),
    [
        (-1.0, 0.0, 0.0),  # exactly -1: outside, and no gradient with respect to the offset
        (-0.75, 0.25, 1.0),  # between -1 and 0: part of the way in
        (0.0, 1.0, 0.0),  # 1 - 1: the constant image's interior, at the first pixel
        (2.5, 0.5, -1.0),  # between H - 1 and H: part of the way out
        (3.0, 0.0, 0.0),  # exactly H
        (float("inf"), 0.0, 0.0),
        (float("-inf"), 0.0, 0.0),
        (1e30, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("axis", [0, 1], ids=["y", "x"])
def test_borders(function, axis, shift, value, grad):
    x = torch.ones(1, 1, 3, 3, requires_grad=True)
    offset = torch.zeros(1, 2, 3, 3)
    offset[0, axis, 0, 0] = shift
    offset.requires_grad_()
    mask = torch.ones(1, 1, 3, 3, requires_grad=True)
    out = function(x, offset, torch.ones(1, 1, 1, 1), mask=mask)
    assert out[0, 0, 0, 0].item() == value
    out[0, 0, 0, 0].backward()
    assert offset.grad[0, axis, 0, 0].item() == grad
    assert mask.grad[0, 0, 0, 0].item() == value
    assert torch.isfinite(offset.grad).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("function", [deform_conv2d, reference.deform_conv2d], ids=["operator", "reference"])
@pytest.mark.parametrize("other", [0.0, float("inf"), 99.0, float("nan")])
@pytest.mark.parametrize("axis", [0, 1], ids=["y", "x"])
def test_nan_coordinate_is_seen(function, axis, other):
    offset = torch.zeros(1, 2, 4, 4)
    offset[0, axis, 1, 2], offset[0, 1 - axis, 1, 2] = float("nan"), other
    offset.requires_grad_()
    x = torch.ones(1, 2, 4, 4, requires_grad=True)
    out = function(x, offset, torch.ones(3, 2, 1, 1))
    assert out[0, :, 1, 2].isnan().all() and out.isnan().sum() == 3
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_corner_outside_is_not_read():
    # The pixels beside the border are infinite; a sample on the border's row weighs them with 0 outside the image.
    x = torch.full((1, 1, 2, 2), 3.0)
    offset = torch.zeros(1, 2, 2, 2)
    offset[:, :, 1, 1] = 0.5
    out = deform_conv2d(x, offset, torch.ones(1, 1, 1, 1))
    assert out[0, 0, 1, 1].item() == 0.75


# ------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("name", ["small", "no_mask_no_bias", "offset_groups_cross_groups", "depthwise_multiplier"])
def test_gradcheck(name):
    case = replace(CASES[name], batch=1, size=(4, 3), channels=min(CASES[name].channels, 12), spread=0.9)
    tensors = case.tensors(torch.float64)
    present = [t for t in tensors if t is not None]

    def function(*values):
        values = iter(values)
        return case.call(deform_conv2d, [None if t is None else next(values) for t in tensors])

    assert torch.autograd.gradcheck(function, present, fast_mode=False, eps=1e-7, atol=1e-5)
    assert torch.autograd.gradgradcheck(function, present, fast_mode=True, eps=1e-7, atol=1e-4)


def test_third_derivative_exists():
    case = replace(CASES["small"], batch=1, channels=1, out_channels=1, size=(3, 3))
    input, offset, weight, bias, mask = case.tensors(torch.float64)
    (first,) = torch.autograd.grad(
        case.call(deform_conv2d, (input, offset, weight, bias, mask)).square().sum(), offset, create_graph=True
    )
    (second,) = torch.autograd.grad(first.square().sum(), weight, create_graph=True)
    (third,) = torch.autograd.grad(second.square().sum(), mask)
    assert third.abs().sum() > 0


# ----------------------------------------------------------------------------------------- opcheck, compile, autocast


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["all_different", "no_mask_no_bias", "depthwise"])
def test_opcheck(name, channels_last):
    case = CASES[name]
    input, offset, weight, bias, mask = case.tensors(torch.float32, channels_last)
    geometry = [list(v) for v in case.geometry]
    torch.library.opcheck(torch.ops.dynconv_ext.deform_conv2d, (input, offset, weight, bias, *geometry, mask))
    grad = torch.randn(case.batch, case.out_channels, *case.out_size)
    outputs = [True, True, False, True, mask is not None]
    arguments = (
        grad,
        *(t.detach() for t in (input, offset, weight)),
        *geometry,
        mask if mask is None else mask.detach(),
    )
    torch.library.opcheck(torch.ops.dynconv_ext.deform_conv2d_backward, (*arguments, outputs))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic):
    layer = DeformableConv2d(4, 6, 3, padding=1)
    nn.init.normal_(layer.offset_conv.weight, std=0.1)
    op_checks.assert_compiles(layer, dynamic)


def test_export():
    op_checks.assert_exports(DeformableConv2d(3, 4, 3, padding=1), "deform_conv2d")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_input_and_weight_only(dtype):
    case = CASES["small"]
    tensors = case.tensors(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = case.call(deform_conv2d, tensors)
    assert out.dtype == dtype
    expected = [t.detach() for t in tensors]
    for i in (0, 2, 3):
        expected[i] = expected[i].to(dtype)
    assert torch.equal(out, case.call(deform_conv2d, expected))
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


def test_autocast_leaves_float64_alone():
    case = CASES["small"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert case.call(deform_conv2d, case.tensors(torch.float64)).dtype == torch.float64


# ---------------------------------------------------------------------------------------- layouts, batches, gradients


def test_channels_last_in_channels_last_out():
    op_checks.assert_keeps_channels_last(CASES["all_different"], deform_conv2d)


def test_non_contiguous_arguments():
    op_checks.assert_takes_any_strides(CASES["all_different"], deform_conv2d)


def test_expanded_gradient():
    op_checks.assert_takes_an_expanded_gradient(CASES["small"], deform_conv2d, reference.deform_conv2d)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_empty_batch(dtype):
    case = replace(CASES["all_different"], batch=0)
    tensors = case.tensors(dtype)
    out = case.call(deform_conv2d, tensors)
    assert out.shape == (0, case.out_channels, *case.out_size)
    out.sum().backward()
    for t in tensors:
        assert t.grad.shape == t.shape and (t.grad == 0).all()


@pytest.mark.parametrize("wanted", range(5), ids=DeformCase.names)
def test_only_the_gradient_asked_for(wanted):
    case = CASES["all_different"]
    op_checks.assert_computes_only_the_gradient(wanted, case, deform_conv2d, reference.deform_conv2d)
    tensors = [t.detach() for t in case.tensors(torch.float64)]
    input, offset, weight, _, mask = tensors
    grads = torch.ops.dynconv_ext.deform_conv2d_backward(
        case.call(deform_conv2d, tensors), input, offset, weight, *case.geometry, mask, [i == wanted for i in range(5)]
    )
    assert [g.numel() > 0 for g in grads] == [i == wanted for i in range(5)]


def test_frozen_everything_has_no_graph():
    case = CASES["small"]
    assert not case.call(deform_conv2d, [t.detach() for t in case.tensors(torch.float32)]).requires_grad


def test_same_result_for_any_number_of_threads_and_runs():
    op_checks.assert_gives_the_same_for_any_threads(CASES["one_image_shared_by_threads"], deform_conv2d)


def test_more_than_2_to_31_elements():
    # Zero pages cost nothing until they are written, and a large stride reads few of them.
    channels, size, stride = 32, 8200, 8199
    assert channels * size * size > 2**31
    x = torch.zeros(1, size, size, channels, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    x[0, -1, -1, -1], x[0, 5, -1, -2], x[0, 0, 0, 0] = 5.0, 2.0, 3.0
    offset = torch.zeros(1, 2, 2, 2, requires_grad=True)
    weight = torch.ones(1, channels, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    out = deform_conv2d(x, offset, weight, stride=stride)
    assert out[0, 0].tolist() == [[3.0, 0.0], [0.0, 5.0]]
    shift = torch.zeros(1, 2, 2, 2)
    shift[0, 1, 1, 1] = -1.0  # one pixel to the left
    assert deform_conv2d(x, shift, weight, stride=stride)[0, 0, 1, 1].item() == 2.0
    out.float().sum().backward()
    assert weight.grad.flatten()[[0, 5, -1]].tolist() == [3.0, 0.0, 5.0]
    assert offset.grad[0, :, 1, 1].tolist() == [-5.0, -5.0]  # further right or down is outside


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_other_cpu_levels(level):
    op_checks.assert_passes_at_cpu_level(level, "test_deform_conv2d")


@pytest.mark.parametrize("level", ["none", "avx512_bf16", "amx"])
def test_bfloat16_levels(level):
    op_checks.assert_passes_at_bfloat16_level(level, "test_deform_conv2d")


def test_bfloat16_groups_keep_infinity_to_themselves():
    """Widths and outputs that fill no block of the matrix product: what stands behind them reaches no other group."""
    x = torch.randn(2, 6, 9, 9, dtype=torch.bfloat16)
    x[:, 0] = float("inf")
    x.requires_grad_()
    offset = torch.zeros(2, 18, 9, 9)
    weight = torch.randn(10, 3, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    out = deform_conv2d(x, offset, weight, padding=1)
    assert not torch.isfinite(out[:, :5]).any()
    assert torch.isfinite(out[:, 5:]).all()
    out.backward(torch.randn_like(out))
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(weight.grad[5:]).all()
    assert torch.isfinite(weight.grad[:5, 1:]).all()


# ------------------------------------------------------------------------------------------------------------ errors


def arguments(**changes):
    values = {
        "input": torch.zeros(2, 4, 6, 5),
        "offset": torch.zeros(2, 18, 6, 5),
        "weight": torch.zeros(3, 4, 3, 3),
        "bias": torch.zeros(3),
        "padding": 1,
        "mask": torch.zeros(2, 9, 6, 5),
    }
    return {**values, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"input": torch.zeros(4, 6, 5)}, RuntimeError, r"input: got shape \(4, 6, 5\), expected 4 dimensions"),
        ({"input": 3}, TypeError, "input: got int, expected a Tensor"),
        ({"input": torch.zeros(2, 4, 6, 5, dtype=torch.int32)}, RuntimeError, r"input.dtype: got Int, expected float32"),
        ({"offset": torch.zeros(2, 17, 6, 5)}, RuntimeError,
         r"offset.shape\[1\]: got 17, expected 2 \* offset_groups \* kH \* kW = 18"),
        ({"offset": torch.zeros(2, 54, 6, 5)}, RuntimeError, r"offset_groups = 3, expected a divisor of input.shape\[1\] = 4"),
        ({"offset": torch.zeros(1, 18, 6, 5)}, RuntimeError, r"offset.shape\[0\]: got 1, expected input.shape\[0\] = 2"),
        ({"offset": torch.zeros(2, 18, 4, 5)}, RuntimeError, r"offset.shape\[2\]: got 4, expected output height = 6"),
        ({"offset": torch.zeros(2, 18, 6, 3)}, RuntimeError, r"offset.shape\[3\]: got 3, expected output width = 5"),
        ({"offset": torch.zeros(2, 18, 6, 5, dtype=torch.float64)}, RuntimeError, "offset.dtype: got float64, expected input.dtype = float32"),
        ({"weight": torch.zeros(3, 4, 3)}, RuntimeError, r"weight: got shape \(3, 4, 3\), expected 4 dimensions"),
        ({"weight": torch.zeros(3, 3, 3, 3)}, RuntimeError, r"weight.shape\[1\]: got 3, expected a divisor of input.shape\[1\] = 4"),
        ({"weight": torch.zeros(3, 2, 3, 3)}, RuntimeError, r"weight.shape\[0\]: got 3, expected a multiple of groups .* = 2"),
        ({"weight": torch.zeros(3, 0, 3, 3)}, RuntimeError, "weight: got shape"),
        ({"weight": torch.zeros(3, 4, 3, 3, dtype=torch.float16)}, RuntimeError, "weight.dtype: got float16, expected input.dtype = float32"),
        ({"bias": torch.zeros(4)}, RuntimeError, r"bias.shape\[0\]: got 4, expected weight.shape\[0\] = 3"),
        ({"bias": "no"}, TypeError, "bias: got str, expected a Tensor or None"),
        ({"mask": torch.zeros(2, 8, 6, 5)}, RuntimeError, r"mask.shape\[1\]: got 8, expected offset_groups \* kH \* kW = 9"),
        ({"mask": torch.zeros(2, 9, 6, 4)}, RuntimeError, r"mask.shape\[3\]: got 4, expected output width = 5"),
        ({"mask": torch.zeros(2, 9, 6, 5, dtype=torch.float64)}, RuntimeError, "mask.dtype: got float64, expected"),
        ({"mask": torch.zeros(2, 9, 6, 5, device="meta")}, RuntimeError, "mask: got a tensor on meta, expected the device of input, cpu"),
        ({"stride": 0}, RuntimeError, r"stride: got \(0, 0\), expected values >= 1"),
        ({"stride": "2"}, TypeError, "stride: got '2', expected an int or a pair"),
        ({"padding": (1, 2, 3)}, TypeError, r"padding: got \(1, 2, 3\), expected an int or a pair"),
        ({"padding": ("1", 1)}, TypeError, r"padding: got \('1', 1\), expected an int or a pair"),
        ({"padding": -1}, RuntimeError, r"padding: got \(-1, -1\), expected values >= 0"),
        ({"dilation": (1, 0)}, RuntimeError, r"dilation: got \(1, 0\), expected values >= 1"),
        ({"dilation": 9}, RuntimeError, "input: got size 6 x 5, which gives an output of 0 x 0"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(changes, error, text):
    deform_conv2d(**arguments())
    with pytest.raises(error, match=text):
        deform_conv2d(**arguments(**changes))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda g: g[:, :2], r"grad_out.shape\[1\]: got 2, expected weight.shape\[0\] = 3"),
        (lambda g: g.double(), "grad_out.dtype: got float64"),
        (lambda g: g[0], "grad_out: got shape"),
    ],
)
def test_backward_operator_checks_its_gradient(change, text):
    a = arguments()
    with pytest.raises(RuntimeError, match=text):
        torch.ops.dynconv_ext.deform_conv2d_backward(
            change(torch.zeros(2, 3, 6, 5)), a["input"], a["offset"], a["weight"], (1, 1), (1, 1), (1, 1), a["mask"],
            [True] * 5,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- modules


def test_module_is_torchvisions():
    options = {"stride": 2, "padding": 1, "dilation": (1, 2), "groups": 2}
    ours, theirs = DeformConv2d(4, 6, (3, 2), **options), torchvision.ops.DeformConv2d(4, 6, (3, 2), **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 9, 9)
    offset, mask = torch.randn(2, 12, 5, 5), torch.rand(2, 6, 5, 5)
    expected = theirs(x, offset, mask)
    torch.testing.assert_close(ours(x, offset, mask), expected, rtol=1e-4, atol=1e-5)
    assert "groups=2" in repr(ours)


def test_deformable_module_starts_as_a_convolution():
    layer = DeformableConv2d(4, 6, 3, padding=1, groups=2, offset_groups=2)
    assert sorted(layer.state_dict()) == sorted(
        f"{name}.{kind}" for name in ("offset_conv", "modulator_conv", "regular_conv") for kind in ("weight", "bias")
    )
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(layer(x), layer.regular_conv(x), rtol=1e-4, atol=1e-5)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_deformable_module_predicts_as_two_convolutions():
    layer = DeformableConv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), offset_groups=3)
    for conv in (layer.offset_conv, layer.modulator_conv):
        nn.init.normal_(conv.weight)
        nn.init.normal_(conv.bias)
    x = torch.randn(2, 3, 8, 9)
    offset, mask = layer.predict(x)
    torch.testing.assert_close(offset, layer.offset_conv(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mask, 2 * layer.modulator_conv(x).sigmoid(), rtol=1e-4, atol=1e-5)
    conv = layer.regular_conv
    expected = torchvision.ops.deform_conv2d(x, offset, conv.weight, conv.bias, (2, 1), (1, 0), mask=mask)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_deformable_layer_without_modulation():
    torch.manual_seed(0)
    layer = DeformableConv2d(4, 6, kernel_size=3, padding=1, modulation=False)
    assert sorted(name.split(".")[0] for name in layer.state_dict()) == ["offset_conv"] * 2 + ["regular_conv"] * 2
    nn.init.normal_(layer.offset_conv.weight, std=0.1)
    x = torch.randn(2, 4, 7, 6)
    offset, mask = layer.predict(x)
    assert mask is None
    torch.testing.assert_close(offset, layer.offset_conv(x))
    conv = layer.regular_conv
    torch.testing.assert_close(layer(x), deform_conv2d(x, offset, conv.weight, conv.bias, padding=1))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"in_channels": 5, "groups": 2}, "in_channels: got 5, expected a positive multiple of groups = 2"),
        ({"out_channels": 0}, "out_channels: got 0"),
        ({"offset_groups": 3}, "offset_groups: got 3, expected a divisor of in_channels = 4"),
        ({"groups": 0}, "groups: got 0"),
        ({"groups": "2"}, "groups: got '2', expected at least 1, a whole number"),
        ({"in_channels": 4.0}, "in_channels: got 4.0, expected a positive multiple"),
        ({"kernel_size": 0}, r"kernel_size: got \(0, 0\), expected values >= 1"),
        ({"stride": (1, 0)}, r"stride: got \(1, 0\), expected values >= 1"),
        ({"padding": -1}, r"padding: got \(-1, -1\), expected values >= 0"),
        ({"dilation": 0}, r"dilation: got \(0, 0\), expected values >= 1"),
    ],
)
def test_module_errors(arguments, text):
    with pytest.raises(ValueError, match=text):
        DeformableConv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **arguments})


def test_missing_library_is_one_clear_error():
    code = """
import sys
sys.modules["dynconv_ext._C"] = None  # what a missing library looks like to the import system
import torch, dynconv_ext
x = torch.ones(1, 1, 3, 3)
out = dynconv_ext.reference.deform_conv2d(x, torch.zeros(1, 2, 3, 3), torch.ones(1, 1, 1, 1))
assert torch.equal(out, x)
try:
    dynconv_ext.deform_conv2d(x, torch.zeros(1, 2, 3, 3), torch.ones(1, 1, 1, 1))
except ImportError as error:
    assert "dynconv_ext._C" in str(error) and "pip install" in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
