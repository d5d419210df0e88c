# SPDX-License-Identifier: BSD-3-Clause
"""How the GPU suite measures: precision, median times of contenders that take turns, and the memory that each needs."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

TORCH_DTYPE = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float32-tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
Run = Callable[[], Any]


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


@dataclass
class Timing:
    """Of one contender, a run; peak_mb: memory needed above inputs and results, see Device.peak_mb."""

    ms: float
    peak_mb: float | None
    timing: str
    runs: int


def first_line(error: Exception) -> str:
    """An error in one line, with its type."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:500]


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

    def alive(self) -> bool:
        """False after an error that the process can't recover from, such as an illegal memory access."""
        try:
            self.synchronize()
            return torch.zeros(1, device=self.name).item() == 0
        except RuntimeError:
            return False

    def prepare(self, runs: Sequence[Run], graphs: bool) -> tuple[Run, str, int]:
        """Warms up; the function to time, how it does the runs, and how many it does."""

        def one_by_one() -> None:
            for run in runs:
                run()

        if not self.cuda:
            one_by_one()
            return one_by_one, "host clock", len(runs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                one_by_one()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if not graphs:
            return one_by_one, "events", len(runs)
        # A replay of at least a millisecond: launching it takes some microseconds.
        once = min(self.time_ms(one_by_one) for _ in range(2))
        times = min(max(1, math.ceil(1.0 / max(once, 1e-3))), 16)
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(times):
                    one_by_one()
            graph.replay()
            torch.cuda.synchronize()
            return graph.replay, "graph", times * len(runs)
        except RuntimeError as error:
            print(f"no CUDA graph, so calls one by one: {first_line(error)}", flush=True)
            torch.cuda.synchronize()
            return one_by_one, "events", len(runs)

    def peak_mb(self, run: Run) -> float | None:
        """The most memory allocated during a run, less what was allocated before and what its results hold.

        Results are what the run returns and the gradients it leaves: of the same size for every contender. What is left
        is what a way of computing costs: workspaces, columns, copies, tensors saved for the backward.
        """
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run()
        torch.cuda.synchronize()
        after = torch.cuda.memory_allocated()
        del results
        return (torch.cuda.max_memory_allocated() - max(before, after)) / 1e6

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
                prepared[name] = (*self.prepare(runs, graphs), peak)
            except Exception as error:  # one contender's failure is a result, too
                errors[name] = first_line(error)
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
                    run, _, runs_at_once, _ = prepared[name]
                    times[name].append(self.time_ms(run) / runs_at_once)
                rounds += 1
        finally:
            gc.enable()
        found = {
            name: Timing(statistics.median(times[name]), peak, timing, rounds * runs_at_once)
            for name, (_, timing, runs_at_once, peak) in prepared.items()
        }
        return found, errors
