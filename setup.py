# SPDX-License-Identifier: BSD-3-Clause
"""Builds dynconv_ext._C (schemas, CPU kernels) and dynconv_ext._cuda (CUDA kernels).

The CUDA library is built where csrc holds CUDA kernels, torch has CUDA and nvcc of the same major version is found:
under CUDA_HOME or CUDA_PATH if set, else the nvcc on PATH (asked for its root, for it may be a wrapper script), else
/usr/local/cuda. Its runtime is linked statically: nothing but the driver is needed where it runs.

Environment: DYNCONV_CUDA=auto|1|0, TORCH_CUDA_ARCH_LIST (unset: the GPUs that are visible, with none 8.0;9.0+PTX),
MAX_JOBS, DEBUG=1, NVCC_APPEND_FLAGS (nvcc's own; -Xptxas=-v prints registers and spills).
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pybind11
import torch
from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
# The stable ABI of torch 2.11: one binary serves every later torch.
TARGET = 0x020B000000000000
DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")
# 8.6, 8.7 and 8.9 run the code of 8.0; everything after 9.0 compiles its PTX at first use.
DEFAULT_ARCHS = "8.0;9.0+PTX"


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: nvcc is root/bin/nvcc, of the given version; what to build for, as in TORCH_CUDA_ARCH_LIST."""

    root: Path
    version: str
    archs: str


def sources(*patterns: str, exclude: str = "") -> list[str]:
    found = sorted(p for pattern in patterns for p in CSRC.glob(pattern) if not exclude or exclude not in p.name)
    return [str(p.relative_to(ROOT)) for p in found]


def nvcc_says(nvcc: Path | str, *options: str) -> str:
    answer = subprocess.run([str(nvcc), *options], capture_output=True, text=True, check=False)
    return answer.stdout + answer.stderr


