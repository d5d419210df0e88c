# SPDX-License-Identifier: BSD-3-Clause
"""deform_conv2d's CUDA backend: on the host emulation, and on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import op_checks
from dynconv_ext import DeformableConv2d, deform_conv2d, reference
from emulated import run_emulated
from op_cases import DEFORM_CASES, TOLERANCE, TOLERANCE_TF32, DeformCase, case_id, relative_error

CASES = {case.name: case for case in DEFORM_CASES}

# -------------------------------------------------------------------------------------------------------- emulation


def test_kernels_under_address_and_undefined_sanitizer(monkeypatch):
    run_emulated(monkeypatch, "deform_conv2d_cases.py", "address")


def test_kernels_have_no_races(monkeypatch):
    run_emulated(monkeypatch, "deform_conv2d_cases.py", "thread", "-k", "races")


# ------------------------------------------------------------------------------------------------------------- GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def on_gpu(tensors):
    return [None if t is None else t.detach().cuda().requires_grad_() for t in tensors]


def check(case: DeformCase, tensors, tolerance: float) -> None:
    op_checks.assert_matches_reference(case, deform_conv2d, reference.deform_conv2d, on_gpu(tensors), tolerance)


@pytest.fixture
def tf32():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", DEFORM_CASES, ids=case_id)
def test_matches_reference(case, dtype, channels_last):
    check(case, case.tensors(dtype, channels_last), TOLERANCE[dtype])


@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", DEFORM_CASES, ids=case_id)
def test_tf32_matches_reference(case, channels_last, tf32):
    check(case, case.tensors(torch.float32, channels_last), TOLERANCE_TF32)


@needs_gpu
def test_tf32_only_where_allowed(tf32):
    case = replace(CASES["several_tiles"], out_channels=64)
    tensors = on_gpu(case.tensors(torch.float32))
    rounded = case.call(deform_conv2d, tensors)
    torch.set_float32_matmul_precision("highest")
    exact = case.call(deform_conv2d, tensors)
    expected = case.call(reference.deform_conv2d, op_checks.in_double(tensors))
    assert relative_error(exact, expected) <= TOLERANCE[torch.float32] < relative_error(rounded, expected)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_offset_beside_half(dtype):
    case = CASES["all_different"]
    check(case, case.tensors(dtype, offset_dtype=torch.float32), TOLERANCE[dtype])


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["small", "all_different", "offset_groups_cross_groups", "several_tiles"])
def test_deterministic(name, dtype, deterministic):
    case = CASES[name]
    check(case, case.tensors(dtype), TOLERANCE[dtype])
    results = []
    for _ in range(3):
        tensors = on_gpu(case.tensors(dtype))
        out = case.call(deform_conv2d, tensors)
        out.backward(op_checks.random_like(out))
        results.append([out.detach(), *(t.grad for t in tensors)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_gpu
@pytest.mark.parametrize("name", ["small", "offset_groups_cross_groups"])
def test_gradcheck(name):
    case = replace(CASES[name], batch=1, size=(4, 3), spread=0.9)
    tensors = on_gpu(case.tensors(torch.float64))
    assert torch.autograd.gradcheck(lambda *values: case.call(deform_conv2d, values), tensors, eps=1e-7, atol=1e-5)
    assert torch.autograd.gradgradcheck(
        lambda *values: case.call(deform_conv2d, values), tensors, fast_mode=True, eps=1e-7, atol=1e-4
    )


@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_opcheck(channels_last):
    case = CASES["all_different"]
    input, offset, weight, bias, mask = on_gpu(case.tensors(torch.float32, channels_last))
    torch.library.opcheck(
        torch.ops.dynconv_ext.deform_conv2d, (input, offset, weight, bias, *map(list, case.geometry), mask, False)
    )


@needs_gpu
def test_compile():
    layer = DeformableConv2d(8, 16, 3, padding=1).cuda()
    torch.nn.init.normal_(layer.offset_conv.weight, std=0.1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 9, 9, device="cuda")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_lowers_input_and_weight_only(dtype):
    case = CASES["small"]
    tensors = on_gpu(case.tensors(torch.float32))
    with torch.autocast("cuda", dtype=dtype):
        out = case.call(deform_conv2d, tensors)
    lowered = [t.detach().to(dtype) if i in (0, 2, 3) else t.detach() for i, t in enumerate(tensors)]
    assert out.dtype == dtype and torch.equal(out, case.call(deform_conv2d, lowered))


@needs_gpu
def test_arguments_with_gaps():
    case = CASES["all_different"]
    op_checks.assert_matches_reference(
        case,
        deform_conv2d,
        reference.deform_conv2d,
        [t.detach().cuda().repeat_interleave(2, dim=0)[::2].requires_grad_() for t in case.tensors(torch.float64)],
        TOLERANCE[torch.float64],
    )


@needs_gpu
@pytest.mark.parametrize("wanted", range(5), ids=DeformCase.names)
def test_only_the_gradient_asked_for(wanted):
    case = CASES["all_different"]
    tensors = on_gpu(case.tensors(torch.float64))
    expected = op_checks.in_double(tensors)
    case.call(reference.deform_conv2d, expected).square().sum().backward()
    for i, t in enumerate(tensors):
        t.requires_grad_(i == wanted)
    case.call(deform_conv2d, tensors).square().sum().backward()
    for i, (t, e) in enumerate(zip(tensors, expected, strict=True)):
        assert (t.grad is not None) == (i == wanted)
        if i == wanted:
            torch.testing.assert_close(t.grad, e.grad, rtol=1e-9, atol=1e-9)


@needs_gpu
def test_follows_the_current_stream():
    case = replace(CASES["several_tiles"], batch=8)
    tensors = [t.detach().cuda() for t in case.tensors(torch.float32)]
    expected = case.call(deform_conv2d, tensors)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The operator must wait for what comes before it on its own stream.
        torch.cuda._sleep(20_000_000)
        changed = [tensors[0] * 2, *tensors[1:]]
        out = case.call(deform_conv2d, changed)
    stream.synchronize()
    bias = tensors[3][:, None, None]
    torch.testing.assert_close(out - bias, 2 * (expected - bias), rtol=1e-4, atol=1e-4)


@needs_gpu
def test_graph_capture():
    case = CASES["several_tiles"]
    tensors = on_gpu(case.tensors(torch.float32))

    def step():
        out = case.call(deform_conv2d, tensors)
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    expected = [t.detach().clone() for t in step()]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for t in results:
        t.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(results, expected, strict=True):
        assert relative_error(a, b) <= TOLERANCE[torch.float32]


@needs_gpu
def test_more_than_2_to_31_elements():
    batch, channels, size = 5, 64, 2600
    assert batch * channels * size * size > 2**31
    x = torch.zeros(batch, channels, size, size, dtype=torch.bfloat16, device="cuda")
    x[-1, -1, -1, -1] = 3.0
    offset = torch.zeros(batch, 2, size, size, device="cuda")
    weight = torch.ones(2, channels, 1, 1, dtype=torch.bfloat16, device="cuda")
    out = deform_conv2d(x, offset, weight)
    assert out[-1, :, -1, -1].tolist() == [3.0, 3.0] and out.float().sum().item() == 6.0


@needs_gpu
def test_nan_coordinate_is_seen():
    offset = torch.zeros(1, 2, 4, 4, device="cuda")
    offset[0, 0, 1, 2] = float("nan")
    x = torch.ones(1, 2, 4, 4, device="cuda", requires_grad=True)
    out = deform_conv2d(x, offset, torch.ones(3, 2, 1, 1, device="cuda"))
    assert out[0, :, 1, 2].isnan().all() and out.isnan().sum() == 3
    out.sum().backward()
    assert x.grad.isfinite().all()


@needs_gpu
def test_tensor_on_another_device():
    x, offset, weight = torch.ones(1, 1, 3, 3), torch.zeros(1, 2, 3, 3), torch.ones(1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="offset: got a tensor on cpu, expected the device of input, cuda:0"):
        deform_conv2d(x.cuda(), offset, weight.cuda())
