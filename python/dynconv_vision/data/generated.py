# SPDX-License-Identifier: BSD-3-Clause
"""The generated set: 50 classes, each a shape of a colour, drawn on demand and never downloaded.

A picture shows one large shape, turned, scaled, stretched and shifted at random, on a smooth many-coloured ground,
among smaller shapes of any colour, partly under lines, in uneven light, blurred and noisy. Neither shape nor colour
alone gives the class. Image i of a split has class i mod 50; all else about it follows from (seed, split, i), so it is
the same whichever process draws it, in whatever order, and about the same scene at every image size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from colorsys import hsv_to_rgb
from dataclasses import dataclass, fields

import cv2
import numpy as np
from numpy.typing import NDArray

from .sources import Items, Layout, fingerprint, stack_fingerprints

DRAWING_VERSION = 1
"""Part of the fingerprints: raise it whenever a drawing changes."""

COLOURS = {"red": 0.0, "yellow": 52.0, "green": 125.0, "blue": 225.0, "magenta": 305.0}
"""Hue in degrees of each colour; each picture's own lies within `_HUE_JITTER` of it."""

_HUE_JITTER = 16.0
_SUBPIXEL_BITS = 4
_SPLIT_NUMBERS = {"train": 0, "val": 1, "test": 2}

Contours = tuple[NDArray[np.float64], ...]
"""Outlines (P, 2) about the origin; what lies within two of them is outside the shape."""


def _arc(radius: float, start: float, stop: float, points: int = 40, centre: tuple[float, float] = (0, 0)) -> NDArray:
    angles = np.linspace(start, stop, points)
    return np.stack([radius * np.cos(angles) + centre[0], radius * np.sin(angles) + centre[1]], 1)


def _crescent() -> NDArray[np.float64]:
    # Two circles that meet at angles +-1.1 of the outer one.
    meet, shift = 1.1, 0.55
    x, y = math.cos(meet), math.sin(meet)
    inner = math.hypot(x - shift, y)
    inner_angle = math.atan2(y, x - shift)
    outer_arc = _arc(1, meet, 2 * math.pi - meet)
    inner_arc = _arc(inner, 2 * math.pi - inner_angle, inner_angle, centre=(shift, 0))
    return np.concatenate([outer_arc, inner_arc])


def _heart() -> NDArray[np.float64]:
    t = np.linspace(0, 2 * math.pi, 60)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], 1) / 16


def _star() -> NDArray[np.float64]:
    angles = np.arange(10) * math.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.15, 0.45)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _polygon(*points: tuple[float, float]) -> NDArray[np.float64]:
    return np.array(points, np.float64)


_ARM = 0.33
SHAPES: dict[str, Contours] = {
    "disc": (_arc(0.85, 0, 2 * math.pi),),
    "ring": (_arc(1, 0, 2 * math.pi), _arc(0.58, 0, 2 * math.pi)),
    "crescent": (_crescent(),),
    "triangle": (_polygon((0, -1.1), (0.95, 0.6), (-0.95, 0.6)),),
    "square": (_polygon((-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)),),
    "bar": (_polygon((-1.1, -0.32), (1.1, -0.32), (1.1, 0.32), (-1.1, 0.32)),),
    "cross": (
        _polygon(
            *((_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM), (_ARM, 1)),
            *((-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM), (-_ARM, -1)),
        ),
    ),
    "star": (_star(),),
    "heart": (_heart(),),
    "arrow": (_polygon((0, -1.1), (0.9, 0), (0.35, 0), (0.35, 1), (-0.35, 1), (-0.35, 0), (-0.9, 0)),),
}
"""Ten shapes that rotation can't turn into one another, of roughly equal size."""

CLASSES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
_SHAPE_CONTOURS = tuple(SHAPES.values())
_HUES = tuple(COLOURS.values())


@dataclass(frozen=True, slots=True)
class GeneratedConfig:
    """How many images to draw, and how hard they are.

    Attributes:
        train: images of the training split; as `val` and `test`, best a multiple of the 50 classes.
        val: images of the validation split.
        test: images of the test split.
        clutter: the most small shapes, and half as many lines, an image may have.
        noise: the largest standard deviation of the noise, of 255.
    """

    train: int = 4000
    val: int = 500
    test: int = 500
    clutter: int = 4
    noise: float = 16.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 1 if field.name in _SPLIT_NUMBERS else 0
            number = isinstance(value, int) or (field.name == "noise" and isinstance(value, float))
            if not number or isinstance(value, bool) or not least <= value < math.inf:
                raise ValueError(f"GeneratedConfig.{field.name}: got {value!r}, expected a number of at least {least}")


@dataclass(frozen=True)
class GeneratedSource:
    """Drawings on demand."""

    config: GeneratedConfig
    image_size: int
    seed: int
    split: str
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> NDArray[np.uint8]:
        number = self.indices[index]
        rng = np.random.default_rng((self.seed, _SPLIT_NUMBERS[self.split], number))
        return draw(number % len(CLASSES), self.image_size, rng, clutter=self.config.clutter, noise=self.config.noise)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> GeneratedSource:
        chosen = tuple(self.indices[i] for i in indices)
        return GeneratedSource(self.config, self.image_size, self.seed, self.split, chosen)

    def fingerprints(self) -> NDArray[np.uint8]:
        drawing = (DRAWING_VERSION, self.config.clutter, float(self.config.noise))
        start = repr((*drawing, self.image_size, self.seed, self.split)).encode()
        return stack_fingerprints([fingerprint(start, b"%d" % number) for number in self.indices])


