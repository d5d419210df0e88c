# SPDX-License-Identifier: BSD-3-Clause
"""Preprocessing in several processes.

Each worker is a fresh Python that reads pickled tasks on its standard input and answers on its standard output.
multiprocessing is not used because its spawned children import the caller's ``__main__`` anew (torch and all of it,
and they fail where a script lacks the ``if __name__ == "__main__"`` guard or came from a pipe), and because pool
workers outlive a parent that was killed. Here the end of standard input ends the worker, whatever ended the parent.
"""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from queue import SimpleQueue
from typing import Any, BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray

from .preprocessing import PreprocessConfig, UnreadableImageError, preprocess
from .sources import Source

TASK_IMAGES = 8
WORTH_PROCESSES_SECONDS = 4.0
"""Processes take about a second to start; work shorter than this isn't worth them."""

_LENGTH = struct.Struct("<Q")
_START = "import sys; sys.path[:] = sys.argv[1:]; from dynconv_vision.data.workers import main; main()"


@dataclass(frozen=True)
class Task:
    """Some images to prepare.

    Attributes:
        source: these images alone.
        indices: their numbers in the caller's source.
        config: the pipeline, or None to decode them only.
    """

    source: Source
    indices: tuple[int, ...]
    config: PreprocessConfig | None


Result = tuple[int, NDArray[np.uint8] | None, str | None]
"""An image's number, its pixels (3, S, S), and what is wrong with it; of the last two one at most is not None."""


def run_task(task: Task) -> list[Result]:
    """Prepare one task's images in this process."""
    return [_prepare_one(task, position, index) for position, index in enumerate(task.indices)]


def _prepare_one(task: Task, position: int, index: int) -> Result:
    try:
        image = task.source.load(position)
        return index, None if task.config is None else preprocess(image, task.config), None
    except UnreadableImageError as error:
        return index, None, str(error)


def run(
    source: Source, todo: Sequence[int], config: PreprocessConfig | None, workers: int | None
) -> Iterator[list[Result]]:
    """Prepare images `todo` of `source`, some at a time, in any order.

    Args:
        source: all images.
        todo: the numbers of those to prepare.
        config: the pipeline, or None to decode only and so find the broken ones.
        workers: processes; 0: this one; None: this one if it will be done in some seconds, else one for each core.
    """
    tasks = (Task(source.take(chunk), chunk, config) for chunk in _chunks(todo, TASK_IMAGES))
    if workers is None:
        workers = available_cores()
        # The caller's own work between two results is in the measured time, and rightly so: processes don't share it.
        started, done = time.perf_counter(), 0
        for task in tasks:
            with _quiet_cv2():
                results = run_task(task)
            yield results
            done += len(results)
            seconds = time.perf_counter() - started
            if workers > 1 and seconds > 0.2 and seconds / done * (len(todo) - done) > WORTH_PROCESSES_SECONDS:
                break
    if workers == 0:
        for task in tasks:
            with _quiet_cv2():
                results = run_task(task)
            yield results
    else:
        yield from run_in_processes(tasks, workers)


def _chunks(numbers: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(numbers), size):
        yield tuple(int(number) for number in numbers[start : start + size])


@contextmanager
def _quiet_cv2() -> Iterator[None]:
    """Broken images are reported by us, all at once: keep OpenCV's own lines out of the progress bar."""
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_in_processes(tasks: Iterable[Task], workers: int) -> Iterator[list[Result]]:
    """Results of tasks in the order in which they are done.

    Raises:
        RuntimeError: a worker failed or died.
    """
    remaining = iter(tasks)
    first = next(remaining, None)
    if first is None:
        return
    remaining = chain([first], remaining)
    processes = [_Worker() for _ in range(workers)]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for process in processes:
        idle.put(process)

    def call(task: Task) -> list[Result]:
        process = idle.get()
        try:
            return process.call(task)
        finally:
            idle.put(process)

    executor = ThreadPoolExecutor(workers)
    pending: set[Future[list[Result]]] = set()
    try:
        # Twice as many tasks as workers are on their way: enough to keep them busy, little to hold in memory.
        while pending := pending | {
            executor.submit(call, task) for task in islice(remaining, max(0, 2 * workers - len(pending)))
        }:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.stop()


class _Worker:
    def __init__(self) -> None:
        # -P and the caller's own sys.path: the worker imports what the caller would, never what lies in the cwd.
        # One thread each: the processes are the parallelism.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENCV_LOG_LEVEL": "SILENT"}
        command: Sequence[str] = [sys.executable, "-P", "-c", _START, *(path or os.getcwd() for path in sys.path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def call(self, task: Task) -> list[Result]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            _send(self.process.stdin, task)
            answer = _receive(self.process.stdout)
        except OSError:
            answer = None
        if answer is None:
            code = self.process.wait()
            raise RuntimeError(
                f"a preprocessing worker ended with exit code {code} (negative: the signal that killed it; -9 often "
                "means that memory ran out). The images done so far are kept; run again, perhaps with fewer workers"
            )
        results, failure = answer
        if failure is not None:
            raise RuntimeError(f"a preprocessing worker failed:\n{failure}")
        return results

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # what was still to be sent has no reader any more
                pass


def _send(stream: BinaryIO, message: Any) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def _receive(stream: BinaryIO) -> Any | None:
    """The next message, or None where the other side has gone."""
    header = stream.read(_LENGTH.size)
    if len(header) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(header)
    data = stream.read(length)
    return pickle.loads(data) if len(data) == length else None


def main() -> None:
    """A worker's life: answer tasks until standard input ends."""
    import signal
    import traceback

    # Ctrl-C reaches the whole group of processes; the parent alone decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not end up among the answers
    while (task := _receive(sys.stdin.buffer)) is not None:
        try:
            answer: tuple[list[Result], str | None] = (run_task(task), None)
        except Exception:
            answer = ([], traceback.format_exc())
        try:
            _send(answers, answer)
        except BrokenPipeError:
            # os._exit: the interpreter would complain again when it flushes the same pipe.
            os._exit(1)
