# SPDX-License-Identifier: BSD-3-Clause
"""Building the CUDA library: what setup.py decides and says, and that no kernel spills registers to local memory.

The spills are read from ptxas' report. Where DYNCONV_NVCC_LOG names the log of an installation made with `pip install -v`
and NVCC_APPEND_FLAGS=-Xptxas=-v (as in .ci/run), from there; otherwise every kernel is compiled here, and the report kept
under build/ptxas until a source changes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
ARCHS = ["sm_80", "sm_90"]
SOURCES = sorted(str(p.relative_to(ROOT)) for p in CSRC.glob("*/*.cu"))


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    spec = importlib.util.spec_from_file_location("dynconv_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for the module's annotations.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------- what setup.py decides


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def toolkit(setup_py, monkeypatch, tmp_path) -> Path:
    """A toolkit whose nvcc is 13.0, a torch with CUDA 13.2, kernels to build, no GPU, nothing set."""
    for variable in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "DYNCONV_CUDA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(setup_py, "sources", lambda *patterns, exclude="": ["csrc/new/new_forward.cu"])
    root = tmp_path / "cuda-13.0"
    script(root / "bin/nvcc", 'echo "Cuda compilation tools, release 13.0, V13.0.88"')
    return root


def test_toolkit_of_cuda_home(setup_py, toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert setup_py.choose_toolkit() == (setup_py.Toolkit(toolkit, "13.0", "8.0;9.0+PTX"), "")


def test_a_wrapper_of_nvcc_is_asked_for_the_root(setup_py, toolkit, monkeypatch, tmp_path):
    wrapper = script(
        tmp_path / "local/bin/nvcc", f"echo '#$ _HERE_={toolkit}/bin' >&2; echo '#$ TOP={toolkit}/bin/..' >&2"
    )
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=":")
    assert setup_py.choose_toolkit()[0].root == toolkit


@pytest.mark.parametrize(
    ("setting", "devices", "expected"),
    [
        (None, [], "8.0;9.0+PTX"),
        (None, [(9, 0), (8, 6), (9, 0)], "8.6;9.0+PTX"),
        ("native", [(12, 0)], "12.0+PTX"),
        ("8.0 9.0", [(12, 0)], "8.0;9.0"),
        ("Hopper", [], "Hopper"),
    ],
)
def test_archs(setup_py, toolkit, monkeypatch, setting, devices, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: devices[i])
    if setting is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", setting)
    assert setup_py.cuda_archs() == expected


def refusals(setup_py, monkeypatch, toolkit: Path, tmp_path: Path, case: str) -> str:
    """Sets the case up; returns what the refusal must say."""
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    if case == "CUDA_HOME without nvcc":
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        return f"nvcc not found; looked in CUDA_HOME={re.escape(str(tmp_path))}, which has no bin/nvcc"
    if case == "another major version":
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        return r"nvcc is 13.0, torch .* is of CUDA 12.8: the major versions must agree; .*--no-build-isolation"
    if case == "torch without CUDA":
        monkeypatch.setattr(torch.version, "cuda", None)
        return f"torch {re.escape(torch.__version__)} has no CUDA"
    if case == "no nvcc":
        monkeypatch.delenv("CUDA_HOME")
        monkeypatch.setenv("PATH", str(tmp_path))
        is_file = Path.is_file
        monkeypatch.setattr(Path, "is_file", lambda path: path.name != "nvcc" and is_file(path))
        return r"nvcc not found; looked in CUDA_HOME and CUDA_PATH \(not set\), PATH, /usr/local/cuda/bin"
    monkeypatch.setattr(setup_py, "sources", lambda *patterns, exclude="": [])
    return "no CUDA kernels"


@pytest.mark.parametrize(
    "case", ["CUDA_HOME without nvcc", "no nvcc", "another major version", "torch without CUDA", "no kernels"]
)
def test_refusals(setup_py, toolkit, monkeypatch, tmp_path, case):
    text = refusals(setup_py, monkeypatch, toolkit, tmp_path, case)
    found, why = setup_py.choose_toolkit()
    assert found is None and re.search(text, why)
    monkeypatch.setenv("DYNCONV_CUDA", "1")
    with pytest.raises(SystemExit, match=f"DYNCONV_CUDA=1: .*{text}"):
        setup_py.choose_toolkit()


def test_setting(setup_py, toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("DYNCONV_CUDA", "0")
    assert setup_py.choose_toolkit() == (None, "DYNCONV_CUDA=0")
    monkeypatch.setenv("DYNCONV_CUDA", "yes")
    with pytest.raises(SystemExit, match="DYNCONV_CUDA: got 'yes', expected auto, 1 or 0"):
        setup_py.choose_toolkit()


# ----------------------------------------------------------------------------------------------------------------- spills


@dataclass(frozen=True)
class Usage:
    """Of one function, in bytes a thread."""

    function: str
    arch: str
    stack: int
    spill_stores: int
    spill_loads: int


PTXAS = re.compile(
    r"Compiling entry function '(?P<entry>[^']+)' for '(?P<arch>\w+)'"
    r"|Function properties for (?P<function>\S+)\s+(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)


def read_ptxas(report: str) -> list[Usage]:
    """The functions in what ptxas -v prints."""
    arch, found = "", []
    for match in PTXAS.finditer(report):
        if match["entry"]:
            arch = match["arch"]
        else:
            sizes = (int(match[key]) for key in ("stack", "stores", "loads"))
            found.append(Usage(match["function"].strip("'"), arch, *sizes))
    return found


def report_in_log(log: str, source: str) -> str:
    """What nvcc printed on the source in the log of a build by ninja: from its command to the next one."""
    steps = re.split(r"^\s*\[\d+/\d+\] ", log, flags=re.MULTILINE)
    return "\n".join(step for step in steps if re.search(rf"nvcc .*-c \S*{re.escape(source)} ", step.split("\n", 1)[0]))


def compile_report(nvcc: Path, source: str, arch: str, cubin: Path) -> str:
    """ptxas' report on the source, compiled here unless it is known."""
    command = [str(nvcc), "-std=c++20", "-O3", "-cubin", f"-arch={arch}", "-Xptxas=-v", f"-I{CSRC}"]
    command += [f"-I{CSRC / 'common/cuda'}", str(ROOT / source)]
    digest = hashlib.sha256(" ".join(command).encode())
    for path in [ROOT / source, *sorted(CSRC.glob("**/*.h"))]:
        digest.update(path.read_bytes())
    kept = ROOT / "build/ptxas" / f"{Path(source).stem}-{arch}-{digest.hexdigest()[:16]}.txt"
    if not kept.exists():
        run = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(run.stdout + run.stderr)
    return kept.read_text()


