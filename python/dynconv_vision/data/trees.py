# SPDX-License-Identifier: BSD-3-Clause
"""Folder trees: one folder a class, and Tiny ImageNet as it is distributed.

Class folders: ``train/<class>/*``, ``val/<class>/*`` (or ``validation``, ``valid``), ``test/<class>/*``, or
``<class>/*`` alone; images at any depth. Labels are the sorted class names' numbers. A split that is missing, or whose
folder has no class folders (Tiny ImageNet's test images have no labels), is held out of train.

Tiny ImageNet: ``wnids.txt``, ``words.txt``, ``train/<wnid>/images/*.JPEG``, ``val/images/*.JPEG``,
``val/val_annotations.txt``.
Labels are the sorted wnids' numbers. Its test images have no labels, so half of val, class by class, becomes test.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .errors import Problem
from .lists import read_lines, unique_names
from .sources import Layout, Record, items_from_records
from .splits import hold_out

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}


def is_tiny_imagenet(folder: Path) -> bool:
    """Whether a folder is Tiny ImageNet as distributed."""
    return (folder / "wnids.txt").is_file() and (folder / "val" / "val_annotations.txt").is_file()


def is_class_folders(folder: Path) -> bool:
    """Whether a folder has ``train/<class>/`` folders, or two or more folders with images."""
    if (folder / "train").is_dir():
        return bool(_subfolders(folder / "train"))
    with_images = (sub for sub in _subfolders(folder) if any(_is_image(entry) for entry in os.scandir(sub)))
    return next(with_images, None) is not None and next(with_images, None) is not None


def tiny_imagenet_layout(folder: Path) -> Layout:
    """Read Tiny ImageNet's original tree."""
    problems: list[Problem] = []
    wnids = sorted(line.strip() for _, line in read_lines(folder / "wnids.txt"))
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    train, empty = _class_records(folder, "train", labels)
    problems += empty
    val: list[Record] = []
    for number, line in read_lines(folder / "val" / "val_annotations.txt"):
        where, fields = f"val/val_annotations.txt:{number}", line.strip().split("\t")
        if len(fields) < 2:
            expected = "expected '<file>\\t<wnid>\\t<box>'"
            problems.append(Problem(where, "malformed line", f"got {line.strip()[:80]!r}, {expected}"))
        elif fields[1] not in labels:
            problems.append(Problem(where, "unknown class", f"got {fields[1]!r}, expected one of wnids.txt"))
        else:
            path = os.path.join(os.path.abspath(folder), "val", "images", fields[0])
            val.append(Record(path, f"val/images/{fields[0]}", labels[fields[1]], where))
    train_items, missing = items_from_records(train)
    val_items, missing_val = items_from_records(val)
    kept, held = hold_out(val_items.labels, val_items.names, 0.5)
    splits = {"train": train_items, "val": val_items.take(kept), "test": val_items.take(held)}
    note = "Tiny ImageNet's test images have no labels: half of its val images, class by class, are the test split"
    return Layout(folder.name, _words(folder, wnids), splits, (*problems, *missing, *missing_val), (note,))


def _words(folder: Path, wnids: Sequence[str]) -> tuple[str, ...]:
    if not (folder / "words.txt").is_file():
        return tuple(wnids)
    words = dict(line.strip().split("\t", 1) for _, line in read_lines(folder / "words.txt") if "\t" in line.strip())
    return unique_names([f"{wnid} {words[wnid]}" if wnid in words else wnid for wnid in wnids])


def class_folder_layout(folder: Path) -> Layout:
    """Read a tree with one folder a class."""
    problems: list[Problem] = []
    notes: list[str] = []
    found = {
        split: next((name for name in names if (folder / name).is_dir()), None)
        for split, names in SPLIT_FOLDERS.items()
    }
    if found["train"] is None:
        found = {"train": "."}
    classes = sorted(sub.name for sub in _subfolders(folder / str(found["train"])))
    labels = {name: label for label, name in enumerate(classes)}
    splits = {}
    for split, name in found.items():
        if name is None:
            continue
        names = [sub.name for sub in _subfolders(folder / name)]
        if not set(names) & set(labels):
            notes.append(f"{name}/ has no class folders, so no labels, and isn't used")
            continue
        for unknown in sorted(set(names) - set(labels)):
            problems.append(Problem(f"{name}/{unknown}", "unknown class", f"there is no {found['train']}/{unknown}"))
        records, empty = _class_records(folder, name, labels)
        if split == "train":
            problems += empty
        splits[split], missing = items_from_records(records)
        problems += missing
    return Layout(folder.resolve().name, tuple(classes), splits, tuple(problems), tuple(notes))


def _class_records(folder: Path, split: str, labels: dict[str, int]) -> tuple[list[Record], list[Problem]]:
    """The images of each class below ``folder/split``, and the classes that have none."""
    root = os.path.abspath(folder)
    records: list[Record] = []
    problems: list[Problem] = []
    for name, label in labels.items():
        before = len(records)
        top = os.path.normpath(os.path.join(root, split, name))
        for parent, folders, files in os.walk(top, followlinks=True):
            folders.sort()
            for file in sorted(files):
                if _has_image_name(file):
                    path = os.path.join(parent, file)
                    relative = os.path.relpath(path, root).replace(os.sep, "/")
                    records.append(Record(path, relative, label, relative))
        if len(records) == before:
            expected = f"no file ends in {' '.join(IMAGE_SUFFIXES)}"
            problems.append(Problem(os.path.normpath(f"{split}/{name}"), "class without images", expected))
    return records, problems


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_image(entry: os.DirEntry[str]) -> bool:
    return _has_image_name(entry.name) and entry.is_file()


def _has_image_name(name: str) -> bool:
    # Names that start with a dot are other programs' files: "._photo.jpg" is macOS metadata.
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
