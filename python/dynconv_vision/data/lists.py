# SPDX-License-Identifier: BSD-3-Clause
"""List files: one image a line, ``<path> <label>``.

The label is what follows the last blank or tab, so paths may contain blanks. Either line end, blank lines and a byte
order mark are fine. Paths are relative to the folder of the list file. A folder has ``train.txt``, ``val.txt`` (or
``validation.txt``), ``test.txt``, and perhaps ``classes.txt``, which names the classes and says how many there are: a
line per class, in label order, ``<name>`` or ``<label> <name>`` or ``<label> <wnid> <name>``.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import DataError, Problem, listing
from .sources import Items, Layout, Record, items_from_records

LIST_NAMES = {"train": ("train.txt",), "val": ("val.txt", "validation.txt"), "test": ("test.txt",)}
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_WNID = re.compile(r"n[0-9]{8}")


def is_list_folder(folder: Path) -> bool:
    """Whether a folder has a training list."""
    return (folder / "train.txt").is_file()


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that aren't blank, with their numbers from 1, without line ends."""
    # surrogateescape: names of files may be any bytes, and os.fsencode gives them back.
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_list(list_file: Path, root: Path | None = None) -> tuple[list[Record], list[Problem]]:
    """The images that a list file names, and its malformed lines.

    Args:
        list_file: the file.
        root: what its paths are relative to; default: its folder.

    Returns:
        Its images in its order, and its malformed lines.

    Raises:
        OSError: the file cannot be read.
    """
    base = os.path.abspath(root if root is not None else list_file.parent)
    records, problems = [], []
    for number, line in read_lines(list_file):
        where = f"{list_file.name}:{number}"
        fields = line.strip().rsplit(None, 1)
        if len(fields) != 2 or not _INTEGER.fullmatch(fields[1]):
            shown = line.strip() if len(line) <= 80 else line.strip()[:77] + "..."
            problems.append(
                Problem(where, "malformed line", f"got {shown!r}, expected '<path> <label>' with a whole number")
            )
            continue
        name = fields[0].removeprefix("./")
        records.append(Record(os.path.normpath(os.path.join(base, name)), name, int(fields[1]), where))
    return records, problems


def check_labels(
    records: Iterable[Record], num_classes: int | None, reason: str = ""
) -> tuple[list[Record], list[Problem]]:
    """Those records whose label is in 0 .. num_classes - 1 (None: 0 or more), and the others as problems.

    Args:
        records: what a list file names.
        num_classes: labels are below it.
        reason: where num_classes comes from, for the problems' texts.

    Returns:
        The records kept, and the problems.
    """
    kept, problems = [], []
    expected = "0 or more" if num_classes is None else f"0..{num_classes - 1}{reason and f' ({reason})'}"
    for record in records:
        if record.label < 0 or (num_classes is not None and record.label >= num_classes):
            problems.append(Problem(record.where, "label out of range", f"got {record.label}, expected {expected}"))
        else:
            kept.append(record)
    return kept, problems