EXAMPLE = """
  [1/3] /usr/local/cuda/bin/nvcc -MD -I/x/csrc -c -c /x/csrc/new/new_forward.cu -o /x/new_forward.o -O3
  ptxas info    : 0 bytes gmem
  ptxas info    : Compiling entry function '_Z3oneIfEvPT_' for 'sm_80'
  ptxas info    : Function properties for _Z3oneIfEvPT_
      0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
  ptxas info    : Used 10 registers, used 0 barriers, 364 bytes cmem[0]
  ptxas info    : Compiling entry function '_Z3twoPf' for 'sm_90'
  ptxas info    : Function properties for _Z3twoPf
      72 bytes stack frame, 64 bytes spill stores, 68 bytes spill loads
  ptxas info    : Used 255 registers, used 1 barriers, 364 bytes cmem[0]
  [2/3] c++ -MMD -c /x/csrc/new/new_cuda.cpp -o /x/new_cuda.o
  [3/3] /usr/local/cuda/bin/nvcc -MD -I/x/csrc -c -c /x/csrc/new/new_backward.cu -o /x/new_backward.o -O3
"""


def test_reading_a_report():
    one, two = read_ptxas(report_in_log(EXAMPLE, "csrc/new/new_forward.cu"))
    assert one == Usage("_Z3oneIfEvPT_", "sm_80", 0, 0, 0)
    assert two == Usage("_Z3twoPf", "sm_90", 72, 64, 68)
    assert read_ptxas(report_in_log(EXAMPLE, "csrc/new/new_backward.cu")) == []


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_do_not_spill(setup_py, tmp_path, source, arch):
    log = os.environ.get("DYNCONV_NVCC_LOG")
    if log:
        text = Path(log).read_text()
        refused = re.search(r"CUDA library: no \((.*)\)", text)
        if refused:
            pytest.skip(f"{log}: built without the CUDA library: {refused[1]}")
        report = report_in_log(text, source)
    else:
        root, looked = setup_py.find_toolkit()
        if root is None:
            pytest.skip(f"no nvcc to compile the kernels with; looked in {looked}")
        report = compile_report(root / "bin/nvcc", source, arch, tmp_path / "kernels.cubin")
    usage = [u for u in read_ptxas(report) if u.arch == arch]
    assert usage, f"no report of ptxas on {source} for {arch}"
    spilling = [u for u in usage if u.spill_stores or u.spill_loads]
    assert not spilling, "\n".join(
        f"{u.function}: {u.spill_stores} bytes of spill stores, {u.spill_loads} of loads" for u in spilling
    )
