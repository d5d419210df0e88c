# SPDX-License-Identifier: BSD-3-Clause
"""Measures the operators on a GPU beside their peers; what benchmarks/gpu_suite.sh runs after building and testing.

    python benchmarks/gpu_suite.py OUTDIR [--seconds 240]    ceilings, networks, races; writes the results
    python benchmarks/gpu_suite.py OUTDIR --check deform:small,dynamic:small
                     values and gradients of geometries of tests/op_cases.py and tests/dynamic_cases.py

OUTDIR/results.json is a list of {op, case, dtype, direction, ours_ms, peer, peer_ms, ratio, ours_peak_mb,
peer_peak_mb}, ratio = peer_ms / ours_ms; beside these layout (of ours), floor_ms (bytes and operations over the
measured ceilings), bound (which of the two), timing (graph: replays of a captured CUDA graph; events: calls one by one)
and runs. peak_mb: the most memory allocated during a run above what it was given and what its results (output, and
gradients where there is a backward) hold; for networks, above parameters, optimiser state and gradients. An operator
without CUDA kernels has null for ours. The rest, errors too, is in suite.json; table.md and chart.png show both.

Times are medians; contenders take turns in a random order, their inputs rotate among sets that together are twice the
L2, and all data is random. ``--device cpu --smoke`` runs the same on tiny shapes without a GPU. After an error that
leaves the process without its GPU the suite goes on in a new one (--resume), without the race that did it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
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
import dynconv_ext  # noqa: E402
import gpu_networks as networks  # noqa: E402
from gpu_check import check  # noqa: E402
from gpu_timing import TORCH_DTYPE, Device, Run, Timing, first_line, precision  # noqa: E402
from timed import DIRECTIONS  # noqa: E402

OPERATORS = ("deform_conv2d", "dynamic_conv2d")
OURS = ("ours", "ours_channels_last")


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
    groups: int = 1

    @property
    def text(self) -> str:
        return f"{self.name} {self.batch}x{self.channels}x{self.height}x{self.width}-{self.out_channels}"

    def flops(self, direction: str) -> float:
        once = 2.0 * self.batch * self.height * self.width * self.out_channels * self.channels / self.groups * 9
        return once * (1 if direction == "forward" else 3)

    def bytes_moved(self, direction: str, dtype: str) -> float:
        """Inputs read once, outputs written once; backward reads the inputs again and writes their gradients."""
        size, wide = TORCH_DTYPE[dtype].itemsize, 8 if dtype == "float64" else 4
        pixels = self.batch * self.height * self.width
        kernels = bench_dynamic.KERNELS if self.op == "dynamic_conv2d" else 1
        inputs = size * (pixels * self.channels + kernels * self.out_channels * self.channels / self.groups * 9)
        inputs += wide * (27 * pixels if self.op == "deform_conv2d" else self.batch * kernels)
        output = size * pixels * self.out_channels
        return inputs + output + (0 if direction == "forward" else output + 2 * inputs)


CASES = [
    Case("deform_conv2d", "A", 64, 64, 31, 31, 128),
    Case("deform_conv2d", "B", 16, 256, 56, 56, 256),
    Case("deform_conv2d", "C", 2, 256, 200, 304, 256),
    Case("deform_conv2d", "depthwise", 16, 256, 56, 56, 256, ("bfloat16", "float32"), 256),
    Case("deform_conv2d", "small", 4, 32, 17, 17, 32, ("float64",)),
    Case("dynamic_conv2d", "stem", 64, 3, 124, 124, 64, ("bfloat16", "float32-tf32")),
    Case("dynamic_conv2d", "stage 1", 64, 64, 62, 62, 64, ("bfloat16", "float32-tf32")),
    Case("dynamic_conv2d", "stage 2", 64, 128, 31, 31, 128, ("bfloat16", "float32-tf32")),
    Case("dynamic_conv2d", "stage 3", 64, 256, 16, 16, 256, ("bfloat16", "float32-tf32", "float32", "float16")),
    Case("dynamic_conv2d", "stage 4", 64, 512, 8, 8, 512, ("bfloat16", "float32-tf32")),
    Case("dynamic_conv2d", "depthwise", 64, 256, 31, 31, 256, ("bfloat16", "float32"), 256),
    Case("dynamic_conv2d", "small", 4, 32, 17, 17, 32, ("float64",)),
]
SMOKE_CASES = [
    Case("deform_conv2d", "tiny", 2, 4, 5, 6, 4, tuple(TORCH_DTYPE)),
    Case("dynamic_conv2d", "tiny", 2, 4, 5, 6, 4, tuple(TORCH_DTYPE)),
]


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

    channels = case.channels // case.groups
    wide_kind = torch.float64 if kind == torch.float64 else torch.float32
    return [
        normal(case.batch, case.channels, *pixels).to(kind),
        normal(case.batch, 18, *pixels).to(wide_kind),
        (normal(case.out_channels, channels, 3, 3) / (9 * channels) ** 0.5).to(kind),
        normal(case.out_channels).to(kind),
        torch.rand(case.batch, 9, *pixels, generator=random, device=device.name).to(wide_kind),
        normal(case.batch, case.out_channels, *pixels).to(kind),
    ]


def dynamic_values(case: Case, kind: torch.dtype, device: Device, seed: int) -> list[Tensor]:
    """input, weight, attention, bias, gradient of the output; attention float32 beside 16-bit types."""
    random = torch.Generator(device.name).manual_seed(seed)
    pixels, kernels = (case.height, case.width), bench_dynamic.KERNELS
    channels = case.channels // case.groups

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device.name)

    return [
        normal(case.batch, case.channels, *pixels).to(kind),
        (normal(kernels, case.out_channels, channels, 3, 3) / (9 * channels) ** 0.5).to(kind),
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
        }
        if case.groups == 1:
            named["wide"] = (wide, values)
    return {
        name: [make(function, v) for v in sets_of_values]
        for name, (function, sets_of_values) in named.items()
        if with_ours or name not in OURS
    }


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
            # A peer that runs in both layouts is raced against ours in the same; the others against ours in both.
            rivals = ["ours_channels_last"] if peer.endswith("_channels_last") else ["ours"]
            both = peer.endswith("_channels_last") or f"{peer}_channels_last" in times
            if not both and "ours_channels_last" in times:
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
        self.errors.append({**info, "contender": "", "error": error if isinstance(error, str) else first_line(error)})
        self.save()

    def load(self) -> None:
        """What an earlier process saved in the folder."""
        rest = json.loads((self.folder / "suite.json").read_text())
        self.rows = json.loads((self.folder / "results.json").read_text())
        self.ceilings, self.errors = rest["ceilings"], rest["errors"]

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
        "measured in the same run. MB: the most memory allocated above inputs and results (output, gradients).",
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
        return first_line(error)
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


@dataclass(frozen=True)
class Race:
    info: dict[str, str]  # op, case, dtype, direction
    entrants: Callable[[], dict[str, Sequence[Run]]]
    case: Case | None = None
    graphs: bool = True

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(self.info.values())


def races(device: Device, missing: dict[str, str]) -> list[Race]:
    """What is measured, the most important first. missing: why an operator has no kernels, "" if it has."""
    # A GPU is not wasted on an operator's peers while another operator has kernels to measure.
    ops = [op for op, why in missing.items() if not why] or list(missing)
    cases = [case for case in (SMOKE_CASES if device.smoke else CASES) if case.op in ops]

    def operators(*dtypes: str) -> list[Race]:
        return [
            Race(
                {"op": case.op, "case": case.text, "dtype": dtype, "direction": direction},
                lambda case=case, dtype=dtype, direction=direction: contenders(
                    case, dtype, direction, device, not missing[case.op]
                ),
                case,
            )
            for dtype in dtypes
            for case in cases
            if dtype in case.dtypes
            for direction in DIRECTIONS
        ]

    def network(model: networks.Network, dtype: str, direction: str, graph: bool = False) -> list[Race]:
        if model.operator not in ops:
            return []
        text = model.text(direction, device) + (", CUDA graph" if graph else "")
        return [
            Race(
                {"op": model.name, "case": text, "dtype": dtype, "direction": direction},
                lambda: model.contenders(dtype, direction, device, not missing[model.operator], graph),
                graphs=graph or direction == "forward",
            )
        ]

    step = "forward+backward"
    return [
        *network(networks.TASK2, "bfloat16", step),
        *network(networks.DYNAMIC, "bfloat16", step),
        *operators("bfloat16", "float32-tf32"),
        *network(networks.TASK2, "float32-tf32", step),
        *([] if device.smoke else network(networks.DYNAMIC, "float32-tf32", step)),
        *network(networks.CONDCONV, "bfloat16", step),
        *network(networks.CONDCONV, "bfloat16", "forward"),
        *operators("float32", "float16", "float64"),
        # Small kernels wait for their launches: a graph shows what the device needs.
        *(network(networks.TASK2, "bfloat16", step, graph=True) if device.cuda else []),
        *(network(networks.DYNAMIC, "bfloat16", step, graph=True) if device.cuda else []),
    ]


def measure(suite: Suite, seconds: float) -> float:
    """Measures what is not yet in the suite; 0, or the seconds that were left when the device was lost."""
    device = suite.device
    begin = time.perf_counter()
    deadline = begin + seconds
    done = {tuple(e.get(key, "") for key in ("op", "case", "dtype", "direction")) for e in suite.rows + suite.errors}
    missing = {e["op"]: e["error"] for e in suite.errors if e["op"] in OPERATORS and "case" not in e}
    for op in OPERATORS:
        if op in missing:
            continue
        missing[op] = has_kernels(op, device)
        if missing[op]:
            suite.fail(missing[op], op=op)
            if not device.alive():
                return seconds
    if not suite.ceilings:
        try:
            suite.ceilings.update(ceilings(device))
        except Exception as error:
            suite.fail(error, op="ceilings")
    todo = [race for race in races(device, missing) if race.key not in done]
    if not networks.has_timm():
        todo = [race for race in todo if race.info["op"] != networks.CONDCONV.name]
        suite.fail("not measured: timm is not installed", op=networks.CONDCONV.name)
    for i, race in enumerate(todo):
        left = deadline - time.perf_counter()
        if left < 0:
            suite.fail(f"not measured: the {seconds:.0f} s were over", **race.info)
            continue
        dtype, direction = race.info["dtype"], race.info["direction"]
        try:
            with precision(dtype):
                # About half of a race goes into warming up and capturing.
                limit = min(3.0, left / (len(todo) - i) / 2)
                times, errors = device.race(race.entrants(), limit, race.graphs)
            least = floor(race.case, dtype, direction, suite.ceilings) if race.case else (None, None)
            suite.add(race.info, times, errors, least)
            print(f"{time.perf_counter() - begin:6.1f} s  " + "  ".join(race.info.values()), flush=True)
        except Exception as error:
            suite.fail(error, **race.info)
        gc.collect()
        if not device.alive():
            suite.fail("the process lost its GPU", **race.info)
            return max(deadline - time.perf_counter(), 1.0)
        if device.cuda:
            torch.cuda.empty_cache()
    suite.save()
    try:
        chart(suite.rows, suite.folder / "chart.png")
    except Exception as error:
        suite.fail(error, op="chart")
    return 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where results go")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, a round each: shows that it runs")
    parser.add_argument("--seconds", type=float, default=240.0, help="time for everything (240)")
    parser.add_argument(
        "--check", help="no timing: compare these geometries (deform:NAME,dynamic:NAME) with the reference"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the results in the folder")
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
    if options.resume:
        suite.load()
    # What was imported need not be looked through at each of the collections to come.
    gc.freeze()
    try:
        left = measure(suite, options.seconds)
    finally:
        gc.unfreeze()
    if left:
        # Only a new process gets a GPU back; it takes this one's place.
        again = [str(options.folder), "--device", options.device, "--seconds", str(left), "--resume"]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, __file__, *again, *(["--smoke"] if options.smoke else [])])
    print((options.folder / "table.md").read_text())
    return 0 if suite.rows else 1


if __name__ == "__main__":
    sys.exit(main())
