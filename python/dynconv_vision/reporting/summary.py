# SPDX-License-Identifier: BSD-3-Clause
"""Several runs of Task I together: means over seeds, confidence intervals, paired differences, the study's aims.

Reads every run under a folder, complete or not: ``config.json`` and, of each network that is done, ``result.json`` and
``predictions.npz``. Intervals are 95 % bootstrap intervals over the test images: each resample draws images, the same
for all networks, seeds and sets of channels, so differences are paired; a network's score of an image is its mean over
seeds. They say what another test set would change, not what further seeds would: for that there is the standard
deviation over seeds.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .figures import draw_set_bars
from .report import markdown_table
from .results import ResultsError
from .source_report import CHANNEL_SETS

PLAIN, STATIC, OURS, PUBLISHED, SPECIALIST = (
    "resnet18",
    "static_resnet18",
    "variable_resnet18",
    "task1_published",
    "specialist_",
)
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


def load_outcomes(folder: Path) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """Every network that is done in the runs under `folder`, and the settings that the runs share.

    Raises:
        ResultsError: There is none, or the runs differ in more than networks and seed, or have one twice.
    """
    found: dict[str, dict[int, tuple[dict[str, np.ndarray], dict[str, Any]]]] = {}
    shared: dict[str, Any] | None = None
    labels: np.ndarray | None = None
    for path in sorted(folder.glob("**/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("task") != "task1":
            continue
        seed = config["train"].pop("seed")
        config["train"] = {key: value for key, value in config["train"].items() if key != "device"}
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
        raise ResultsError(f"{folder}: no network of Task I is done in it; expected the folder of one or more runs")
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


def write_summary(folder: str | Path, resamples: int = RESAMPLES) -> str:
    """Summarise the runs of Task I under a folder.

    Writes into it ``summary.md``, ``summary.json``, ``summary.csv`` (a line a network and set of channels),
    ``per_seed.csv`` (a line a network, seed and set) and ``channels.png``.

    Args:
        folder: Holds the folders of runs with the same settings, but for networks and seed.
        resamples: Of the bootstrap.

    Returns:
        The text of ``summary.md``.

    Raises:
        ResultsError: As `load_outcomes`.
    """
    folder = Path(folder)
    outcomes, settings = load_outcomes(folder)
    images = next(iter(next(iter(outcomes.values())).right.values())).shape[1]
    bootstrap = Bootstrap(images, resamples)
    estimates = {
        name: {each: bootstrap.estimate(outcome.score([each])) for each in outcome.right}
        for name, outcome in outcomes.items()
    }
    _write_csv(folder, outcomes, estimates)

    train = settings["train"]
    lines = ["# Task I: summary", ""]
    lines += [
        f"{settings['data']}, {settings['image_size']} px, recipe `{settings['preset']}`, {train['epochs']} epochs, "
        f"{images} test images. Accuracies in percent: mean over seeds, and the 95 % interval of a paired bootstrap "
        "over the test images; ± is the standard deviation over seeds. Epochs were chosen on the validation images.",
        "",
    ]
    aims = _aims(outcomes, bootstrap)
    if aims:
        header = ["aim", "wanted", "measured", "met"]
        rows = [[aim["aim"], aim["wanted"], aim["measured"], "yes" if aim["met"] else "no"] for aim in aims]
        lines += ["## Aims", "", markdown_table(header, rows, 4), ""]
    main = _networks_of_all_sets(outcomes, estimates)
    if main:
        lines += ["## Sets of channels", "", _sets_table(main, outcomes), "", "![Sets of channels](channels.png)", ""]
        draw_set_bars(
            folder / "channels.png",
            {
                name: {each: (e.mean, e.low, e.high) for each, e in row.items()}
                for name, row in main.items()
                if name in (PLAIN, STATIC, OURS, PUBLISHED, "specialists")
            },
            f"Task I: {settings['image_size']} px, recipe {settings['preset']}, {train['epochs']} epochs",
        )
    ablations = _ablation_rows(outcomes, bootstrap)
    if ablations:
        header = ["network", "seeds", "RGB", "pairs", "singles", "mean of the seven", "less ours"]
        lines += ["## Ablations", "", markdown_table(header, ablations, 1), ""]
    wide = _wide_rows(outcomes, bootstrap)
    if wide:
        header = ["network", "seeds", "channels in the set", "sets", "accuracy", "least", "greatest"]
        lines += ["## More than three channels, and channels never seen", "", markdown_table(header, wide, 1), ""]
    header = ["network", "seeds", "parameters", "operations", "seconds an epoch"]
    rows = [
        [
            f"`{name}`",
            str(len(outcome.seeds)),
            f"{outcome.number('params') / 1e6:.4f} M",
            f"{outcome.number('flops') / 1e9:.4f} G",
            f"{outcome.number('seconds') / outcome.number('epochs'):.2f}",
        ]
        for name, outcome in outcomes.items()
    ]
    lines += ["## Cost", "", markdown_table(header, rows, 1), ""]
    text = "\n".join(lines)
    (folder / "summary.md").write_text(text, encoding="utf-8")
    content = {
        "settings": settings,
        "aims": aims,
        "networks": {
            name: {
                "seeds": list(outcome.seeds),
                "channels": {each: vars(estimate) for each, estimate in estimates[name].items()},
            }
            for name, outcome in outcomes.items()
        },
    }
    (folder / "summary.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return text


def _sd(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _write_csv(folder: Path, outcomes: Mapping[str, Outcome], estimates: Mapping[str, Mapping[str, Estimate]]) -> None:
    with (folder / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["network", "channels", "seeds", "test_acc", "low", "high", "sd_over_seeds", "val_acc"])
        for name, outcome in outcomes.items():
            for each, estimate in estimates[name].items():
                sd = _sd(100 * outcome.right[each].mean(1))
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


def _has_all_sets(outcome: Outcome) -> bool:
    return set(CHANNEL_SETS) <= set(outcome.right)


def _networks_of_all_sets(
    outcomes: Mapping[str, Outcome], estimates: Mapping[str, Mapping[str, Estimate]]
) -> dict[str, dict[str, Estimate]]:
    """Estimates on the seven sets of the main networks; the specialists together are one line."""
    rows = {
        name: {each: estimates[name][each] for each in CHANNEL_SETS}
        for name in (PLAIN, STATIC, OURS, PUBLISHED)
        if name in outcomes and _has_all_sets(outcomes[name])
    }
    done = [each for each in CHANNEL_SETS if SPECIALIST + each in outcomes]
    specialists = {each: estimates[SPECIALIST + each][each] for each in done}
    return rows | ({"specialists": specialists} if specialists else {})


def _sets_table(rows: Mapping[str, Mapping[str, Estimate]], outcomes: Mapping[str, Outcome]) -> str:
    def cell(name: str, each: str) -> str:
        if each not in rows[name]:
            return "–"
        outcome = outcomes[SPECIALIST + each if name == "specialists" else name]
        sd = _sd(100 * outcome.right[each].mean(1))
        return str(rows[name][each]) + ("" if sd is None else f" ± {sd:.2f}")

    header = ["channels", *(f"`{name}`" for name in rows)]
    return markdown_table(header, [[each, *(cell(name, each) for name in rows)] for each in CHANNEL_SETS], 1)


_GROUPS: dict[str, Callable[[str], bool]] = {
    "RGB": lambda each: len(each) == 3,
    "pairs": lambda each: len(each) == 2,
    "singles": lambda each: len(each) == 1,
    "mean of the seven": lambda each: True,
}


def _ablation_rows(outcomes: Mapping[str, Outcome], bootstrap: Bootstrap) -> list[list[str]]:
    """Networks on the seven sets, in groups, and their difference to ours."""
    rows = []
    for name, outcome in outcomes.items():
        if not _has_all_sets(outcome) or len(outcome.right) > len(CHANNEL_SETS):
            continue
        cells = [f"{100 * outcome.score(list(filter(f, CHANNEL_SETS))).mean():.2f}" for f in _GROUPS.values()]
        less = "–"
        if OURS in outcomes and name != OURS:
            difference = outcome.score(CHANNEL_SETS) - outcomes[OURS].score(CHANNEL_SETS)
            less = str(bootstrap.estimate(difference))
        rows.append([f"`{name}`", str(len(outcome.seeds)), *cells, less])
    return rows


def _wide_rows(outcomes: Mapping[str, Outcome], bootstrap: Bootstrap) -> list[list[str]]:
    """Networks that know other channels than R, G, B, or not all of them: accuracy by the number of channels."""
    rows = []
    for name, outcome in outcomes.items():
        if "wide" not in name and "without" not in name:
            continue
        for count in range(1, max(map(len, outcome.right)) + 1):
            sets = [each for each in outcome.right if len(each) == count]
            if not sets:
                continue
            by_set = {each: 100 * outcome.right[each].mean() for each in sets}
            least, greatest = min(by_set, key=by_set.get), max(by_set, key=by_set.get)
            rows.append(
                [
                    f"`{name}`",
                    str(len(outcome.seeds)),
                    str(count),
                    str(len(sets)),
                    str(bootstrap.estimate(outcome.score(sets))),
                    f"{by_set[least]:.2f} ({least})",
                    f"{by_set[greatest]:.2f} ({greatest})",
                ]
            )
    return rows


def _aims(outcomes: Mapping[str, Outcome], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """The study's aims, as far as the networks that they compare are there."""
    aims: list[dict[str, Any]] = []
    if OURS not in outcomes:
        return aims
    ours = outcomes[OURS]

    def add(aim: str, wanted: str, measured: object, met: bool) -> None:
        aims.append({"aim": aim, "wanted": wanted, "measured": str(measured), "met": bool(met)})

    if PLAIN in outcomes:
        plain = outcomes[PLAIN]
        difference = bootstrap.estimate(ours.score(["RGB"]) - plain.score(["RGB"]))
        add("RGB, less plain ResNet-18", ">= -1 point", difference, difference.mean >= -1)
    for each in CHANNEL_SETS:
        if SPECIALIST + each in outcomes and each != "RGB":
            difference = bootstrap.estimate(ours.score([each]) - outcomes[SPECIALIST + each].score([each]))
            add(f"{each}, less its specialist", ">= -2 points", difference, difference.mean >= -2)
    if STATIC in outcomes:
        difference = bootstrap.estimate(ours.score(CHANNEL_SETS) - outcomes[STATIC].score(CHANNEL_SETS))
        add("mean of the seven, less the static stem", "> 0 points", difference, difference.mean > 0)
    if PLAIN in outcomes:
        for key, text, most in (("params", "parameters", 1.01), ("flops", "operations", 1.03)):
            ratio = ours.number(key) / plain.number(key)
            add(f"{text}, over plain ResNet-18's", f"<= {most}", f"{ratio:.4f}", ratio <= most)
        speeds = [outcome.number("epochs") / outcome.number("seconds") for outcome in (ours, plain)]
        ratio = speeds[0] / speeds[1]
        add("epochs a second, validation included, over plain's", ">= 0.9", f"{ratio:.3f}", ratio >= 0.9)
    return aims
