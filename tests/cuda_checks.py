# SPDX-License-Identifier: BSD-3-Clause
"""Checks that every operator's CUDA backend must pass: on the host emulation, and on a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import op_checks
from op_cases import TOLERANCE, ConvCase, relative_error
from op_checks import Operator

EMULATION = Path(__file__).parent / "cuda_emulation"


def run_emulated(monkeypatch: pytest.MonkeyPatch, cases: str, mode: str, *options: str) -> None:
    """Runs a file of emulated cases in a process of its own, under the mode's sanitizers."""
    monkeypatch.syspath_prepend(str(EMULATION))
    import build
    import operators

    path = os.pathsep.join([str(EMULATION), str(EMULATION.parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("DYNCONV_EMULATED_OPERATORS", str(operators.build_operators(mode)))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, EMULATION / cases]
    result = build.run(command, mode, timeout=3000)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-8000:]


# ------------------------------------------------------------------------------------------------------------- GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def on_gpu(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Leaves of their own on the GPU, of the same values and layouts."""
    return [None if t is None else t.detach().cuda().requires_grad_() for t in tensors]


def there_and_back(function: Operator) -> Operator:
    """The function of tensors on the CPU, computed on the GPU; gradients take the same way."""

    def call(*arguments: Any) -> Tensor:
        return function(*(a.cuda() if isinstance(a, Tensor) else a for a in arguments)).cpu()

    return call


def needs_memory(gigabytes: float) -> None:
    """Skips the test where the GPU has less free memory."""
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free memory on the GPU, which has {free / 1e9:.1f}")


def gradient_of_output(case: ConvCase, dtype: torch.dtype) -> Tensor:
    """On the GPU; made before what must not wait for the host's memory."""
    return op_checks.random_like(torch.empty(case.out_shape, dtype=dtype, device="cuda"))


def both_directions(
    case: ConvCase, operator: Operator, tensors: Sequence[Tensor | None], grad_out: Tensor
) -> list[Tensor]:
    """The output and the gradients of all tensors, as the operator made them."""
    out = case.call(operator, tensors)
    return [out.detach(), *torch.autograd.grad(out, [t for t in tensors if t is not None], grad_out)]


def assert_rounds_to_tf32_only_where_allowed(case: ConvCase, operator: Operator, reference: Operator) -> None:
    """To be called where TF32 is allowed; products are exact where it is not."""
    tensors = on_gpu(case.tensors(torch.float32))
    rounded = case.call(operator, tensors)
    torch.set_float32_matmul_precision("highest")
    exact = case.call(operator, tensors)
    expected = case.call(reference, op_checks.in_double(tensors))
    assert relative_error(exact, expected) <= TOLERANCE[torch.float32] < relative_error(rounded, expected)


def assert_gives_the_same_bits(case: ConvCase, operator: Operator, dtype: torch.dtype, channels_last: bool) -> None:
    """Run for run; between the runs other work fills the caching allocator's memory and the device's queues."""
    results, grad = [], gradient_of_output(case, dtype)
    for run in range(3):
        tensors = on_gpu(case.tensors(dtype, channels_last))
        results.append(both_directions(case, operator, tensors, grad))
        torch.full((1 << (18 + run),), float("nan"), device="cuda")
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def assert_gradients_check(function: Callable[..., Any], tensors: Sequence[Tensor | None]) -> None:
    """gradcheck, and gradgradcheck by a random projection, of a function of float64 tensors on the GPU."""
    given = [t for t in on_gpu(tensors) if t is not None]
    absent = [None] * (len(tensors) - len(given))

    def call(*values: Tensor) -> Any:
        return function([*values, *absent])

    assert torch.autograd.gradcheck(call, given, eps=1e-7, atol=1e-5)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True, eps=1e-7, atol=1e-4)


def assert_follows_the_current_stream(case: ConvCase, operator: Operator) -> None:
    """The operator waits for what comes before it on its own stream, and what comes after it there sees its results."""
    tensors = on_gpu(case.tensors(torch.float32))
    grad = gradient_of_output(case, torch.float32)

    def twice_the_input() -> list[Tensor]:
        doubled = [(2 * tensors[0]).detach().requires_grad_(), *tensors[1:]]
        return [2 * t for t in both_directions(case, operator, doubled, grad)]

    expected = twice_the_input()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        results = twice_the_input()
    stream.synchronize()
    for got, wanted in zip(results, expected, strict=True):
        assert relative_error(got, wanted) <= TOLERANCE[torch.float32]


def assert_captures_in_a_graph(case: ConvCase, operator: Operator, dtype: torch.dtype) -> None:
    """Forward and backward, replayed on other values than those captured."""
    tensors = on_gpu(case.tensors(dtype))
    others = on_gpu(case.tensors(dtype, seed=1))
    grad = gradient_of_output(case, dtype)
    expected = both_directions(case, operator, others, grad)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        both_directions(case, operator, tensors, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both_directions(case, operator, tensors, grad)
    with torch.no_grad():
        for to, value in zip(tensors, others, strict=True):
            if to is not None:
                to.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted in zip(results, expected, strict=True):
        assert relative_error(got, wanted) <= TOLERANCE[dtype]


def assert_never_waits(case: ConvCase, operator: Operator) -> None:
    """Neither direction makes the host wait for the device."""
    tensors = on_gpu(case.tensors(torch.float32))
    grad = gradient_of_output(case, torch.float32)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_directions(case, operator, tensors, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
