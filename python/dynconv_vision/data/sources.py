# SPDX-License-Identifier: BSD-3-Clause
"""Where raw images come from: files, an array, or a drawing; and one split of them with its labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import Problem
from .preprocessing import read_bgr

FINGERPRINT_BYTES = 16


class Source(Protocol):
    """Raw images by number. It is sent to worker processes, so it is picklable and `take` keeps it small."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as uint8 BGR (H, W, 3). Raises UnreadableImageError."""
        ...

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Source:
        """The same source with these images alone, in this order."""
        ...

    def fingerprints(self) -> NDArray[np.uint8]:
        """(N, FINGERPRINT_BYTES): equal for two images only if their raw pixels are."""
        ...


def fingerprint(*parts: bytes) -> bytes:
    """A digest of `FINGERPRINT_BYTES` bytes."""
    return blake2b(b"\0".join(parts), digest_size=FINGERPRINT_BYTES).digest()


def stack_fingerprints(digests: Sequence[bytes]) -> NDArray[np.uint8]:
    """Digests as rows of one array."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, FINGERPRINT_BYTES)


@dataclass(frozen=True)
class FileSource:
    """Image files.

    A file is known by its absolute path, size and modification time, as make knows it: reading 60,000 photographs to
    hash them would cost minutes at every start, and no usual tool replaces a file by another with the same three.
    """

    paths: tuple[str, ...]
    stats: tuple[tuple[int, int], ...]
    """Size in bytes and modification time in nanoseconds of each file."""

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> NDArray[np.uint8]:
        return read_bgr(self.paths[index])

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> FileSource:
        return FileSource(tuple(self.paths[i] for i in indices), tuple(self.stats[i] for i in indices))

    def fingerprints(self) -> NDArray[np.uint8]:
        return stack_fingerprints(
            [fingerprint(os.fsencode(path), b"%d %d" % stat) for path, stat in zip(self.paths, self.stats, strict=True)]
        )


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images already in memory: uint8 RGB (N, H, W, 3)."""

    images: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self.images[index, :, :, ::-1])

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> ArraySource:
        return ArraySource(self.images[np.asarray(indices, np.int64)])

    def fingerprints(self) -> NDArray[np.uint8]:
        shape = str(self.images.shape[1:]).encode()
        return stack_fingerprints([fingerprint(shape, image.tobytes()) for image in self.images])


@dataclass(frozen=True, eq=False)
class Items:
    """One split before preprocessing.

    Attributes:
        source: N raw images.
        labels: int64 (N,).
        names: N names that stay the same wherever the data lies; they decide what is held out and what a limit keeps.
        where: N places for error texts, ``train.txt:12`` or a path.
    """

    source: Source
    labels: NDArray[np.int64]
    names: tuple[str, ...]
    where: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Items:
        return Items(
            self.source.take(indices),
            self.labels[np.asarray(indices, np.int64)],
            tuple(self.names[i] for i in indices),
            tuple(self.where[i] for i in indices),
        )


@dataclass(frozen=True, slots=True)
class Record:
    """An image file that a list or a folder tree names."""

    path: str
    """Absolute."""
    name: str
    """Relative to the data folder, with forward slashes."""
    label: int
    where: str


@dataclass(frozen=True)
class Layout:
    """A dataset as found, before anything is read.

    Attributes:
        name: the folder's name or the built-in set's.
        classes: class names, in label order.
        splits: by "train", "val" and "test"; those that are missing will be held out of train.
        problems: what is wrong so far.
        notes: what a reader of results should know: how splits were made, what was left out.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Items]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    def with_splits(self, splits: dict[str, Items], *notes: str) -> Layout:
        """The same dataset with other splits and more notes."""
        return replace(self, splits=splits, notes=(*self.notes, *notes))


def items_from_records(records: Sequence[Record]) -> tuple[Items, list[Problem]]:
    """Look every file up. Those that are missing are left out and reported."""
    found: list[Record] = []
    stats: list[tuple[int, int]] = []
    problems: list[Problem] = []
    for record in records:
        path, stat = record.path, _stat(record.path)
        if stat is None and os.sep == "/" and "\\" in path:  # a list written on Windows
            path = path.replace("\\", "/")
            record, stat = replace(record, path=path, name=record.name.replace("\\", "/")), _stat(path)
        if stat is None:
            problems.append(Problem(record.where, "missing image", record.path))
        else:
            found.append(record)
            stats.append(stat)
    source = FileSource(tuple(record.path for record in found), tuple(stats))
    labels = np.array([record.label for record in found], np.int64)
    items = Items(source, labels, tuple(record.name for record in found), tuple(record.where for record in found))
    return items, problems


def _stat(path: str) -> tuple[int, int] | None:
    try:
        result = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null byte in the path
        return None
    return result.st_size, result.st_mtime_ns
