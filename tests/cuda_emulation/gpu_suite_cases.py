# SPDX-License-Identifier: BSD-3-Clause
"""The GPU suite's device parts, its operators being the emulated CUDA kernels.

Not collected by itself: test_gpu_suite.py runs it under the sanitizers, in a process of its own. The suite's timing, graphs
and peers need a GPU; its checks, its contenders of ours and its training steps run here, and their results are compared.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import operators

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import dynconv_ext
import gpu_check
import gpu_suite
from dynconv_ext._registration import pair
from gpu_timing import TORCH_DTYPE, Device, precision
from op_cases import TOLERANCE, relative_error

torch.ops.load_library(os.environ["DYNCONV_EMULATED_OPERATORS"])
# The emulation's threads are one thread of the host.
torch.set_num_threads(1)

DEVICE = Device("cpu", smoke=True)
BENCH = {"deform_conv2d": gpu_suite.bench_deform, "dynamic_conv2d": gpu_suite.bench_dynamic}
# Places among the operator's arguments: what autocast lowers; stride, padding, dilation.
LOWERED = {"deform_conv2d": (0, 2, 3), "dynamic_conv2d": (0, 1, 3)}
PAIRS = (4, 5, 6)


def emulated(name: str, calls: Counter) -> Callable[..., Tensor]:
    """dynconv_ext's function with the emulated operator in it; counts its calls with what allow_tf32 was."""

    def call(*values, **named) -> Tensor:
        allow_tf32 = values[0].dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        calls[allow_tf32] += 1
        arguments = list(values)
        for i in LOWERED[name]:
            if torch.is_autocast_enabled("cpu") and i < len(arguments) and arguments[i] is not None:
                arguments[i] = arguments[i].to(torch.get_autocast_dtype("cpu"))
        for i in PAIRS:
            if i < len(arguments):
                arguments[i] = pair("", arguments[i])
        named = {key: pair(key, value) if key == "padding" else value for key, value in named.items()}
        return getattr(operators, name)(allow_tf32)(*arguments, **named)

    return call


@pytest.fixture(params=operators.OPERATORS)
def operator(request, monkeypatch) -> str:
    """An operator, in whose place the suite finds the emulated one."""
    replace(monkeypatch, request.param, emulated(request.param, Counter()))
    return request.param


def replace(monkeypatch, name: str, function: Callable[..., Tensor]) -> None:
    for module in (dynconv_ext, sys.modules[f"dynconv_ext.{name}"], BENCH[name]):
        monkeypatch.setattr(module, name, function)


def short(operator: str) -> str:
    return operator.removesuffix("_conv2d")


# Ways to be wrong: of the value, and of the gradient of one argument alone.


