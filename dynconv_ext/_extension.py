# SPDX-License-Identifier: BSD-3-Clause
"""Loads the compiled libraries; the one place that says what to do when one is missing."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch

_MEND = (
    "Build it again with the torch you run:  pip install --no-build-isolation -e .  (in the source folder), "
    "or reinstall dynconv-ext. dynconv_ext.reference works without it."
)
_MEND_CUDA = (
    "With the CUDA toolkit (nvcc) installed, build it with the torch you run:  "
    "DYNCONV_CUDA=1 pip install --no-build-isolation -e .  (in the source folder). Until then move the tensors to the "
    "CPU."
)


def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"dynconv_ext.{name}"), ""
    except ImportError as error:
        return None, f"cannot be loaded: {error}"


def _load_cuda() -> tuple[ModuleType | None, str]:
    if importlib.util.find_spec("dynconv_ext._cuda") is None:
        return None, "is missing: this build has none"
    if torch.version.cuda is None:
        return None, f"is not loaded: torch {torch.__version__} has no CUDA"
    return _load("_cuda")


_C, _why = _load("_C")
loaded: bool = _C is not None
# Only after _C, which declares the operators that _cuda has kernels for.
_cuda, _why_no_cuda = _load_cuda() if loaded else (None, "is not loaded without dynconv_ext._C")


def require() -> ModuleType:
    """The compiled module ``_C``.

    Raises:
        ImportError: the library is missing or cannot be loaded; says why, and the command that mends it.
    """
    if _C is None:
        raise ImportError(f"dynconv_ext._C, the compiled library, {_why}. {_MEND}")
    return _C


def no_cuda(operator: str) -> Callable[..., NoReturn]:
    """What stands in for an operator's CUDA kernel without the CUDA library: raises, saying why and what mends it."""

    def unavailable(*args: Any) -> NoReturn:
        info = require().build_info()
        raise ImportError(
            f"{operator}: got CUDA tensors, but dynconv_ext._cuda, the compiled library of CUDA kernels, "
            f"{_why_no_cuda}. (dynconv_ext was built by {info['compiler']} with torch {info['torch_built_with']}, "
            f"torch {torch.__version__} runs.) {_MEND_CUDA}"
        )

    return unavailable


def build_info() -> dict[str, Any]:
    """How the libraries were built and what they use here.

    Returns:
        ``compiler``, ``torch_built_with``, ``torch_at_least``, ``torch_running``, ``cuda`` (version that the CUDA
        kernels were compiled with, None without them), ``cuda_archs`` (what for, as in TORCH_CUDA_ARCH_LIST; [] without
        them), ``cpu_level`` (baseline, avx2 or avx512; the environment variable DYNCONV_CPU_LEVEL lowers it),
        ``cpu_bfloat16`` (none, avx512_bf16 or amx: what multiplies bfloat16; the environment variable
        DYNCONV_CPU_BFLOAT16 decides), ``native_bfloat16`` (whether torch multiplies it natively).

    Raises:
        ImportError: the compiled library is missing.
    """
    info = {**require().build_info(), "torch_running": torch.__version__}
    return info if _cuda is None else {**info, **_cuda.build_info()}