def list_folder_layout(folder: Path, num_classes: int | None = None) -> Layout:
    """Read a folder of list files.

    Args:
        folder: has train.txt and perhaps the others.
        num_classes: labels are below it. Default: the number of lines of classes.txt, or else the largest label in
            train.txt plus 1.

    Returns:
        The dataset as listed; malformed lines, labels out of range, contradictions and missing files are its problems.

    Raises:
        DataError: num_classes is not given, and the largest label is absurd.
    """
    problems: list[Problem] = []
    lists: dict[str, list[Record]] = {}
    for split, names in LIST_NAMES.items():
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is not None:
            lists[split], malformed = read_list(path)
            problems += malformed
        if path is not None and not lists[split] and not malformed and split == "train":
            problems.append(Problem(path.name, "empty list", "expected lines '<path> <label>'"))
    names = _read_class_names(folder / "classes.txt")
    reason = ""
    if num_classes is None:
        reason = f"{len(names)} classes in classes.txt" if names else "the largest label in train.txt"
        num_classes = len(names) or max((record.label for record in lists["train"]), default=-1) + 1
        if num_classes > MOST_CLASSES:
            raise DataError(
                f"{folder / 'train.txt'}: the largest label is {num_classes - 1}, which makes more than {MOST_CLASSES} "
                "classes; if that is meant, say so by num_classes or a classes.txt"
            )
    splits: dict[str, Items] = {}
    for split, records in lists.items():
        # Without one label in train.txt, the other lists are not to blame.
        lists[split], out_of_range = check_labels(records, num_classes or None, reason)
        problems += out_of_range
    contradictions, notes = _overlaps(lists)
    problems += contradictions
    for note in notes:
        warnings.warn(f"{folder}: {note}", stacklevel=4)
    contradictory = {problem.where for problem in contradictions}
    for split, records in lists.items():
        kept = [record for record in records if record.where not in contradictory]
        splits[split], missing = items_from_records(kept)
        problems += missing
    if len(names) != num_classes:
        names = _folder_names(lists["train"], num_classes)
    return Layout(folder.name, names, splits, tuple(problems), tuple(notes))


MOST_CLASSES = 100_000
"""One mistyped label must not make a network of a billion outputs."""


def _overlaps(lists: dict[str, list[Record]]) -> tuple[list[Problem], list[str]]:
    """Images that are listed more than once: with another label, a problem; else, a note on how many."""
    first: dict[str, tuple[str, Record]] = {}
    problems: list[Problem] = []
    repeated: dict[tuple[str, str], list[Problem]] = {}
    for split, records in lists.items():
        for record in records:
            earlier_split, earlier = first.setdefault(record.path, (split, record))
            if earlier is record:
                continue
            if earlier.label != record.label:
                detail = f"{record.name} has label {record.label}, but {earlier.label} in {earlier.where}"
                problems.append(Problem(record.where, "contradictory label", detail))
            else:
                repetition = Problem(record.where, "listed before", f"{record.name}, in {earlier.where}")
                repeated.setdefault((earlier_split, split), []).append(repetition)
    notes = []
    for (earlier_split, split), found in repeated.items():
        if earlier_split == split:
            head = f"{len(found)} lines of the {split} list repeat an image"
        else:
            head = f"leak: {len(found)} images of the {split} list are in the {earlier_split} list too"
        notes.append("\n".join([head, *listing(found, 3)]))
    return problems, notes


def _read_class_names(path: Path) -> tuple[str, ...]:
    """The names in classes.txt, or none where there is no such file."""
    if not path.is_file():
        return ()
    lines = [line.strip() for _, line in read_lines(path)]
    fields = [line.split(None, 1) for line in lines]
    if all(len(field) == 2 and field[0] == str(index) for index, field in enumerate(fields)):
        lines = [field[1] for field in fields]
    return unique_names(lines)


def unique_names(descriptions: Sequence[str]) -> tuple[str, ...]:
    """Short class names from lines like ``n01443537 goldfish, Carassius auratus``, if that leaves them distinct."""
    names = []
    for description in descriptions:
        wnid, _, words = description.partition(" ")
        text = words.strip() if _WNID.fullmatch(wnid) and words.strip() else description
        names.append(text.split(",")[0].strip() or description)
    return tuple(names) if len(set(names)) == len(names) else tuple(descriptions)


def _folder_names(records: Sequence[Record], num_classes: int) -> tuple[str, ...]:
    """Classes by the folder of their images where each has one of its own, else by number."""
    folders: dict[int, set[str]] = {}
    for record in records:
        folders.setdefault(record.label, set()).add(os.path.basename(os.path.dirname(record.path)))
    names = {label: next(iter(found)) for label, found in folders.items() if len(found) == 1}
    if len(names) == num_classes == len(set(names.values())) and all(names.values()):
        return tuple(names[label] for label in range(num_classes))
    return tuple(str(label) for label in range(num_classes))
