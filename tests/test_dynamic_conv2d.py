# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import op_checks
from dynamic_cases import DYNAMIC_CASES, DynamicCase
from dynconv_ext import DynamicConv2d, aggregate_kernels, dynamic_conv2d, reference
from op_cases import TOLERANCE, case_id, relative_error
from op_checks import random_like

CASES = {case.name: case for case in DYNAMIC_CASES}
OPS = torch.ops.dynconv_ext


def check(case: DynamicCase, tensors, tolerance: float) -> None:
    """Output and all gradients against the reference in float64."""
    # One kernel under a softmax has the weight 1 whatever its logit: the reference's gradient is rounding noise.
    zero = ("attention",) if case.num_kernels == 1 and case.temperature else ()
    op_checks.assert_matches_reference(case, dynamic_conv2d, reference.dynamic_conv2d, tensors, tolerance, zero)


# ------------------------------------------------------------------------------ forward and backward, the reference


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", DYNAMIC_CASES, ids=case_id)
def test_matches_reference(case, dtype, channels_last):
    check(case, case.tensors(dtype, channels_last), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_attention_beside_half(dtype):
    case = CASES["all_different"]
    check(case, case.tensors(dtype, attention_dtype=torch.float32), TOLERANCE[dtype])


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_geometry_matches_reference(data):
    def pair(low, high):
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    groups = data.draw(st.integers(1, 3))
    kernel, dilation, padding = pair(1, 4), pair(1, 3), pair(0, 3)
    spans = [dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i] for i in (0, 1)]
    size = tuple(data.draw(st.integers(max(1, span), max(1, span) + 9)) for span in spans)
    case = DynamicCase(
        "drawn", data.draw(st.integers(0, 6)), groups * data.draw(st.integers(1, 20)), size,
        groups * data.draw(st.integers(1, 9)), kernel, pair(1, 3), padding, dilation, groups,
        data.draw(st.integers(1, 6)), data.draw(st.sampled_from([None, 0.5, 30.0])), data.draw(st.booleans()),
    )  # fmt: skip
    check(case, case.tensors(torch.float64, data.draw(st.booleans())), TOLERANCE[torch.float64])


def test_matches_a_loop_of_conv2d():
    case = CASES["all_different"]
    input, weight, attention, bias = (t.detach() for t in case.tensors(torch.float64))
    mix = torch.softmax(attention / case.temperature, dim=1)
    expected = []
    for n in range(case.batch):
        kernel = sum(mix[n, k] * weight[k] for k in range(case.num_kernels))
        kernel_bias = sum(mix[n, k] * bias[k] for k in range(case.num_kernels))
        expected.append(
            nn.functional.conv2d(
                input[n : n + 1], kernel, kernel_bias, case.stride, case.padding, case.dilation, case.groups
            )
        )
    for function in (dynamic_conv2d, reference.dynamic_conv2d):
        out = function(input, weight, attention, bias, *case.geometry)
        assert relative_error(out, torch.cat(expected)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["all_different", "no_bias_mixing_weights_as_given", "several_chunks_of_channels"])
def test_aggregate_kernels_matches_reference(name, dtype):
    case = CASES[name]
    _, *tensors = case.tensors(dtype)
    op_checks.assert_aggregates_like_reference(
        aggregate_kernels, reference.aggregate_kernels, tensors, case.temperature
    )


def test_aggregated_kernels_are_those_of_the_convolution():
    case = CASES["several_chunks_of_channels"]
    input, weight, attention, bias = (t.detach() for t in case.tensors(torch.float64))
    kernels, biases = aggregate_kernels(weight, attention, bias, case.temperature)
    out = case.call(dynamic_conv2d, (input, weight, attention, bias))
    for n in range(case.batch):
        expected = nn.functional.conv2d(input[n : n + 1], kernels[n], biases[n], padding=case.padding)
        assert relative_error(out[n : n + 1], expected) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("case", DYNAMIC_CASES, ids=case_id)
