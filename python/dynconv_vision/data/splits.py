# SPDX-License-Identifier: BSD-3-Clause
"""Deterministic, stratified choices of images: splits held out, and subsets.

Within a class, images are ranked by a hash of their names. The choice so depends on no seed, no order and no machine,
adding an image moves no other (but at the edge), a smaller subset lies within a larger one, and results of runs with
different training seeds are about the same images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "val", "test")
HELD_OUT_FRACTION = 0.1


def _ranks(labels: NDArray[np.int64], names: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Each image's rank within its class, and the hash of its name that ranks it."""
    digests = b"".join(blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest() for name in names)
    keys = np.frombuffer(digests, "<u8")
    order = np.lexsort((keys, labels))
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(starts, counts)
    return ranks, keys


def hold_out(
    labels: NDArray[np.int64], names: Sequence[str], fraction: float = HELD_OUT_FRACTION
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divide images into those kept and those held out, class by class.

    Args:
        labels: int64 (N,).
        names: N names that rank the images within their classes.
        fraction: of each class to hold out, rounded, but at least one image; a class of one image is kept.

    Returns:
        Indices kept and indices held out, both ascending.
    """
    if len(labels) == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    ranks, _ = _ranks(labels, names)
    counts = np.bincount(labels)
    quota = np.minimum(np.maximum(np.rint(counts * fraction).astype(np.int64), 1), np.maximum(counts - 1, 0))
    held = ranks < quota[labels]
    return np.flatnonzero(~held), np.flatnonzero(held)


def subset(labels: NDArray[np.int64], names: Sequence[str], count: int) -> NDArray[np.int64]:
    """Ascending indices of `count` images, as equally many of each class as there are."""
    if count >= len(labels):
        return np.arange(len(labels))
    ranks, keys = _ranks(labels, names)
    return np.sort(np.lexsort((keys, ranks))[:count])


def check_limits(limits: Mapping[str, int] | None) -> dict[str, int]:
    """Limits by split, checked.

    Raises:
        ValueError: an unknown split, or a count that is not an integer of 1 or more.
    """
    checked = dict(limits or {})
    for split, count in checked.items():
        if split not in SPLITS:
            raise ValueError(f"limits: got the split {split!r}, expected one of {', '.join(SPLITS)}")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"limits[{split!r}]: got {count!r}, expected a number of images, 1 or more")
    return checked
