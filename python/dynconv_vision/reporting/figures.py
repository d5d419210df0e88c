# SPDX-License-Identifier: BSD-3-Clause
"""Pictures of a run, drawn by matplotlib's Agg renderer: no display is needed, and pyplot's global state is left alone.

A network has one colour in all pictures: blue is the plain baseline, vermilion the published network, green ours. The
colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from .outcomes import Estimate
from .results import Results
from .source_report import CHANNEL_SETS, DATASET, IMAGE_SIZE, corrected

_COLOURS = {
    "resnet18": "#0072B2",
    "resnet34": "#0072B2",
    "task1_published": "#D55E00",
    "task2_published": "#D55E00",
    "static_resnet18": "#E69F00",
    "specialists": "#999999",
    "variable_resnet18": "#009E73",
    "four_conv": "#009E73",
}
_MORE_COLOURS = ("#CC79A7", "#56B4E9", "#F0E442", "#7F7F7F")

_LABELS = {
    "resnet18": "ResNet-18",
    "resnet34": "ResNet-34",
    "task1_published": "VariableInputConv, published",
    "task2_published": "Task II network, published",
    "static_resnet18": "static stem, sampled channels",
    "specialists": "specialists, one a set",
    "variable_resnet18": "VariableInputConv, ours",
    "four_conv": "four convolutions, ours",
}

INK = "#333333"
#: Up to so many epochs, curves mark every one.
_FEW_EPOCHS = 12
#: Up to so many networks, each bar bears its number.
_FEW_NETWORKS = 6
_LEGEND_COLUMNS = 4
_SOURCE_LABEL = f"source report, corrected\n({DATASET}, {IMAGE_SIZE} px)"


def model_label(name: str) -> str:
    """How pictures name a network."""
    return _LABELS.get(name, name)


def model_colours(names: Sequence[str]) -> dict[str, str]:
    """The colour of every network; networks unknown to this module take spare colours in their order."""
    spare = [name for name in names if name not in _COLOURS]
    more = _MORE_COLOURS if len(spare) <= len(_MORE_COLOURS) else [to_hex(each) for each in colormaps["tab20"].colors]
    return {name: _COLOURS.get(name) or more[spare.index(name) % len(more)] for name in names}


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, grid: str = "y") -> None:
    """The look of every picture: a light grid, no frame above and to the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=INK)
    axes.grid(axis=grid, color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write a PNG."""
    figure.savefig(path, dpi=dpi, facecolor="white")


def _new_picture(handles: Sequence[Line2D], columns: int, width: float, height: float) -> Figure:
    """A figure with a legend below; long ones add to its height."""
    rows = -(-len(handles) // columns)
    figure = new_figure(width, height + 0.22 * max(0, rows - 2))
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _source_handle() -> Line2D:
    return Line2D(
        [], [], linestyle="none", marker="D", markersize=6, markerfacecolor="white", markeredgecolor=INK,
        label=_SOURCE_LABEL,
    )  # fmt: skip


def draw_learning_curves(path: Path, histories: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> bool:
    """Loss and accuracy over the epochs, training dashed, validation solid.

    Args:
        path: The PNG to write.
        histories: Columns of ``history.csv`` by network.
        title: Above the picture.

    Returns:
        Whether there was anything to draw.
    """
    drawable = {
        name: history
        for name, history in histories.items()
        if any(
            math.isfinite(value)
            for key, column in history.items()
            if key not in ("epoch", "seconds")
            for value in column
        )
    }
    if not drawable:
        return False
    colours = model_colours(list(histories))
    longest = max(len(history["epoch"]) for history in drawable.values())
    marker = "o" if longest <= _FEW_EPOCHS else None
    handles = [Line2D([], [], color=colours[name], linewidth=2.5, label=model_label(name)) for name in drawable]
    handles += [
        Line2D(
            [], [], color=INK, linestyle="--", linewidth=1.8, marker=marker, markerfacecolor="white", label="training"
        ),
        Line2D([], [], color=INK, linestyle="-", linewidth=1.8, marker=marker, label="validation"),
    ]
    columns = len(handles) if len(handles) <= _FEW_NETWORKS else _LEGEND_COLUMNS
    figure = _new_picture(handles, columns, 11, 4.4)
    left, right = figure.subplots(1, 2)
    for axes, quantity, label in ((left, "loss", "loss (cross-entropy, nats)"), (right, "acc", "accuracy (%)")):
        for name, history in drawable.items():
            for split, style, face in (("train", "--", "white"), ("val", "-", None)):
                values = history.get(f"{split}_{quantity}")
                if values is None:
                    continue
                axes.plot(
                    history["epoch"], values, style, color=colours[name], linewidth=1.8,
                    marker=marker, markersize=5, markerfacecolor=face or colours[name],
                )  # fmt: skip
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if longest == 1:
            axes.margins(x=0.5)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        style_axes(axes)
    figure.suptitle(title)
    save_figure(figure, path)
    return True


def _grouped_bars(
    axes: Axes,
    groups: Sequence[str],
    values: Mapping[str, Sequence[float | None]],
    source: Mapping[str, Sequence[float | None]],
) -> None:
    """Bars with their numbers, one group on the x axis per entry of ``groups``, and the source report's as marks."""
    colours = model_colours(list(values))
    width = min(0.8 / len(values), 0.4)
    size = 9 if len(values) * len(groups) <= 9 else 7.5
    highest = 1.0
    numbers = []
    for place, (name, column) in enumerate(values.items()):
        for group, value in enumerate(column):
            x = group + width * (place + 0.5 - len(values) / 2)
            reference = source.get(name, [None] * len(groups))[group]
            if reference is not None:
                axes.plot(x, reference, "D", markersize=5, markerfacecolor="white", markeredgecolor=INK, zorder=3)
                highest = max(highest, reference)
            if value is None:
                axes.text(x, 0.4, "n/a", ha="center", va="bottom", color="#888888", fontsize=size, rotation=90)
                continue
            highest = max(highest, value)
            axes.bar(x, value, width * 0.92, color=colours[name])
            numbers.append((x, value))
    limit = min(1.08 * highest + 2, 110)
    for x, value in numbers if len(values) <= _FEW_NETWORKS else ():
        # At the foot of the bar, where marks and other bars are far; above it where the bar is too low.
        inside = value > 0.09 * limit
        axes.annotate(
            f"{value:.1f}", (x, 0 if inside else value), xytext=(0, 4), textcoords="offset points", ha="center",
            va="bottom", fontsize=size, color="white" if inside else INK, weight="bold" if inside else "normal",
        )  # fmt: skip
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.55, len(groups) - 0.45)
    axes.set_ylim(0, limit)
    style_axes(axes)
    axes.tick_params(axis="x", length=0)