def generated_layout(config: GeneratedConfig, image_size: int, seed: int) -> Layout:
    """The three splits of the generated set.

    Raises:
        ValueError: a negative seed.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: got {seed!r}, expected an integer of 0 or more")
    splits = {}
    for split in _SPLIT_NUMBERS:
        indices = tuple(range(getattr(config, split)))
        names = tuple(f"{split}[{index}]" for index in indices)
        labels = np.array(indices, np.int64) % len(CLASSES)
        splits[split] = Items(GeneratedSource(config, image_size, seed, split, indices), labels, names, names)
    return Layout("generated", CLASSES, splits, notes=(f"images were generated with seed {seed}",))


def draw(
    label: int, size: int, rng: np.random.Generator, *, clutter: int = 4, noise: float = 16.0
) -> NDArray[np.uint8]:
    """Draw one picture.

    Args:
        label: class, index into `CLASSES`.
        size: height and width in pixels.
        rng: all that is random comes from it.
        clutter: as in `GeneratedConfig`.
        noise: as in `GeneratedConfig`.

    Returns:
        uint8 BGR (size, size, 3).
    """
    shape, colour = divmod(label, len(COLOURS))
    image = _ground(size, rng)
    for _ in range(rng.integers(clutter // 2, clutter + 1)):
        contours = _SHAPE_CONTOURS[rng.integers(len(_SHAPE_CONTOURS))]
        _fill(image, contours, rng.uniform(0.05, 0.95, 2), rng.uniform(0.05, 0.11), _clutter_colour(rng), rng)
    radius = rng.uniform(0.24, 0.38)
    centre = rng.uniform(radius + 0.02, 0.98 - radius, 2)
    _fill(image, _SHAPE_CONTOURS[shape], centre, radius, _class_colour(colour, rng), rng)
    for _ in range(rng.integers(0, clutter // 2 + 1)):
        ends = np.rint(rng.uniform(0, 1, (2, 2)) * size * 2**_SUBPIXEL_BITS).astype(int)
        thickness = max(1, round(size * rng.uniform(0.01, 0.03)))
        cv2.line(image, ends[0], ends[1], _clutter_colour(rng), thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
    return _photograph(image, noise, rng)


def _ground(size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A smooth, faintly coloured random ground."""
    cells = int(rng.integers(2, 6))
    grey = rng.uniform(50, 200, (cells, cells, 1))
    tint = rng.uniform(-30, 30, (cells, cells, 3))
    coarse = np.clip(grey + tint, 0, 255).astype(np.uint8)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def _class_colour(colour: int, rng: np.random.Generator) -> tuple[float, float, float]:
    hue = (_HUES[colour] + rng.uniform(-_HUE_JITTER, _HUE_JITTER)) % 360
    red, green, blue = hsv_to_rgb(hue / 360, rng.uniform(0.6, 1), rng.uniform(0.55, 1))
    return 255 * blue, 255 * green, 255 * red


def _clutter_colour(rng: np.random.Generator) -> tuple[float, float, float]:
    red, green, blue = hsv_to_rgb(rng.uniform(), rng.uniform(0, 1), rng.uniform(0.2, 1))
    return 255 * blue, 255 * green, 255 * red


def _fill(
    image: NDArray[np.uint8],
    contours: Contours,
    centre: NDArray[np.float64],
    radius: float,
    colour: tuple[float, float, float],
    rng: np.random.Generator,
) -> None:
    """Draw a shape, turned by any angle and stretched by up to a quarter along any axis; lengths in image sizes."""
    turn, axis, stretch = rng.uniform(0, 2 * math.pi), rng.uniform(0, math.pi), rng.uniform(1, 1.25)
    along, across = radius * math.sqrt(stretch), radius / math.sqrt(stretch)
    matrix = _rotation(axis) @ np.diag([along, across]) @ _rotation(turn - axis)
    scale = len(image) * 2**_SUBPIXEL_BITS
    points = [np.rint((contour @ matrix.T + centre) * scale).astype(np.int32) for contour in contours]
    cv2.fillPoly(image, points, colour, cv2.LINE_AA, _SUBPIXEL_BITS)


def _rotation(angle: float) -> NDArray[np.float64]:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def _photograph(image: NDArray[np.uint8], noise: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Uneven light, blur, noise."""
    size = len(image)
    sigma = rng.uniform(0, 0.012) * size
    if sigma > 0.3:
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    light = cv2.resize(rng.uniform(0.7, 1.15, (2, 2)).astype(np.float32), (size, size), interpolation=cv2.INTER_LINEAR)
    lit = image * light[:, :, None]
    lit += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0.15, 1) * noise)
    return np.clip(np.rint(lit), 0, 255).astype(np.uint8)