def find_toolkit() -> tuple[Path | None, str]:
    """The toolkit's root, or None and where it was looked for."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            root = Path(os.environ[variable])
            return (root, "") if (root / "bin/nvcc").is_file() else (None, f"{variable}={root}, which has no bin/nvcc")
    looked = ["CUDA_HOME and CUDA_PATH (not set)"]
    on_path = shutil.which("nvcc")
    if on_path:
        # The folder above a wrapper script is not the toolkit: torch would look for headers and libraries there.
        top = re.search(r"^#\$ TOP=(.+)$", nvcc_says(on_path, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
        root = Path(top[1].strip()).resolve() if top else Path(on_path).resolve().parent.parent
        if (root / "bin/nvcc").is_file():
            return root, ""
        looked.append(f"{on_path} (its root, {root}, has no bin/nvcc)")
    else:
        looked.append("PATH")
    root = Path("/usr/local/cuda")
    return (root, "") if (root / "bin/nvcc").is_file() else (None, ", ".join([*looked, f"{root}/bin"]))


def cuda_archs() -> str:
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if archs not in ("", "native"):
        return archs.replace(" ", ";")
    devices = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    return ";".join(f"{major}.{minor}" for major, minor in devices) + "+PTX" if devices else DEFAULT_ARCHS


def choose_toolkit() -> tuple[Toolkit | None, str]:
    """The toolkit to build the CUDA library with, or None and why it is not built.

    Raises:
        SystemExit: DYNCONV_CUDA is none of auto, 1, 0; or it is 1 and the library cannot be built.
    """
    choice = os.environ.get("DYNCONV_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"DYNCONV_CUDA: got {choice!r}, expected auto, 1 or 0")
    toolkit, why = None, ""
    if choice == "0":
        why = "DYNCONV_CUDA=0"
    elif not sources("*/*.cu"):
        why = "this version of dynconv-ext has no CUDA kernels (no csrc/*/*.cu)"
    elif torch.version.cuda is None:
        why = f"torch {torch.__version__} has no CUDA; install one that has, see https://pytorch.org/get-started"
    else:
        root, looked = find_toolkit()
        if root is None:
            why = f"nvcc not found; looked in {looked}; install the CUDA toolkit, or set CUDA_HOME to its folder"
        else:
            release = re.search(r"release (\d+\.\d+)", nvcc_says(root / "bin/nvcc", "--version"))
            version = release[1] if release else "of unknown version"
            if version.split(".")[0] != torch.version.cuda.split(".")[0]:
                why = (
                    f"{root}/bin/nvcc is {version}, torch {torch.__version__} is of CUDA {torch.version.cuda}: "
                    "the major versions must agree; set CUDA_HOME to another toolkit, or build with the torch you run "
                    "(pip install --no-build-isolation)"
                )
            else:
                toolkit = Toolkit(root, version, cuda_archs())
    if choice == "1" and toolkit is None:
        raise SystemExit(f"DYNCONV_CUDA=1: {why}")
    return toolkit, why


def extensions(toolkit: Toolkit | None) -> tuple[list[Extension], type[Any]]:
    if toolkit is not None:
        # torch reads both: the first when the next line imports, the second when it compiles.
        os.environ.update(CUDA_HOME=str(toolkit.root), TORCH_CUDA_ARCH_LIST=toolkit.archs)
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths, library_paths

    cxx = ["-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
    cxx += ["-O0", "-g"] if DEBUG else ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
    include = [str(CSRC), pybind11.get_include()]
    macros: list[tuple[str, str | None]] = [("TORCH_STABLE_ONLY", None), ("TORCH_TARGET_VERSION", hex(TARGET))]
    headers = [str(p) for pattern in ("**/*.h", "**/*.inl") for p in CSRC.glob(pattern)]
    found = [
        CppExtension(
            "dynconv_ext._C",
            sources("*.cpp", "*/*.cpp", exclude="_cuda"),
            include_dirs=[*include],
            define_macros=[*macros],
            extra_compile_args={"cxx": [*cxx]},
            depends=headers,
        )
    ]
    if toolkit is not None:
        cuda_sources = sources("module_cuda.cpp", "*/*_cuda.cpp", "*/*.cu")
        stems = [Path(s).with_suffix("") for s in cuda_sources]
        if len(set(stems)) < len(stems):
            raise SystemExit(f"csrc: two sources with one stem, so one object file: {', '.join(cuda_sources)}")
        nvcc = ["-std=c++20", "--threads", "2", "-Xcompiler=-fvisibility=hidden,-Wno-psabi"]
        nvcc += ["-O0", "-g", "-G"] if DEBUG else ["-O3", "-lineinfo"]
        found.append(
            CppExtension(
                "dynconv_ext._cuda",
                cuda_sources,
                # Kernels include <ptx.h>: the path chooses between CUDA's and an emulation's.
                include_dirs=[*include, str(CSRC / "common/cuda"), *include_paths("cuda", torch_include_dirs=False)],
                # USE_CUDA shows the stable ABI's functions for streams.
                define_macros=[*macros, ("USE_CUDA", None), ("DYNCONV_CUDA_ARCHS", f'"{toolkit.archs}"')],
                extra_compile_args={"cxx": [*cxx], "nvcc": nvcc},
                depends=headers,
                library_dirs=library_paths("cuda", torch_include_dirs=False),
                libraries=["torch_cuda", "cudart_static", "rt", "dl", "pthread"],
                # Torch loads a CUDA runtime of its own for all to see; ours must not be mixed up with it.
                extra_link_args=["-Wl,--exclude-libs,ALL"],
            )
        )
    return found, BuildExtension.with_options(use_ninja=True)


if __name__ == "__main__":
    toolkit, why = choose_toolkit()
    print(
        f"dynconv-ext: torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        + "CUDA library: "
        + (f"yes, by nvcc {toolkit.version} in {toolkit.root} for {toolkit.archs}" if toolkit else f"no ({why})")
        + f", {'debug' if DEBUG else 'release'} build"
    )
    modules, builder = extensions(toolkit)
    vision = [f"dynconv_vision.{p}" for p in find_packages("python/dynconv_vision")]
    setup(
        ext_modules=modules,
        packages=["dynconv_ext", "dynconv_ext.reference", "dynconv_vision", *vision],
        cmdclass={"build_ext": builder},
    )