def test_gradient_identities(case):
    case = replace(case, temperature=None)
    tensors = case.tensors(torch.float64)
    input, weight, attention, _ = tensors
    out = case.call(dynamic_conv2d, tensors)
    grad = random_like(out)
    out.backward(grad)
    # The output is linear in the mixing weights.
    torch.testing.assert_close((attention * attention.grad).sum(1), (grad * out).flatten(1).sum(1))
    tensors = replace(case, bias=False).tensors(torch.float64)
    input, weight, _, _ = tensors
    case.call(dynamic_conv2d, tensors).backward(grad)
    # Without a bias it is linear in the bank and in the input.
    torch.testing.assert_close((weight * weight.grad).sum(), (input * input.grad).sum())


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", DYNAMIC_CASES, ids=case_id)
def test_tiles_and_samples_agree(case, dtype, channels_last, monkeypatch):
    results = {}
    for path in ("tiles", "samples"):
        monkeypatch.setenv("DYNCONV_DYNAMIC_CONV2D", path)
        tensors = case.tensors(dtype, channels_last)
        if path == "samples":
            check(case, tensors, TOLERANCE[dtype])
        out = case.call(dynamic_conv2d, tensors)
        grads = torch.autograd.grad(out, tensors[:2], random_like(out))
        results[path] = [out, *grads]
    for a, b in zip(*results.values(), strict=True):
        assert relative_error(a, b) <= 2 * TOLERANCE[dtype]


def test_unknown_path_is_an_error(monkeypatch):
    monkeypatch.setenv("DYNCONV_DYNAMIC_CONV2D", "quick")
    case = CASES["small"]
    with pytest.raises(RuntimeError, match="DYNCONV_DYNAMIC_CONV2D: got quick, expected depthwise, tiles or samples"):
        case.call(dynamic_conv2d, case.tensors(torch.float32))


def test_softmax_of_large_logits():
    input, weight = torch.ones(1, 4, 3, 3), torch.arange(2.0).reshape(2, 1, 1, 1, 1).expand(2, 4, 4, 1, 1)
    out = dynamic_conv2d(input, weight, torch.tensor([[-3e38, 3e38]]), temperature=1.0)
    assert (out == 4).all()
    assert dynamic_conv2d(input, weight, torch.tensor([[float("nan"), 0.0]]), temperature=1.0).isnan().all()


# -------------------------------------------------------------------------------------------- gradcheck, gradgradcheck

TINY = [
    DynamicCase("tiles", 2, 1, (3, 2), 4, (2, 2), num_kernels=2),
    DynamicCase("samples", 2, 2, (3, 3), 2, (2, 1), (1, 2), (1, 0), groups=2, num_kernels=3),
    DynamicCase("mixing_weights", 1, 2, (2, 2), 4, (2, 1), temperature=None, bias=False, num_kernels=2),
]


@pytest.mark.parametrize("case", TINY, ids=case_id)
def test_gradcheck(case):
    tensors = case.tensors(torch.float64)

    def function(*values):
        return case.call(dynamic_conv2d, [*values, *[None] * (4 - len(values))])

    tensors = [t for t in tensors if t is not None]
    assert torch.autograd.gradcheck(function, tensors)
    # All elements of the Hessian at once, by a random projection: one by one they take minutes.
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_aggregate_gradcheck(bias):
    _, *tensors = replace(TINY[0], bias=bias).tensors(torch.float64)
    tensors = [t for t in tensors if t is not None]

    def function(*values):
        return tuple(t for t in aggregate_kernels(*values, temperature=0.5) if t is not None)

    assert torch.autograd.gradcheck(function, tensors)
    # All elements of the Hessian at once, by a random projection: one by one they take minutes.
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_third_derivative_exists():
    tensors = TINY[0].tensors(torch.float64)
    out = TINY[0].call(dynamic_conv2d, tensors)
    for _ in range(3):
        (out,) = torch.autograd.grad(out.pow(2).sum(), tensors[2], create_graph=True)
    expected_tensors = TINY[0].tensors(torch.float64)
    expected = TINY[0].call(reference.dynamic_conv2d, expected_tensors)
    for _ in range(3):
        (expected,) = torch.autograd.grad(expected.pow(2).sum(), expected_tensors[2], create_graph=True)
    torch.testing.assert_close(out, expected)