def _bar_picture(names: Sequence[str], marked: bool, height: float) -> Figure:
    """A figure with the legend of bars."""
    colours = model_colours(names)
    handles = [Line2D([], [], color=colours[name], linewidth=8, label=model_label(name)) for name in names]
    if marked:
        handles.append(_source_handle())
    columns = -(-len(handles) // 2) if 4 < len(handles) <= _FEW_NETWORKS + 1 else min(len(handles), _LEGEND_COLUMNS)
    return _new_picture(handles, columns, 11, height)


def _draw_bars(
    path: Path,
    title: str,
    results: Results,
    names: Sequence[str],
    bars: Mapping[str, str],
    x_label: str = "",
    y_label: str = "accuracy (%)",
) -> bool:
    """Write the picture of one bar a network in each group; ``bars`` is the key of the number by the group's label."""
    values = {name: [results.number(name, key) for key in bars.values()] for name in names}
    if all(value is None for column in values.values() for value in column):
        return False
    source = {name: [corrected(name, key) for key in bars.values()] for name in names}
    marked = any(value is not None for column in source.values() for value in column)
    figure = _bar_picture(names, marked, 4.6)
    axes = figure.subplots()
    _grouped_bars(axes, list(bars), values, source)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    figure.suptitle(title)
    save_figure(figure, path)
    return True


def draw_accuracy(path: Path, results: Results, title: str) -> bool:
    """Training, validation and test accuracy of every network, with the source report's corrected numbers as marks.

    Args:
        path: The PNG to write.
        results: The run.
        title: Above the picture.

    Returns:
        Whether there was anything to draw.
    """
    bars = {"training": "train_acc", "validation": "val_acc", "test": "test_acc"}
    return _draw_bars(path, title, results, list(results.models), bars)


def draw_channels(path: Path, results: Results, title: str) -> bool:
    """Test accuracy on every set of channels, with the source report's corrected numbers as marks.

    Args:
        path: The PNG to write.
        results: The run.
        title: Above the picture.

    Returns:
        Whether there was anything to draw.
    """
    known = {key for entry in results.models.values() for key in entry.get("channels", {})}
    more = sorted(known - set(CHANNEL_SETS))
    # More groups of bars than this cannot be read.
    bars = {key: f"channels.{key}" for key in (*CHANNEL_SETS, *(more if len(more) <= 5 else ()))}
    names = [name for name, entry in results.models.items() if len(entry.get("channels", ())) > 1]
    names = names or [name for name, entry in results.models.items() if entry.get("channels")]
    return _draw_bars(path, title, results, names, bars, "channels of the test images", "test accuracy (%)")


def _whiskers(values: Sequence[Estimate]) -> list[list[float]]:
    """How far intervals reach below and above the means, as matplotlib takes them."""
    return [[value.mean - value.low for value in values], [value.high - value.mean for value in values]]


def draw_set_bars(path: Path, values: Mapping[str, Mapping[str, Estimate]], title: str) -> None:
    """Test accuracy on the seven sets of channels, with intervals.

    Args:
        path: The PNG to write.
        values: By network and set: accuracy in percent; sets may be missing.
        title: Above the picture.
    """
    colours = model_colours(list(values))
    width = 0.84 / len(values)
    figure = _bar_picture(list(values), False, 4.8)
    axes = figure.subplots()
    for place, (name, row) in enumerate(values.items()):
        groups = [group for group, each in enumerate(CHANNEL_SETS) if each in row]
        found = [row[CHANNEL_SETS[group]] for group in groups]
        x = [group + width * (place + 0.5 - len(values) / 2) for group in groups]
        axes.bar(
            x, [each.mean for each in found], width * 0.92, color=colours[name], yerr=_whiskers(found),
            error_kw={"ecolor": INK, "elinewidth": 1},
        )  # fmt: skip
    axes.set_xticks(range(len(CHANNEL_SETS)), CHANNEL_SETS)
    axes.set_xlabel("channels of the test images")
    axes.set_ylabel("test accuracy (%), 95 % interval")
    style_axes(axes)
    axes.tick_params(axis="x", length=0)
    figure.suptitle(title)
    save_figure(figure, path)


def draw_differences(path: Path, values: Mapping[str, Estimate], label: str, title: str) -> None:
    """Differences of networks to one of them, a line each, with intervals.

    Args:
        path: The PNG to write.
        values: By network: the difference, in points.
        label: Of what, less what.
        title: Above the picture.
    """
    figure = new_figure(9, 1.5 + 0.3 * len(values))
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=1)
    for place, value in enumerate(values.values()):
        # Green and vermilion: better, or worse, by more than the interval; grey between.
        colour = "#009E73" if value.low > 0 else "#D55E00" if value.high < 0 else "#7F7F7F"
        axes.errorbar(value.mean, place, xerr=_whiskers([value]), fmt="o", color=colour, markersize=6)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlabel(label)
    style_axes(axes, grid="x")
    axes.tick_params(axis="y", length=0)
    figure.suptitle(title)
    save_figure(figure, path)


