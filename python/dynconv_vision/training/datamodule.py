# SPDX-License-Identifier: BSD-3-Clause
"""Batches of in-memory images whose order and randomness are a function of (seed, epoch, step) and of nothing else.

A run that starts again in the middle of an epoch therefore sees the batches, the augmentation and the dropout it
would have seen without the break: no state of a random generator has to be saved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

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
        augmentation: Applied to every image by itself; what it draws is a function of (seed, epoch, step), too.
        workers: Processes that fetch and augment; 0: this one.

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
        augmentation: v2.Transform | None = None,
        workers: int = 0,
    ) -> None:
        self.split, self.batch_size, self.seed, self.position = split, batch_size, seed, position
        self.rank, self.world_size, self.augmentation = rank, world_size, augmentation
        self.share = -(-len(split) // world_size)
        full, rest = divmod(self.share, batch_size)
        self.batches = full + (rest > 1 or (rest == 1 and batch_size == 1))
        if self.batches == 0:
            raise StudyError(f"training images: got {len(split)}, expected at least {2 * world_size}")
        self._order: tuple[int, np.ndarray] | None = None
        # The sampler hands out (epoch, step), which is all that a worker has to know; the workers stay.
        self._loader = DataLoader(
            _Batches(self),
            batch_size=None,
            sampler=_Positions(self),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=workers > 0 and torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        # A generator: position() is asked at the first batch, when the trainer knows the epoch.
        yield from self._loader

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch of a step of an epoch."""
        if self._order is None or self._order[0] != epoch:
            order = np.resize(epoch_order(len(self.split), self.seed, epoch), self.share * self.world_size)
            self._order = epoch, order[self.rank :: self.world_size]
        chosen = self._order[1][step * self.batch_size : (step + 1) * self.batch_size]
        batch = _fetch(self.split, chosen, mix_seed(self.seed, epoch, step, self.rank))
        if self.augmentation is None:
            return batch
        torch.manual_seed(mix_seed(batch.seed, 1))
        # One draw an image: on a whole batch, v2 transforms draw once for all of it.
        return batch._replace(images=torch.stack([self.augmentation(image) for image in batch.images]))


class _Batches(torch.utils.data.Dataset[Batch]):
    """Batches by (epoch, step)."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader

    def __getitem__(self, position: tuple[int, int]) -> Batch:
        return self.loader.batch(*position)


class _Positions(torch.utils.data.Sampler[tuple[int, int]]):
    """(epoch, step) of the steps that are left of an epoch."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return self.loader.batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, start = self.loader.position()
        for step in range(start, self.loader.batches):
            yield epoch, step


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
        self.augmentation = make_augmentation(config.augment, dataset.image_size)

    def train_dataloader(self) -> TrainLoader:
        config = self.config
        workers = config.workers
        if workers is None:
            on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
            # Transforms of single images are small work for a GPU and much for the one process that feeds it.
            workers = min(8, (os.cpu_count() or 2) - 1) if on_gpu and self.augmentation is not None else 0
        return TrainLoader(
            self.dataset.train,
            config.batch_size,
            config.seed,
            self._position,
            *self._processes(),
            augmentation=self.augmentation,
            workers=workers,
        )

    def val_dataloader(self) -> EvaluationLoader:
        rank, world_size = self._processes()
        return EvaluationLoader(self.dataset.val, seed=self.config.seed, rank=rank, world_size=world_size)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return batch._replace(images=prepare_images(batch.images, self.config.channels_last))

    def _position(self) -> tuple[int, int]:
        return self.trainer.current_epoch, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _processes(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def prepare_images(images: Tensor, channels_last: bool = True) -> Tensor:
    """uint8 images (B, 3, S, S) as float32 in [0, 1], channels last in memory unless `channels_last` is false."""
    images = images.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return images.float().div_(255)


def make_augmentation(name: str, image_size: int) -> v2.Transform | None:
    """The augmentation of uint8 images (3, S, S) that `TrainConfig.augment` names; None for "none".

    "light": horizontal flips, and crops of the image after reflecting an eighth of it at the borders. "strong": flips,
    crops of 35 to 100 percent of the area, brightness, contrast and saturation, a grey box on every fourth image.
    """
    if name == "none":
        return None
    if name == "light":
        crop = v2.RandomCrop(image_size, padding=max(1, image_size // 8), padding_mode="reflect")
        return v2.Compose([v2.RandomHorizontalFlip(), crop])
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomResizedCrop(image_size, scale=(0.35, 1.0), antialias=True),
            v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3),
            v2.RandomErasing(p=0.25, value=114),
        ]
    )


def _fetch(split: Split, chosen: np.ndarray, seed: int) -> Batch:
    # Fancy indexing copies, also out of a read-only memory map: from_numpy gets an array of its own.
    images = torch.from_numpy(np.ascontiguousarray(split.images[chosen]))
    return Batch(images, torch.from_numpy(split.labels[chosen].astype(np.int64, copy=False)), seed)
