# SPDX-License-Identifier: BSD-3-Clause
"""Checks that every operator and its module must pass. An operator is given as a function of a case's tensors."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import dynconv_ext
from op_cases import TOLERANCE, ConvCase, relative_error

Operator = Callable[..., Tensor]


def in_double(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Leaves of their own with the same values in float64."""
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def random_like(t: Tensor, seed: int = 7) -> Tensor:
    """Normal values of t's shape and dtype, the same in every dtype but for rounding."""
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(t)


def assert_matches_reference(
    case: ConvCase,
    operator: Operator,
    reference: Operator,
    tensors: Sequence[Tensor | None],
    tolerance: float,
    zero_gradients: Sequence[str] = (),
) -> None:
    """Output and all gradients are the reference's in float64; gradients named zero are exactly zero."""
    expected_tensors = in_double(tensors)
    out, expected = case.call(operator, tensors), case.call(reference, expected_tensors)
    assert out.dtype == tensors[0].dtype and out.shape == case.out_shape
    assert relative_error(out, expected) <= tolerance
    grad = random_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    for name, got, wanted in zip(case.names, tensors, expected_tensors, strict=True):
        if got is None:
            continue
        assert got.grad.dtype == got.dtype
        if name in zero_gradients:
            assert (got.grad == 0).all(), name
        else:
            assert relative_error(got.grad, wanted.grad) <= tolerance, name


def assert_aggregates_like_reference(
    aggregate: Callable[..., tuple[Tensor, Tensor | None]],
    reference: Callable[..., tuple[Tensor, Tensor | None]],
    tensors: Sequence[Tensor | None],
    temperature: float | None,
    zero_gradients: Sequence[str] = (),
) -> None:
    """aggregate_kernels' outputs and gradients, of weight, attention, bias, are the reference's in float64."""
    dtype = tensors[0].dtype
    expected_tensors = in_double(tensors)
    outputs = [t for t in aggregate(*tensors, temperature=temperature) if t is not None]
    expected = [t for t in reference(*expected_tensors, temperature=temperature) if t is not None]
    assert len(outputs) == len(expected) == (1 if tensors[2] is None else 2)
    for got, wanted in zip(outputs, expected, strict=True):
        assert got.dtype == dtype and relative_error(got, wanted) <= TOLERANCE[dtype]
    grads = [random_like(t) for t in outputs]
    torch.autograd.backward(outputs, grads)
    torch.autograd.backward(expected, [g.double() for g in grads])
    for name, got, wanted in zip(("weight", "attention", "bias"), tensors, expected_tensors, strict=True):
        if got is None:
            continue
        assert got.grad.dtype == got.dtype
        if name in zero_gradients:
            assert (got.grad == 0).all(), name
        else:
            assert relative_error(got.grad, wanted.grad) <= TOLERANCE[dtype], name


