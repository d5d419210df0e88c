# SPDX-License-Identifier: BSD-3-Clause
"""What the benchmarks share: settings, and races between contenders.

A benchmark is one contender (``impl``) of a race on one case; all contenders of a race form a group and carry the same
``extra_info``, from which ``ratios.py`` makes its table. Contenders take turns, a run each, so that a machine that is
slow for a second is slow for all of them; pytest-benchmark is then handed the times that were measured.
"""

from __future__ import annotations

import gc
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch

Contenders = Mapping[str, Callable[[], Any]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke", action="store_true", help="one round of every benchmark: shows that they run")
    parser.addoption("--seconds", type=float, default=3.0, help="seconds that a race is given (3)")


class ReplayTimer:
    """A timer that reads 0 at the start of a round and the next recorded time at its end."""

    def __init__(self) -> None:
        self.readings: deque[float] = deque()

    def load(self, times: Iterable[float]) -> None:
        self.readings = deque(reading for t in times for reading in (0.0, t))

    def __call__(self) -> float:
        return self.readings.popleft()


_timer = ReplayTimer()
_races: dict[str, dict[str, list[float]]] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "race" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=_timer))


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """``race(contenders, impl, op=, case=, dtype=, direction=)`` reports one contender of a race.

    ``contenders()`` prepares the functions to time, by name; it is called, and the race run, when the first contender
    of the group is reported.
    """

    def run(contenders: Callable[[], Contenders], impl: str, **info: str) -> None:
        group = "/".join(info[key] for key in ("op", "case", "direction", "dtype"))
        if group not in _races:
            _races[group] = interleave(
                contenders(), request.config.getoption("--smoke"), request.config.getoption("--seconds")
            )
        times = _races[group].get(impl)
        if times is None:
            pytest.skip(f"{impl} has no {group}")
        benchmark.group = group
        benchmark.extra_info.update(info, impl=impl, threads=torch.get_num_threads())
        _timer.load(times)
        benchmark.pedantic(lambda: None, rounds=len(times), iterations=1)

    return run


def interleave(contenders: Contenders, smoke: bool, seconds: float) -> dict[str, list[float]]:
    """Times of each contender in seconds, one after the other in turn, after one run each to warm up."""
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    shuffle = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        rounds = 0
        while rounds < 1 or not smoke and rounds < 200 and (rounds < 5 or time.perf_counter() - start < seconds):
            # A new order each round: what one contender leaves behind (spinning threads, caches) falls on all alike.
            for name, run in shuffle.sample(list(contenders.items()), len(contenders)):
                before = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - before)
            rounds += 1
    finally:
        gc.enable()
    return times
