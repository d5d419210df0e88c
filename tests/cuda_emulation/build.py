# SPDX-License-Identifier: BSD-3-Clause
"""Builds CUDA sources for the host emulation with g++, under sanitizers, and says how to run the result.

Modes: "address" (AddressSanitizer and UBSan; a block's threads are fibers) and "thread" (ThreadSanitizer; they are
threads of the operating system).
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from filelock import FileLock

Mode = Literal["address", "thread"]

EMULATION = Path(__file__).resolve().parent
ROOT = EMULATION.parents[1]
# Ignored by git; DYNCONV_EMULATION_BUILD replaces it.
BUILD = Path(os.environ.get("DYNCONV_EMULATION_BUILD", ROOT / "build" / "cuda_emulation"))
COMPILER = os.environ.get("CXX", "g++")
JOBS = 2

COMPILE_FLAGS = ("-std=c++20", "-O1", "-g1", "-fPIC", "-fno-omit-frame-pointer", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi")  # fmt: skip
# -U: for Debian's and Ubuntu's compilers that define it; its wrappers hide accesses from the sanitizers.
MODE_FLAGS: dict[Mode, tuple[str, ...]] = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-U_FORTIFY_SOURCE"),
    "thread": ("-fsanitize=thread", "-DDYNCONV_EMULATION_THREADS", "-U_FORTIFY_SOURCE"),
}
SANITIZER_LIBRARIES: dict[Mode, tuple[str, ...]] = {
    "address": ("libasan.so", "libubsan.so"),
    "thread": ("libtsan.so",),
}
SANITIZER_OPTIONS: dict[Mode, dict[str, str]] = {
    # Python leaks by design. A small quarantine: shared memory is allocated for every block.
    "address": {"ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=32", "UBSAN_OPTIONS": "print_stacktrace=1"},
    # Code that is not instrumented (torch) synchronises in ways that ThreadSanitizer doesn't see.
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1"},
}


def build(
    name: str,
    sources: Sequence[str | Path],
    mode: Mode = "address",
    *,
    shared: bool = False,
    compile_flags: Sequence[str] = (),
    link_flags: Sequence[str] = (),
) -> Path:
    """Compiles and links sources (.cpp, .cu) with the emulation; what is up to date is not compiled again.

    Args:
        name: File name of the result.
        sources: Their quoted includes are found from csrc, <ptx.h> and <cuda_runtime.h> in the emulation.
        mode: See the module.
        shared: Whether to build a shared library instead of an executable.
        compile_flags: More flags; include paths, definitions.
        link_flags: More flags, after the objects.

    Returns:
        The path of the library or executable.

    Raises:
        RuntimeError: The compiler failed; with its command and messages.
    """
    backend = "os_threads.cpp" if mode == "thread" else "fibers.cpp"
    folder = BUILD / mode
    own = [*COMPILE_FLAGS, *MODE_FLAGS[mode], f"-I{EMULATION}", f"-I{ROOT / 'csrc'}"]
    # The emulation's objects serve everything that is built in a mode.
    compilations = [(EMULATION / file, folder / "emulation", own) for file in ("emulation.cpp", backend)]
    compilations += [(Path(source).resolve(), folder / name, [*own, *compile_flags]) for source in sources]
    for _, objects_folder, _ in compilations:
        objects_folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        with ThreadPoolExecutor(JOBS) as pool:
            objects = list(pool.map(lambda arguments: _compile(*arguments), compilations))
        target = folder / name / (f"{name}.so" if shared else name)
        link = [COMPILER, *MODE_FLAGS[mode], *(["-shared"] if shared else []), *map(str, objects), *link_flags]
        _make(target, [*link, "-ldl", "-pthread", "-o", str(target)], objects)
    return target


def sanitizer_environment(mode: Mode = "address") -> dict[str, str]:
    """The environment in which to run what was built: an executable, or Python that loads a shared library.

    The executables find the sanitizer themselves; Python, which is not instrumented, needs it preloaded.
    """
    libraries = [_library(library) for library in SANITIZER_LIBRARIES[mode]]
    return {**os.environ, **SANITIZER_OPTIONS[mode], "LD_PRELOAD": ":".join(libraries)}


def run(
    command: Sequence[str | Path], mode: Mode = "address", *, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Runs what was built, or Python, in the sanitizers' environment; output as text, any exit status."""
    prefix = _without_random_addresses() if mode == "thread" else ()
    return subprocess.run(
        [*prefix, *map(str, command)], env=sanitizer_environment(mode), capture_output=True, text=True, timeout=timeout
    )


@functools.cache
def _without_random_addresses() -> tuple[str, ...]:
    """A prefix of commands: gcc's ThreadSanitizer refuses the widest randomisation that newer kernels use."""
    prefix = ("setarch", "-R")
    try:
        return prefix if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0 else ()
    except FileNotFoundError:
        return ()


@functools.cache
def _library(name: str) -> str:
    command = [COMPILER, f"-print-file-name={name}"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(path).is_file():
        raise RuntimeError(f"{COMPILER} has no {name}")
    return str(Path(path).resolve())


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([COMPILER, "--version"], check=True, capture_output=True, text=True).stdout


def _compile(source: Path, folder: Path, flags: Sequence[str]) -> Path:
    """Compiles a source unless its object was made by the same command from the same files."""
    # .cu and .cpp of one stem may be there.
    target = folder / f"{source.name}.o"
    dependencies = folder / f"{source.name}.d"
    command = [COMPILER, *flags, "-MD", "-MF", str(dependencies), "-x", "c++", "-c", str(source), "-o", str(target)]
    _make(target, command, [source], dependencies)
    return target


def _make(target: Path, command: Sequence[str], inputs: Iterable[Path], dependencies: Path | None = None) -> None:
    """Runs the command if it, or what it read the last time, has changed."""
    stamp = target.with_name(f"{target.name}.hash")

    def state() -> str:
        # A depfile lists the sources and headers that the compiler read, after "target:".
        listed = dependencies.read_text().split(":", 1)[1].replace("\\\n", " ").split() if dependencies else []
        digest = hashlib.sha256("\0".join([_compiler_version(), *command]).encode())
        for path in sorted({*map(str, inputs), *listed}):
            digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
        return digest.hexdigest()

    try:
        if target.exists() and stamp.read_text() == state():
            return
    except OSError:  # a file is new, or gone
        pass
    stamp.unlink(missing_ok=True)
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    stamp.write_text(state())
