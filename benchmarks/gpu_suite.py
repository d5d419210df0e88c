# SPDX-License-Identifier: BSD-3-Clause
"""Measures the operators on a GPU beside their peers; what benchmarks/gpu_suite.sh runs after building and testing.

    python benchmarks/gpu_suite.py OUTDIR [--seconds 240]    ceilings, training steps, races; writes the results
    python benchmarks/gpu_suite.py OUTDIR --check small      values and gradients of geometries of tests/op_cases.py

OUTDIR/results.json is a list of {op, case, dtype, direction, ours_ms, peer, peer_ms, ratio, ours_peak_mb,
peer_peak_mb}, ratio = peer_ms / ours_ms; beside these layout (of ours), floor_ms (bytes and operations over the
measured ceilings), bound (which of the two), timing (graph: replays of a captured CUDA graph; events: calls one by one)
and runs. An operator without CUDA kernels has null for ours. The rest, errors too, is in suite.json; table.md and
chart.png show both.

Times are medians; contenders take turns in a random order, their inputs rotate among sets that together are twice the
L2, and all data is random. ``--device cpu --smoke`` runs the same on tiny shapes without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent, HERE.parent / "python", HERE.parent / "tests"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import bench_deform_conv2d as bench_deform  # noqa: E402
import bench_dynamic_conv2d as bench_dynamic  # noqa: E402
import bench_end_to_end as bench_network  # noqa: E402
import dynconv_ext  # noqa: E402
from timed import DIRECTIONS  # noqa: E402

TORCH_DTYPE = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float32-tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
OURS = ("ours", "ours_channels_last")
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A shape; kernel 3, padding 1; deform_conv2d with a mask and one offset group, dynamic_conv2d with 4 kernels."""

    op: str
    name: str
    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    dtypes: tuple[str, ...] = ("bfloat16", "float32-tf32", "float32", "float16")

    @property
    def text(self) -> str:
        return f"{self.name} {self.batch}x{self.channels}x{self.height}x{self.width}-{self.out_channels}"

    def flops(self, direction: str) -> float:
        once = 2.0 * self.batch * self.height * self.width * self.out_channels * self.channels * 9
        return once * (1 if direction == "forward" else 3)

    def bytes_moved(self, direction: str, dtype: str) -> float:
        """Inputs read once, outputs written once; backward reads the inputs again and writes their gradients."""
        size, wide = TORCH_DTYPE[dtype].itemsize, 8 if dtype == "float64" else 4
        pixels = self.batch * self.height * self.width
        kernels = bench_dynamic.KERNELS if self.op == "dynamic_conv2d" else 1
        inputs = size * (pixels * self.channels + kernels * self.out_channels * self.channels * 9)
        inputs += wide * (27 * pixels if self.op == "deform_conv2d" else self.batch * kernels)
        output = size * pixels * self.out_channels
        return inputs + output + (0 if direction == "forward" else output + 2 * inputs)


CASES = [
    Case("deform_conv2d", "A", 64, 64, 31, 31, 128),
    Case("deform_conv2d", "B", 16, 256, 56, 56, 256),
    Case("deform_conv2d", "C", 2, 256, 200, 304, 256),
    Case("deform_conv2d", "small", 4, 32, 17, 17, 32, ("float64",)),
    Case("dynamic_conv2d", "stem", 64, 3, 124, 124, 64, ("bfloat16", "float32-tf32")),
    Case("dynamic_conv2d", "stage 1", 64, 64, 62, 62, 64, ("bfloat16", "float32-tf32")),
    Case("dynamic_conv2d", "stage 2", 64, 128, 31, 31, 128, ("bfloat16", "float32-tf32")),
    Case("dynamic_conv2d", "stage 3", 64, 256, 16, 16, 256, ("bfloat16", "float32-tf32", "float32", "float16")),
    Case("dynamic_conv2d", "stage 4", 64, 512, 8, 8, 512, ("bfloat16", "float32-tf32")),
    Case("dynamic_conv2d", "small", 4, 32, 17, 17, 32, ("float64",)),
]
SMOKE_CASES = [
    Case("deform_conv2d", "tiny", 2, 4, 5, 6, 4, tuple(TORCH_DTYPE)),
    Case("dynamic_conv2d", "tiny", 2, 4, 5, 6, 4, tuple(TORCH_DTYPE)),
]


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """torch's settings for float32: products in TF32 for float32-tf32, exact otherwise."""
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv.fp32_precision
    torch.set_float32_matmul_precision("high" if dtype == "float32-tf32" else "highest")
    torch.backends.cudnn.conv.fp32_precision = "tf32" if dtype == "float32-tf32" else "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.conv.fp32_precision = conv


