# SPDX-License-Identifier: BSD-3-Clause
"""Batches of in-memory images whose order and randomness are a function of (seed, epoch, step) and of nothing else.

A run that starts again in the middle of an epoch therefore sees the batches, the augmentation and the dropout it
would have seen without the break: no state of a random generator has to be saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from .augmentation import augment
from .config import StudyError, TrainConfig

EVALUATION_BATCH_SIZE = 128

# The epoch that stands for validation and test in the seeds: no training epoch gets there.
_EVALUATION_EPOCH = 2**31


class Split(Protocol):
    """What training needs of `dynconv_vision.data.ImageSplit`."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int: ...


class Dataset(Protocol):
    """What training needs of `dynconv_vision.data.ImageDataset`."""

    classes: tuple[str, ...]
    image_size: int
    train: Split
    val: Split
    test: Split


class Batch(NamedTuple):
    """Images (B, 3, S, S), uint8 on the host, float32 in [0, 1] on the device; labels (B,) int64; the step's seed."""

    images: Tensor
    labels: Tensor
    seed: int


def mix_seed(*parts: int) -> int:
    """A 63-bit seed that depends on every part (non-negative) and on their order."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order (count,) in which `epoch` visits the training images."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class TrainLoader:
    """Shuffled training batches, one process's share of them.

    A last batch of a single image is left out: batch normalisation over one 1x1 map has no variance. With more than
    one process the order is filled up from its beginning, so that all processes take the same number of steps.

    Args:
        split: Images and labels.
        batch_size: Images a batch of this process.
        seed: Decides the order, with the epoch.
        position: Called when an iteration starts; gives the epoch and the number of its batches to leave out, those
            that were trained on before a break.
        rank, world_size: This process and the number of processes.

    Raises:
        StudyError: There are fewer than two images a process.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.split, self.batch_size, self.seed, self.position = split, batch_size, seed, position
        self.rank, self.world_size = rank, world_size
        self.share = -(-len(split) // world_size)
        full, rest = divmod(self.share, batch_size)
        self.batches = full + (rest > 1 or (rest == 1 and batch_size == 1))
        if self.batches == 0:
            raise StudyError(f"training images: got {len(split)}, expected at least {2 * world_size}")
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        # A generator: position() is asked at the first batch, when the trainer knows the epoch.
        epoch, start = self.position()
        for step in range(start, self.batches):
            yield self.batch(epoch, step)

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch of a step of an epoch."""
        if self._order is None or self._order[0] != epoch:
            order = np.resize(epoch_order(len(self.split), self.seed, epoch), self.share * self.world_size)
            self._order = epoch, order[self.rank :: self.world_size]
        chosen = self._order[1][step * self.batch_size : (step + 1) * self.batch_size]
        return _fetch(self.split, chosen, mix_seed(self.seed, epoch, step, self.rank))


class EvaluationLoader:
    """Batches in the order of the files; a process's part of the last batch may be empty, so that none counts twice."""

    def __init__(
        self, split: Split, batch_size: int = EVALUATION_BATCH_SIZE, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-len(self.split) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        together = self.batch_size * self.world_size
        for step in range(len(self)):
            whole = np.arange(step * together, min((step + 1) * together, len(self.split)))
            chosen = np.array_split(whole, self.world_size)[self.rank]
            yield _fetch(self.split, chosen, mix_seed(self.seed, _EVALUATION_EPOCH, step, self.rank))


class ImageDataModule(pl.LightningDataModule):
    """Training and validation batches of a dataset, converted to floating point on the device.

    Args:
        dataset: An `ImageDataset`.
        config: Batch size, seed, augmentation and memory format are taken from it.
    """

    def __init__(self, dataset: Dataset, config: TrainConfig) -> None:
        super().__init__()
        self.dataset, self.config = dataset, config

    def train_dataloader(self) -> TrainLoader:
        config = self.config
        return TrainLoader(self.dataset.train, config.batch_size, config.seed, self._position, *self._processes())

    def val_dataloader(self) -> EvaluationLoader:
        rank, world_size = self._processes()
        return EvaluationLoader(self.dataset.val, seed=self.config.seed, rank=rank, world_size=world_size)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        images = prepare_images(batch.images, self.config.channels_last)
        if self.trainer is not None and self.trainer.training:
            images = augment(self.config.augment, images, mix_seed(batch.seed, 1))
        return batch._replace(images=images)

    def _position(self) -> tuple[int, int]:
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _processes(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def prepare_images(images: Tensor, channels_last: bool = True) -> Tensor:
    """uint8 images (B, 3, S, S) as float32 in [0, 1], channels last in memory unless `channels_last` is false."""
    images = images.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return images.float().div_(255)


def _fetch(split: Split, chosen: np.ndarray, seed: int) -> Batch:
    # Fancy indexing copies, also out of a read-only memory map: from_numpy gets an array of its own.
    images = torch.from_numpy(np.ascontiguousarray(split.images[chosen]))
    return Batch(images, torch.from_numpy(split.labels[chosen].astype(np.int64, copy=False)), seed)
