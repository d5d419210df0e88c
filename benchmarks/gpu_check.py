# SPDX-License-Identifier: BSD-3-Clause
"""Compares the operators on a device with their references, on the geometries of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import dynconv_ext
from dynamic_cases import DYNAMIC_CASES
from gpu_timing import TORCH_DTYPE, Device, first_line, precision
from op_cases import DEFORM_CASES, TOLERANCE, TOLERANCE_TF32, relative_error

# What --check calls an operator; its geometries.
CASES: dict[str, tuple[str, Sequence[Any]]] = {
    "deform": ("deform_conv2d", DEFORM_CASES),
    "dynamic": ("dynamic_conv2d", DYNAMIC_CASES),
}


def find_cases(names: Sequence[str]) -> list[tuple[str, Any]]:
    """Operators and cases of names such as deform:small.

    Raises:
        SystemExit: a name is unknown; lists those there are.
    """
    known = {f"{short}:{case.name}": (operator, case) for short, (operator, cases) in CASES.items() for case in cases}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"--check: got {', '.join(unknown)}, expected names of {', '.join(known)}")
    return [known[name] for name in names]


def check_case(operator: str, case: Any, dtype: str, channels_last: bool, device: Device) -> list[str]:
    """What is wrong with the operator's value and gradients."""
    kind = TORCH_DTYPE[dtype]
    label = f"{operator} {case.name} {dtype} {'channels_last' if channels_last else 'contiguous'}"
    # Coordinates and attention stay wide beside 16-bit types.
    here = case.tensors(kind, channels_last, torch.float64 if kind == torch.float64 else torch.float32)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in here]
    moved = [None if t is None else t.detach().to(device.name).requires_grad_() for t in here]
    with precision(dtype):
        out = case.call(getattr(dynconv_ext, operator), moved)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(kind)
        out.backward(grad.to(device.name))
    device.synchronize()
    expected = case.call(getattr(dynconv_ext.reference, operator), exact)
    expected.backward(grad.double())
    tolerance = TOLERANCE_TF32 if dtype == "float32-tf32" else TOLERANCE[kind]
    pairs = [("out", out, expected)]
    named = zip(case.names, moved, exact, strict=True)
    pairs += [(f"grad_{name}", a.grad, b.grad) for name, a, b in named if a is not None]
    wrong = []
    for name, a, b in pairs:
        error = relative_error(a.detach().cpu(), b.detach())
        if not error <= tolerance:
            wrong.append(f"{label}: {name} is off by {error:.2e}, allowed {tolerance:.0e}")
    print(label, flush=True)
    return wrong


def check(names: Sequence[str], device: Device) -> list[str]:
    """Checks the named cases in every dtype and both layouts; what is wrong, in lines."""
    wrong: list[str] = []
    for operator, case in find_cases(names):
        for dtype in TORCH_DTYPE:
            for channels_last in (False, True):
                try:
                    wrong += check_case(operator, case, dtype, channels_last, device)
                except Exception as error:
                    wrong.append(f"{operator} {case.name} {dtype}: {first_line(error)}")
                    if not device.alive():
                        return wrong
    return wrong
