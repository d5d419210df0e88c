# SPDX-License-Identifier: BSD-3-Clause
"""CUDA backend of aggregate_kernels and dynamic_conv2d: on the host emulation, and on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cuda_checks
import op_checks
from cuda_checks import needs_gpu, on_gpu, run_emulated, there_and_back
from dynamic_cases import ANY_WAY, CUDA_WAYS, DYNAMIC_CASES, DynamicCase
from dynconv_ext import DynamicConv2d, aggregate_kernels, dynamic_conv2d, reference
from op_cases import TOLERANCE, TOLERANCE_TF32, case_id, relative_error

CASES = {case.name: case for case in DYNAMIC_CASES}

# -------------------------------------------------------------------------------------------------------- emulation


def test_kernels_under_address_and_undefined_sanitizer(monkeypatch):
    run_emulated(monkeypatch, "dynamic_conv2d_cases.py", "address")


def test_kernels_have_no_races(monkeypatch):
    run_emulated(monkeypatch, "dynamic_conv2d_cases.py", "thread", "-k", "races")


# ------------------------------------------------------------------------------------------------------------- GPU


def check(case: DynamicCase, tensors, tolerance: float) -> None:
    # One kernel under a softmax has the weight 1 whatever its logit.
    zero = ("attention",) if case.num_kernels == 1 and case.temperature else ()
    op_checks.assert_matches_reference(case, dynamic_conv2d, reference.dynamic_conv2d, on_gpu(tensors), tolerance, zero)


@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", DYNAMIC_CASES, ids=case_id)
def test_matches_reference(case, dtype, channels_last):
    check(case, case.tensors(dtype, channels_last), TOLERANCE[dtype])


@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", DYNAMIC_CASES, ids=case_id)
def test_tf32_matches_reference(case, channels_last, tf32):
    check(case, case.tensors(torch.float32, channels_last), TOLERANCE_TF32)


# Enough work for a GPU that every way of sharing it among blocks is taken, as for networks' layers.
LAYERS = [
    DynamicCase("stem", 16, 3, (62, 61), 64, stride=(2, 2)),
    DynamicCase("wide_maps", 16, 64, (62, 62), 64),
    DynamicCase("middle", 33, 128, (16, 16), 128),
    DynamicCase("middle_with_stride", 33, 64, (31, 31), 128, stride=(2, 2)),
    DynamicCase("small_maps", 64, 256, (8, 8), 256),
    DynamicCase("smallest_maps_many_kernels", 64, 128, (4, 4), 256, num_kernels=8),
    DynamicCase("depthwise", 16, 96, (31, 31), 96, (5, 5), padding=(2, 2), groups=96),
    DynamicCase("groups", 16, 128, (15, 15), 128, groups=4),
]


@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", LAYERS, ids=case_id)
def test_layers_match_reference(case, dtype, channels_last):
    check(case, case.tensors(dtype, channels_last), TOLERANCE[dtype])


@needs_gpu
@pytest.mark.parametrize("case", LAYERS, ids=case_id)
def test_tf32_layers_match_reference(case, tf32):
    check(case, case.tensors(torch.float32, channels_last=True), TOLERANCE_TF32)


@needs_gpu
@pytest.mark.parametrize("way", CUDA_WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_gives_the_same(monkeypatch, way, dtype):
    monkeypatch.setenv("DYNCONV_DYNAMIC_CONV2D_CUDA", way)
    check(ANY_WAY, ANY_WAY.tensors(dtype), TOLERANCE[dtype])


@needs_gpu
def test_tf32_only_where_allowed(tf32):
    cuda_checks.assert_rounds_to_tf32_only_where_allowed(
        CASES["several_chunks_of_channels"], dynamic_conv2d, reference.dynamic_conv2d
    )


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_attention_beside_half(dtype):
    case = CASES["all_different"]
    check(case, case.tensors(dtype, attention_dtype=torch.float32), TOLERANCE[dtype])


BANKS = [
    *(CASES[name] for name in ("all_different", "one_kernel", "sixteen_kernels", "one_sample_one_tile")),
    replace(CASES["several_chunks_of_channels"], batch=37, bias=False),
    replace(CASES["large_channels_and_map"], batch=70, num_kernels=8, temperature=None),
    replace(CASES["large_channels_and_map"], batch=9, num_kernels=16),
    replace(CASES["all_different"], num_kernels=300),
]


@needs_gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", BANKS, ids=lambda case: f"{case.name}-{case.batch}x{case.num_kernels}")
def test_aggregate_kernels_matches_reference(case, dtype):
    zero = ("attention",) if case.num_kernels == 1 else ()
    op_checks.assert_aggregates_like_reference(
        aggregate_kernels, reference.aggregate_kernels, on_gpu(case.tensors(dtype)[1:]), case.temperature, zero
    )


@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["all_different", "depthwise", "several_tiles_with_stride", "large_channels_and_map"])
def test_same_bits_in_every_run(name, dtype, channels_last):
    cuda_checks.assert_gives_the_same_bits(CASES[name], dynamic_conv2d, dtype, channels_last)


@needs_gpu
@pytest.mark.parametrize("case", LAYERS, ids=case_id)
def test_same_bits_of_layers_in_every_run(case):
    cuda_checks.assert_gives_the_same_bits(case, dynamic_conv2d, torch.bfloat16, channels_last=True)


@needs_gpu
@pytest.mark.parametrize("name", ["small", "depthwise", "no_bias_mixing_weights_as_given"])
def test_gradcheck(name):
    case = replace(CASES[name], batch=2, size=(3, 3))
    cuda_checks.assert_gradients_check(lambda values: case.call(dynamic_conv2d, values), case.tensors(torch.float64))


@needs_gpu
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_aggregate_gradcheck(bias):
    case = DynamicCase("tiny", 2, 2, out_channels=2, kernel=(2, 1), num_kernels=3, bias=bias)

    def function(values):
        return tuple(t for t in aggregate_kernels(*values, temperature=0.5) if t is not None)

    cuda_checks.assert_gradients_check(function, case.tensors(torch.float64)[1:])


@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_opcheck(channels_last):
    case = CASES["all_different"]
    tensors = on_gpu(case.tensors(torch.float32, channels_last))
    stride, padding, dilation, groups, temperature = case.geometry
    geometry = (list(stride), list(padding), list(dilation), groups, temperature)
    torch.library.opcheck(torch.ops.dynconv_ext.dynamic_conv2d, (*tensors, *geometry, False))
    torch.library.opcheck(torch.ops.dynconv_ext.aggregate_kernels, (*tensors[1:], temperature))


@needs_gpu
def test_compile():
    layer = DynamicConv2d(8, 16, 3, padding=1).cuda()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8, 9, 9, device="cuda")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    gradients = []
    for module in (layer, compiled):
        layer.zero_grad()
        module(x).square().sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_attention_alone(dtype):
    case = CASES["small"]
    tensors = on_gpu(case.tensors(torch.float32))
    with torch.autocast("cuda", dtype=dtype):
        out = case.call(dynamic_conv2d, tensors)
        kernels, biases = aggregate_kernels(*tensors[1:], temperature=2.0)
    assert out.dtype == kernels.dtype == biases.dtype == dtype
    lowered = [t.detach() if i == 2 else t.detach().to(dtype) for i, t in enumerate(tensors)]
    assert torch.equal(out, case.call(dynamic_conv2d, lowered))
    assert torch.equal(kernels, aggregate_kernels(*lowered[1:], temperature=2.0)[0])
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


@needs_gpu
@pytest.mark.parametrize("name", ["all_different", "depthwise", "several_tiles_with_stride"])
def test_channels_last_in_channels_last_out(name):
    op_checks.assert_keeps_channels_last(CASES[name], there_and_back(dynamic_conv2d))


@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_last_gradient", "contiguous_gradient"])
@pytest.mark.parametrize("name", ["small", "depthwise", "large_channels_and_map"])
def test_gradient_in_the_other_layout(name, channels_last):
    op_checks.assert_takes_a_gradient_in_the_other_layout(
        CASES[name], there_and_back(dynamic_conv2d), reference.dynamic_conv2d, channels_last
    )


@needs_gpu
def test_arguments_with_gaps():
    case = CASES["all_different"]
    op_checks.assert_matches_reference(
        case,
        dynamic_conv2d,
        reference.dynamic_conv2d,
        [t.detach().cuda().repeat_interleave(2, dim=0)[::2].requires_grad_() for t in case.tensors(torch.float64)],
        TOLERANCE[torch.float64],
    )


@needs_gpu
@pytest.mark.parametrize("name", ["all_different", "depthwise"])
@pytest.mark.parametrize("wanted", range(4), ids=DynamicCase.names)
def test_only_the_gradient_asked_for(wanted, name):
    op_checks.assert_computes_only_the_gradient(
        wanted, CASES[name], there_and_back(dynamic_conv2d), reference.dynamic_conv2d
    )


@needs_gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_empty_batch(dtype):
    tensors = on_gpu(replace(CASES["all_different"], batch=0).tensors(dtype))
    out = CASES["all_different"].call(dynamic_conv2d, tensors)
    kernels, biases = aggregate_kernels(*tensors[1:], temperature=2.0)
    assert out.shape[0] == kernels.shape[0] == biases.shape[0] == 0
    (out.sum() + kernels.sum() + biases.sum()).backward()
    assert all((t.grad == 0).all() for t in tensors)


@needs_gpu
@pytest.mark.parametrize("case", [LAYERS[2], LAYERS[6]], ids=case_id)
def test_follows_the_current_stream(case):
    cuda_checks.assert_follows_the_current_stream(case, dynamic_conv2d)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [LAYERS[0], LAYERS[2], LAYERS[4], LAYERS[6]], ids=case_id)
def test_graph_capture(case, dtype):
    cuda_checks.assert_captures_in_a_graph(case, dynamic_conv2d, dtype)


@needs_gpu
@pytest.mark.parametrize("case", [LAYERS[2], LAYERS[6]], ids=case_id)
def test_host_never_waits(case):
    cuda_checks.assert_never_waits(case, dynamic_conv2d)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_of_samples_are_never_in_memory(dtype):
    case = DynamicCase("many samples", 64, 256, (8, 8), 256)
    tensors = on_gpu(case.tensors(dtype, channels_last=True))
    grad = torch.randn(case.out_shape, dtype=dtype, device="cuda")
    kernels_of_samples = case.batch * tensors[1][0].nbytes
    results = sum(t.nbytes for t in (*tensors, grad))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = case.call(dynamic_conv2d, tensors)
    torch.autograd.grad(out, tensors, grad)
    torch.cuda.synchronize()
    workspace = torch.cuda.max_memory_allocated() - before - results
    assert workspace < kernels_of_samples / 4, f"{workspace / 1e6} MB beside kernels of {kernels_of_samples / 1e6} MB"


# ------------------------------------------------------------------------------------------ more than 2^31 elements


@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_input_of_more_than_2_to_31_elements(channels_last):
    cuda_checks.needs_memory(16)
    batch, channels, size = 5, 64, 2600
    assert batch * channels * size * size > 2**31
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(batch, channels, size, size, dtype=torch.bfloat16, device="cuda", memory_format=layout).zero_()
    x[-1, -1, -1, -1], x[0, 0, 0, 0] = 3.0, 2.0
    x.requires_grad_()
    weight = torch.ones(2, 2, channels, 1, 1, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    attention = torch.tensor([[1.0, 0.0]] * 4 + [[0.5, 1.5]], device="cuda", requires_grad=True)
    out = dynamic_conv2d(x, weight, attention)
    assert out[-1, :, -1, -1].tolist() == [6.0, 6.0] and out[0, :, 0, 0].tolist() == [2.0, 2.0]
    assert out.float().sum().item() == 16.0
    grad = torch.zeros_like(out)
    grad[-1, 1, -1, -1], grad[0, 0, 0, 0] = 1.0, 5.0
    del out
    grad_x, grad_weight, grad_attention = torch.autograd.grad(
        dynamic_conv2d(x, weight, attention), (x, weight, attention), grad
    )
    assert (grad_x[-1, :, -1, -1] == 2.0).all() and (grad_x[0, :, 0, 0] == 5.0).all()
    # In parts: a sum makes a float32 copy of what it adds up.
    assert sum(image.sum(dtype=torch.float32).item() for image in grad_x) == channels * 7.0
    assert grad_attention.tolist() == [[10.0, 10.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [3.0, 3.0]]
    assert grad_weight[:, 1, -1].flatten().tolist() == [1.5, 4.5]
    assert grad_weight[:, 0, 0].flatten().tolist() == [10.0, 0.0]
    assert grad_weight.float().sum().item() == 16.0


@needs_gpu
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_output_of_more_than_2_to_31_elements(channels_last):
    cuda_checks.needs_memory(16)
    batch, out_channels, size = 3, 128, 2400
    assert batch * out_channels * size * size > 2**31
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.zeros(batch, 3, size, size, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=layout)
    x[-1, -1, -1, -1] = 2.0
    x.requires_grad_()
    weight = torch.ones(1, out_channels, 3, 3, 3, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    attention = torch.tensor([[1.0], [2.0], [3.0]], device="cuda", requires_grad=True)
    out = dynamic_conv2d(x, weight, attention, padding=1)
    assert (out[-1, :, -2:, -2:] == 6.0).all()
    assert sum(image.count_nonzero().item() for image in out.detach()) == out_channels * 4
    grad = torch.zeros_like(out)
    grad[-1, -1, -1, -1] = 1.0
    grad_x, grad_weight, grad_attention = torch.autograd.grad(out, (x, weight, attention), grad)
    assert (grad_x[-1, :, -2:, -2:] == 3.0).all() and grad_x.count_nonzero().item() == 12
    assert grad_weight.count_nonzero().item() == 1 and grad_weight[0, -1, -1, 1, 1].item() == 6.0
    assert grad_attention.tolist() == [[0.0], [0.0], [2.0]]


@needs_gpu
def test_depthwise_of_more_than_2_to_31_elements():
    cuda_checks.needs_memory(24)
    batch, channels, size = 5, 64, 2600
    x = torch.zeros(batch, channels, size, size, dtype=torch.bfloat16, device="cuda")
    x[-1, -1, -1, -1] = 2.0
    x.requires_grad_()
    weight = torch.ones(1, channels, 1, 3, 3, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    attention = torch.ones(batch, 1, device="cuda", requires_grad=True)
    out = dynamic_conv2d(x, weight, attention, padding=1, groups=channels)
    assert (out[-1, -1, -2:, -2:] == 2.0).all()
    assert sum(image.count_nonzero().item() for image in out.detach()) == 4
    grad = torch.zeros_like(out)
    grad[-1, -1, -1, -1] = 1.0
    grad_x, grad_weight, grad_attention = torch.autograd.grad(out, (x, weight, attention), grad)
    assert (grad_x[-1, -1, -2:, -2:] == 1.0).all()
    assert sum(image.count_nonzero().item() for image in grad_x) == 4
    assert grad_weight.count_nonzero().item() == 1 and grad_weight[0, -1, 0, 1, 1].item() == 2.0
    assert grad_attention.flatten().tolist() == [0.0, 0.0, 0.0, 0.0, 2.0]


@needs_gpu
def test_aggregate_kernels_of_more_than_2_to_31_elements():
    cuda_checks.needs_memory(16)
    batch, outputs, row = 70000, 8, 4096
    assert batch * outputs * row > 2**31
    weight = torch.ones(2, outputs, row, 1, 1, dtype=torch.bfloat16, device="cuda")
    weight[1] = 2.0
    weight.requires_grad_()
    attention = torch.zeros(batch, 2, device="cuda")
    attention[-1, 1], attention[0, 0] = 3.0, 5.0
    attention.requires_grad_()
    kernels, _ = aggregate_kernels(weight, attention)
    assert (kernels[-1] == 6.0).all() and (kernels[0] == 5.0).all()
    assert kernels[1].count_nonzero() == kernels[-2].count_nonzero() == 0
    grad = torch.zeros_like(kernels)
    grad[-1, -1, -1], grad[0, 0, 0] = 1.0, 4.0
    grad_weight, grad_attention = torch.autograd.grad(kernels, (weight, attention), grad)
    assert grad_attention[-1].tolist() == [1.0, 2.0] and grad_attention[0].tolist() == [4.0, 8.0]
    assert grad_attention.count_nonzero().item() == 4
    assert grad_weight[1, -1, -1].item() == 3.0 and grad_weight[0, 0, 0].item() == 20.0
    assert grad_weight.count_nonzero().item() == 2


# ----------------------------------------------------------------------------------------------------------- values


@needs_gpu
def test_softmax_of_large_logits():
    x = torch.ones(1, 4, 3, 3, device="cuda")
    weight = torch.arange(2.0, device="cuda").reshape(2, 1, 1, 1, 1).expand(2, 4, 4, 1, 1)
    assert (dynamic_conv2d(x, weight, torch.tensor([[-3e38, 3e38]], device="cuda"), temperature=1.0) == 4).all()
    nan = torch.tensor([[float("nan"), 0.0]], device="cuda")
    assert dynamic_conv2d(x, weight, nan, temperature=1.0).isnan().all()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("in_weight", [False, True], ids=["in_images", "in_weight"])
@pytest.mark.parametrize("channels", [5, 9], ids=["direct", "mixed"])
def test_non_finite_values_stay_where_they_belong(channels, in_weight, dtype):
    # Without padding, where an infinite weight may meet a zero or nothing at all.
    case = DynamicCase("odd", 6, channels, (15, 17), channels, (3, 2), padding=(0, 0), num_kernels=3)
    op_checks.assert_keeps_non_finite_values_apart(
        case, there_and_back(dynamic_conv2d), dynamic_conv2d, dtype, in_weight
    )


@needs_gpu
def test_agrees_with_the_cpu():
    case = CASES["all_different"]
    for dtype in (torch.float32, torch.float64):
        tensors = [t.detach() for t in case.tensors(dtype)]
        out, expected = case.call(there_and_back(dynamic_conv2d), tensors), case.call(dynamic_conv2d, tensors)
        assert relative_error(out, expected) <= TOLERANCE[dtype]


@needs_gpu
def test_tensor_on_another_device():
    x, weight, attention = torch.ones(2, 1, 3, 3), torch.ones(2, 1, 1, 1, 1), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="attention: got a tensor on cpu, expected the device of input, cuda:0"):
        dynamic_conv2d(x.cuda(), weight.cuda(), attention)
    with pytest.raises(RuntimeError, match="attention: got a tensor on cpu, expected the device of weight, cuda:0"):
        aggregate_kernels(weight.cuda(), attention)