# ----------------------------------------------------------------------------------------- opcheck, compile, autocast


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["all_different", "no_bias_mixing_weights_as_given", "depthwise"])
def test_opcheck(name, channels_last):
    case = CASES[name]
    tensors = case.tensors(torch.float32, channels_last)
    stride, padding, dilation, groups, temperature = case.geometry
    geometry = (list(stride), list(padding), list(dilation), groups, temperature)
    torch.library.opcheck(OPS.dynamic_conv2d, (*tensors, *geometry))
    grad = torch.randn(case.batch, case.out_channels, *case.out_size)
    detached = [None if t is None else t.detach() for t in tensors]
    torch.library.opcheck(OPS.dynamic_conv2d_backward, (grad, *detached, *geometry, [True, True, False, case.bias]))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_opcheck_aggregate(bias):
    _, *tensors = replace(CASES["small"], bias=bias).tensors(torch.float32)
    torch.library.opcheck(OPS.aggregate_kernels, (*tensors, 2.0))
    detached = [None if t is None else t.detach() for t in tensors]
    kernels, biases = aggregate_kernels(*detached)
    torch.library.opcheck(OPS.aggregate_kernels_backward, (kernels, biases, *detached, 2.0, [True, True, bias]))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic):
    layer = DynamicConv2d(4, 6, 3, padding=1)
    compiled = op_checks.assert_compiles(layer, dynamic)
    # The temperature is a tensor of the graph, not a constant in it.
    for module in (layer, compiled):
        module.set_temperature(0.1)
    x = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(compiled(x), layer(x))