def assert_compiles(layer: nn.Module, dynamic: bool) -> nn.Module:
    """The compiled layer gives the layer's outputs and gradients, for batches of two sizes; the compiled layer."""
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        x = torch.randn(batch, layer.in_channels, 8, 8)
        expected, got = layer(x), compiled(x)
        torch.testing.assert_close(got, expected)
        layer.zero_grad()
        compiled.zero_grad()
        expected.square().sum().backward()
        got.square().sum().backward()
        for (name, a), b in zip(layer.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    return compiled


def assert_exports(layer: nn.Module, operator_name: str) -> None:
    """The exported layer calls the operator, and takes a batch of another size than the example's."""
    layer.eval()
    x = torch.randn(2, layer.in_channels, 8, 8)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert any(operator_name in str(node.target) for node in program.graph.nodes)
    x = torch.randn(5, layer.in_channels, 8, 8)
    torch.testing.assert_close(program.module()(x), layer(x))


def assert_keeps_channels_last(case: ConvCase, operator: Operator) -> None:
    """A channels_last input gives a channels_last output and gradient."""
    tensors = case.tensors(torch.float32, channels_last=True)
    out = case.call(operator, tensors)
    assert out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
    # Not .grad: that is put into the layout of its tensor.
    (grad,) = torch.autograd.grad(out.sum(), tensors[0])
    assert grad.is_contiguous(memory_format=torch.channels_last) and not grad.is_contiguous()


def assert_takes_any_strides(case: ConvCase, operator: Operator) -> None:
    """Arguments and a gradient with gaps and turned dimensions give what contiguous ones give."""
    tensors = [t.detach() for t in case.tensors(torch.float64)]
    expected_tensors = [t.clone().requires_grad_() for t in tensors]

    def strided(t: Tensor) -> Tensor:
        """The same values, every second element of a larger tensor, last two dimensions swapped in memory."""
        if t.dim() == 1:
            return torch.stack([t, t], dim=1)[:, 0].requires_grad_()
        big = t.transpose(-1, -2).contiguous().repeat_interleave(2, dim=1)[:, ::2]
        return big.transpose(-1, -2).requires_grad_()

    tensors = [strided(t) for t in tensors]
    assert not any(t.is_contiguous() for t in tensors)
    out, expected = case.call(operator, tensors), case.call(operator, expected_tensors)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn(expected.shape[::-1], dtype=torch.float64).permute(3, 2, 1, 0)
    out.backward(grad)
    expected.backward(grad)
    for name, a, b in zip(case.names, tensors, expected_tensors, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10, msg=name)


def assert_takes_an_expanded_gradient(case: ConvCase, operator: Operator, reference: Operator) -> None:
    """A gradient of stride 0, as a sum gives it."""
    a, b = case.tensors(torch.float64), case.tensors(torch.float64)
    case.call(operator, a).sum().backward()
    case.call(reference, b).sum().backward()
    for name, x, y in zip(case.names, a, b, strict=True):
        torch.testing.assert_close(x.grad, y.grad, msg=name)


def assert_takes_a_gradient_in_the_other_layout(
    case: ConvCase, operator: Operator, reference: Operator, channels_last: bool
) -> None:
    """A channels_last gradient of a contiguous output, or with channels_last the reverse."""
    tensors, expected = case.tensors(torch.float32, channels_last), case.tensors(torch.float32)
    out = case.call(operator, tensors)
    layout = torch.contiguous_format if channels_last else torch.channels_last
    grad = random_like(torch.empty(out.shape)).contiguous(memory_format=layout)
    assert out.stride() != grad.stride()
    out.backward(grad)
    case.call(reference, expected).backward(grad)
    for name, got, wanted in zip(case.names, tensors, expected, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-5, msg=name)


def assert_keeps_non_finite_values_apart(
    case: ConvCase, operator: Operator, other: Operator, dtype: torch.dtype, in_weight: bool
) -> None:
    """NaN in input and gradient, or in the second tensor, reach the same results as in another operator."""
    values = [t.detach().to(dtype) for t in case.tensors(torch.float32)]
    grad = torch.ones(case.out_shape, dtype=dtype)
    names = ["output", *case.names]
    if in_weight:
        values[1].flatten()[0], values[1].flatten()[-9] = float("inf"), float("nan")
        # At the borders a weight may meet a zero, or nothing at all.
        names.remove(case.names[0])
    else:
        values[0][3, 0, 0, 0] = values[0][4, -1, -1, -1] = grad[-1, 2, 3, 3] = float("nan")
    results = []
    for function in (operator, other):
        tensors = [t.clone().requires_grad_() for t in values]
        out = case.call(function, tensors)
        out.backward(grad)
        results.append(dict(zip(("output", *case.names), (out.detach(), *(t.grad for t in tensors)), strict=True)))
    assert not results[1]["output"].isfinite().all() and results[1]["output"].isfinite().any()
    for name in names:
        differ = (results[0][name].isfinite() != results[1][name].isfinite()).sum().item()
        assert differ == 0, name


def assert_computes_only_the_gradient(wanted: int, case: ConvCase, operator: Operator, reference: Operator) -> None:
    """Where one tensor requires its gradient, it gets the reference's and the others get none."""
    tensors, expected = case.tensors(torch.float64), case.tensors(torch.float64)
    case.call(reference, expected).square().sum().backward()
    for i, t in enumerate(tensors):
        t.requires_grad_(i == wanted)
    case.call(operator, tensors).square().sum().backward()
    for i, (t, e) in enumerate(zip(tensors, expected, strict=True)):
        if i == wanted:
            torch.testing.assert_close(t.grad, e.grad, rtol=1e-9, atol=1e-9)
        else:
            assert t.grad is None


def assert_gives_the_same_for_any_threads(case: ConvCase, operator: Operator) -> None:
    """The same bits run for run, and the same values whatever the number of threads."""
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            tensors = case.tensors(torch.float32)
            out = case.call(operator, tensors)
            out.square().sum().backward()
            results.append([out.detach(), *(t.grad for t in tensors)])
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(results[1], results[3], strict=True):
        assert torch.equal(a, b)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert relative_error(a, b) <= TOLERANCE[torch.float32]


def assert_passes_at_cpu_level(level: str, test_module: str) -> None:
    """`check` of a test module on all its `CASES`, in a process of its own that uses the given instructions."""
    order = ["baseline", "avx2", "avx512"]
    if order.index(dynconv_ext.build_info()["cpu_level"]) < order.index(level):
        pytest.skip(f"this CPU lacks {level}")
    code = """
import importlib, sys
import dynconv_ext, op_cases
level, name = sys.argv[1:]
assert dynconv_ext.build_info()["cpu_level"] == level
tests = importlib.import_module(name)
for case in tests.CASES.values():
    for dtype, tolerance in op_cases.TOLERANCE.items():
        tests.check(case, case.tensors(dtype), tolerance)
"""
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "DYNCONV_CPU_LEVEL": level, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code, level, test_module], env=environment, check=True, timeout=300)


def assert_passes_at_bfloat16_level(level: str, test_module: str) -> None:
    """`check` of a test module on all its `CASES` in bfloat16, in a process of its own that multiplies it so."""
    code = """
import importlib, sys, torch
import dynconv_ext, op_cases
level, name = sys.argv[1:]
try:
    assert dynconv_ext.build_info()["cpu_bfloat16"] == level
except RuntimeError as error:
    sys.exit(str(error))
tests = importlib.import_module(name)
for case in tests.CASES.values():
    for channels_last in (False, True):
        tests.check(case, case.tensors(torch.bfloat16, channels_last), op_cases.TOLERANCE[torch.bfloat16])
"""
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "DYNCONV_CPU_BFLOAT16": level, "PYTHONPATH": path}
    command = [sys.executable, "-c", code, level, test_module]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
    if f"DYNCONV_CPU_BFLOAT16: got {level}, which this CPU lacks" in done.stderr:
        pytest.skip(f"this CPU lacks {level}")
    assert done.returncode == 0, done.stderr
