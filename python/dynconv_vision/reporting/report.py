# SPDX-License-Identifier: BSD-3-Clause
"""The report of a run: the source report's tables with the measured numbers beside them, and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynconv_vision.models import list_models

from .figures import draw_accuracy, draw_channels, draw_complexity, draw_learning_curves
from .results import MODEL_KEYS, Results, load_history, load_results, options_text
from .source_report import (
    CHANNEL_SETS,
    DATASET,
    FIGURE_3,
    IMAGE_SIZE,
    TASK2_GOAL,
    Row,
    SourceFigure,
    corrected,
    figures_of,
)

_TITLES = {
    "task1": "Task I: a convolution for any set of channels",
    "task2": "Task II: four convolutions, one of them deformable, against ResNet-34",
}
#: Networks that the report of a task is about; one that a run lacks is said to be missing.
_EXPECTED = {"task1": ("resnet18", "task1_published", "variable_resnet18"), "task2": ("resnet34", "task2_published")}

_QUANTITIES = {
    "epochs": "epochs",
    "params": "parameters",
    "flops": "operations",
    "train_acc": "training accuracy",
    "train_loss": "training loss",
    "val_acc": "validation accuracy",
    "val_loss": "validation loss",
    "test_acc": "test accuracy",
    "seconds": "training time",
}
_NONE = "–"


def _format(key: str, value: float | None) -> str:
    """A number with its unit."""
    if value is None:
        return _NONE
    if key == "params":
        return f"{value / 1e6:.4f} M"
    if key == "flops":
        return f"{value / 1e9:.4f} G" if value < 1e10 else f"{value / 1e9:.3f} G"
    if key.endswith("_loss"):
        return f"{value:.4f}"
    if key == "epochs":
        return f"{value:g}"
    if key == "seconds":
        minutes, seconds = divmod(round(value), 60)
        if minutes >= 60:
            return f"{minutes // 60} h {minutes % 60:02d} min"
        return f"{minutes} min {seconds:02d} s" if minutes else f"{value:.1f} s"
    return f"{value:.2f} %"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int) -> str:
    """A Markdown table, padded so that it reads as text, too; columns from ``numbers_from`` on are right-aligned."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if column >= numbers_from else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (width - 1) + ":" if column >= numbers_from else "-" * width for column, width in enumerate(widths)]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])


def _corrected_cell(row: Row) -> str:
    if row.corrected is None:
        return row.remark or _NONE
    value = _format(row.key, row.corrected)
    return f"{value} ({row.remark})" if row.remark else value


def _figure_table(figure: SourceFigure, results: Results) -> str:
    """One figure of the source report, and the same quantities of networks that it does not have."""
    published = {(row.model, row.key): row for row in figure.rows}
    keys = list(dict.fromkeys(row.key for row in figure.rows))
    models = list(dict.fromkeys([*(row.model for row in figure.rows), *results.models]))
    rows = []
    for model in models:
        for key in keys:
            row = published.get((model, key), Row(model, key, _QUANTITIES[key], None, None))
            measured = _format(key, results.number(model, key))
            rows.append([f"`{model}`", row.quantity, _format(key, row.published), _corrected_cell(row), measured])
    header = ["network", "quantity", "published", "corrected", "measured"]
    return markdown_table(header, rows, numbers_from=2)


def _channels_table(results: Results) -> str:
    """Figure 3: a line for every set of channels, a column for every network."""
    published = {row.quantity: row for row in FIGURE_3.rows}
    more = {key for entry in results.models.values() for key in entry.get("channels", {})} - set(CHANNEL_SETS)
    rows = []
    for name in [*CHANNEL_SETS, *sorted(more, key=lambda each: (len(each), each))]:
        row = published.get(name)
        cells = [name, _format("acc", row and row.published), _format("acc", row and row.corrected)]
        rows.append(cells + [_format("acc", results.number(model, f"channels.{name}")) for model in results.models])
    header = ["channels", "published", "corrected", *(f"measured `{model}`" for model in results.models)]
    return markdown_table(header, rows, numbers_from=1)


def _share_table(results: Results) -> str:
    """Task II's goal: test accuracy as a share of ResNet-34's."""

    def share(one: float | None, other: float | None) -> str:
        return _NONE if one is None or not other else f"{100 * one / other:.1f} %"

    rows = []
    for model in dict.fromkeys(["task2_published", *results.models]):
        if model == "resnet34":
            continue
        source = share(corrected(model, "test_acc"), corrected("resnet34", "test_acc"))
        measured = share(results.number(model, "test_acc"), results.number("resnet34", "test_acc"))
        rows.append([f"`{model}`", f"{TASK2_GOAL:g} %", source, source, measured])
    return markdown_table(["network", "goal", "published", "corrected", "measured"], rows, numbers_from=1)


