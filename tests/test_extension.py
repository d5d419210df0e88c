# SPDX-License-Identifier: BSD-3-Clause
"""Loading the compiled libraries: what they tell, and the errors where the CUDA library is missing or does not load."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap

import pytest
import torch

import dynconv_ext
from dynconv_ext import _extension

# Calls the CUDA kernels of the dispatcher with CPU tensors: what a call with CUDA tensors comes to, without a GPU.
CALL = """
import torch, dynconv_ext
x, weight, offset = torch.ones(1, 2, 4, 4), torch.ones(2, 2, 1, 1), torch.zeros(1, 2, 4, 4)
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
assert dynconv_ext.build_info()["cuda"] is None and dynconv_ext.build_info()["cuda_archs"] == []
assert dynconv_ext.deform_conv2d(x, offset, weight).eq(2).all()
for call in (
    lambda: torch.ops.dynconv_ext.deform_conv2d.default.redispatch(
        cuda, x, offset, weight, None, [1, 1], [0, 0], [1, 1], None),
    lambda: torch.ops.dynconv_ext.deform_conv2d_backward.default.redispatch(
        cuda, x, x, offset, weight, [1, 1], [0, 0], [1, 1], None, [True] * 5),
):
    try:
        call()
    except ImportError as error:
        print(error)
"""
BROKEN_LIBRARY = """
import importlib.machinery, sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "dynconv_ext._cuda" else None
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        raise ImportError("libtorch_cuda.so: cannot open shared object file")
sys.meta_path.insert(0, Broken())
import torch
torch.version.cuda = torch.version.cuda or "13.0"
"""
CASES = {
    "missing": ("import sys; sys.modules['dynconv_ext._cuda'] = None", "is missing: this build has none"),
    "unloadable": (BROKEN_LIBRARY, "cannot be loaded: libtorch_cuda.so: cannot open shared object file"),
    "torch without CUDA": (
        BROKEN_LIBRARY + "torch.version.cuda = None",
        f"is not loaded: torch {torch.__version__} has no CUDA",
    ),
}


def test_build_info():
    info = dynconv_ext.build_info()
    # A library that is there loads: the linker takes a symbol that nobody defines for one of torch's.
    built = importlib.util.find_spec("dynconv_ext._cuda") is not None
    assert not built or torch.version.cuda is None or _extension._cuda is not None, _extension._why_no_cuda
    assert info["torch_running"] == torch.__version__
    if _extension._cuda is None:
        assert info["cuda"] is None and info["cuda_archs"] == []
    else:
        assert info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]
        assert info["cuda_archs"] and all(info["cuda_archs"])


@pytest.mark.parametrize("case", CASES)
def test_without_the_cuda_library(case):
    prepare, reason = CASES[case]
    run = subprocess.run([sys.executable, "-c", prepare + textwrap.dedent(CALL)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    forward, backward = run.stdout.splitlines()
    for line, operator in ((forward, "deform_conv2d"), (backward, "deform_conv2d_backward")):
        assert line.startswith(f"{operator}: got CUDA tensors, but dynconv_ext._cuda,")
        assert reason in line
        assert "DYNCONV_CUDA=1 pip install --no-build-isolation -e ." in line
        assert f"torch {torch.__version__} runs" in line and "built by" in line


def test_every_operator_answers_for_cuda():
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("dynconv_ext::")]
    assert len(names) >= 6
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
