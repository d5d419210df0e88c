# SPDX-License-Identifier: BSD-3-Clause
"""The part of a summary that is Task I's: sets of channels, ablations, more channels, and the study's aims."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .figures import draw_differences, draw_set_bars
from .outcomes import Bootstrap, Estimate, Outcome, aim, deviation
from .report import markdown_table
from .source_report import CHANNEL_SETS

PLAIN, STATIC, OURS, PUBLISHED, SPECIALIST = (
    "resnet18",
    "static_resnet18",
    "variable_resnet18",
    "task1_published",
    "specialist_",
)


def task1_sections(
    folder: Path,
    outcomes: Mapping[str, Outcome],
    estimates: Mapping[str, Mapping[str, Estimate]],
    bootstrap: Bootstrap,
    title: str,
) -> list[str]:
    """Lines of Markdown; draws channels.png where the main networks are there, and ablations.png beside ours."""
    lines: list[str] = []
    main = _networks_of_all_sets(outcomes, estimates)
    if main:
        lines += ["## Sets of channels", "", _sets_table(main, outcomes), "", "![Sets of channels](channels.png)", ""]
        draw_set_bars(
            folder / "channels.png",
            {name: row for name, row in main.items() if name in (PLAIN, STATIC, OURS, PUBLISHED, "specialists")},
            title,
        )
    ablations, differences = _ablation_rows(outcomes, bootstrap)
    if ablations:
        header = ["network", "seeds", "RGB", "pairs", "singles", "mean of the seven", "less ours"]
        lines += ["## Ablations", "", markdown_table(header, ablations, 1), ""]
    if differences:
        label = "mean of the seven sets, less ours (points, 95 % interval)"
        draw_differences(folder / "ablations.png", differences, label, title)
        lines += ["![Ablations](ablations.png)", ""]
    wide = _wide_rows(outcomes, bootstrap)
    if wide:
        header = ["network", "seeds", "channels in the set", "sets", "accuracy", "least", "greatest"]
        lines += ["## More than three channels, and channels never seen", "", markdown_table(header, wide, 1), ""]
    return lines


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
        sd = deviation(100 * outcome.right[each].mean(1))
        return str(rows[name][each]) + ("" if sd is None else f" ± {sd:.2f}")

    header = ["channels", *(f"`{name}`" for name in rows)]
    return markdown_table(header, [[each, *(cell(name, each) for name in rows)] for each in CHANNEL_SETS], 1)


_GROUPS: dict[str, Callable[[str], bool]] = {
    "RGB": lambda each: len(each) == 3,
    "pairs": lambda each: len(each) == 2,
    "singles": lambda each: len(each) == 1,
    "mean of the seven": lambda each: True,
}


def _ablation_rows(
    outcomes: Mapping[str, Outcome], bootstrap: Bootstrap
) -> tuple[list[list[str]], dict[str, Estimate]]:
    """Networks on the seven sets, in groups; and their difference to ours, but for networks made for one set."""
    rows, differences = [], {}
    for name, outcome in outcomes.items():
        if not _has_all_sets(outcome) or len(outcome.right) > len(CHANNEL_SETS):
            continue
        cells = [f"{100 * outcome.score(list(filter(f, CHANNEL_SETS))).mean():.2f}" for f in _GROUPS.values()]
        less = "–"
        if OURS in outcomes and name != OURS:
            found = bootstrap.estimate(outcome.score(CHANNEL_SETS) - outcomes[OURS].score(CHANNEL_SETS))
            less = str(found)
            if name not in (PLAIN, PUBLISHED):
                differences[name] = found
        rows.append([f"`{name}`", str(len(outcome.seeds)), *cells, less])
    return rows, differences


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


def task1_aims(outcomes: Mapping[str, Outcome], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """The study's aims, as far as the networks that they compare are there.

    But for training throughput: one network trained after the other says little of that where anything else runs, the
    end-to-end benchmark takes their steps in turns.
    """
    aims: list[dict[str, Any]] = []
    if OURS not in outcomes:
        return aims
    ours = outcomes[OURS]

    def add(*stated: Any) -> None:
        aims.append(aim(*stated))

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
    return aims
