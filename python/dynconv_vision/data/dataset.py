# SPDX-License-Identifier: BSD-3-Clause
"""From a source's name or path to three splits of prepared images."""

from __future__ import annotations

import logging
import mmap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache import prepare
from .cifar import cifar10_layout
from .errors import DataError, Problem, summary
from .generated import GeneratedConfig, generated_layout
from .lists import LIST_NAMES, check_labels, is_list_folder, list_folder_layout, read_list
from .preprocessing import PreprocessConfig
from .sources import Items, Layout, items_from_records
from .splits import HELD_OUT_FRACTION, SPLITS, check_limits, hold_out, subset
from .trees import class_folder_layout, is_class_folders, is_tiny_imagenet, tiny_imagenet_layout
from .workers import run

logger = logging.getLogger(__name__)

_SKIP_HINT = "skip_bad_images=True (--skip-bad-images) goes on without them"


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Prepared images and their labels.

    Attributes:
        images: uint8 RGB (N, 3, S, S), 0..255; read-only and mapped from the cache's file, so copy what you change.
        labels: int64 (N,).
        skipped: what was left out with ``skip_bad_images``.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    skipped: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as all its pixels: worker processes of data loaders map the same file instead.
        images: Any = self.images
        if isinstance(images, np.memmap) and isinstance(images.base, mmap.mmap):
            images = Path(str(images.filename))
        return {"images": images, "labels": self.labels, "skipped": self.skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["images"], Path):
            state = {**state, "images": np.load(state["images"], mmap_mode="r")}
        self.__dict__.update(state)


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A dataset with its three splits.

    Attributes:
        name: of the folder, or "generated" or "cifar10".
        classes: class names in label order.
        image_size: height and width in pixels.
        train: to learn from.
        val: to choose by.
        test: to report.
        notes: what a reader of results should know: how splits were made, what was left out.
    """

    name: str
    classes: tuple[str, ...]
    image_size: int
    train: ImageSplit
    val: ImageSplit
    test: ImageSplit
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.classes)


def load_dataset(
    source: str | Path | GeneratedConfig,
    *,
    image_size: int,
    denoise: bool = False,
    normalize: bool = False,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    skip_bad_images: bool = False,
    seed: int = 0,
    progress: bool = True,
    limits: Mapping[str, int] | None = None,
    num_classes: int | None = None,
    download: bool = False,
) -> ImageDataset:
    """Find, check and preprocess a dataset. The second time it comes from the cache.

    Args:
        source: "generated" or a `GeneratedConfig`; "cifar10" (in ``$DYNCONV_DATA`` or ./data) or "cifar10:FOLDER"; or a
            folder of list files (``train.txt``, ``val.txt`` or ``validation.txt``, ``test.txt``; see `lists`), Tiny
            ImageNet's tree, or class folders (see `trees`). A missing val or test split is held out of train: a tenth
            of each class, by a hash of the images' names, so always the same.
        image_size: height and width in pixels, S.
        denoise: non-local means on every image, about 50 ms each on one core at 124 pixels.
        normalize: stretch each image's values to 0..255.
        cache_dir: default: ``$DYNCONV_CACHE`` or ~/.cache/dynconv_vision.
        workers: processes that preprocess; 0: none but this one; None: as many as cores where the work is worth it.
        skip_bad_images: leave out malformed lines, labels out of range, missing and unreadable images, and warn how
            many that were.
        seed: of the generated set. Splits and subsets never depend on it.
        progress: show progress bars with rate and time left.
        limits: at most so many images by split ("train", "val", "test"), equally of each class, always the same; for
            the generated set, exactly so many.
        num_classes: for list files: labels must be below it. Default: the number of lines in classes.txt, or the
            largest label in train.txt plus 1.
        download: let torchvision download CIFAR-10 where it is missing.

    Returns:
        Images uint8 RGB (N, 3, S, S) and labels int64 (N,) of each split, with the classes' names.

    Raises:
        DataError: with everything that is wrong with the data, by file and line.
        ValueError: an argument out of range; the text names it.
    """
    config = PreprocessConfig(image_size, denoise, normalize)
    _check_workers(workers)
    checked_limits = check_limits(limits)
    if isinstance(source, str) and source == "generated":
        source = GeneratedConfig()
    if isinstance(source, GeneratedConfig):
        layout = generated_layout(replace(source, **checked_limits), image_size, seed)
    else:
        layout = _find_layout(source, num_classes, download)
    layout = _limit(_complete(layout), checked_limits)
    problems = list(layout.problems)
    if problems and not skip_bad_images:
        # Look for broken images before giving up: whoever mends the data wants to hear it all at once.
        for split, items in layout.splits.items():
            problems += _find_unreadable(items, f"{layout.name}-{split}", workers, progress)
        raise DataError.from_problems(f"{layout.name}", problems, _SKIP_HINT)

    prepared = {
        split: _prepare(items, config, f"{layout.name}-{split}", cache_dir, workers, progress)
        for split, items in layout.splits.items()
    }
    problems += [problem for split in prepared.values() for problem in split.skipped]
    notes = layout.notes
    if problems:
        if not skip_bad_images:
            raise DataError.from_problems(layout.name, problems, _SKIP_HINT)
        notes = (*notes, _warn_skipped(layout.name, problems))
    for split, images in prepared.items():
        if len(images) == 0:
            raise DataError(f"{layout.name}: no usable image in the {split} split", problems)
    unseen = np.setdiff1d(np.arange(len(layout.classes)), prepared["train"].labels)
    if len(unseen):
        note = f"{len(unseen)} of {len(layout.classes)} classes have no training image: labels {_short(unseen)}"
        warnings.warn(f"{layout.name}: {note} (labels count from 0)", stacklevel=2)
        notes = (*notes, note)
    return ImageDataset(layout.name, layout.classes, image_size, **prepared, notes=notes)


def load_list(
    list_file: str | Path,
    root: str | Path | None = None,
    *,
    image_size: int,
    num_classes: int | None = None,
    denoise: bool = False,
    normalize: bool = False,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    skip_bad_images: bool = False,
    progress: bool = True,
) -> ImageSplit:
    """Read and preprocess the images of one list file.

    Args:
        list_file: lines ``<path> <label>``.
        root: what the paths are relative to; default: the folder of the list file.
        num_classes: labels must be below it; None: any label of 0 or more.
        image_size, denoise, normalize, cache_dir, workers, skip_bad_images, progress: as for `load_dataset`.

    Returns:
        Images uint8 RGB (N, 3, S, S) and labels int64 (N,), in the list's order, with what was left out.

    Raises:
        DataError: with everything that is wrong, by line.
        ValueError: an argument out of range; the text names it.
    """
    config = PreprocessConfig(image_size, denoise, normalize)
    _check_workers(workers)
    path = Path(list_file).expanduser()
    if not path.is_file():
        raise DataError(f"{path}: there is no such list file")
    name = f"{path.resolve().parent.name}-{path.stem}"
    records, problems = read_list(path, None if root is None else Path(root).expanduser())
    records, out_of_range = check_labels(records, num_classes, f"{num_classes} classes")
    items, missing = items_from_records(records)
    problems += out_of_range + missing
    if problems and not skip_bad_images:
        problems += _find_unreadable(items, name, workers, progress)
        raise DataError.from_problems(str(path), problems, _SKIP_HINT)
    split = _prepare(items, config, name, cache_dir, workers, progress)
    problems += split.skipped
    if problems:
        if not skip_bad_images:
            raise DataError.from_problems(str(path), problems, _SKIP_HINT)
        _warn_skipped(str(path), problems)
    if len(split) == 0:
        raise DataError(f"{path}: no usable image", problems)
    return replace(split, skipped=tuple(problems))


def _check_workers(workers: int | None) -> None:
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 0):
        raise ValueError(f"workers: got {workers!r}, expected None or a number of processes, 0 or more")


def _find_layout(source: str | Path, num_classes: int | None, download: bool) -> Layout:
    if isinstance(source, str) and (source == "cifar10" or source.startswith("cifar10:")):
        folder = source.partition(":")[2]
        return cifar10_layout(Path(folder).expanduser() if folder else None, download)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        what = "a file, not a folder" if folder.exists() else "no such folder"
        raise DataError(f"source: got {str(source)!r}, {what}; expected a folder, 'generated' or 'cifar10[:FOLDER]'")
    if is_list_folder(folder):
        return list_folder_layout(folder.resolve(), num_classes)
    if is_tiny_imagenet(folder):
        return tiny_imagenet_layout(folder.resolve())
    if is_class_folders(folder):
        return class_folder_layout(folder.resolve())
    lists = ", ".join(name for names in LIST_NAMES.values() for name in names)
    raise DataError(
        f"{folder}: no dataset found. Expected list files ({lists}), Tiny ImageNet's tree (wnids.txt, train/, "
        "val/val_annotations.txt) or class folders (train/<class>/, val/<class>/, test/<class>/)"
    )


def _complete(layout: Layout) -> Layout:
    """Hold missing splits out of train."""
    splits = dict(layout.splits)
    if len(splits["train"]) == 0:
        raise DataError.from_problems(f"{layout.name}: no usable image to train on", layout.problems)
    notes = []
    for split in SPLITS:
        if split not in splits:
            train = splits["train"]
            kept, held = hold_out(train.labels, train.names)
            splits["train"], splits[split] = train.take(kept), train.take(held)
            share = f"{HELD_OUT_FRACTION:.0%} of each class, chosen by a hash of the names"
            notes.append(f"no {split} split: {len(held)} images are held out of train ({share})")
            logger.info("%s: %s", layout.name, notes[-1])
    return layout.with_splits({split: splits[split] for split in SPLITS}, *notes)


def _limit(layout: Layout, limits: Mapping[str, int]) -> Layout:
    splits, notes = dict(layout.splits), []
    for split, count in limits.items():
        items = splits[split]
        if count < len(items):
            splits[split] = items.take(subset(items.labels, items.names, count))
            notes.append(f"{count} of {len(items)} {split} images are used")
    return layout.with_splits(splits, *notes)


def _find_unreadable(items: Items, name: str, workers: int | None, progress: bool) -> list[Problem]:
    from tqdm import tqdm

    bad: dict[int, str] = {}
    with tqdm(desc=f"checking {name}", total=len(items), unit="img", disable=not progress) as bar:
        for results in run(items.source, range(len(items)), None, workers):
            bad |= {index: error for index, _, error in results if error is not None}
            bar.update(len(results))
    return _unreadable(items, bad)


def _unreadable(items: Items, bad: Mapping[int, str]) -> list[Problem]:
    paths = items.names
    return [Problem(items.where[i], "unreadable image", f"{paths[i]}: {bad[i]}") for i in sorted(bad)]


def _prepare(
    items: Items, config: PreprocessConfig, name: str, cache_dir: str | Path | None, workers: int | None, progress: bool
) -> ImageSplit:
    if len(items) == 0:
        return ImageSplit(np.empty((0, 3, config.image_size, config.image_size), np.uint8), items.labels)
    prepared = prepare(items.source, config, name=name, cache_dir=cache_dir, workers=workers, progress=progress)
    good = np.setdiff1d(np.arange(len(items)), list(prepared.bad)).astype(np.int64)
    return ImageSplit(prepared.images, items.labels[good], tuple(_unreadable(items, prepared.bad)))


def _warn_skipped(name: str, problems: list[Problem]) -> str:
    note = f"left out {summary(problems)}"
    warnings.warn(f"{name}: {note}, the first: {problems[0]}", stacklevel=3)
    return note


def _short(numbers: NDArray[np.int64], limit: int = 10) -> str:
    text = ", ".join(str(number) for number in numbers[:limit])
    return text if len(numbers) <= limit else f"{text}, ..."
