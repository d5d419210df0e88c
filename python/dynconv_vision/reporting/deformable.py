# SPDX-License-Identifier: BSD-3-Clause
"""Pictures of what a deformable convolution has learnt: where it samples, what it mutes, what the network looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .figures import INK, new_figure, save_figure


@dataclass(frozen=True)
class Samples:
    """Where one output pixel of a layer samples its input, or the image; both count pixels' centres from 0.

    Attributes:
        centre: (2,) y and x of the pixel itself.
        taps: (K, 2) y and x of its taps, moved by their offsets.
        weights: (K,) modulation of the taps, 0 to 2; 1 where there is none.
    """

    centre: np.ndarray
    taps: np.ndarray
    weights: np.ndarray

    def in_image(self, map_size: int, image_size: int) -> Samples:
        """The same in pixels of the image, from those of a feature map of it."""
        centre, taps = ((places + 0.5) * (image_size / map_size) - 0.5 for places in (self.centre, self.taps))
        return Samples(centre, taps, self.weights)


def _set_title(figure: Figure, title: str) -> None:
    """In one line, though a picture of few images is narrow; a character takes some 0.6 of the font's size."""
    figure.suptitle(title, fontsize=min(12.0, 72 * figure.get_figwidth() / (0.6 * len(title))))


def draw_samples(path: Path, images: np.ndarray, rows: Mapping[str, Sequence[Sequence[Samples]]], title: str) -> None:
    """Sampling points over images: a cross at the output pixel, a dot at every tap, larger where it weighs more.

    Args:
        path: The PNG to write.
        images: (n, S, S, 3), uint8.
        rows: By layer, for each image, the output pixels to show.
        title: Above the picture.
    """
    count = len(images)
    figure = new_figure(1.9 * count + 0.4, 2.05 * len(rows) + 0.5)
    grid = figure.subplots(len(rows), count, squeeze=False)
    for axes_row, (layer, shown) in zip(grid, rows.items(), strict=True):
        for place, (axes, image, pixels) in enumerate(zip(axes_row, images, shown, strict=True)):
            axes.imshow(image, alpha=0.75)
            for samples, colour in zip(pixels, ("#D55E00", "#0072B2", "#009E73", "#CC79A7"), strict=False):
                y, x = samples.taps.T
                axes.scatter(x, y, s=4 + 26 * samples.weights, color=colour, edgecolors="white", linewidths=0.4)
                axes.plot(samples.centre[1], samples.centre[0], "+", color=colour, markersize=9, markeredgewidth=1.6)
            axes.set_xlim(-0.5, image.shape[1] - 0.5)
            axes.set_ylim(image.shape[0] - 0.5, -0.5)
            axes.set_xticks([])
            axes.set_yticks([])
            if place == 0:
                axes.set_ylabel(layer, fontsize=9, color=INK)
    _set_title(figure, title)
    save_figure(figure, path)


def draw_maps(path: Path, images: np.ndarray, rows: Mapping[str, np.ndarray], names: Sequence[str], title: str) -> None:
    """Images, and below each its maps over a faded copy.

    Args:
        path: The PNG to write.
        images: (n, S, S, 3), uint8.
        rows: By name: (n, H, W) maps; a row has one scale of colours, and its limits are in its label.
        names: (n,) what stands above each image.
        title: Above the picture.
    """
    count, size = len(images), images.shape[1]
    figure = new_figure(1.9 * count + 0.4, 2.05 * (len(rows) + 1) + 0.5)
    grid = figure.subplots(len(rows) + 1, count, squeeze=False)
    for axes, image, name in zip(grid[0], images, names, strict=True):
        axes.imshow(image)
        axes.set_title(name, fontsize=8, color=INK)
    extent = (-0.5, size - 0.5, size - 0.5, -0.5)
    for axes_row, (label, maps) in zip(grid[1:], rows.items(), strict=True):
        low, high = float(maps.min()), float(maps.max())
        for axes, image, values in zip(axes_row, images, maps, strict=True):
            axes.imshow(image.mean(2), cmap="gray")
            axes.imshow(values, cmap="inferno", vmin=low, vmax=high, alpha=0.6, extent=extent, interpolation="bilinear")
        axes_row[0].set_ylabel(f"{label}\n{low:.2f} to {high:.2f}", fontsize=9, color=INK)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    _set_title(figure, title)
    # Photographs under colours compress badly.
    save_figure(figure, path, dpi=90)
