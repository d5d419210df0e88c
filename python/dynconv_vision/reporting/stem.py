# SPDX-License-Identifier: BSD-3-Clause
"""Pictures of a :class:`VariableInputConv`: its kernels by channel and set, and its attention over images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .figures import INK, new_figure, save_figure, style_axes


def draw_kernels(path: Path, kernels: Mapping[str, Mapping[str, np.ndarray]], title: str) -> None:
    """The kernels of every channel; one scale for all.

    Args:
        path: The PNG to write.
        kernels: By row, such as "in RGB" and "alone", by channel: (O, kH, kW).
        title: Above the picture.
    """
    channels = list(dict.fromkeys(name for row in kernels.values() for name in row))
    largest = max(float(np.abs(each).max()) for row in kernels.values() for each in row.values())
    figure = new_figure(2.6 * len(channels) + 1.2, 2.8 * len(kernels) + 0.6)
    grid = figure.subplots(len(kernels), len(channels), squeeze=False)
    image = None
    for axes_row, (name, row) in zip(grid, kernels.items(), strict=True):
        for axes, channel in zip(axes_row, channels, strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            if channel not in row:
                axes.set_axis_off()
                continue
            image = axes.imshow(_tiles(row[channel]), cmap="RdBu_r", vmin=-largest, vmax=largest)
            axes.set_title(f"{channel} {name}", fontsize=9, color=INK)
    figure.colorbar(image, ax=grid, shrink=0.6, label="weight")
    figure.suptitle(title)
    save_figure(figure, path)


def _tiles(kernels: np.ndarray) -> np.ndarray:
    """(O, kH, kW) as one picture, kernels in rows, a gap of NaN between them."""
    count, height, width = kernels.shape
    across = int(np.ceil(np.sqrt(count)))
    down = -(-count // across)
    picture = np.full((down * (height + 1) - 1, across * (width + 1) - 1), np.nan)
    for place, kernel in enumerate(kernels):
        top, left = place // across * (height + 1), place % across * (width + 1)
        picture[top : top + height, left : left + width] = kernel
    return picture


def draw_attention(path: Path, mixtures: Mapping[str, np.ndarray], title: str) -> None:
    """How the mixing weights of the K kernels spread over images, by set of channels.

    Args:
        path: The PNG to write.
        mixtures: By set: (images, K).
        title: Above the picture.
    """
    count = next(iter(mixtures.values())).shape[1]
    colours: Sequence[str] = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#7F7F7F")
    figure = new_figure(11, 4.4)
    axes = figure.subplots()
    width = 0.8 / count
    for kernel in range(count):
        x = [group + width * (kernel + 0.5 - count / 2) for group in range(len(mixtures))]
        colour = colours[kernel % len(colours)]
        axes.boxplot(
            [mixture[:, kernel] for mixture in mixtures.values()], positions=x, widths=0.85 * width, whis=(5, 95),
            showfliers=False, patch_artist=True, manage_ticks=False, boxprops={"facecolor": colour, "edgecolor": INK},
            medianprops={"color": INK}, label=f"kernel {kernel + 1}",
        )  # fmt: skip
    axes.axhline(1 / count, color=INK, linestyle=":", linewidth=1)
    axes.set_xticks(range(len(mixtures)), list(mixtures))
    axes.set_xlabel("channels of the images")
    axes.set_ylabel("mixing weight (quartiles; 5, 95 %)")
    axes.set_ylim(0, 1)
    style_axes(axes)
    figure.legend(loc="outside lower center", ncols=count, frameon=False)
    figure.suptitle(title)
    save_figure(figure, path)
