# SPDX-License-Identifier: BSD-3-Clause
"""CIFAR-10 from the folder ``cifar-10-batches-py``, by torchvision where it is the published one.

The published files are pickles, and reading a pickle can run any code. So a file must either have the published
checksum, which torchvision verifies, or contain nothing but what such a batch consists of (numbers, text, lists,
dictionaries, numpy arrays): subsets and re-packed copies load, other things don't.
"""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError, Problem
from .sources import ArraySource, Items, Layout

BATCHES_FOLDER = "cifar-10-batches-py"
_HARMLESS = {
    *(("numpy", name) for name in ("ndarray", "dtype")),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("_codecs", "encode"),
    *((module, "bytes") for module in ("builtins", "__builtin__")),
}


def default_cifar_root() -> Path:
    """``$DYNCONV_DATA``, or ``data`` in the current folder, as in torchvision's examples."""
    return Path(os.environ.get("DYNCONV_DATA") or "data").expanduser()


def cifar10_layout(root: Path | None = None, download: bool = False) -> Layout:
    """Read CIFAR-10; val is held out of train by the caller.

    Args:
        root: the folder that has cifar-10-batches-py, or that folder itself. Default: `default_cifar_root`.
        download: let torchvision download and unpack what is missing (170 MB).

    Raises:
        DataError: files are missing, unsafe or not in CIFAR-10's format.
    """
    # Here and not above: worker processes import this package, and torch takes seconds.
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    root = default_cifar_root() if root is None else root
    if root.name == BATCHES_FOLDER:
        root = root.parent
    folder = root / BATCHES_FOLDER
    if download:
        CIFAR10(str(root), download=True)

    published = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    missing = [name for name, _ in published if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"CIFAR-10 is incomplete in {folder.resolve()}: missing {', '.join(missing)}\n"
            "  Name its folder by cifar10:FOLDER or DYNCONV_DATA. It is not downloaded unasked; to download it there:\n"
            f'  python -c "from torchvision.datasets import CIFAR10; CIFAR10({str(root)!r}, download=True)"',
            [Problem(str(folder / name), "missing file", "part of CIFAR-10") for name in missing],
        )
    others = [name for name, md5 in published if not check_integrity(str(folder / name), md5)]
    if others:
        warnings.warn(f"{folder}: not the published CIFAR-10 ({', '.join(others)} differ)", stacklevel=4)
    splits: dict[str, Items] = {}
    classes: tuple[str, ...] = ()
    for split, batches in (("train", CIFAR10.train_list), ("test", CIFAR10.test_list)):
        if others:
            parts = [_read_batch(folder / name) for name, _ in batches]
            images = np.concatenate([images for images, _ in parts])
            labels = np.concatenate([labels for _, labels in parts])
            classes = _read_classes(folder / CIFAR10.meta["filename"])
        else:
            dataset = CIFAR10(str(root), train=split == "train")
            images, labels, classes = dataset.data, np.array(dataset.targets, np.int64), tuple(dataset.classes)
        names = tuple(f"{split}[{index}]" for index in range(len(labels)))
        splits[split] = Items(ArraySource(images), labels, names, names)
    for split, items in splits.items():
        if len(items) and not 0 <= items.labels.min() <= items.labels.max() < len(classes):
            came = f"{items.labels.min()}..{items.labels.max()}"
            raise DataError(f"{folder}: {split} labels: got {came}, expected 0..{len(classes) - 1}")
    notes = (f"not the published files: {', '.join(others)}",) if others else ()
    return Layout("cifar10", classes, splits, notes=notes)


class _HarmlessUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def _read_plain(path: Path) -> dict[str, Any]:
    """The dictionary in a file, which must have nothing but plain data in it. Keys may be text or bytes."""
    try:
        with open(path, "rb") as file:
            content = _HarmlessUnpickler(file, encoding="latin1").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
    # A broken pickle can raise about anything.
    except Exception as error:
        raise DataError(
            f"{path}: neither the published CIFAR-10 file nor a plain batch: {error}",
            [Problem(str(path), "unreadable file", str(error))],
        ) from None


def _read_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N, 32, 32, 3) and labels (N,) of one batch file."""
    batch = _read_plain(path)
    for key in ("data", "labels"):
        if key not in batch:
            raise DataError(f"{path}: got the keys {sorted(map(str, batch))}, expected data and labels among them")
    images, labels = batch["data"], np.asarray(batch["labels"])
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        came = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(f"{path}: data: got {came}, expected uint8 (N, 3072)")
    if labels.shape != (len(images),) or not (np.issubdtype(labels.dtype, np.integer) or len(labels) == 0):
        raise DataError(f"{path}: labels: got {labels.dtype} {labels.shape}, expected {len(images)} integers")
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int64)


def _read_classes(path: Path) -> tuple[str, ...]:
    names = _read_plain(path).get("label_names")
    if not isinstance(names, list) or not names:
        raise DataError(f"{path}: label_names: got {names!r}, expected a list of class names")
    return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