# --------------------------------------------------------------------------------------------------------------- timing


@dataclass
class Timing:
    """Of one contender, a run."""

    ms: float
    peak_mb: float | None
    timing: str
    runs: int


class Device:
    """Where and how to measure: CUDA events and graphs, or a host clock on the CPU."""

    def __init__(self, name: str, smoke: bool) -> None:
        self.name, self.smoke, self.cuda = name, smoke, name == "cuda"
        self.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size if self.cuda else 0

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def sets(self, bytes_of_one: float) -> int:
        """How many sets of inputs together are twice the L2."""
        return min(max(2, math.ceil(2 * self.l2_bytes / max(bytes_of_one, 1))), 16)

    def prepare(self, runs: Sequence[Run], graphs: bool) -> tuple[Run, str]:
        """Warms up; the function that does all runs once, and how it does them."""

        def one_by_one() -> None:
            for run in runs:
                run()

        if not self.cuda:
            one_by_one()
            return one_by_one, "host clock"
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                one_by_one()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if not graphs:
            return one_by_one, "events"
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                one_by_one()
            graph.replay()
            torch.cuda.synchronize()
            return graph.replay, "graph"
        except RuntimeError:
            torch.cuda.synchronize()
            return one_by_one, "events"

    def peak_mb(self, run: Run) -> float | None:
        """Memory that a run needs above what is allocated, its results included."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def time_ms(self, run: Run) -> float:
        if not self.cuda:
            before = time.perf_counter()
            run()
            return (time.perf_counter() - before) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def race(
        self, contenders: dict[str, Sequence[Run]], seconds: float, graphs: bool = True
    ) -> tuple[dict[str, Timing], dict[str, str]]:
        """Median times of contenders that take turns in a random order; and the errors of those that failed.

        A contender is the same work on several sets of inputs; its time is that of one set.
        """
        prepared: dict[str, tuple[Run, str, int, float | None]] = {}
        errors: dict[str, str] = {}
        for name, runs in contenders.items():
            try:
                runs[0]()
                peak = self.peak_mb(runs[-1])
                prepared[name] = (*self.prepare(runs, graphs), len(runs), peak)
            except Exception as error:  # one contender's failure is a result, too
                errors[name] = f"{type(error).__name__}: {error}".split("\n")[0][:500]
        times: dict[str, list[float]] = {name: [] for name in prepared}
        shuffle = random.Random(0)
        gc.collect()
        gc.disable()
        try:
            start, rounds = time.perf_counter(), 0
            while rounds < (1 if self.smoke else 5) or (
                not self.smoke and rounds < 300 and time.perf_counter() - start < seconds
            ):
                for name in shuffle.sample(list(prepared), len(prepared)):
                    run, _, sets, _ = prepared[name]
                    times[name].append(self.time_ms(run) / sets)
                rounds += 1
        finally:
            gc.enable()
        found = {
            name: Timing(statistics.median(times[name]), peak, timing, rounds * sets)
            for name, (_, timing, sets, peak) in prepared.items()
        }
        return found, errors


def ceilings(device: Device) -> dict[str, float]:
    """Measured: copy_gb_s (bytes read plus bytes written) and {dtype}_tflop_s of matrix products, on random data."""
    found = {}
    numbers = 1 << (14 if device.smoke else 30)
    source = torch.randn(numbers // 4, device=device.name)
    target = torch.empty_like(source)
    times, _ = device.race({"copy": [lambda: target.copy_(source)]}, 0.5)
    found["copy_gb_s"] = 2 * source.nbytes / times["copy"].ms / 1e6
    for dtype, kind in TORCH_DTYPE.items():
        n = 64 if device.smoke else 4096 if dtype in ("float32", "float64") else 8192
        a, b = (torch.randn(n, n, device=device.name).to(kind) for _ in range(2))
        with precision(dtype):
            times, _ = device.race({"product": [lambda a=a, b=b: a @ b]}, 0.5)
        if "product" in times:
            found[f"{dtype}_tflop_s"] = 2 * n**3 / times["product"].ms / 1e9
    return found


def floor(case: Case, dtype: str, direction: str, measured: dict[str, float]) -> tuple[float | None, str | None]:
    """The least time in ms on this device, and what sets it: memory or arithmetic."""
    bandwidth, rate = measured.get("copy_gb_s"), measured.get(f"{dtype}_tflop_s")
    if not bandwidth or not rate:
        return None, None
    memory, arithmetic = case.bytes_moved(direction, dtype) / bandwidth / 1e6, case.flops(direction) / rate / 1e9
    return max(memory, arithmetic), "memory" if memory > arithmetic else "arithmetic"


# ----------------------------------------------------------------------------------------------------------- contenders


def autocast(function: Callable[..., Tensor], device: Device, dtype: str) -> Callable[..., Tensor]:
    def run(*values: Tensor) -> Tensor:
        # Without its cache of cast weights, which a captured graph must not keep.
        with torch.autocast(device.name, TORCH_DTYPE[dtype], cache_enabled=False):
            return function(*values)

    return run


def wide(x: Tensor, weight: Tensor, attention: Tensor, bias: Tensor) -> Tensor:
    """One convolution over K copies of the input, each times its attention: cat_k(a_k x), K * C channels."""
    mix = torch.softmax(attention / bench_dynamic.TEMPERATURE, dim=1).to(x.dtype)
    copies = (mix[:, :, None, None, None] * x[:, None]).flatten(1, 2)
    kernel = weight.transpose(0, 1).flatten(1, 2)
    return nn.functional.conv2d(copies, kernel, padding=1) + (mix @ bias)[:, :, None, None]


def deform_values(case: Case, kind: torch.dtype, device: Device, seed: int) -> list[Tensor]:
    """input, offset, weight, bias, mask, gradient of the output; offset and mask float32 beside 16-bit types."""
    random = torch.Generator(device.name).manual_seed(seed)
    pixels = (case.height, case.width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device.name)

    wide_kind = torch.float64 if kind == torch.float64 else torch.float32
    return [
        normal(case.batch, case.channels, *pixels).to(kind),
        normal(case.batch, 18, *pixels).to(wide_kind),
        (normal(case.out_channels, case.channels, 3, 3) / (9 * case.channels) ** 0.5).to(kind),
        normal(case.out_channels).to(kind),
        torch.rand(case.batch, 9, *pixels, generator=random, device=device.name).to(wide_kind),
        normal(case.batch, case.out_channels, *pixels).to(kind),
    ]


def dynamic_values(case: Case, kind: torch.dtype, device: Device, seed: int) -> list[Tensor]:
    """input, weight, attention, bias, gradient of the output; attention float32 beside 16-bit types."""
    random = torch.Generator(device.name).manual_seed(seed)
    pixels, kernels = (case.height, case.width), bench_dynamic.KERNELS

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device.name)

    return [
        normal(case.batch, case.channels, *pixels).to(kind),
        (normal(kernels, case.out_channels, case.channels, 3, 3) / (9 * case.channels) ** 0.5).to(kind),
        normal(case.batch, kernels).to(torch.float64 if kind == torch.float64 else torch.float32),
        normal(kernels, case.out_channels).to(kind),
        normal(case.batch, case.out_channels, *pixels).to(kind),
    ]


def channels_last(values: list[Tensor], which: Sequence[int]) -> list[Tensor]:
    return [t.contiguous(memory_format=torch.channels_last) if i in which else t for i, t in enumerate(values)]


def contenders(case: Case, dtype: str, direction: str, device: Device, with_ours: bool) -> dict[str, Sequence[Run]]:
    make, kind = DIRECTIONS[direction], TORCH_DTYPE[dtype]
    sets = range(device.sets(case.bytes_moved("forward", dtype)))
    if case.op == "deform_conv2d":
        values = [deform_values(case, kind, device, seed) for seed in sets]
        last = [channels_last(v, (0, 2, 5)) for v in values]
        named = {
            "ours": (bench_deform.ours, values),
            "ours_channels_last": (bench_deform.ours, last),
            "conv2d": (bench_deform.plain, values),
            "conv2d_channels_last": (bench_deform.plain, last),
        }
        if dtype in ("bfloat16", "float16"):
            named["torchvision_autocast"] = (autocast(bench_deform.peer, device, dtype), values)
        if dtype != "bfloat16":
            # It wants one dtype for all.
            named["torchvision"] = (bench_deform.peer, [[t.to(kind) for t in v] for v in values])
    else:
        values = [dynamic_values(case, kind, device, seed) for seed in sets]
        last = [channels_last(v, (0, 4)) for v in values]
        named = {
            "ours": (bench_dynamic.ours, values),
            "ours_channels_last": (bench_dynamic.ours, last),
            "conv2d": (bench_dynamic.plain, [bench_dynamic.static(v) for v in values]),
            "conv2d_channels_last": (bench_dynamic.plain, [bench_dynamic.static(v) for v in last]),
            "grouped": (bench_dynamic.grouped, values),
            "wide": (wide, values),
        }
    return {
        name: [make(function, v) for v in sets_of_values]
        for name, (function, sets_of_values) in named.items()
        if with_ours or name not in OURS
    }


def network_steps(dtype: str, device: Device, with_ours: bool) -> tuple[str, dict[str, Sequence[Run]]]:
    """The case's text, and training steps of task2_published with ours and torchvision's operator, and of resnet34."""
    batch, size = (2, 32) if device.smoke else (64, 124)
    layers = {
        "ours": ("task2_published", None),
        "torchvision": ("task2_published", bench_network.WithTorchvision),
        "resnet34": ("resnet34", None),
    }
    steps: dict[str, Sequence[Run]] = {}
    for name, (model, layer) in layers.items():
        if with_ours or name != "ours":
            found = bench_network.network(model, layer, size).to(device.name)
            steps[name] = [bench_network.step(found, dtype, device.name, batch, size)]
    return f"training step {batch}x3x{size}x{size}", steps


# ---------------------------------------------------------------------------------------------------------------- suite


@dataclass
class Suite:
    """What was measured; saved after every race, so that a run cut short keeps what it has."""

    folder: Path
    device: Device
    environment: dict[str, Any]
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)

    def add(
        self,
        info: dict[str, str],
        times: dict[str, Timing],
        errors: dict[str, str],
        least: tuple[float | None, str | None] = (None, None),
    ) -> None:
        for peer in times:
            if peer in OURS:
                continue
            # A peer that has a layout is raced against ours in the same; the others against ours in both.
            rivals = ["ours_channels_last"] if peer.endswith("_channels_last") else ["ours"]
            if peer not in ("conv2d", "conv2d_channels_last") and "ours_channels_last" in times:
                rivals = list(OURS)
            for rival in rivals:
                ours = times.get(rival)
                self.rows.append(
                    {
                        **info,
                        "ours_ms": ours and ours.ms,
                        "peer": peer,
                        "peer_ms": times[peer].ms,
                        "ratio": ours and times[peer].ms / ours.ms,
                        "ours_peak_mb": ours and ours.peak_mb,
                        "peer_peak_mb": times[peer].peak_mb,
                        "layout": "channels_last" if rival == "ours_channels_last" else "contiguous",
                        "floor_ms": least[0],
                        "bound": least[1],
                        "timing": ours.timing if ours else times[peer].timing,
                        "runs": ours.runs if ours else times[peer].runs,
                    }
                )
        self.errors += [{**info, "contender": name, "error": text} for name, text in errors.items()]
        self.save()

    def fail(self, error: Exception | str, **info: str) -> None:
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}".split("\n")[0][:500]
        self.errors.append({**info, "contender": "", "error": text})
        self.save()

    def save(self) -> None:
        """results.json, suite.json and table.md."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "results.json").write_text(json.dumps(self.rows, indent=1) + "\n")
        rest = {"environment": self.environment, "ceilings": self.ceilings, "errors": self.errors}
        (self.folder / "suite.json").write_text(json.dumps(rest, indent=1) + "\n")
        (self.folder / "table.md").write_text(markdown(self.rows, **rest))


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def markdown(
    rows: list[dict[str, Any]],
    environment: dict[str, Any],
    ceilings: dict[str, float],
    errors: list[dict[str, str]],
) -> str:
    """A row per case, direction, dtype and layout of ours; a peer's cell is its time, and that over ours."""
    lines = [
        "Milliseconds, medians of interleaved runs; in brackets a peer's time over ours: above 1, ours is faster. The",
        "floor is the larger of bytes over the copy bandwidth and operations over the rate of matrix products, both",
        "measured in the same run. MB: memory needed above what was allocated, results included.",
        "",
        ", ".join(f"{key} {value}" for key, value in environment.items()) + ".",
        "Ceilings: " + ", ".join(f"{key} {value:.4g}" for key, value in ceilings.items()) + ".",
    ]
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        peers = list(dict.fromkeys(row["peer"] for row in of_op))
        lines += ["", f"### {op}", ""]
        lines.append(
            "| case | direction | dtype | layout | floor | bound | ours | ours MB | " + " | ".join(peers) + " |"
        )
        lines.append("|---|---|---|---|---:|---|---:|---:|" + "---:|" * len(peers))
        keys = ("case", "direction", "dtype", "layout")
        for key in dict.fromkeys(tuple(row[k] for k in keys) for row in of_op):
            group = {row["peer"]: row for row in of_op if tuple(row[k] for k in keys) == key}
            first = next(iter(group.values()))
            memory = "" if first["ours_peak_mb"] is None else f"{first['ours_peak_mb']:.0f}"
            cells = [*key, number(first["floor_ms"]), first["bound"] or "", number(first["ours_ms"]), memory]
            for peer in peers:
                row = group.get(peer)
                cell = number(row["peer_ms"]) if row else ""
                cells.append(f"{cell} ({row['ratio']:.2f})" if row and row["ratio"] else cell)
            lines.append("| " + " | ".join(cells) + " |")
    if errors:
        lines += ["", "### What failed", ""]
        lines += [f"- {', '.join(v for k, v in e.items() if k != 'error' and v)}: {e['error']}" for e in errors]
    return "\n".join(lines) + "\n"


def chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the peers' time over ours, a panel per operator and direction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["ratio"]]
    panels = list(dict.fromkeys((row["op"], row["direction"]) for row in rows))
    if not panels:
        return
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(12, 3.2 * len(panels)), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        best: dict[tuple[str, str, str], float] = {}
        for row in rows:
            if (row["op"], row["direction"]) == panel:
                key = (row["case"], row["dtype"], row["peer"])
                best[key] = max(best.get(key, 0.0), row["ratio"])
        groups = list(dict.fromkeys(key[:2] for key in best))
        peers = list(dict.fromkeys(key[2] for key in best))
        for i, peer in enumerate(peers):
            found = [(j, best[(*group, peer)]) for j, group in enumerate(groups) if (*group, peer) in best]
            axis.bar([j + i * 0.8 / len(peers) for j, _ in found], [r for _, r in found], 0.8 / len(peers), label=peer)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(groups)), [f"{case}\n{dtype}" for case, dtype in groups], fontsize=7)
        axis.set(title=", ".join(panel), ylabel="peer's time / ours", yscale="log")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def has_kernels(op: str, device: Device) -> str:
    """ "" if the operator runs on the device, else why not."""
    case = Case(op, "probe", 1, 2, 4, 4, 2)
    try:
        if op == "deform_conv2d":
            bench_deform.ours(*deform_values(case, torch.float32, device, 0)[:-1])
        else:
            bench_dynamic.ours(*dynamic_values(case, torch.float32, device, 0)[:-1])
        device.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0][:500]
    return ""


