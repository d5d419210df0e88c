# SPDX-License-Identifier: BSD-3-Clause
"""Loads the compiled libraries; the one place that says what to do when one is missing."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

_MEND = (
    "Build it again with the torch you run:  pip install --no-build-isolation -e .  (in the source folder), "
    "or reinstall dynconv-ext. dynconv_ext.reference works without it."
)


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("dynconv_ext._C"), ""
    except ImportError as error:
        return None, str(error)


_C, _why = _load()
loaded: bool = _C is not None


def require() -> ModuleType:
    """The compiled module ``_C``.

    Raises:
        ImportError: the library is missing or cannot be loaded; says why, and the command that mends it.
    """
    if _C is None:
        raise ImportError(f"dynconv_ext._C, the compiled library, cannot be loaded: {_why}. {_MEND}")
    return _C


def build_info() -> dict[str, Any]:
    """How the libraries were built and what they use here.

    Returns:
        ``compiler``, ``torch_built_with``, ``torch_at_least``, ``torch_running``, ``cuda`` (version or None),
        ``cuda_archs``, ``cpu_level`` (baseline, avx2 or avx512; the environment variable DYNCONV_CPU_LEVEL lowers it),
        ``cpu_bfloat16`` (none, avx512_bf16 or amx: what dynamic_conv2d multiplies bfloat16 with; the environment
        variable DYNCONV_CPU_BFLOAT16 decides), ``native_bfloat16`` (whether torch multiplies it natively).

    Raises:
        ImportError: the compiled library is missing.
    """
    return {**require().build_info(), "torch_running": torch.__version__}
