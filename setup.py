# SPDX-License-Identifier: BSD-3-Clause
"""Builds dynconv_ext._C (schemas, CPU kernels, pybind11 module).

The CUDA library, dynconv_ext._cuda, joins it where csrc holds CUDA kernels, nvcc is found and torch has CUDA.

Environment: DYNCONV_CUDA=auto|1|0, TORCH_CUDA_ARCH_LIST, MAX_JOBS, DEBUG=1.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
# The stable ABI of torch 2.11: one binary serves every later torch.
TARGET = 0x020B000000000000
DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")


def sources(*patterns: str, exclude: str = "") -> list[str]:
    found = sorted(p for pattern in patterns for p in CSRC.glob(pattern) if not exclude or exclude not in p.name)
    return [str(p.relative_to(ROOT)) for p in found]


def want_cuda() -> bool:
    """Whether to build the CUDA library: DYNCONV_CUDA, then what is there."""
    choice = os.environ.get("DYNCONV_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"DYNCONV_CUDA: got {choice!r}, expected auto, 1 or 0")
    kernels = sources("*/*.cu")
    if choice == "1" and not kernels:
        raise SystemExit("DYNCONV_CUDA=1: this version of dynconv-ext has no CUDA kernels yet (no csrc/*/*.cu)")
    return choice != "0" and bool(kernels)


def extensions() -> list[Extension]:
    if want_cuda():
        raise SystemExit("csrc holds CUDA kernels, but setup.py does not build them yet")
    common = ["-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
    optimise = ["-O0", "-g"] if DEBUG else ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
    return [
        CppExtension(
            "dynconv_ext._C",
            sources("*.cpp", "*/*.cpp", exclude="_cuda"),
            include_dirs=[str(CSRC), pybind11.get_include()],
            define_macros=[("TORCH_STABLE_ONLY", None), ("TORCH_TARGET_VERSION", hex(TARGET))],
            extra_compile_args={"cxx": common + optimise},
            depends=[str(p) for p in CSRC.glob("**/*.h")],
        )
    ]


if __name__ == "__main__":
    print(
        f"dynconv-ext: torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"CUDA library: {'yes' if want_cuda() else 'no'}, {'debug' if DEBUG else 'release'} build"
    )
    vision = [f"dynconv_vision.{p}" for p in find_packages("python/dynconv_vision")]
    setup(
        ext_modules=extensions(),
        packages=["dynconv_ext", "dynconv_ext.reference", "dynconv_vision", *vision],
        cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    )