def environment(device: Device) -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": "cpu"}
    if device.cuda:
        properties = torch.cuda.get_device_properties(0)
        found.update(device=properties.name, multiprocessors=properties.multi_processor_count)
        found.update(l2_mb=device.l2_bytes // 2**20, cudnn=torch.backends.cudnn.version())
    with contextlib.suppress(ImportError):
        found["built"] = dynconv_ext.build_info()
    return found


def measure(suite: Suite, seconds: float) -> None:
    device = suite.device
    begin = time.perf_counter()
    deadline = begin + seconds
    cases = SMOKE_CASES if device.smoke else CASES
    missing = {op: has_kernels(op, device) for op in dict.fromkeys(case.op for case in cases)}
    for op, why in missing.items():
        if why:
            suite.fail(why, op=op)
    # A GPU is not wasted on an operator's peers while another operator has kernels to measure.
    ops = [op for op, why in missing.items() if not why] or list(missing)
    try:
        suite.ceilings.update(ceilings(device))
    except Exception as error:
        suite.fail(error, op="ceilings")
    for dtype in ("bfloat16", "float32-tf32", "float32") if "deform_conv2d" in ops else ():
        info = {"op": "task2_published", "dtype": dtype, "direction": "forward+backward"}
        try:
            with precision(dtype):
                text, steps = network_steps(dtype, device, not missing["deform_conv2d"])
                times, errors = device.race(steps, min(4.0, seconds / 30), graphs=False)
            suite.add({"op": info["op"], "case": text, **info}, times, errors)
        except Exception as error:
            suite.fail(error, **info)
    dtypes = list(dict.fromkeys(dtype for case in cases for dtype in case.dtypes))
    races = [
        (case, dtype, direction)
        for dtype in dtypes
        for case in cases
        if case.op in ops and dtype in case.dtypes
        for direction in DIRECTIONS
    ]
    for i, (case, dtype, direction) in enumerate(races):
        info = {"op": case.op, "case": case.text, "dtype": dtype, "direction": direction}
        left = deadline - time.perf_counter()
        if left < 0:
            suite.fail(f"not measured: the {seconds:.0f} s were over", **info)
            continue
        try:
            with precision(dtype):
                entrants = contenders(case, dtype, direction, device, not missing[case.op])
                # About half of a race goes into warming up and capturing.
                times, errors = device.race(entrants, min(3.0, left / (len(races) - i) / 2))
            suite.add(info, times, errors, floor(case, dtype, direction, suite.ceilings))
            print(f"{time.perf_counter() - begin:6.1f} s  " + "  ".join(info.values()), flush=True)
        except Exception as error:
            suite.fail(error, **info)
        entrants = {}
        gc.collect()
        if device.cuda:
            torch.cuda.empty_cache()
    suite.save()
    try:
        chart(suite.rows, suite.folder / "chart.png")
    except Exception as error:
        suite.fail(error, op="chart")


def check(names: Sequence[str], device: Device) -> list[str]:
    """Compares values and gradients on the device with the reference in float64; returns what is wrong."""
    from op_cases import DEFORM_CASES, TOLERANCE, TOLERANCE_TF32, relative_error

    wrong = []
    cases = [case for case in DEFORM_CASES if case.name in names]
    if len(cases) < len(set(names)):
        raise SystemExit(
            f"--check: got {', '.join(names)}, expected names of {', '.join(c.name for c in DEFORM_CASES)}"
        )
    for case in cases:
        for dtype, kind in TORCH_DTYPE.items():
            for layout in (False, True):
                label = f"deform_conv2d {case.name} {dtype} {'channels_last' if layout else 'contiguous'}"
                here = case.tensors(kind, layout, torch.float64 if kind == torch.float64 else torch.float32)
                exact = [None if t is None else t.detach().double().requires_grad_() for t in here]
                with precision(dtype):
                    moved = [None if t is None else t.detach().to(device.name).requires_grad_() for t in here]
                    x, offset, weight, bias, mask = moved
                    out = dynconv_ext.deform_conv2d(x, offset, weight, bias, *case.geometry, mask=mask)
                    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(kind)
                    out.backward(grad.to(device.name))
                device.synchronize()
                x, offset, weight, bias, mask = exact
                expected = dynconv_ext.reference.deform_conv2d(x, offset, weight, bias, *case.geometry, mask=mask)
                expected.backward(grad.double())
                tolerance = TOLERANCE_TF32 if dtype == "float32-tf32" else TOLERANCE[kind]
                pairs = [("out", out, expected)]
                named = zip(("input", "offset", "weight", "bias", "mask"), moved, exact, strict=True)
                pairs += [(f"grad_{name}", a.grad, b.grad) for name, a, b in named if a is not None]
                for name, a, b in pairs:
                    error = relative_error(a.detach().cpu(), b.detach())
                    if not error <= tolerance:
                        wrong.append(f"{label}: {name} is off by {error:.2e}, allowed {tolerance:.0e}")
                print(label, flush=True)
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where results go")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, a round each: shows that it runs")
    parser.add_argument("--seconds", type=float, default=240.0, help="time for everything (240)")
    parser.add_argument("--check", help="no timing: compare these geometries (comma-separated) with the reference")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_suite: torch sees no GPU (--device cpu --smoke runs without one)")
    device = Device(options.device, options.smoke)
    if options.check:
        wrong = check(options.check.split(","), device)
        print("\n".join(wrong) or "all as the reference")
        return 1 if wrong else 0
    torch.backends.cudnn.benchmark = True
    suite = Suite(options.folder, device, environment(device))
    measure(suite, options.seconds)
    print((options.folder / "table.md").read_text())
    return 0 if suite.rows else 1


if __name__ == "__main__":
    sys.exit(main())
