# SPDX-License-Identifier: BSD-3-Clause
"""What happens around the training steps: history, checkpoints, stopping on request."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar

from .config import StudyError, TrainConfig

BEST, LAST, HISTORY = "best.ckpt", "last.ckpt", "history.csv"


class TrainingInterrupted(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM) and has saved where it was.

    Attributes:
        signal: Number of the signal that asked.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal = signal_number


@dataclass(frozen=True)
class EpochRecord:
    """One line of history.csv: an epoch (from 1), its losses, its accuracies in percent, its seconds."""

    epoch: int
    train_loss: float
    train_acc: float
    val_loss: float
    val_acc: float
    seconds: float


class StopRequest:
    """Turns the first SIGINT or SIGTERM inside the `with` block into a request; a second one interrupts at once.

    Stopping between two steps is what keeps weights, optimiser and counters consistent in the saved checkpoint.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python lets only the main thread set handlers; elsewhere signals keep their meaning.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        if int(os.environ.get("RANK", "0")) == 0:
            print("\nStopping: saving after this step (or after the running validation).", file=sys.stderr, flush=True)


class RunState(Checkpoint):
    """Keeps history.csv, best.ckpt (best validation accuracy) and last.ckpt, and stops when asked.

    last.ckpt is written after every epoch's validation, and inside an epoch every `checkpoint_minutes` and
    `checkpoint_steps`. It is not written between an epoch's last step and the end of its validation: continuing from
    there would leave the validation out.

    Being a `Checkpoint`, it runs after the callbacks that decide about stopping early.
    """

    def __init__(
        self, folder: Path, config: TrainConfig, stop: StopRequest, show: Callable[[EpochRecord], None] | None = None
    ) -> None:
        self.folder, self.config, self.stop, self.show = folder, config, stop, show
        self.records: list[EpochRecord] = []
        self.finished = False
        self._seconds = 0.0
        self._since = self._saved_at = time.perf_counter()

    @property
    def best(self) -> EpochRecord:
        """The epoch whose weights best.ckpt holds: the first with the greatest validation accuracy."""
        return max(self.records, key=lambda record: record.val_acc)

    def state_dict(self) -> dict[str, Any]:
        return {
            "records": [dataclasses.asdict(record) for record in self.records],
            "seconds": self._elapsed(),
            "finished": self.finished,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = [EpochRecord(**record) for record in state_dict["records"]]
        self.finished = state_dict["finished"]
        self._seconds = state_dict["seconds"]
        self._since = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = self._saved_at = time.perf_counter()
        # Epochs that a killed run wrote after its last checkpoint are about to be trained again.
        self._write_history(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        stopping = self._stopping(trainer)
        step, every = trainer.global_step, self.config.checkpoint_steps
        if stopping or (every and step % every == 0) or self._overdue(trainer):
            self._save(trainer, LAST)
        if stopping:
            raise TrainingInterrupted(self.stop.signal or signal.SIGINT)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        names = ("train_loss", "train_acc", "val_loss", "val_acc")
        values = {name: float(trainer.callback_metrics[name]) for name in names}
        for name in ("train_loss", "val_loss"):
            if not math.isfinite(values[name]):
                raise StudyError(
                    f"epoch {trainer.current_epoch + 1}: {name} is {values[name]}: training diverged "
                    f"(learning_rate {self.config.learning_rate}, gradient_clip {self.config.gradient_clip})"
                )
        record = EpochRecord(epoch=trainer.current_epoch + 1, seconds=self._elapsed(), **values)
        self.records.append(record)
        self._seconds, self._since = 0.0, time.perf_counter()
        self.finished = trainer.should_stop or record.epoch >= self.config.epochs
        self._write_history(trainer)
        if self.show is not None and trainer.is_global_zero:
            self.show(record)
        if self.best is record:
            trainer.save_checkpoint(self.folder / BEST, weights_only=True)
        self._save(trainer, LAST)
        if not self.finished and self._stopping(trainer):
            raise TrainingInterrupted(self.stop.signal or signal.SIGINT)

    def _elapsed(self) -> float:
        return self._seconds + time.perf_counter() - self._since

    def _save(self, trainer: pl.Trainer, name: str) -> None:
        trainer.save_checkpoint(self.folder / name)
        self._saved_at = time.perf_counter()

    def _stopping(self, trainer: pl.Trainer) -> bool:
        stopping = self.stop.signal is not None
        # All processes must stop at the same step: signals reach them at different ones.
        return trainer.strategy.reduce_boolean_decision(stopping, all=False) if trainer.world_size > 1 else stopping

    def _overdue(self, trainer: pl.Trainer) -> bool:
        overdue = time.perf_counter() - self._saved_at > 60 * self.config.checkpoint_minutes
        return bool(trainer.strategy.broadcast(overdue)) if trainer.world_size > 1 else overdue

    def _write_history(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        path = self.folder / HISTORY
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(field.name for field in dataclasses.fields(EpochRecord))
            writer.writerows(dataclasses.astuple(record) for record in self.records)
        partial.replace(path)


class EpochBar(TQDMProgressBar):
    """Lightning's bar, without the version number that stands for nothing here."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, int | str | float]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
