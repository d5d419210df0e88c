# SPDX-License-Identifier: BSD-3-Clause
"""Which device and precision a run uses."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from .config import DEVICES, PRECISIONS, StudyError


def resolve_device(name: str) -> str:
    """The device to use for "auto", "cpu", "cuda" or "mps".

    Raises:
        StudyError: The device is unknown or this machine (or this build of torch) does not have it.
    """
    if name not in DEVICES:
        raise StudyError(f"device: got {name!r}, expected one of {', '.join(DEVICES)}")
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise StudyError(f"device: got 'cuda', but {why} (torch {torch.__version__}); use cpu or auto")
    if name == "mps" and not torch.backends.mps.is_available():
        raise StudyError(
            f"device: got 'mps', but torch finds no Apple GPU (torch {torch.__version__}); use cpu or auto"
        )
    return name


def resolve_precision(name: str, device: str) -> str:
    """The precision to use on `device` for "auto", "float32" or "bf16".

    "auto" is bf16 where matrix products in bfloat16 have instructions of their own, float32 elsewhere: emulated
    bfloat16 is slower than float32.

    Raises:
        StudyError: The precision is unknown.
    """
    if name not in PRECISIONS:
        raise StudyError(f"precision: got {name!r}, expected one of {', '.join(PRECISIONS)}")
    if name != "auto":
        return name
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device == "cpu":
        return "bf16" if _cpu_multiplies_bf16() else "float32"
    return "float32"


def describe_hardware(device: str) -> str:
    """The processor's name and, on the CPU, the number of threads torch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads" if device == "cpu" else name


def _cpu_multiplies_bf16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return bool(flags & {"amx_bf16", "avx512_bf16"})
