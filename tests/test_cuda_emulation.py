# SPDX-License-Identifier: BSD-3-Clause
"""The host emulation of CUDA: it computes what a GPU would, and reports the mistakes it is there to find."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys

import pytest

from cuda_emulation import build
from cuda_emulation.build import Mode

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which(build.COMPILER) is None, reason="needs Linux and g++"
)


def run(name: str, mode: Mode) -> subprocess.CompletedProcess[str]:
    program = build.build("self_test", [build.EMULATION / "self_test.cu"], mode)
    return build.run([program, name], mode)


CORRECT = ("reduction", "bfloat16", "bfloat16_trans", "float16", "float16_trans", "tf32", "conversions", "shuffles", "copies", "fresh_shared_memory")  # fmt: skip


@pytest.mark.parametrize("mode", ["address", "thread"])
@pytest.mark.parametrize("name", CORRECT)
def test_correct_kernels(name: str, mode: Mode):
    result = run(name, mode)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("overrun_shared", "AddressSanitizer: heap-buffer-overflow"),
        ("overrun_global", "AddressSanitizer: heap-buffer-overflow"),
        ("misaligned_vector", "runtime error: store to misaligned address"),
    ],
)
def test_wrong_accesses(name: str, report: str):
    result = run(name, "address")
    assert result.returncode != 0
    assert report in result.stderr
    assert "self_test.cu:" in result.stderr
    if name != "misaligned_vector":
        assert "CUDA emulation: in kernel mistaken<" in result.stderr
        assert "block 0, thread 7\n" in result.stderr


@pytest.mark.parametrize("mode", ["address", "thread"])
@pytest.mark.parametrize(
    ("name", "thread", "message"),
    [
        (
            "skipped_barrier",
            "",
            "threads wait for it at __syncthreads|of the 32 threads that must take part have returned",
        ),
        ("mixed_barriers", "", "all threads of the block wait, .* of the 32 that must take part are here"),
        ("other_operation", "", "__shfl(_xor)?_sync: threads that must take part are at __shfl(_xor)?_sync"),
        (
            "returned_lane",
            "",
            "threads wait for it at __shfl_xor_sync|of the 32 threads that must take part have returned",
        ),
        ("partial_warp", "", "__syncwarp: the block's last warp has only 8 threads"),
        ("partial_mask", "", "__shfl_xor_sync: a mask other than 0xffffffff"),
        ("misaligned_row", "3", "ldmatrix_x4: an address is not aligned to 16 bytes"),
        ("row_outside", "3", "ldmatrix_x4: an address outside the 160 bytes of shared memory, at byte 160"),
        ("misaligned_copy", "3", "copy_async_16: an address is not aligned to 16 bytes"),
        ("copy_outside", "3", "copy_async_16: an address outside the 160 bytes of shared memory"),
        ("misaligned_add", "3", "add_global_x4: an address is not aligned to 16 bytes"),
    ],
)
def test_wrong_operations(name: str, thread: str, message: str, mode: Mode):
    result = run(name, mode)
    assert result.returncode == 1
    place = rf"kernel mistaken<.*>, block 0, thread {thread or '[0-9]+'}: "
    assert re.search(f"^CUDA emulation: {place}.*({message})", result.stderr), result.stderr


@pytest.mark.parametrize("name", ["missing_barrier", "missing_syncwarp", "blocks_race"])
def test_races(name: str):
    result = run(name, "thread")
    assert result.returncode == 66
    assert "WARNING: ThreadSanitizer: data race" in result.stderr
    assert re.search("SUMMARY: ThreadSanitizer: data race .*self_test.cu:", result.stderr)


def test_rebuilds_what_changed(tmp_path):
    (tmp_path / "answer.h").write_text("#define ANSWER 1\n")
    source = tmp_path / "answer.cpp"
    source.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    library = build.build("answer", [source], shared=True)
    made = library.stat().st_mtime_ns
    assert build.build("answer", [source], shared=True).stat().st_mtime_ns == made
    (tmp_path / "answer.h").write_text("#define ANSWER 2\n")
    build.build("answer", [source], shared=True)
    loaded = build.run([sys.executable, "-c", f"import ctypes; print(ctypes.CDLL({str(library)!r}).answer())"])
    assert loaded.stdout == "2\n", loaded.stderr
    source.write_text("an error\n")
    with pytest.raises(RuntimeError, match="answer.cpp"):
        build.build("answer", [source], shared=True)
