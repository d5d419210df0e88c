# SPDX-License-Identifier: BSD-3-Clause
"""Several runs of one study together: means over seeds, confidence intervals, paired comparisons, the study's aims.

Reads every run under a folder, complete or not: ``config.json`` and, of each network that is done, ``result.json`` and
``predictions.npz``. What the intervals mean: :mod:`.outcomes`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .outcomes import RESAMPLES, Bootstrap, Outcome, load_outcomes, write_tables
from .report import markdown_table
from .results import ResultsError, options_text
from .summary_task1 import task1_aims, task1_sections
from .summary_task2 import task2_aims, task2_sections

_TITLES = {"task1": "Task I", "task2": "Task II"}


def write_summary(folder: str | Path, resamples: int = RESAMPLES, against: str | Path | None = None) -> str:
    """Summarise the runs of one task under a folder.

    Writes into it ``summary.md``, ``summary.json``, ``summary.csv`` (a line a network and set of channels),
    ``per_seed.csv`` (a line a network, seed and set), ``channels.png`` for Task I or ``trade_off.png`` for Task II, and
    ``ablations.png`` where other networks can be held against ours.

    Args:
        folder: Holds the folders of runs with the same settings, but for networks and seed.
        resamples: Of the bootstrap.
        against: Task II: a folder of runs of another recipe on the same images, whose ResNet-34 the best network is
            compared with as well.

    Returns:
        The text of ``summary.md``.

    Raises:
        ResultsError: There are no results, or the runs do not fit together.
    """
    folder = Path(folder)
    outcomes, settings = load_outcomes(folder)
    task = settings["task"]
    others: Mapping[str, Outcome] = {}
    if against is not None:
        others, other = load_outcomes(Path(against))
        if task != "task2":
            raise ResultsError(f"against: got {against} for runs of {task}, expected runs of task2 to compare")
        for key in ("task", "data", "image_size", "limits"):
            if other.get(key) != settings.get(key):
                raise ResultsError(f"against: {against}: {key} is {other.get(key)!r}, expected {settings.get(key)!r}")
    images = next(iter(next(iter(outcomes.values())).right.values())).shape[1]
    bootstrap = Bootstrap(images, resamples)
    estimates = {
        name: {each: bootstrap.estimate(outcome.score([each])) for each in outcome.right}
        for name, outcome in outcomes.items()
    }
    write_tables(folder, outcomes, estimates)

    epochs = settings["train"]["epochs"]
    lines = [f"# {_TITLES[task]}: summary", ""]
    lines += [
        f"{Path(settings['data']).name}, {settings['image_size']} px{options_text(settings.get('options'))}, "
        f"recipe `{settings['preset']}`, {epochs} epochs, {images} test images. Accuracies in percent: mean over "
        "seeds, and the 95 % interval of a paired bootstrap over the test images; ± is the standard deviation over "
        "seeds. Epochs were chosen on the validation images.",
        "",
    ]
    title = f"{_TITLES[task]}: {settings['image_size']} px, recipe {settings['preset']}, {epochs} epochs"
    if task == "task1":
        aims = task1_aims(outcomes, bootstrap)
        sections = task1_sections(folder, outcomes, estimates, bootstrap, title)
    else:
        aims = task2_aims(outcomes, bootstrap, settings["preset"], others)
        sections = task2_sections(folder, outcomes, estimates, bootstrap, title)
    if aims:
        header = ["aim", "wanted", "measured", "met"]
        rows = [[aim["aim"], aim["wanted"], aim["measured"], "yes" if aim["met"] else "no"] for aim in aims]
        lines += ["## Aims", "", markdown_table(header, rows, 4), ""]
    lines += [*sections, *_cost(outcomes)]
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


def _cost(outcomes: Mapping[str, Outcome]) -> list[str]:
    header = ["network", "seeds", "parameters", "operations", "seconds an epoch"]
    rows: list[list[Any]] = [
        [
            f"`{name}`",
            str(len(outcome.seeds)),
            f"{outcome.number('params') / 1e6:.4f} M",
            f"{outcome.number('flops') / 1e9:.4f} G",
            f"{outcome.number('seconds') / outcome.number('epochs'):.2f}",
        ]
        for name, outcome in outcomes.items()
    ]
    return ["## Cost", "", markdown_table(header, rows, 1), ""]
