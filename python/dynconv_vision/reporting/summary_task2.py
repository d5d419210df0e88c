# SPDX-License-Identifier: BSD-3-Clause
"""The part of a summary that is Task II's: networks beside ResNet-34, ablations, trade-off plots, the study's aims."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .figures import draw_differences, draw_trade_off
from .outcomes import Bootstrap, Estimate, Outcome, aim, deviation
from .report import markdown_table
from .source_report import TASK2_GOAL

RESNET34, PUBLISHED, OURS = "resnet34", "task2_published", "four_conv"
#: Trained by more than the labels, hence no candidates for the best network.
DISTILLED = "four_conv_distilled"
#: The greatest number of parameters that the aims allow.
MOST_PARAMETERS = 1.2e6
_WHOLE = [""]
#: The sizes of our family; with the ablations, the picture could not be read.
_SIZES = (OURS, f"{OURS}_tiny", f"{OURS}_small", f"{OURS}_wide")


def _is_ours(name: str) -> bool:
    return name.startswith(OURS)


def _best(outcomes: Mapping[str, Outcome]) -> str | None:
    """The small network of ours that is best on the validation images, among those with the most seeds.

    The best of many networks with one seed each is as much the luckiest.
    """
    names = [
        name
        for name, outcome in outcomes.items()
        if _is_ours(name) and name != DISTILLED and outcome.number("params") <= MOST_PARAMETERS
    ]
    return max(names, key=lambda name: (len(outcomes[name].seeds), outcomes[name].val[""].mean()), default=None)


def task2_aims(
    outcomes: Mapping[str, Outcome], bootstrap: Bootstrap, preset: str, others: Mapping[str, Outcome]
) -> list[dict[str, Any]]:
    """The study's aims, as far as they are of this recipe and the networks that they compare are there.

    Args:
        outcomes: Of the runs.
        bootstrap: For the intervals.
        preset: Their recipe; "paper" is the source report's.
        others: Outcomes under another recipe.

    Returns:
        For each: what, how much is wanted, what was measured, whether that is met.
    """
    aims: list[dict[str, Any]] = []

    def share(text: str, name: str, baseline: Outcome, wanted: float) -> None:
        ratio = bootstrap.ratio(outcomes[name].score(_WHOLE), baseline.score(_WHOLE))
        aims.append(aim(text, f">= {wanted:g} %", ratio, ratio.mean >= wanted))

    best = _best(outcomes)
    if RESNET34 in outcomes:
        if PUBLISHED in outcomes and preset == "paper":
            share("published network, share of ResNet-34's accuracy", PUBLISHED, outcomes[RESNET34], TASK2_GOAL)
        if best is not None:
            wanted = 100 if preset == "paper" else 95
            share(f"`{best}`, share of ResNet-34's accuracy", best, outcomes[RESNET34], wanted)
            ratio = outcomes[best].number("flops") / outcomes[RESNET34].number("flops")
            aims.append(aim(f"`{best}`, operations over ResNet-34's", "< 1", f"{ratio:.4f}", ratio < 1))
    if best is not None and RESNET34 in others:
        share(f"`{best}`, share of the accuracy of ResNet-34 under the other recipe", best, others[RESNET34], 100)
    return aims


def task2_sections(
    folder: Path,
    outcomes: Mapping[str, Outcome],
    estimates: Mapping[str, Mapping[str, Estimate]],
    bootstrap: Bootstrap,
    title: str,
) -> list[str]:
    """Lines of Markdown; draws trade_off.png, and ablations.png where there are some."""
    rows = []
    differences = {}
    for name, outcome in outcomes.items():
        sd = deviation(100 * outcome.right[""].mean(1))
        share = "–"
        if RESNET34 in outcomes and name != RESNET34:
            share = str(bootstrap.ratio(outcome.score(_WHOLE), outcomes[RESNET34].score(_WHOLE)))
        less = "–"
        if OURS in outcomes and name != OURS:
            found = bootstrap.estimate(outcome.score(_WHOLE) - outcomes[OURS].score(_WHOLE))
            less = str(found)
            if _is_ours(name):
                differences[name] = found
        rows.append(
            [
                f"`{name}`",
                str(len(outcome.seeds)),
                f"{outcome.number('params') / 1e6:.4f} M",
                f"{outcome.number('flops') / 1e9:.4f} G",
                f"{outcome.number('train_acc'):.2f}",
                f"{outcome.val[''].mean():.2f}",
                str(estimates[name][""]) + ("" if sd is None else f" ± {sd:.2f}"),
                share,
                less,
            ]
        )
    header = ["network", "seeds", "parameters", "operations", "train", "val", "test", "% of ResNet-34", "less ours"]
    shown = (*_SIZES, DISTILLED, _best(outcomes))
    draw_trade_off(
        folder / "trade_off.png",
        {
            name: (outcome.number("params"), outcome.number("flops"), estimates[name][""])
            for name, outcome in outcomes.items()
            if not _is_ours(name) or name in shown
        },
        title,
    )
    lines = ["## Networks", "", markdown_table(header, rows, 1), "", "![Trade-off](trade_off.png)", ""]
    if differences:
        draw_differences(folder / "ablations.png", differences, "accuracy, less ours (points, 95 % interval)", title)
        lines += ["![Ablations](ablations.png)", ""]
    return lines
