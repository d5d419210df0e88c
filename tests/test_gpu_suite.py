# SPDX-License-Identifier: BSD-3-Clause
"""The GPU suite (benchmarks/gpu_suite.py) on the CPU: what needs no GPU, what it writes, its device parts emulated."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cuda_checks import run_emulated

ROOT = Path(__file__).parents[1]
#: A run on the CPU, with time enough on a busy machine.
SMOKE = ("--device", "cpu", "--smoke", "--seconds", "3600")
REQUIRED = {
    "op",
    "case",
    "dtype",
    "direction",
    "ours_ms",
    "peer",
    "peer_ms",
    "ratio",
    "ours_peak_mb",
    "peer_peak_mb",
}


@pytest.fixture(scope="module")
def gpu_suite() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_suite", ROOT / "benchmarks/gpu_suite.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(gpu_suite, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu_suite")
    benchmark = torch.backends.cudnn.benchmark
    try:
        assert gpu_suite.main([str(folder), *SMOKE]) == 0
    finally:
        torch.backends.cudnn.benchmark = benchmark
    return folder


def test_results(run):
    rows = json.loads((run / "results.json").read_text())
    for row in rows:
        assert row.keys() >= REQUIRED
        assert row["direction"] in ("forward", "forward+backward")
        assert row["dtype"] in ("float64", "float32", "float32-tf32", "bfloat16", "float16")
        assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"])
    seen = {(row["op"], row["peer"]) for row in rows}
    for op, peers in {
        "deform_conv2d": ("torchvision", "conv2d", "conv2d_channels_last"),
        "dynamic_conv2d": ("conv2d", "conv2d_channels_last", "grouped", "wide"),
        "task2_published": ("torchvision", "resnet34"),
        "dynamic_resnet18": ("static", "static_channels_last", "grouped"),
        "efficientnet_cc_b0_4e": ("condconv", "efficientnet_b0", "efficientnet_b0_channels_last"),
    }.items():
        if op == "efficientnet_cc_b0_4e" and not importlib.util.find_spec("timm"):
            continue
        assert {(op, peer) for peer in peers} <= seen
    for op in ("deform_conv2d", "dynamic_conv2d"):
        assert {row["dtype"] for row in rows if row["op"] == op} == set(
            ("float64", "float32", "float32-tf32", "bfloat16", "float16")
        )
        assert {row["layout"] for row in rows if row["op"] == op} == {"contiguous", "channels_last"}


def test_table_and_chart(run):
    table = (run / "table.md").read_text()
    rest = json.loads((run / "suite.json").read_text())
    # torchvision has no autocast on a CPU; nothing else may fail.
    errors = [e for e in rest["errors"] if "timm is not installed" not in e["error"]]
    assert {e["contender"] for e in errors} <= {"torchvision", "torchvision_autocast"}, errors
    assert all(e["dtype"] in ("bfloat16", "float16") for e in errors), errors
    assert rest["ceilings"]["copy_gb_s"] > 0 and rest["ceilings"]["bfloat16_tflop_s"] > 0
    for heading in ("### deform_conv2d", "### dynamic_conv2d", "### task2_published"):
        assert heading in table
    rows = [line for line in table.splitlines() if line.startswith("| tiny")]
    columns = {line.count("|") for line in rows}
    assert rows and len(columns) <= 2
    assert (run / "chart.png").read_bytes()[:4] == b"\x89PNG"


def test_a_failing_contender_is_recorded_and_the_others_go_on(gpu_suite, tmp_path):
    def fail() -> None:
        raise ValueError("no such kernel\nmore")

    device = gpu_suite.Device("cpu", smoke=True)
    times, errors = device.race({"ours": [fail], "conv2d": [lambda: None]}, 0.1)
    assert list(times) == ["conv2d"] and errors == {"ours": "ValueError: no such kernel"}
    suite = gpu_suite.Suite(tmp_path, device, {})
    info = {"op": "deform_conv2d", "case": "A", "dtype": "float32", "direction": "forward"}
    suite.add(info, times, errors)
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row["ours_ms"] is None and row["ratio"] is None and row["peer_ms"] is not None
    assert "deform_conv2d, A, float32, forward, ours: ValueError: no such kernel" in (tmp_path / "table.md").read_text()


def test_without_kernels_only_the_peers_are_measured(gpu_suite, tmp_path, monkeypatch):
    def fail(*values) -> None:
        raise ImportError("deform_conv2d: got CUDA tensors, but dynconv_ext._cuda is missing")

    monkeypatch.setattr(gpu_suite.bench_deform, "ours", fail)
    monkeypatch.setattr(gpu_suite.bench_dynamic, "ours", fail)
    case = gpu_suite.Case("deform_conv2d", "tiny", 1, 2, 4, 4, 2, ("float32",))
    monkeypatch.setattr(gpu_suite, "SMOKE_CASES", [case])
    monkeypatch.setattr(gpu_suite.networks.Network, "contenders", lambda *arguments: {})
    suite = gpu_suite.Suite(tmp_path, gpu_suite.Device("cpu", smoke=True), {})
    gpu_suite.measure(suite, 60)
    assert {row["peer"] for row in suite.rows} == {"torchvision", "conv2d", "conv2d_channels_last"}
    assert all(row["ours_ms"] is None for row in suite.rows)
    assert any("dynconv_ext._cuda is missing" in error["error"] for error in suite.errors)


def test_floor(gpu_suite):
    """PEERS' arithmetic for case A: 9.1 GFLOP forward, twice that in the backward; 0.011 ms at 790 TFLOP/s."""
    case = gpu_suite.CASES[0]
    assert case.flops("forward") == pytest.approx(9.07e9, rel=1e-2)
    assert case.flops("forward+backward") == pytest.approx(3 * case.flops("forward"))
    measured = {"copy_gb_s": 4300.0, "bfloat16_tflop_s": 790.0, "float32_tflop_s": 50.0}
    least, bound = gpu_suite.floor(case, "bfloat16", "forward", measured)
    assert bound == "arithmetic" and least == pytest.approx(0.0115, rel=2e-2)
    assert case.bytes_moved("forward", "bfloat16") == pytest.approx(30.4e6, rel=2e-2)
    assert gpu_suite.floor(case, "float16", "forward", measured) == (None, None)