def test_export():
    op_checks.assert_exports(DynamicConv2d(3, 4, 3, padding=1), "dynamic_conv2d")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_attention_alone(dtype):
    case = CASES["small"]
    tensors = case.tensors(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = case.call(dynamic_conv2d, tensors)
        kernels, biases = aggregate_kernels(*tensors[1:], temperature=2.0)
    assert out.dtype == kernels.dtype == biases.dtype == dtype
    expected = [t.detach() if i == 2 else t.detach().to(dtype) for i, t in enumerate(tensors)]
    assert torch.equal(out, case.call(dynamic_conv2d, expected))
    assert torch.equal(kernels, aggregate_kernels(*expected[1:], temperature=2.0)[0])
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


def test_autocast_leaves_float64_alone():
    case = CASES["small"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert case.call(dynamic_conv2d, case.tensors(torch.float64)).dtype == torch.float64


# ---------------------------------------------------------------------------------------- layouts, batches, gradients


@pytest.mark.parametrize(
    ("path", "name"),
    [("tiles", "all_different"), ("samples", "all_different"), ("depthwise", "depthwise_several_vectors")],
)
def test_channels_last_in_channels_last_out(path, name, monkeypatch):
    monkeypatch.setenv("DYNCONV_DYNAMIC_CONV2D", path)
    op_checks.assert_keeps_channels_last(CASES[name], dynamic_conv2d)


@pytest.mark.parametrize("name", ["all_different", "depthwise_several_vectors"])
def test_non_contiguous_arguments(name):
    op_checks.assert_takes_any_strides(CASES[name], dynamic_conv2d)


@pytest.mark.parametrize("name", ["small", "depthwise_same_size"])
def test_expanded_gradient(name):
    op_checks.assert_takes_an_expanded_gradient(CASES[name], dynamic_conv2d, reference.dynamic_conv2d)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_empty_batch(dtype):
    case = replace(CASES["all_different"], batch=0)
    tensors = case.tensors(dtype)
    out = case.call(dynamic_conv2d, tensors)
    kernels, biases = aggregate_kernels(*tensors[1:], temperature=2.0)
    assert out.shape == (0, case.out_channels, *case.out_size)
    assert kernels.shape == (0, *tensors[1].shape[1:]) and biases.shape == (0, case.out_channels)
    (out.sum() + kernels.sum() + biases.sum()).backward()
    for t in tensors:
        assert t.grad.shape == t.shape and (t.grad == 0).all()


@pytest.mark.parametrize(
    ("path", "name"),
    [("tiles", "all_different"), ("samples", "all_different"), ("depthwise", "depthwise_several_vectors")],
)
@pytest.mark.parametrize("wanted", range(4), ids=DynamicCase.names)
def test_only_the_gradient_asked_for(wanted, path, name, monkeypatch):
    monkeypatch.setenv("DYNCONV_DYNAMIC_CONV2D", path)
    case = CASES[name]
    op_checks.assert_computes_only_the_gradient(wanted, case, dynamic_conv2d, reference.dynamic_conv2d)
    detached = [t.detach() for t in case.tensors(torch.float64)]
    mask = [i == wanted for i in range(4)]
    out = case.call(dynamic_conv2d, detached)
    grads = OPS.dynamic_conv2d_backward(out, *detached, *case.geometry, mask)
    assert [g.numel() > 0 for g in grads] == mask
    if wanted > 0:
        kernels, biases = aggregate_kernels(*detached[1:])
        grads = OPS.aggregate_kernels_backward(kernels, biases, *detached[1:], None, mask[1:])
        assert [g.numel() > 0 for g in grads] == mask[1:]


def test_frozen_everything_has_no_graph():
    case = CASES["small"]
    assert not case.call(dynamic_conv2d, [t.detach() for t in case.tensors(torch.float32)]).requires_grad


def test_mixed_kernels_are_never_saved():
    case = DynamicCase("many samples", batch=64, channels=16, size=(4, 4), out_channels=16)
    tensors = case.tensors(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = case.call(dynamic_conv2d, tensors)
    given = {t.data_ptr() for t in tensors}
    assert saved and all(t.data_ptr() in given for t in saved)
    assert max(t.numel() for t in saved) < case.batch * tensors[1][0].numel()
    out.sum().backward()


@pytest.mark.parametrize("path", ["tiles", "samples", "depthwise"])
@pytest.mark.parametrize(
    "name", ["all_different", "depthwise_several_vectors", "one_sample_shared_by_threads", "several_tiles_of_pixels"]
)
def test_same_result_for_any_number_of_threads_and_runs(name, path, monkeypatch):
    monkeypatch.setenv("DYNCONV_DYNAMIC_CONV2D", path)
    op_checks.assert_gives_the_same_for_any_threads(CASES[name], dynamic_conv2d)


def test_more_than_2_to_31_elements():
    # Zero pages cost nothing until they are written, and the stride reads few of them.
    batch, channels, size = 65600, 32, 32
    assert batch * channels * size * size > 2**31
    x = torch.zeros(batch, channels, size, size, dtype=torch.bfloat16)
    x[-1, :, 0, 0], x[0, 3, 0, 0] = 2.0, 5.0
    weight = torch.ones(2, 4, channels, 1, 1, dtype=torch.bfloat16)
    attention = torch.zeros(batch, 2)
    attention[-1] = 1.0
    attention[0, 1] = 3.0
    out = dynamic_conv2d(x, weight, attention, stride=size)
    assert out.shape == (batch, 4, 1, 1)
    assert out[0].flatten().tolist() == [15.0] * 4 and out[-1].flatten().tolist() == [128.0] * 4
    assert (out[1:-1] == 0).all()


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_other_cpu_levels(level):
    op_checks.assert_passes_at_cpu_level(level, "test_dynamic_conv2d")


@pytest.mark.parametrize("level", ["none", "avx512_bf16", "amx"])
def test_bfloat16_levels(level):
    op_checks.assert_passes_at_bfloat16_level(level, "test_dynamic_conv2d")


def test_unknown_bfloat16_level():
    code = "import dynconv_ext; dynconv_ext.build_info()"
    environment = {**os.environ, "DYNCONV_CPU_BFLOAT16": "fast"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    assert "DYNCONV_CPU_BFLOAT16: got fast, expected none, avx512_bf16 or amx" in done.stderr


def test_non_finite_values_stay_where_they_belong():
    # Tiles are padded up to the CPU's matrix units; a NaN times the padding's zero must not spread.
    case = DynamicCase("odd", 10, 5, (5, 7), 21, num_kernels=3)
    values = case.tensors(torch.float32)
    with torch.no_grad():
        values[0][3, 0, 0, 0] = values[0][4, 4, 4, 6] = values[1][1, 20, 4, 2, 2] = float("nan")
        values[1][0, 0, 0, 0, 0] = float("inf")
    grad = torch.ones(case.batch, case.out_channels, *case.out_size)
    grad[7, 2, 3, 3] = float("nan")
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [t.detach().to(dtype).requires_grad_() for t in values]
        out = case.call(dynamic_conv2d, tensors)
        out.backward(grad.to(dtype))
        results.append([out.detach(), *(t.grad for t in tensors)])
    assert not results[0][0].isfinite().all() and results[0][0].isfinite().any()
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected.isfinite(), got.isfinite())


# ------------------------------------------------------------------------------------------------------------ errors


def arguments(**changes):
    values = {
        "input": torch.zeros(2, 4, 6, 5),
        "weight": torch.zeros(3, 6, 2, 3, 3),
        "attention": torch.zeros(2, 3),
        "bias": torch.zeros(3, 6),
        "groups": 2,
        "temperature": 2.0,
    }
    return {**values, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"input": torch.zeros(4, 6, 5)}, RuntimeError, r"input: got shape \(4, 6, 5\), expected 4 dimensions"),
        ({"input": 3}, TypeError, "input: got int, expected a Tensor"),
        ({"input": torch.zeros(2, 4, 6, 5, dtype=torch.int32)}, RuntimeError, r"input.dtype: got Int, expected float32"),
        ({"input": torch.zeros(2, 5, 6, 5)}, RuntimeError, r"input.shape\[1\]: got 5, expected a positive multiple of groups = 2"),
        ({"input": torch.zeros(2, 4, 2, 5)}, RuntimeError, "input: got size 2 x 5, which gives an output of 0 x 3"),
        ({"weight": torch.zeros(6, 2, 3, 3)}, RuntimeError, r"weight: got shape \(6, 2, 3, 3\), expected 5 dimensions \(K, O, C / groups, kH, kW\)"),
        ({"weight": torch.zeros(3, 6, 4, 3, 3)}, RuntimeError, r"weight.shape\[2\]: got 4, expected input.shape\[1\] / groups = 2"),
        ({"weight": torch.zeros(3, 7, 2, 3, 3)}, RuntimeError, r"bias.shape\[1\]: got 6, expected weight.shape\[1\] = 7"),
        ({"weight": torch.zeros(3, 7, 2, 3, 3), "bias": None}, RuntimeError, r"weight.shape\[1\]: got 7, expected a multiple of groups = 2"),
        ({"weight": torch.zeros(3, 6, 2, 0, 3)}, RuntimeError, r"weight: got shape \(3, 6, 2, 0, 3\), expected every size >= 1"),
        ({"weight": torch.zeros(3, 6, 2, 3, 3).half()}, RuntimeError, "weight.dtype: got float16, expected input.dtype = float32"),
        ({"attention": torch.zeros(3)}, RuntimeError, r"attention: got shape \(3,\), expected 2 dimensions \(N, K\)"),
        ({"attention": torch.zeros(3, 3)}, RuntimeError, r"attention.shape\[0\]: got 3, expected input.shape\[0\] = 2"),
        ({"attention": torch.zeros(2, 4)}, RuntimeError, r"attention.shape\[1\]: got 4, expected weight.shape\[0\] = 3"),
        ({"attention": torch.zeros(2, 3).double()}, RuntimeError, "attention.dtype: got float64, expected weight.dtype = float32"),
        ({"attention": torch.zeros(2, 3, device="meta")}, RuntimeError, "attention: got a tensor on meta, expected the device of input, cpu"),
        ({"attention": None}, TypeError, "attention: got NoneType, expected a Tensor"),
        ({"bias": torch.zeros(6)}, RuntimeError, r"bias: got shape \(6,\), expected 2 dimensions \(K, O\)"),
        ({"bias": torch.zeros(4, 6)}, RuntimeError, r"bias.shape\[0\]: got 4, expected weight.shape\[0\] = 3"),
        ({"bias": torch.zeros(3, 6).double()}, RuntimeError, "bias.dtype: got float64, expected weight.dtype = float32"),
        ({"bias": "no"}, TypeError, "bias: got str, expected a Tensor or None"),
        ({"stride": 0}, RuntimeError, r"stride: got \(0, 0\), expected values >= 1"),
        ({"stride": "2"}, TypeError, "stride: got '2', expected an int or a pair"),
        ({"padding": -1}, RuntimeError, r"padding: got \(-1, -1\), expected values >= 0"),
        ({"padding": (1, 2, 3)}, TypeError, r"padding: got \(1, 2, 3\), expected an int or a pair"),
        ({"dilation": (1, 0)}, RuntimeError, r"dilation: got \(1, 0\), expected values >= 1"),
        ({"groups": 0}, RuntimeError, "groups: got 0, expected at least 1"),
        ({"groups": 2.5}, TypeError, "groups: got 2.5, expected an int"),
        ({"temperature": 0.0}, RuntimeError, r"temperature: got 0, expected a finite number > 0, or None"),
        ({"temperature": float("nan")}, RuntimeError, "temperature: got nan, expected a finite number > 0"),
        ({"temperature": float("inf")}, RuntimeError, "temperature: got inf, expected a finite number > 0"),
        ({"temperature": "hot"}, TypeError, "temperature: got 'hot', expected a number or None"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(changes, error, text):
    dynamic_conv2d(**arguments())
    with pytest.raises(error, match=text):
        dynamic_conv2d(**arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"weight": torch.zeros(3, 6)}, RuntimeError, r"weight: got shape \(3, 6\), expected 5 dimensions"),
        ({"weight": 1}, TypeError, "weight: got int, expected a Tensor"),
        ({"weight": torch.zeros(3, 6, 2, 3, 3, dtype=torch.int64)}, RuntimeError, "weight.dtype: got Long, expected float32"),
        ({"attention": torch.zeros(2, 4)}, RuntimeError, r"attention.shape\[1\]: got 4, expected weight.shape\[0\] = 3"),
        ({"attention": torch.zeros(2, 3, device="meta")}, RuntimeError, "attention: got a tensor on meta, expected the device of weight, cpu"),
        ({"bias": torch.zeros(3, 5)}, RuntimeError, r"bias.shape\[1\]: got 5, expected weight.shape\[1\] = 6"),
        ({"temperature": -1}, RuntimeError, "temperature: got -1, expected a finite number > 0"),
    ],
)  # fmt: skip
def test_aggregate_errors_name_the_argument(changes, error, text):
    given = {k: v for k, v in arguments(**changes).items() if k not in ("input", "groups")}
    with pytest.raises(error, match=text):
        aggregate_kernels(**given)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda g: g[:, :2], r"grad_out.shape\[1\]: got 2, expected weight.shape\[1\] = 6"),
        (lambda g: g.double(), "grad_out.dtype: got float64"),
        (lambda g: g[0], "grad_out: got shape"),
    ],
)
def test_backward_operator_checks_its_gradient(change, text):
    a = arguments()
    with pytest.raises(RuntimeError, match=text):
        OPS.dynamic_conv2d_backward(
            change(torch.zeros(2, 6, 4, 3)), a["input"], a["weight"], a["attention"], a["bias"], (1, 1), (0, 0),
            (1, 1), 2, 2.0, [True] * 4,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ module


def test_module_is_its_formula():
    layer = DynamicConv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), groups=2, num_kernels=3, temperature=2.0)
    x = torch.randn(5, 6, 9, 8)
    hidden = torch.relu(x.mean((2, 3)) @ layer.fc1.weight.T + layer.fc1.bias)
    logits = hidden @ layer.fc2.weight.T + layer.fc2.bias
    expected = reference.dynamic_conv2d(x, layer.weight, logits, layer.bias, (2, 1), (1, 0), groups=2, temperature=2.0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    assert "groups=2" in repr(layer) and "num_kernels=3" in repr(layer)
    assert "bias=False" in repr(DynamicConv2d(3, 4, 1, bias=False))


def test_module_starts_like_conv2d():
    torch.manual_seed(0)
    layer, conv = DynamicConv2d(16, 32, 3), nn.Conv2d(16, 32, 3)
    bound = conv.weight.detach().abs().max().item()
    for kernel in layer.weight:
        assert 0.95 * bound < kernel.abs().max().item() < 1.05 * bound
    assert not torch.equal(layer.weight[0], layer.weight[1])


def test_temperature_is_saved_and_annealed():
    layer = DynamicConv2d(4, 4, 3, temperature=31.0)
    temperatures = []
    for progress in (0.0, 1 / 6, 1 / 3, 0.7, 1.0):
        layer.anneal(progress)
        temperatures.append(layer.temperature.item())
    assert temperatures == pytest.approx([31.0, 16.0, 1.0, 1.0, 1.0])
    layer.anneal(0.25, until=0.5)
    assert layer.temperature.item() == pytest.approx(16.0)
    other = DynamicConv2d(4, 4, 3)
    other.load_state_dict(layer.state_dict())
    assert other.temperature.item() == pytest.approx(16.0)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(other(x), layer(x))
    other.set_temperature(0.01)
    assert not torch.allclose(other(x), layer(x))
    layer.reset_parameters()
    assert layer.temperature.item() == 31.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_module_in_another_dtype(dtype):
    layer = DynamicConv2d(4, 6, 3, padding=1, dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(torch.randn(2, 4, 5, 5, dtype=dtype)).dtype == dtype


def test_module_under_autocast():
    layer = DynamicConv2d(4, 6, 3, padding=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(torch.randn(2, 4, 5, 5))
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("call_it", "text"),
    [
        (lambda: DynamicConv2d(5, 4, 3, groups=2), "in_channels: got 5, expected a positive multiple of groups = 2"),
        (lambda: DynamicConv2d(4, 0, 3), "out_channels: got 0"),
        (lambda: DynamicConv2d(4, 4, 3, groups=0), "groups: got 0, expected at least 1"),
        (lambda: DynamicConv2d(4, 4, 3, num_kernels=0), "num_kernels: got 0, expected at least 1"),
        (lambda: DynamicConv2d(4, 4, 3, temperature=0), "temperature: got 0, expected a finite number > 0"),
        (lambda: DynamicConv2d(4, 4, 3).set_temperature(float("inf")), "temperature: got inf"),
        (lambda: DynamicConv2d(4, 4, 3).anneal(1.5), "progress: got 1.5, expected 0 <= progress <= 1"),
        (lambda: DynamicConv2d(4, 4, 3).anneal(0.5, until=0), "until: got 0, expected 0 < until <= 1"),
    ],
)
def test_module_errors(call_it, text):
    with pytest.raises(ValueError, match=text):
        call_it()


def test_layer_in_channels_last_and_other_types():
    layer = DynamicConv2d(3, 8, 3, padding=1)
    x = torch.randn(2, 3, 6, 5)
    expected = layer(x)
    assert layer.to(memory_format=torch.channels_last) is layer
    out = layer(x.contiguous(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected)
    weight = layer.weight
    layer.double().to(memory_format=torch.channels_last)
    assert layer.weight is weight and weight.shape == (4, 8, 3, 3, 3)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    torch.testing.assert_close(layer(x.double()).float(), expected)
    assert layer.to("meta").weight.shape == (4, 8, 3, 3, 3)
