# SPDX-License-Identifier: BSD-3-Clause
"""Prepared images, kept as one uint8 .npy file per set of images and settings, mapped into memory and never rewritten.

``<cache>/<settings>/<name>-<key>/`` is an entry; the key is a hash of the fingerprints of all its images, in order:

- ``fingerprints.npy``   one row an image, whatever comes of it
- ``partial.npy``        while it is made: the array at its final size, rows in any state
- ``done.bin``           while it is made: one byte an image, 1 once its row is safely in partial.npy
- ``meta.json``          settings, and the images left out because they can't be read
- ``images.npy``         the finished array, without the rows of unreadable images; with meta.json: complete

A killed run leaves partial.npy and done.bin, and the next one goes on from there. A new entry takes over the rows of
images that other entries of the same settings have already, so adding, mending or removing images costs only those.
A lock beside the entry lets one process make it while others wait. Everything here may be deleted at any time.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

from .preprocessing import PreprocessConfig, UnreadableImageError
from .sources import Source
from .workers import run

logger = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 2.0
"""How often finished rows are made safe: what a kill can lose, and no more disk traffic than that."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """The result of `prepare`.

    Attributes:
        images: uint8 RGB (N - len(bad), 3, S, S), read-only, in the order of the source.
        bad: images that can't be read, by number, and why; they have no row.
    """

    images: NDArray[np.uint8]
    bad: dict[int, str]


def default_cache_dir() -> Path:
    """``$DYNCONV_CACHE``, or ``~/.cache/dynconv_vision``."""
    return Path(os.environ.get("DYNCONV_CACHE") or Path.home() / ".cache" / "dynconv_vision").expanduser()


def prepare(
    source: Source,
    config: PreprocessConfig,
    *,
    name: str,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Prepared:
    """Preprocess all images of a source, or open what an earlier call made of them.

    Args:
        source: N raw images.
        config: the pipeline.
        name: for people: in the name of the entry and on the progress bar.
        cache_dir: default: `default_cache_dir`.
        workers: as in `workers.run`.
        progress: show a progress bar with rate and time left.

    Returns:
        The images, mapped from the cache's file, and what could not be read.

    Raises:
        OSError: the cache can't be written; the text says where it is.
    """
    fingerprints = source.fingerprints()
    key = blake2b(fingerprints.tobytes(), digest_size=8).hexdigest()
    root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    readable = re.sub(r"[^\w.-]+", "_", name)
    entry = root / config.tag / f"{readable}-{key}"
    ready = _open_entry(entry, source, config)
    if ready is not None:
        return ready
    try:
        entry.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"can't create the cache folder ({error.strerror}); set DYNCONV_CACHE or cache_dir to a writable one"
        raise OSError(error.errno, text, str(entry)) from None
    with _lock(entry):
        ready = _open_entry(entry, source, config)  # another process may have made it while this one waited
        if ready is None:
            _make_entry(entry, source, config, fingerprints, name, workers, progress)
            ready = _open_entry(entry, source, config)
        if ready is None:
            raise RuntimeError(f"{entry}: the cache entry just written can't be read back; delete it and run again")
        return ready


@contextmanager
def _lock(entry: Path) -> Iterator[None]:
    lock = FileLock(f"{entry}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is preparing %s; waiting for it", entry)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _open_entry(entry: Path, source: Source, config: PreprocessConfig) -> Prepared | None:
    """The finished entry, or None where it is missing, incomplete, damaged, or overtaken by mended images."""
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        bad = {int(index): str(reason) for index, reason in meta["bad"].items()}
        rows = len(source) - len(bad)
        images: NDArray[np.uint8] = np.empty((0, 3, config.image_size, config.image_size), np.uint8)
        if rows > 0:
            images = np.load(entry / "images.npy", mmap_mode="r")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    if images.shape != (rows, 3, config.image_size, config.image_size) or images.dtype != np.uint8:
        return None
    # What made an image unreadable may have passed without changing the file: its permissions, a network drive.
    for index in bad:
        try:
            source.load(index)
        except UnreadableImageError:
            continue
        return None
    return Prepared(images, bad)


def _make_entry(
    entry: Path,
    source: Source,
    config: PreprocessConfig,
    fingerprints: NDArray[np.uint8],
    name: str,
    workers: int | None,
    progress: bool,
) -> None:
    shape = (len(source), 3, config.image_size, config.image_size)
    bad: dict[int, str] = {}
    with _Partial(entry, shape, fingerprints) as partial:
        partial.take_over()
        todo = np.flatnonzero(partial.done == 0)
        with (
            closing(run(source, todo.tolist(), config, workers)) as batches,
            tqdm(
                desc=f"preparing {name} ({config.tag})",
                total=len(source),
                initial=len(source) - len(todo),
                unit="img",
                disable=not progress,
            ) as bar,
        ):
            for results in batches:
                for index, image, error in results:
                    if image is None:
                        bad[index] = error or "no image"
                    else:
                        partial.write(index, image)
                if bad:
                    bar.set_postfix_str(f"{len(bad)} unreadable", refresh=False)
                bar.update(len(results))
    meta = {**asdict(config), "pipeline": config.tag, "opencv": cv2.__version__, "images": len(source)}
    partial.finish({**meta, "bad": {str(index): bad[index] for index in sorted(bad)}})


class _Partial:
    """An entry being made. Rows are written to the file and not through a memory map: a full disk is then an error
    instead of a SIGBUS that ends the process."""

    def __init__(self, entry: Path, shape: tuple[int, int, int, int], fingerprints: NDArray[np.uint8]) -> None:
        self.entry, self.shape, self.fingerprints = entry, shape, fingerprints
        self.row_bytes = int(np.prod(shape[1:]))
        self.images_path, self.done_path = entry / "partial.npy", entry / "done.bin"

    def __enter__(self) -> _Partial:
        try:
            images = np.load(self.images_path, mmap_mode="r")
            done = np.frombuffer(self.done_path.read_bytes(), np.uint8).copy()
            resumed = images.shape == self.shape and images.dtype == np.uint8 and done.shape == self.shape[:1]
        except (OSError, ValueError):
            resumed = False
        if resumed:
            self.done = done
        else:
            self._create()
        self.images = open(self.images_path, "r+b")
        np.lib.format.read_magic(self.images)
        np.lib.format.read_array_header_1_0(self.images)
        self.offset = self.images.tell()
        self.saved = time.monotonic()
        return self

    def _create(self) -> None:
        self.done_path.unlink(missing_ok=True)
        needed, free = self.shape[0] * self.row_bytes, shutil.disk_usage(self.entry).free
        if needed > free:
            text = f"the prepared images need {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free"
            raise OSError(errno.ENOSPC, f"{text}; set DYNCONV_CACHE or cache_dir to another disk", str(self.entry))
        np.save(self.entry / "fingerprints.npy", self.fingerprints)
        with open(self.images_path, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + needed)
        self.done = np.zeros(self.shape[0], np.uint8)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._checkpoint()
        finally:
            self.images.close()

    def write(self, index: int, image: NDArray[np.uint8]) -> None:
        self.images.seek(self.offset + index * self.row_bytes)
        self.images.write(image.tobytes())
        self.done[index] = 1
        if time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            self._checkpoint()

    def _checkpoint(self) -> None:
        # In this order, with fsync: after a power failure too, a row that counts as done is in the file.
        self.images.flush()
        os.fsync(self.images.fileno())
        _write_atomically(self.done_path, self.done.tobytes())
        self.saved = time.monotonic()

    def take_over(self) -> None:
        """Copy rows from other entries of the same settings, and from this one where it was complete before."""
        wanted: dict[bytes, list[int]] = {}
        for index in np.flatnonzero(self.done == 0).tolist():
            wanted.setdefault(self.fingerprints[index].tobytes(), []).append(index)
        for other in sorted(self.entry.parent.iterdir()):
            if not wanted:
                break
            if other.is_dir():
                for digest, image in _rows_of(other, self.shape[1:], wanted):
                    for index in wanted.pop(digest, ()):
                        self.write(index, image)

    def finish(self, meta: dict) -> None:
        """Turn the finished rows into the complete entry."""
        finished = self.images_path
        if meta["bad"]:
            finished = self.entry / "compact.npy"
            rows = np.load(self.images_path, mmap_mode="r")
            good = np.flatnonzero(self.done)
            with open(finished, "wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(good), *self.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
                for index in good:
                    file.write(rows[index].tobytes())
                file.flush()
                os.fsync(file.fileno())
        # Complete means meta.json and a fitting images.npy, so the array comes last; a kill before that leaves
        # partial.npy and done.bin, from which the next run gets here again at once.
        final = self.entry / "images.npy"
        final.unlink(missing_ok=True)
        _write_atomically(self.entry / "meta.json", json.dumps(meta, indent=1).encode())
        os.replace(finished, final)
        for leftover in (self.images_path, self.done_path):
            leftover.unlink(missing_ok=True)


def _rows_of(
    entry: Path, row_shape: tuple[int, ...], wanted: dict[bytes, list[int]]
) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
    """Those rows of another entry, complete or not, whose fingerprints are wanted."""
    try:
        fingerprints = np.load(entry / "fingerprints.npy")
        if (entry / "meta.json").exists() and (entry / "images.npy").exists():
            images = np.load(entry / "images.npy", mmap_mode="r")
            bad = json.loads((entry / "meta.json").read_text(encoding="utf-8"))["bad"]
            indices = np.setdiff1d(np.arange(len(fingerprints)), [int(index) for index in bad])
            rows = np.arange(len(indices))
        else:
            images = np.load(entry / "partial.npy", mmap_mode="r")
            indices = rows = np.flatnonzero(np.frombuffer((entry / "done.bin").read_bytes(), np.uint8))
        if images.shape[1:] != row_shape or images.dtype != np.uint8 or len(rows) > len(images):
            return
        digests = [fingerprints[index].tobytes() for index in indices]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return  # half-written, deleted meanwhile, or not ours: its images are made anew
    for row, digest in zip(rows, digests, strict=True):
        if digest in wanted:
            yield digest, images[row]


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
