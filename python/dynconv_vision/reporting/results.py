# SPDX-License-Identifier: BSD-3-Clause
"""Reading what a run left: ``results.json``, and a ``history.csv`` for every network."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Numbers of a network in results.json; all of them may be missing.
MODEL_KEYS = ("params", "flops", "train_acc", "val_acc", "test_acc", "train_loss", "val_loss", "seconds")

#: Columns of history.csv; accuracies in percent.
HISTORY_COLUMNS = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "seconds")

_TASKS = {"task1": "task1", "task2": "task2", "1": "task1", "2": "task2"}


class ResultsError(ValueError):
    """``results.json`` is missing or broken; the text says where and what was expected."""


@dataclass(frozen=True)
class Results:
    """A checked ``results.json``.

    Attributes:
        task: ``"task1"`` or ``"task2"``.
        settings: What the run says of itself: dataset, image_size, seed, epochs and whatever else it saved.
        models: Numbers of every network, by its name; ``channels`` is a mapping, the others are numbers. Missing ones
            and nulls are left out.
    """

    task: str
    settings: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]

    def number(self, model: str, key: str) -> float | None:
        """A number of a network, None if it is missing. ``channels.RG`` is a set of channels, ``epochs`` the run's."""
        entry = self.models.get(model, {})
        if key == "epochs":
            return _optional_number(entry.get("epochs", self.settings.get("epochs"))) if model in self.models else None
        if key.startswith("channels."):
            return entry.get("channels", {}).get(key.removeprefix("channels."))
        return entry.get(key)


def options_text(options: Mapping[str, Any] | None) -> str:
    """Settings of a run's networks as words: ", networks with width 32", or "" where they are built as they are."""
    return ", networks with " + ", ".join(f"{key} {value}" for key, value in options.items()) if options else ""


def _optional_number(value: object) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _check_number(where: str, key: str, value: object) -> float:
    number = _optional_number(value)
    if number is None:
        raise ResultsError(f"{where}.{key}: got {value!r}, expected a number or null")
    if key.endswith("_acc") or ".channels" in where:
        if not 0 <= number <= 100:
            raise ResultsError(f"{where}.{key}: got {value!r}, expected an accuracy in percent, 0 to 100")
    elif key in ("params", "flops", "seconds") and not (number >= 0 and math.isfinite(number)):
        raise ResultsError(f"{where}.{key}: got {value!r}, expected a number >= 0")
    return number


def load_results(run_dir: str | Path) -> Results:
    """Read and check ``run_dir/results.json``.

    Args:
        run_dir: The folder of a run.

    Returns:
        The checked results.

    Raises:
        ResultsError: If the file is missing, is no JSON, or an entry is of the wrong kind.
    """
    path = Path(run_dir) / "results.json"
    if not path.is_file():
        raise ResultsError(f"{path}: not found; expected the folder of a run that has ended")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path}: no valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ResultsError(f"{path}: got a {type(data).__name__}, expected an object with 'task' and 'models'")
    for key in ("task", "models"):
        if key not in data:
            raise ResultsError(f"{path}: no {key!r}; got the keys {sorted(data)}")
    task = _TASKS.get(str(data["task"]))
    if task is None:
        raise ResultsError(f"{path}: task: got {data['task']!r}, expected 'task1' or 'task2'")
    if not isinstance(data["models"], dict) or not data["models"]:
        raise ResultsError(
            f"{path}: models: got {data['models']!r}, expected an object with an entry for every network"
        )

    models = {}
    for name, entry in data["models"].items():
        where = f"{path}: models.{name}"
        if not isinstance(entry, dict):
            raise ResultsError(f"{where}: got {entry!r}, expected an object")
        kept: dict[str, Any] = {
            key: _check_number(where, key, entry[key]) for key in MODEL_KEYS if entry.get(key) is not None
        }
        if "epochs" in entry:
            kept["epochs"] = entry["epochs"]
        channels = entry.get("channels")
        if channels is not None:
            if not isinstance(channels, dict):
                raise ResultsError(f"{where}.channels: got {channels!r}, expected an object such as {{'RG': 41.5}}")
            kept["channels"] = {
                key: _check_number(f"{where}.channels", key, value)
                for key, value in channels.items()
                if value is not None
            }
        models[name] = kept
    settings = {key: value for key, value in data.items() if key not in ("task", "models")}
    return Results(task, settings, models)


def load_history(path: str | Path) -> dict[str, list[float]]:
    """Read a ``history.csv``.

    Args:
        path: The file.

    Returns:
        The values of every known column that it has, epoch by epoch; NaN where a cell is empty.

    Raises:
        OSError: If the file can't be read.
        ValueError: If it has no column ``epoch``, no rows, or a cell that is no number.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = [name for name in HISTORY_COLUMNS if name in (reader.fieldnames or ())]
        if "epoch" not in columns:
            raise ValueError(f"got the columns {reader.fieldnames}, expected {', '.join(HISTORY_COLUMNS)}")
        history: dict[str, list[float]] = {name: [] for name in columns}
        for row in reader:
            for name in columns:
                cell = (row[name] or "").strip()
                try:
                    history[name].append(float(cell) if cell else math.nan)
                except ValueError:
                    raise ValueError(f"line {reader.line_num}, {name}: got {cell!r}, expected a number") from None
    if not history["epoch"]:
        raise ValueError("no epochs in it")
    return history