def _size_text(results: Results) -> str:
    settings = results.settings
    return f"{settings.get('image_size', 'unknown')} px{options_text(settings.get('config', {}).get('options'))}"


def _settings_text(results: Results) -> str:
    settings = results.settings
    parts = [str(settings.get("dataset", "unknown data"))]
    if settings.get("image_size") is not None:
        parts.append(_size_text(results))
    for key, unit in (("epochs", "epochs"), ("seed", None)):
        if settings.get(key) is not None:
            parts.append(f"{settings[key]} {unit}" if unit else f"{key} {settings[key]}")
    return ", ".join(parts)


def _missing(results: Results) -> list[str]:
    """What a complete run would have and this one has not."""
    missing = []
    for key in ("dataset", "image_size", "seed", "epochs"):
        if results.settings.get(key) is None:
            missing.append(f"results.json has no `{key}`.")
    for model in _EXPECTED[results.task]:
        if model not in results.models:
            missing.append(f"`{model}` was not run.")
    for model, entry in results.models.items():
        gone = [_QUANTITIES[key] for key in MODEL_KEYS if key not in entry]
        if gone:
            missing.append(f"`{model}`: {', '.join(gone)}.")
        if results.task == "task1" and model in list_models("task1"):
            sets = [name for name in CHANNEL_SETS if name not in entry.get("channels", {})]
            if sets:
                missing.append(f"`{model}`: test accuracy on {', '.join(sets)}.")
    return missing


def write_report(run_dir: str | Path) -> str:
    """Write the report of a run from the numbers that it saved.

    Reads ``results.json`` and ``<model>/history.csv``; writes ``report.md`` and its pictures ``learning_curves.png``,
    ``accuracy.png``, ``complexity.png`` and, for Task I, ``channels.png``. A run may be incomplete: the report then has
    what there is, and says what is missing.

    Args:
        run_dir: The folder of a run.

    Returns:
        The text of ``report.md``.

    Raises:
        ResultsError: If ``results.json`` is missing or broken.
    """
    run_dir = Path(run_dir)
    results = load_results(run_dir)
    missing = _missing(results)
    histories = {}
    for model in results.models:
        path = run_dir / model / "history.csv"
        try:
            histories[model] = load_history(path)
        except FileNotFoundError:
            missing.append(f"`{model}`: no {model}/history.csv, so no learning curves.")
        except (OSError, ValueError) as error:
            missing.append(f"`{model}`: {model}/history.csv can't be read: {error}")

    settings = _settings_text(results)
    lines = [f"# {_TITLES[results.task]}", ""]
    lines += [f"Measured: {settings}. Published: {DATASET}, {IMAGE_SIZE} px, 30 epochs.", ""]
    lines += [
        "Published: as printed in the source report. Corrected: as its notebook supports it. Measured: this run.",
        "",
    ]
    for figure in figures_of(results.task):
        lines += [f"## Figure {figure.number}: {figure.title.lower()}", ""]
        lines += [_channels_table(results) if figure is FIGURE_3 else _figure_table(figure, results), ""]
        lines += [f"- {note}" for note in figure.notes] + [""]
    if results.task == "task2":
        lines += ["## Test accuracy as a share of ResNet-34's", "", _share_table(results), ""]

    times = [[f"`{model}`", _format("seconds", results.number(model, "seconds"))] for model in results.models]
    lines += ["## Training time", "", markdown_table(["network", "measured"], times, numbers_from=1), ""]

    size = _size_text(results)
    drawings = [
        ("learning_curves.png", "Learning curves", settings, histories, draw_learning_curves),
        ("accuracy.png", "Accuracy", settings, results, draw_accuracy),
        ("complexity.png", "Parameters and operations", size, results, draw_complexity),
    ]
    if results.task == "task1":
        drawings.append(("channels.png", "Sets of channels", settings, results, draw_channels))
    lines += ["## Pictures", ""]
    for name, title, of_what, numbers, draw in drawings:
        if draw(run_dir / name, numbers, f"{title}: {of_what}"):
            lines += [f"![{title}]({name})", ""]
        else:
            # A picture of an earlier, fuller run would contradict this report.
            (run_dir / name).unlink(missing_ok=True)
            missing.append(f"{name}: nothing to draw.")
    if missing:
        lines += ["## Missing", ""] + [f"- {item}" for item in missing] + [""]
    text = "\n".join(lines)
    (run_dir / "report.md").write_text(text, encoding="utf-8")
    return text
