# SPDX-License-Identifier: BSD-3-Clause
"""Runs tests of the CUDA kernels on the host emulation, in a process of their own under the sanitizers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

EMULATION = Path(__file__).parent / "cuda_emulation"


def run_emulated(monkeypatch, cases: str, mode: str, *options: str) -> None:
    """Runs a file of tests/cuda_emulation with pytest; fails with its output.

    Args:
        monkeypatch: The calling test's.
        cases: The file's name.
        mode: "address" or "thread", see tests/cuda_emulation/build.py.
        options: More arguments for pytest.
    """
    monkeypatch.syspath_prepend(str(EMULATION))
    import build
    import operators

    path = os.pathsep.join([str(EMULATION), str(EMULATION.parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("DYNCONV_EMULATED_OPERATORS", str(operators.build_operators(mode)))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, EMULATION / cases]
    result = build.run(command, mode, timeout=3000)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-8000:]