def test_check_compares_with_the_reference(gpu_suite, monkeypatch, capsys):
    device = gpu_suite.Device("cpu", smoke=True)
    assert gpu_suite.check(["deform:small", "dynamic:small"], device) == []
    labels = capsys.readouterr().out.splitlines()
    assert len(labels) == 2 * 2 * len(gpu_suite.TORCH_DTYPE)
    for name in ("deform_conv2d", "dynamic_conv2d"):
        right = getattr(gpu_suite.dynconv_ext, name)
        with monkeypatch.context() as patch:
            patch.setattr(gpu_suite.dynconv_ext, name, lambda x, *values, right=right: right(x * 1.1, *values))
            wrong = gpu_suite.check([f"{name.removesuffix('_conv2d')}:small"], device)
            assert any(f"{name} small float32 contiguous: out is off by" in line for line in wrong)
            assert any(f"{name} small bfloat16 channels_last: grad_weight is off by" in line for line in wrong)
    with pytest.raises(
        SystemExit, match="--check: got small, nonsense, expected names of deform:small, .*dynamic:small"
    ):
        gpu_suite.check(["small", "nonsense", "deform:small"], device)


def test_check_goes_on_after_an_error(gpu_suite, monkeypatch):
    device = gpu_suite.Device("cpu", smoke=True)
    monkeypatch.setattr(gpu_suite.dynconv_ext, "deform_conv2d", lambda *values: fail_with(ImportError("no _cuda")))
    wrong = gpu_suite.check(["deform:small"], device)
    assert len(wrong) == 2 * len(gpu_suite.TORCH_DTYPE)
    assert "deform_conv2d small float64: ImportError: no _cuda" in wrong


def fail_with(error: Exception) -> None:
    raise error


def test_a_lost_device_is_left_by_a_new_process(gpu_suite, tmp_path, monkeypatch):
    """The race that lost it is not run again; what was measured before stays."""
    case = gpu_suite.Case("deform_conv2d", "tiny", 1, 2, 4, 4, 2, ("float32",))
    monkeypatch.setattr(gpu_suite, "SMOKE_CASES", [case])
    monkeypatch.setattr(gpu_suite.networks.Network, "contenders", lambda *arguments: {})
    monkeypatch.setattr(gpu_suite.networks, "has_timm", lambda: False)
    lives = iter([True] * 2 + [False])
    monkeypatch.setattr(gpu_suite.Device, "alive", lambda device: next(lives, True))
    commands = []
    monkeypatch.setattr(gpu_suite.os, "execv", lambda program, command: commands.append(command))
    arguments = [str(tmp_path), *SMOKE]
    benchmark = torch.backends.cudnn.benchmark
    try:
        gpu_suite.main(arguments)
        assert len(commands) == 1 and "--resume" in commands[0] and "--smoke" in commands[0]
        first = json.loads((tmp_path / "results.json").read_text())
        lost = [e for e in json.loads((tmp_path / "suite.json").read_text())["errors"] if "lost its GPU" in e["error"]]
        assert len(lost) == 1
        again = commands[0][2:]
        assert gpu_suite.main(again) == 0
    finally:
        torch.backends.cudnn.benchmark = benchmark
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows[: len(first)] == first and len(commands) == 1
    keys = [(row["direction"], row["peer"], row["layout"]) for row in rows if row["op"] == "deform_conv2d"]
    assert len(keys) == len(set(keys)) and {key[0] for key in keys} == set(gpu_suite.DIRECTIONS)


def test_device_parts_on_the_emulation(monkeypatch):
    run_emulated(monkeypatch, "gpu_suite_cases.py", "address")


def test_precision_restores_the_settings(gpu_suite):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision
    with gpu_suite.precision("float32-tf32"):
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision) == before
