# SPDX-License-Identifier: BSD-3-Clause
"""What the networks of several runs said of the test images, and estimates with confidence intervals.

Intervals are 95 % bootstrap intervals over the test images: each resample draws images, the same for all networks,
seeds and sets of channels, so differences and ratios are paired; a network's score of an image is its mean over seeds.
They say what another test set would change, not what further seeds would: for that there is the standard deviation over
seeds.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .results import ResultsError

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, in percent (or percentage points), with the limits of its interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Outcome:
    """One network, over all seeds.

    Attributes:
        seeds: In ascending order.
        right: By set of channels, (seeds, test images): whether the image was classified rightly.
        val: By set of channels, (seeds,): validation accuracy in percent.
        entries: result.json of every seed.
    """

    seeds: tuple[int, ...]
    right: dict[str, np.ndarray]
    val: dict[str, np.ndarray]
    entries: tuple[dict[str, Any], ...]

    def score(self, sets: Sequence[str]) -> np.ndarray:
        """(test images,): share of seeds and of these sets with which each image was classified rightly."""
        return np.mean([self.right[name].mean(0) for name in sets], axis=0)

    def number(self, key: str) -> float:
        """Mean over seeds of a number of result.json."""
        return float(np.mean([entry[key] for entry in self.entries]))


class Bootstrap:
    """Resamples of the test images, the same for everything that is estimated.

    Args:
        images: Number of test images.
        resamples: How many.
    """

    def __init__(self, images: int, resamples: int = RESAMPLES) -> None:
        draws = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=resamples)
        self._weights = (draws / images).astype(np.float32)

    def estimate(self, score: np.ndarray) -> Estimate:
        """Of the mean of a score, (test images,), times 100."""
        low, high = np.percentile(self._weights @ score.astype(np.float32), (2.5, 97.5))
        return Estimate(100 * float(score.mean()), 100 * float(low), 100 * float(high))

    def ratio(self, score: np.ndarray, other: np.ndarray) -> Estimate:
        """Of the mean of a score over the mean of another one, times 100."""
        above, below = (self._weights @ each.astype(np.float32) for each in (score, other))
        low, high = np.percentile(above / below, (2.5, 97.5))
        return Estimate(100 * float(score.mean() / other.mean()), 100 * float(low), 100 * float(high))


def load_outcomes(folder: Path) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """Every network that is done in the runs under `folder`, and the settings that the runs share, the task among them.

    Raises:
        ResultsError: There is none, or the runs differ in more than networks and seed, or have one twice, or a setting
            that is unknown.
    """
    # Here, since Lightning imports matplotlib.pyplot, which reports of single runs do without.
    from dynconv_vision.training.config import StudyError, TrainConfig

    found: dict[str, dict[int, tuple[dict[str, np.ndarray], dict[str, Any]]]] = {}
    shared: dict[str, Any] | None = None
    labels: np.ndarray | None = None
    for path in sorted(folder.glob("**/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        try:
            # A setting that has come since then has its default.
            config["train"] = TrainConfig.from_dict(config["train"]).to_dict()
        except StudyError as error:
            raise ResultsError(f"{path}: {error}") from None
        seed = config["train"].pop("seed")
        del config["train"]["device"]
        settings = {key: value for key, value in config.items() if key != "models"}
        if shared is None:
            shared = settings
        elif shared != settings:
            different = [key for key in settings if settings[key] != shared.get(key)]
            raise ResultsError(f"{path}: differs from the other runs under {folder} in {', '.join(different)}")
        for name in config["models"]:
            model = path.parent / name
            if not (model / "result.json").is_file() or not (model / "predictions.npz").is_file():
                continue
            with np.load(model / "predictions.npz") as file:
                arrays = {key: file[key] for key in file.files}
            if labels is None:
                labels = arrays["test/labels"]
            elif not np.array_equal(labels, arrays["test/labels"]):
                raise ResultsError(f"{model}: tested on other images than the other networks under {folder}")
            if seed in found.setdefault(name, {}):
                raise ResultsError(f"{model}: a second {name} with seed {seed} under {folder}")
            found[name][seed] = arrays, json.loads((model / "result.json").read_text(encoding="utf-8"))
    if shared is None or not found:
        raise ResultsError(f"{folder}: no network is done in it; expected the folder of one or more runs")
    outcomes = {}
    for name, seeds in found.items():
        order = tuple(sorted(seeds))
        sets = [key.removeprefix("test/") for key in seeds[order[0]][0] if key.startswith("test/")]
        sets.remove("labels")
        arrays = [seeds[seed][0] for seed in order]
        outcomes[name] = Outcome(
            order,
            {each: np.array([a[f"test/{each}"] == a["test/labels"] for a in arrays]) for each in sets},
            {each: np.array([100 * (a[f"val/{each}"] == a["val/labels"]).mean() for a in arrays]) for each in sets},
            tuple(seeds[seed][1] for seed in order),
        )
    return outcomes, shared


def deviation(values: np.ndarray) -> float | None:
    """Standard deviation over seeds; None for one seed."""
    return float(values.std(ddof=1)) if len(values) > 1 else None


def aim(text: str, wanted: str, measured: object, met: bool) -> dict[str, Any]:
    """An aim of a study, as summaries have it: what, how much is wanted, what was measured, whether that is met."""
    return {"aim": text, "wanted": wanted, "measured": str(measured), "met": bool(met)}


def write_tables(
    folder: Path, outcomes: Mapping[str, Outcome], estimates: Mapping[str, Mapping[str, Estimate]]
) -> None:
    """Write summary.csv, a line a network and set of channels, and per_seed.csv, a line a seed of these.

    The set of channels is empty for Task II.
    """
    with (folder / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["network", "channels", "seeds", "test_acc", "low", "high", "sd_over_seeds", "val_acc"])
        for name, outcome in outcomes.items():
            for each, estimate in estimates[name].items():
                sd = deviation(100 * outcome.right[each].mean(1))
                numbers = [estimate.mean, estimate.low, estimate.high, sd, float(outcome.val[each].mean())]
                cells = ["" if number is None else f"{number:.4f}" for number in numbers]
                writer.writerow([name, each, len(outcome.seeds), *cells])
    with (folder / "per_seed.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["network", "seed", "channels", "val_acc", "test_acc"])
        for name, outcome in outcomes.items():
            for place, seed in enumerate(outcome.seeds):
                for each, right in outcome.right.items():
                    row = [f"{outcome.val[each][place]:.4f}", f"{100 * right[place].mean():.4f}"]
                    writer.writerow([name, seed, each, *row])