def wrong_value(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *values, **named: function(*values, **named) * 1.1


def wrong_gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of the second argument: offset, or the bank of kernels."""

    def call(x, second, *values, **named) -> Tensor:
        second = second.view_as(second)
        if second.requires_grad:
            second.register_hook(lambda grad: grad * 1.1)
        return function(x, second, *values, **named)

    return call


# --------------------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("name", operators.OPERATORS)
def test_check(name, monkeypatch):
    calls = Counter()
    replace(monkeypatch, name, emulated(name, calls))
    assert gpu_suite.check([f"{short(name)}:small"], DEVICE) == []
    # Every dtype in both layouts, one of them TF32.
    assert calls == {True: 2, False: 2 * (len(TORCH_DTYPE) - 1)}


@pytest.mark.parametrize("wrong", [wrong_value, wrong_gradient])
def test_check_finds_a_wrong_kernel(operator, monkeypatch, wrong):
    replace(monkeypatch, operator, wrong(getattr(dynconv_ext, operator)))
    ((_, case),) = gpu_check.find_cases([f"{short(operator)}:small"])
    found = gpu_check.check_case(operator, case, "float32", False, DEVICE)
    name = "out" if wrong is wrong_value else f"grad_{case.names[1]}"
    assert any(f"{operator} small float32 contiguous: {name} is off by" in line for line in found), found


# ---------------------------------------------------------------------------------------------------------------- races


def race(operator: str, dtype: str, direction: str) -> dict[str, list[Tensor]]:
    """Races ours in both layouts; what each computed on the first set of inputs."""
    case = gpu_suite.Case(operator, "tiny", 2, 4, 3, 4, 4)
    with precision(dtype):
        entrants = gpu_suite.contenders(case, dtype, direction, DEVICE, True)
        results: dict[str, list[Tensor]] = {}

        def keep(name: str) -> None:
            found = entrants[name][0]()
            results[name] = found if isinstance(found, list) else [found]

        # One set of inputs: emulated kernels are slow.
        times, errors = DEVICE.race({name: [lambda name=name: keep(name)] for name in gpu_suite.OURS}, 0.0)
        assert errors == {} and list(times) == list(gpu_suite.OURS)
    return results


def expected(operator: str, dtype: str, direction: str, monkeypatch) -> dict[str, list[Tensor]]:
    with monkeypatch.context() as patch:
        replace(patch, operator, getattr(dynconv_ext.reference, operator))
        return race(operator, dtype, direction)


def differences(operator: str, dtype: str, direction: str, monkeypatch) -> list[float]:
    wanted = expected(operator, dtype, direction, monkeypatch)
    return [
        relative_error(a, b)
        for name, found in race(operator, dtype, direction).items()
        for a, b in zip(found, wanted[name], strict=True)
    ]


# The reference rounds to 16 bits here, too: twice the tolerance for one rounding.
def allowed(dtype: str) -> float:
    return 2 * TOLERANCE[TORCH_DTYPE[dtype]]


@pytest.mark.parametrize("direction", gpu_suite.DIRECTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_race(operator, monkeypatch, dtype, direction):
    found = differences(operator, dtype, direction, monkeypatch)
    tensors = {"deform_conv2d": 6, "dynamic_conv2d": 5}[operator] if direction == "forward+backward" else 1
    assert len(found) == 2 * tensors and max(found) <= allowed(dtype), found


@pytest.mark.parametrize(("wrong", "direction"), [(wrong_value, "forward"), (wrong_gradient, "forward+backward")])
def test_a_wrong_kernel_shows_in_a_race(operator, monkeypatch, wrong, direction):
    replace(monkeypatch, operator, wrong(getattr(dynconv_ext, operator)))
    assert max(differences(operator, "float32", direction, monkeypatch)) > allowed("float32")


# -------------------------------------------------------------------------------------------------------- training step


def gradients_of_a_step(model: nn.Module, dtype: str) -> list[Tensor]:
    run = gpu_suite.networks.bench_network.step(model, dtype, "cpu", batch=2, image_size=6)
    run()
    before = [p.detach().clone() for p in model.parameters()]
    run()
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    return [p.grad for p in model.parameters()]


def network(operator: str) -> nn.Module:
    torch.manual_seed(0)
    if operator == "deform_conv2d":
        layer = dynconv_ext.DeformableConv2d(3, 4, 3, padding=1)
        nn.init.normal_(layer.offset_conv.weight, std=0.2)
    else:
        layer = dynconv_ext.DynamicConv2d(3, 4, 3, padding=1, temperature=1.0)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(4 * 36, 50)).train()


def gradients_of_a_reference_step(operator: str, dtype: str, monkeypatch) -> list[Tensor]:
    with monkeypatch.context() as patch:
        replace(patch, operator, getattr(dynconv_ext.reference, operator))
        return gradients_of_a_step(network(operator), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_step(operator, monkeypatch, dtype):
    wanted = gradients_of_a_reference_step(operator, dtype, monkeypatch)
    found = gradients_of_a_step(network(operator), dtype)
    errors = [relative_error(a, b) for a, b in zip(found, wanted, strict=True)]
    # Two steps of Adam, which turns a gradient's sign into a step: 16 bits only show that the step is much the same.
    assert max(errors) <= (1e-3 if dtype == "float32" else 0.2), errors


def test_a_wrong_kernel_shows_in_a_training_step(operator, monkeypatch):
    wanted = gradients_of_a_reference_step(operator, "float32", monkeypatch)
    replace(monkeypatch, operator, wrong_value(getattr(dynconv_ext, operator)))
    found = gradients_of_a_step(network(operator), "float32")
    assert max(relative_error(a, b) for a, b in zip(found, wanted, strict=True)) > 1e-2