def draw_trade_off(path: Path, points: Mapping[str, tuple[float, float, Estimate]], title: str) -> None:
    """Test accuracy against operations and against parameters, one colour a family of networks.

    Args:
        path: The PNG to write.
        points: By network: parameters, operations an image, accuracy in percent.
        title: Above the picture.
    """
    families = {
        "ResNet": ("resnet34", [name for name in points if name.startswith("resnet")]),
        "published": ("task2_published", [name for name in points if name == "task2_published"]),
        "four convolutions, ours": ("four_conv", [name for name in points if name.startswith("four_conv")]),
    }
    figure = new_figure(11, 5)
    panels = zip(figure.subplots(1, 2, sharey=True), ((1, "operations an image"), (0, "parameters")), strict=True)
    for axes, (key, label) in panels:
        for colour, names in families.values():
            for name in names:
                size, accuracy = points[name][key], points[name][2]
                axes.errorbar(
                    size, accuracy.mean, yerr=_whiskers([accuracy]), fmt="o", color=_COLOURS[colour],
                    ecolor=_COLOURS[colour] + "66", markersize=6,
                )  # fmt: skip
                axes.annotate(
                    name, (size, accuracy.mean), xytext=(6, 3), textcoords="offset points", fontsize=7, color=INK
                )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"{label} (logarithmic)")
        style_axes(axes)
        axes.margins(x=0.2)
    figure.axes[0].set_ylabel("test accuracy (%), 95 % interval")
    handles = [
        Line2D([], [], color=_COLOURS[colour], linestyle="none", marker="o", label=family)
        for family, (colour, names) in families.items()
        if names
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)


def draw_complexity(path: Path, results: Results, title: str) -> bool:
    """Parameters and operations of every network.

    Args:
        path: The PNG to write.
        results: The run.
        title: Above the picture.

    Returns:
        Whether there was anything to draw.
    """
    panels = [
        (label, divisor, [results.number(name, key) for name in results.models])
        for key, label, divisor in (
            ("params", "parameters (millions)", 1e6),
            ("flops", "operations per image (GFLOPs)", 1e9),
        )
    ]
    if all(value is None for _, _, column in panels for value in column):
        return False
    names = list(results.models)
    colours = model_colours(names)
    figure = new_figure(10, 1.6 + 0.55 * len(names))
    both = figure.subplots(1, 2, sharey=True)
    for axes, (label, divisor, column) in zip(both, panels, strict=True):
        longest = max((value for value in column if value is not None), default=divisor) / divisor or 1.0
        for place, (name, value) in enumerate(zip(names, column, strict=True)):
            if value is None:
                axes.text(0.01 * longest, place, "n/a", va="center", color="#888888")
                continue
            axes.barh(place, value / divisor, 0.62, color=colours[name])
            axes.text(value / divisor + 0.015 * longest, place, f"{value / divisor:.3f}", va="center", color=INK)
        axes.set_xlim(0, 1.2 * longest)
        axes.set_xlabel(label)
        axes.set_yticks(range(len(names)), [model_label(name) for name in names])
        style_axes(axes, grid="x")
        axes.tick_params(axis="y", length=0)
    both[0].invert_yaxis()
    figure.suptitle(title)
    save_figure(figure, path)
    return True
