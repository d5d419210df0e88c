# SPDX-License-Identifier: BSD-3-Clause
"""Small images, datasets and sources for test_data.py. Importable by preprocessing workers."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dynconv_vision.data.preprocessing import UnreadableImageError


def random_image(number: int, height: int = 20, width: int = 24) -> np.ndarray:
    """uint8 BGR noise over a gradient: no two numbers agree in any pixel row."""
    rng = np.random.default_rng(number)
    ramp = np.linspace(0, 120, width)[None, :, None]
    return (ramp + rng.integers(0, 120, (height, width, 3))).astype(np.uint8)


def write_image(path: Path, number: int = 0, **size: int) -> Path:
    """Write `random_image` in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), random_image(number, **size))
    return path


def write_list_folder(folder: Path, counts: dict[str, int], num_classes: int = 2, suffix: str = ".png") -> Path:
    """Lists ``<split>.txt`` and their images; image i of a split has label i mod num_classes."""
    number = 0
    for split, count in counts.items():
        lines = []
        for index in range(count):
            name = f"images/{split}_{index}{suffix}"
            write_image(folder / name, number)
            number += 1
            lines.append(f"{name} {index % num_classes}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def write_cifar10(root: Path, per_batch: int = 20, key: Callable[[str], object] = str) -> Path:
    """CIFAR-10's folder in its real format, smaller; `key` makes the keys of the pickled dictionaries."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rng = np.random.default_rng(number)
        batch = {
            key("batch_label"): name,
            key("labels"): [index % 10 for index in range(per_batch)],
            key("data"): rng.integers(0, 256, (per_batch, 3072), np.uint8),
            key("filenames"): [f"{index}.png" for index in range(per_batch)],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = {key("num_cases_per_batch"): per_batch, key("label_names"): [key(name) for name in classes]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    return folder


@dataclass(frozen=True)
class FailingSource:
    """One good image, one unreadable, then whatever `end` says."""

    end: str
    numbers: tuple[int, ...] = tuple(range(3))

    def __len__(self) -> int:
        return len(self.numbers)

    def load(self, index: int) -> np.ndarray:
        number = self.numbers[index]
        if number == 1:
            raise UnreadableImageError("made so")
        if number == 2 and self.end == "raise":
            raise ZeroDivisionError("a bug")
        if number == 2 and self.end == "die":
            os._exit(7)
        return random_image(number)

    def take(self, indices) -> FailingSource:
        return FailingSource(self.end, tuple(self.numbers[i] for i in indices))

    def fingerprints(self) -> np.ndarray:
        return np.array([[number] * 16 for number in self.numbers], np.uint8)
