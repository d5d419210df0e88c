# SPDX-License-Identifier: BSD-3-Clause
"""Training: settings, batches, exact resume, stopping, evaluation, checkpoints."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from dynconv_ext import DeformableConv2d
from dynconv_vision.training import (
    ClassificationModule,
    EvaluationLoader,
    ModelCard,
    StudyError,
    TrainConfig,
    TrainingInterrupted,
    TrainLoader,
    augmentation,
    epoch_order,
    evaluate_model,
    load_network,
    prepare_images,
    read_checkpoint,
    resolve_device,
    resolve_precision,
    select_channels,
    train_model,
)
from dynconv_vision.training.augmentation import augment
from dynconv_vision.training.datamodule import Batch
from dynconv_vision.training.matmul_conv import use_matmul_convolutions

CLASSES = ("dark", "dim", "bright", "white")


@dataclass
class ArraySplit:
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class ArrayDataset:
    classes: tuple[str, ...]
    image_size: int
    train: ArraySplit
    val: ArraySplit
    test: ArraySplit


def brightness_split(count: int, seed: int = 0) -> ArraySplit:
    """Noisy grey images whose class is their brightness."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, len(CLASSES), count)
    images = generator.integers(0, 40, (count, 3, 8, 8)) + 55 * labels[:, None, None, None]
    return ArraySplit(images.astype(np.uint8), labels.astype(np.int64))


@pytest.fixture(scope="module")
def dataset() -> ArrayDataset:
    return ArrayDataset(CLASSES, 8, brightness_split(70, 1), brightness_split(30, 2), brightness_split(30, 3))


def network(*first: nn.Module) -> nn.Module:
    """Batch norm, dropout and a convolution behind the modules given; always the same weights at the start."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, len(CLASSES)),
    )
    return nn.Sequential(*first, layers)


class AtCall(nn.Module):
    """Passes images on, and does something at its n-th call in a training step."""

    def __init__(self, call: int, action) -> None:
        super().__init__()
        self.call, self.action, self.calls = call, action, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        if self.training and self.calls == self.call:
            self.action()
        return images


class Seen(nn.Module):
    """Passes images on and remembers their sums."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[float] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.sums.append(float(images.double().sum()))
        return images


class Died(Exception):
    pass


def die() -> None:
    raise Died


# All that a break could upset: a schedule with warm-up, augmentation, dropout, batch norm, early stopping's counter.
CONFIG = TrainConfig(
    epochs=3,
    batch_size=8,
    learning_rate=0.01,
    weight_decay=1e-4,
    gradient_clip=1.0,
    schedule="cosine",
    warmup_epochs=0.5,
    augment="light",
    mix="both",
    mix_share=0.5,
    ema_decay=0.9,
    early_stop_patience=5,
    device="cpu",
    precision="float32",
    checkpoint_steps=2,
)
STEPS_AN_EPOCH = 9


def final_state(folder: Path) -> tuple[dict[str, torch.Tensor], list[list[str]]]:
    """Weights and Adam's state of last.ckpt, and the history without its seconds."""
    checkpoint = read_checkpoint(folder / "last.ckpt")
    state = dict(checkpoint["state_dict"])
    for index, moments in checkpoint["optimizer_states"][0]["state"].items():
        state |= {f"{index}.{name}": value for name, value in moments.items()}
    with (folder / "history.csv").open() as file:
        return state, [row[:-1] for row in csv.reader(file)]


def assert_same(left: Path, right: Path) -> None:
    (weights, history), (others, other_history) = final_state(left), final_state(right)
    assert history == other_history
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name


@pytest.fixture(scope="module")
def uninterrupted(dataset: ArrayDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("whole")
    seen = Seen()
    train_model(network(seen), dataset, CONFIG, folder, progress=False)
    return folder, seen.sums


class TestConfig:
    def test_round_trip(self) -> None:
        assert TrainConfig.from_dict(CONFIG.to_dict()) == CONFIG

    def test_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            CONFIG.epochs = 5  # type: ignore[misc]

    @pytest.mark.parametrize(
        ("name", "value", "text"),
        [
            ("epochs", 0, "epochs: got 0, expected a whole number >= 1"),
            ("batch_size", 2.5, "batch_size: got 2.5, expected a whole number >= 1"),
            ("learning_rate", 0.0, "learning_rate: got 0.0, expected a number > 0.0"),
            ("learning_rate", float("nan"), "learning_rate: got nan"),
            ("label_smoothing", 1.0, "label_smoothing: got 1.0, expected a number >= 0.0 and < 1.0"),
            ("gradient_clip", -1.0, "gradient_clip: got -1.0, expected a number > 0.0"),
            ("schedule", "linear", "schedule: got 'linear', expected one of constant, cosine"),
            ("device", "gpu", "device: got 'gpu', expected one of auto, cpu, cuda, mps"),
            ("precision", "fp8", "precision: got 'fp8', expected one of auto, float32, bf16"),
            ("augment", 1, "augment: got 1, expected one of none, light, strong"),
            ("channels", ("R", "Q"), "channels: got ('R', 'Q'), expected different names out of R, G, B, L"),
            ("ema_decay", 1.0, "ema_decay: got 1.0, expected a number >= 0.0 and < 1.0"),
            ("mix", "blend", "mix: got 'blend', expected one of none, mixup, cutmix, both"),
            ("mix_share", 1.5, "mix_share: got 1.5, expected a number >= 0.0 and <= 1.0"),
            ("offset_learning_rate", -0.1, "offset_learning_rate: got -0.1, expected a number >= 0.0"),
            ("distillation", -0.5, "distillation: got -0.5, expected a number >= 0.0 and <= 1.0"),
            ("optimizer", "lion", "optimizer: got 'lion', expected one of adam, adamw, sgd"),
        ],
    )
    def test_errors(self, name: str, value: object, text: str) -> None:
        with pytest.raises(StudyError) as error:
            TrainConfig(**{name: value})
        assert text in str(error.value)

    def test_unknown_setting(self) -> None:
        with pytest.raises(StudyError, match="unknown settings lr"):
            TrainConfig.from_dict({"lr": 1e-3})


class TestHardware:
    def test_cuda_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(StudyError, match="device: got 'cuda', but"):
            resolve_device("cuda")

    def test_auto_takes_the_cpu_at_last(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        assert resolve_device("auto") == "cpu"

    def test_precision(self) -> None:
        assert resolve_precision("float32", "cpu") == "float32"
        assert resolve_precision("bf16", "cpu") == "bf16"
        assert resolve_precision("auto", "mps") == "float32"
        assert resolve_precision("auto", "cpu") in ("float32", "bf16")

    @pytest.mark.parametrize(("precision", "expected"), [("float32", False), ("bf16", True)])
    def test_precision_reaches_the_network(
        self, dataset: ArrayDataset, tmp_path: Path, precision: str, expected: bool
    ) -> None:
        autocast: set[bool] = set()
        config = TrainConfig(epochs=1, batch_size=35, device="cpu", precision=precision)
        model = network(AtCall(2, lambda: autocast.add(torch.is_autocast_enabled("cpu"))))
        train_model(model, dataset, config, tmp_path, progress=False)
        assert autocast == {expected}


class TestBatches:
    def test_order_depends_on_seed_and_epoch_only(self) -> None:
        np.random.seed(1)
        first = epoch_order(50, seed=3, epoch=2)
        np.random.seed(2)
        assert (epoch_order(50, seed=3, epoch=2) == first).all()
        assert sorted(first) == list(range(50))
        assert (epoch_order(50, seed=3, epoch=1) != first).any()
        assert (epoch_order(50, seed=4, epoch=2) != first).any()

    def test_every_image_once(self, dataset: ArrayDataset) -> None:
        batches = list(TrainLoader(dataset.train, 8, seed=0))
        assert [len(batch.labels) for batch in batches] == [8] * 8 + [6]
        sums = torch.cat([batch.images for batch in batches]).long().sum((1, 2, 3))
        assert sorted(sums.tolist()) == sorted(dataset.train.images.astype(np.int64).sum((1, 2, 3)).tolist())

    def test_labels_stay_with_their_images(self, dataset: ArrayDataset) -> None:
        for batch in TrainLoader(dataset.train, 8, seed=0):
            assert ((batch.images.float().mean((1, 2, 3)) / 55).long() == batch.labels).all()

    def test_starts_in_the_middle(self, dataset: ArrayDataset) -> None:
        whole = list(TrainLoader(dataset.train, 8, 0, lambda: (4, 0)))
        rest = list(TrainLoader(dataset.train, 8, 0, lambda: (4, 6)))
        assert len(rest) == 3
        for left, right in zip(whole[6:], rest, strict=True):
            assert torch.equal(left.images, right.images) and left.seed == right.seed

    def test_seeds_differ(self, dataset: ArrayDataset) -> None:
        seeds = [
            batch.seed
            for epoch in range(3)
            for rank in range(2)
            for batch in TrainLoader(dataset.train, 8, 0, lambda epoch=epoch: (epoch, 0), rank, 2)
        ]
        assert len(set(seeds)) == len(seeds) == 30

    def test_single_image_at_the_end_is_left_out(self) -> None:
        assert [len(batch.labels) for batch in TrainLoader(brightness_split(17), 8, 0)] == [8, 8]

    def test_too_few_images(self) -> None:
        with pytest.raises(StudyError, match="training images: got 1, expected at least 2"):
            TrainLoader(brightness_split(1), 8, 0)

    def test_processes_share_an_epoch(self, dataset: ArrayDataset) -> None:
        loaders = [TrainLoader(dataset.train, 8, 0, rank=rank, world_size=3) for rank in range(3)]
        parts = [torch.cat([batch.images for batch in loader]) for loader in loaders]
        assert [len(part) for part in parts] == [24, 24, 24]
        distinct = {image.numpy().tobytes() for part in parts for image in part}
        assert len(distinct) == 70

    @pytest.mark.parametrize("world_size", [1, 2, 4])
    def test_evaluation_counts_each_image_once(self, dataset: ArrayDataset, world_size: int) -> None:
        loaders = [EvaluationLoader(dataset.val, 7, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert len({len(list(loader)) for loader in loaders}) == 1
        images = [image.numpy().tobytes() for loader in loaders for batch in loader for image in batch.images]
        assert sorted(images) == sorted(image.tobytes() for image in dataset.val.images)

    def test_read_only_memory_map(self, tmp_path: Path) -> None:
        split = brightness_split(9)
        np.save(tmp_path / "images.npy", split.images)
        mapped = ArraySplit(np.load(tmp_path / "images.npy", mmap_mode="r"), split.labels)
        batch = next(iter(EvaluationLoader(mapped, 4)))
        batch.images.zero_()
        assert (np.load(tmp_path / "images.npy") == split.images).all()

    def test_prepare_images(self) -> None:
        images = torch.arange(256, dtype=torch.uint8)[:192].view(1, 3, 8, 8)
        prepared = prepare_images(images)
        assert prepared.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(prepared, images / 255)


class TestAugmentation:
    @pytest.mark.parametrize("name", ["light", "strong"])
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_draws_for_each_image_by_the_seed_alone(self, name: str, memory_format: torch.memory_format) -> None:
        images = torch.rand(1, 3, 16, 16).expand(64, 3, 16, 16).contiguous(memory_format=memory_format)
        first, again, other = (augment(name, images, seed) for seed in (5, 5, 6))
        assert first.shape == images.shape and first.is_contiguous(memory_format=memory_format)
        assert len({image.numpy().tobytes() for image in first}) > 32
        assert torch.equal(first, again) and not torch.equal(first, other)
        # Its neighbours do not matter.
        assert torch.equal(augment(name, images[:3], 5), first[:3])
        assert 0 <= first.min() and first.max() <= 1

    def test_none_is_the_images(self) -> None:
        images = torch.rand(2, 3, 8, 8)
        assert augment("none", images, 0) is images

    def test_light_is_flips_and_shifts(self) -> None:
        """Every shift by -2..2 pixels of 16, with reflected borders, flipped or not, and nothing else."""
        image = torch.rand(3, 16, 16)
        padded = nn.functional.pad(image[None], (2, 2, 2, 2), mode="replicate")[0]
        # Reflection about the border pixels' outer edges: the outermost pixel comes twice.
        padded[:, :, :2], padded[:, :, -2:] = padded[:, :, 2:4].flip(2), padded[:, :, -4:-2].flip(2)
        padded[:, :2], padded[:, -2:] = padded[:, 2:4].flip(1), padded[:, -4:-2].flip(1)
        shifts = [padded[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
        possible = torch.stack(shifts + [each.flip(2) for each in shifts])
        out = augment("light", image.expand(400, 3, 16, 16), 3)
        distances = (out[:, None] - possible[None]).abs().amax((2, 3, 4))
        nearest = distances.min(1)
        assert nearest.values.max() < 1e-5
        counts = torch.bincount(nearest.indices, minlength=50)
        assert (counts > 0).sum() > 45 and counts.max() < 25

    def test_crops_are_torchvisions(self) -> None:
        images = torch.rand(3, 3, 12, 10, dtype=torch.float64)
        boxes = [(0, 0, 12, 10), (2, 3, 6, 5), (5, 1, 7, 9)]
        shares = torch.tensor([(t / 12, left / 10, h / 12, w / 10) for t, left, h, w in boxes], dtype=torch.float64)
        flip = torch.tensor([False, True, False])
        out = augmentation._cropped(images, shares, flip)
        for image, box, flipped, got in zip(images, boxes, flip, out, strict=True):
            expected = v2.functional.resized_crop(image, *box, size=[12, 10], antialias=False)
            inner = (slice(None), slice(2, -2), slice(2, -2))  # at its border a crop sees what lies around it
            torch.testing.assert_close(got[inner], (expected.flip(2) if flipped else expected)[inner])

    def test_colours_are_torchvisions(self) -> None:
        images = torch.rand(4, 3, 6, 5)
        factors = torch.tensor([[1, 1, 1], [0.7, 1, 1], [1, 1.3, 0.7], [1.2, 0.8, 1.3]])
        for image, factor, got in zip(images, factors.tolist(), augmentation._coloured(images, factors), strict=True):
            expected = v2.functional.adjust_brightness(image, factor[0])
            expected = v2.functional.adjust_contrast(expected, factor[1])
            torch.testing.assert_close(got, v2.functional.adjust_saturation(expected, factor[2]), rtol=1e-3, atol=1e-3)

    def test_boxes_have_the_areas_and_shapes_asked_for(self) -> None:
        torch.manual_seed(0)
        boxes = augmentation._boxes(torch.rand(4000, 2), torch.rand(4000, 2), (0.35, 1.0), (3 / 4, 4 / 3))
        top, left, height, width = boxes.T
        assert boxes.min() >= 0 and (top + height).max() <= 1 + 1e-6 and (left + width).max() <= 1 + 1e-6
        area = (height * width)[(height < 1) & (width < 1)]
        assert 0.349 < area.min() < 0.36 and area.max() > 0.95
        assert 0.74 < (width / height).min() and (width / height).max() < 1.34

    def test_every_fourth_image_has_a_grey_box(self) -> None:
        images = torch.ones(2000, 3, 16, 16)
        grey = (augment("strong", images, 0) - 114 / 255).abs().amax(1) < 1e-6
        share = grey.flatten(1).any(1).float().mean()
        assert 0.21 < share < 0.29
        # Not only on images that are not flipped: flips show on an image with a left and a right half.
        images[:, :, :, 8:] = 0.5
        out = augment("strong", images, 0)
        flipped = out[:, 0, :, :2].mean((1, 2)) < out[:, 0, :, -2:].mean((1, 2))
        boxed = ((out - 114 / 255).abs().amax(1) < 1e-6).flatten(1).any(1)
        assert abs(boxed[flipped].float().mean() - boxed[~flipped].float().mean()) < 0.06


class TestTraining:
    def test_learns(self, dataset: ArrayDataset, tmp_path: Path) -> None:
        config = dataclasses.replace(CONFIG, epochs=12, augment="none", mix="none", learning_rate=0.05, ema_decay=None)
        model = network()
        result = train_model(model, dataset, config, tmp_path, progress=False)
        assert result.best.val_acc > 80
        assert result.history[-1].train_loss < 0.6 * result.history[0].train_loss
        # The model comes back with the best weights.
        measured = evaluate_model(model, dataset.val, 4, device="cpu", precision="float32")
        assert measured["accuracy"] == pytest.approx(result.best.val_acc, abs=1e-4)
        assert measured["loss"] == pytest.approx(result.best.val_loss, rel=1e-4)

    def test_files(self, uninterrupted: tuple[Path, list[float]]) -> None:
        folder, _ = uninterrupted
        rows = list(csv.DictReader((folder / "history.csv").open()))
        assert list(rows[0]) == ["epoch", "train_loss", "train_acc", "val_loss", "val_acc", "seconds"]
        assert [row["epoch"] for row in rows] == ["1", "2", "3"]
        assert (folder / "best.ckpt").stat().st_size < (folder / "last.ckpt").stat().st_size
        assert list(folder.glob("logs/tensorboard/events.*")) and list(folder.glob("logs/csv/*/metrics.csv"))

    def test_history_is_right(self, dataset: ArrayDataset, tmp_path: Path) -> None:
        """With steps that change nothing, training and evaluation must agree."""
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        config = TrainConfig(epochs=1, batch_size=8, learning_rate=1e-30, device="cpu", precision="float32")
        result = train_model(model, dataset, config, tmp_path, progress=False)
        measured = evaluate_model(model, dataset.train, 4, device="cpu", precision="float32")
        assert result.history[0].train_acc == pytest.approx(measured["accuracy"], abs=1e-4)
        assert result.history[0].train_loss == pytest.approx(measured["loss"], rel=1e-5)

    def test_early_stopping(self, dataset: ArrayDataset, tmp_path: Path) -> None:
        config = TrainConfig(
            epochs=9, batch_size=35, learning_rate=1e-30, early_stop_patience=2, device="cpu", precision="float32"
        )
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        result = train_model(model, dataset, config, tmp_path, progress=False)
        assert len(result.history) == 3 and result.best.epoch == 1
        again = train_model(model, dataset, config, tmp_path, resume=True, progress=False)
        assert again == result

    def test_schedule(self, dataset: ArrayDataset, tmp_path: Path) -> None:
        rates: list[float] = []

        class Spy(ClassificationModule):
            def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
                rates.append(optimizer.param_groups[0]["lr"])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dynconv_vision.training.train.ClassificationModule", Spy)
            train_model(network(), dataset, CONFIG, tmp_path, progress=False)
        warmup, total = round(0.5 * STEPS_AN_EPOCH), 3 * STEPS_AN_EPOCH
        expected = [0.01 * (step + 1) / warmup for step in range(warmup)]
        angles = np.pi * np.arange(total - warmup) / (total - warmup)
        np.testing.assert_allclose(rates, expected + (0.005 * (1 + np.cos(angles))).tolist())

    def test_gradient_clipping(self, dataset: ArrayDataset, tmp_path: Path) -> None:
        """Adam forgets the gradient's scale, but for its epsilon: far below it, nothing moves."""
        moved = []
        for clip in (None, 1e-14):
            model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
            before = model[1].weight.detach().clone()
            config = TrainConfig(epochs=1, batch_size=8, gradient_clip=clip, device="cpu", precision="float32")
            train_model(model, dataset, config, tmp_path / str(clip), progress=False)
            moved.append(float((model[1].weight.detach() - before).abs().max()))
        assert moved[0] > 1e-3 and moved[1] < 1e-6

    def test_temperature_follows_the_epochs(self, dataset: ArrayDataset, tmp_path: Path) -> None:
        told: list[tuple[float, float]] = []

        class Annealed(nn.Identity):
            def anneal(self, progress: float, until: float) -> None:
                told.append((progress, until))

        config = TrainConfig(epochs=2, batch_size=35, device="cpu", precision="float32", temperature_anneal=0.25)
        train_model(network(Annealed()), dataset, config, tmp_path, progress=False)
        assert told == [(0.0, 0.25), (0.25, 0.25), (0.5, 0.25), (0.75, 0.25)]

    def test_divergence_is_an_error(self, dataset: ArrayDataset, tmp_path: Path) -> None:
        class Bad(nn.Module):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                return images * float("nan")

        config = TrainConfig(epochs=1, batch_size=35, device="cpu", precision="float32")
        with pytest.raises(StudyError, match="epoch 1: train_loss is nan: training diverged"):
            train_model(network(Bad()), dataset, config, tmp_path, progress=False)

    def test_folder_of_another_training(self, dataset: ArrayDataset, uninterrupted: tuple[Path, list[float]]) -> None:
        folder, _ = uninterrupted
        with pytest.raises(StudyError, match="resume that training, or choose another folder"):
            train_model(network(), dataset, CONFIG, folder, progress=False)
        with pytest.raises(StudyError, match="holds another training"):
            train_model(network(), dataset, CONFIG, folder, card={"model": "other"}, resume=True, progress=False)


class TestResume:
    # With last.ckpt every two steps of nine: before the first, at odd and even steps, the last of an epoch, the first
    # of the next, the last of all.
    @pytest.mark.parametrize("step", [1, 3, 5, 8, 9, 10, 27])
    def test_ends_with_the_same_weights(
        self, dataset: ArrayDataset, tmp_path: Path, uninterrupted: tuple[Path, list[float]], step: int
    ) -> None:
        whole, sums = uninterrupted
        with pytest.raises(Died):
            train_model(network(AtCall(step, die)), dataset, CONFIG, tmp_path, progress=False)
        torch.manual_seed(12345)
        seen = Seen()
        train_model(network(seen), dataset, CONFIG, tmp_path, resume=True, progress=False)
        assert_same(whole, tmp_path)
        if step > 2:
            # The first sum is that of the zeros that go through a network before it is trained.
            assert len(seen.sums) < len(sums)
            assert seen.sums[1:] == sums[len(sums) - len(seen.sums) + 1 :]

    def test_after_sigkill(
        self, dataset: ArrayDataset, tmp_path: Path, uninterrupted: tuple[Path, list[float]]
    ) -> None:
        done = subprocess.run(
            [sys.executable, __file__, str(tmp_path), str(torch.get_num_threads())],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 14
        assert len(list(csv.reader((tmp_path / "history.csv").open()))) == 2
        train_model(network(nn.Identity()), dataset, CONFIG, tmp_path, resume=True, progress=False)
        assert_same(uninterrupted[0], tmp_path)

    @pytest.mark.parametrize("step", [4, 9])
    def test_after_ctrl_c(
        self, dataset: ArrayDataset, tmp_path: Path, uninterrupted: tuple[Path, list[float]], step: int
    ) -> None:
        """The state is saved at the step itself, or after the validation that follows an epoch's last step."""
        handler = signal.getsignal(signal.SIGINT)
        config = dataclasses.replace(CONFIG, checkpoint_steps=None)
        with pytest.raises(TrainingInterrupted) as stop:
            press = AtCall(step, lambda: os.kill(os.getpid(), signal.SIGINT))
            train_model(network(press), dataset, config, tmp_path, progress=False)
        assert stop.value.signal == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == handler
        assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == step
        train_model(network(nn.Identity()), dataset, config, tmp_path, resume=True, progress=False)
        assert_same(uninterrupted[0], tmp_path)

    def test_finished_training_is_read_back(self, dataset: ArrayDataset, tmp_path: Path) -> None:
        config = dataclasses.replace(CONFIG, epochs=1)
        first = train_model(network(), dataset, config, tmp_path, progress=False)
        before = (tmp_path / "last.ckpt").read_bytes()
        assert train_model(network(), dataset, config, tmp_path, resume=True, progress=False) == first
        assert (tmp_path / "last.ckpt").read_bytes() == before

    def test_damaged_checkpoint(self, dataset: ArrayDataset, tmp_path: Path) -> None:
        (tmp_path / "last.ckpt").write_bytes(b"PK\x03\x04 half a file")
        with pytest.raises(StudyError, match=r"last\.ckpt cannot be read: damaged, or no torch checkpoint"):
            train_model(network(), dataset, CONFIG, tmp_path, resume=True, progress=False)

    def test_constants_drawn_in_the_first_call(self, dataset: ArrayDataset, tmp_path: Path) -> None:
        """A network that draws an unregistered tensor when first called gets the same one after a break."""

        class Lazy(nn.Module):
            factor: torch.Tensor | None = None

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                if self.factor is None:
                    self.factor = torch.rand(3, 1, 1)
                return images * self.factor

        train_model(network(Lazy()), dataset, CONFIG, tmp_path / "whole", progress=False)
        with pytest.raises(Died):
            train_model(network(AtCall(13, die), Lazy()), dataset, CONFIG, tmp_path / "broken", progress=False)
        model = network(nn.Identity(), Lazy())
        train_model(model, dataset, CONFIG, tmp_path / "broken", resume=True, progress=False)
        assert_losses_equal(tmp_path / "whole", tmp_path / "broken")


def assert_losses_equal(left: Path, right: Path) -> None:
    assert final_state(left)[1] == final_state(right)[1]


class Variable(nn.Module):
    """Takes named channels and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 4)
        self.seen: list[tuple[bool, int, tuple[str, ...] | None]] = []

    def forward(self, images: torch.Tensor, channels: tuple[str, ...] | None = None) -> torch.Tensor:
        self.seen.append((self.training, images.shape[1], channels))
        return self.fc(images.mean((1, 2, 3))[:, None])


class TestChannels:
    def test_sampled_in_training_only(self, dataset: ArrayDataset, tmp_path: Path) -> None:
        model = Variable()
        config = TrainConfig(epochs=4, batch_size=8, channel_sampling="step", device="cpu", precision="float32")
        train_model(model, dataset, config, tmp_path, progress=False)
        drawn = [(count, channels) for training, count, channels in model.seen if training]
        assert len(drawn) == 36
        assert all(channels and len(channels) == count for count, channels in drawn)
        assert len({channels for _, channels in drawn}) == 7
        # Once for the zeros that a network sees first.
        assert len({channels for training, _, channels in model.seen if not training}) > 1

    def test_sampling_needs_named_channels(self, dataset: ArrayDataset) -> None:
        with pytest.raises(StudyError, match="does not take named channels"):
            ClassificationModule(network(), dataclasses.replace(CONFIG, channel_sampling="step"), 4, 8)
        with pytest.raises(StudyError, match="channel_sampling: got 'image', but Variable takes one set"):
            ClassificationModule(Variable(), dataclasses.replace(CONFIG, channel_sampling="image"), 4, 8)

    def test_missing_channels(self) -> None:
        images = torch.rand(2, 3, 4, 4)
        left, named = select_channels(Variable(), images, ("R", "B"))
        assert torch.equal(left, images[:, [0, 2]]) and named == {"channels": ("R", "B")}
        filled, named = select_channels(nn.Identity(), images, ("R", "B"))
        assert torch.equal(filled[:, [0, 2]], images[:, [0, 2]]) and named == {}
        assert not filled[:, 1].any()

    @pytest.mark.parametrize("channels", [(), ("R", "R"), ("X",)])
    def test_wrong_channels(self, channels: tuple[str, ...]) -> None:
        with pytest.raises(StudyError, match="channels: got"):
            select_channels(nn.Identity(), torch.rand(1, 3, 2, 2), channels)

    def test_first_channel_is_red(self) -> None:
        red = np.zeros((4, 3, 2, 2), np.uint8)
        red[:, 0] = 255

        class Brightest(nn.Module):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                return images.mean((2, 3))

        split = ArraySplit(red, np.zeros(4, np.int64))
        measure = {c: evaluate_model(Brightest(), split, 3, channels=(c,), device="cpu")["loss"] for c in "RGB"}
        assert measure["R"] < measure["G"] == measure["B"]


class TestEvaluate:
    def test_counts(self) -> None:
        """A network that is right about three of five images, over batches of two."""

        class Reads(nn.Module):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                return nn.functional.one_hot((images[:, 0, 0, 0] * 255).round().long(), 4).float() * 50

        images = np.zeros((5, 3, 2, 2), np.uint8)
        images[:, 0, 0, 0] = [0, 1, 2, 3, 0]
        split = ArraySplit(images, np.array([0, 1, 2, 0, 3]))
        for _ in range(2):
            measured = evaluate_model(Reads(), split, 4, batch_size=2, device="cpu", precision="float32")
            assert measured["accuracy"] == pytest.approx(60)
            assert measured["loss"] == pytest.approx(20)

    def test_label_out_of_range(self) -> None:
        with pytest.raises(StudyError, match=r"labels: got 0\.\.3, expected 0\.\.1, since the network has 2 classes"):
            evaluate_model(network(), brightness_split(30), 2, device="cpu")

    def test_empty(self) -> None:
        with pytest.raises(StudyError, match="images: got none"):
            evaluate_model(network(), brightness_split(0), 4, device="cpu")


class TestCheckpoints:
    def test_card_round_trip(self) -> None:
        card = ModelCard("task2", "resnet34", {}, ("a", "b"), 32, True, False)
        assert ModelCard.from_dict(card.to_dict()) == card

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(StudyError, match="is not a file"):
            read_checkpoint(tmp_path / "none.ckpt")

    def test_foreign_file(self, tmp_path: Path) -> None:
        torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
        with pytest.raises(StudyError, match="was not written by a study of this project"):
            load_network(tmp_path / "other.ckpt")

    def test_code_in_a_file_is_not_run(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple:
                return os.mkdir, (str(tmp_path / "executed"),)

        torch.save({"state_dict": {}, "dynconv_vision": Evil()}, tmp_path / "evil.ckpt")
        with pytest.raises(StudyError, match="cannot be read"):
            load_network(tmp_path / "evil.ckpt")
        assert not (tmp_path / "executed").exists()


# Run as a script by test_after_sigkill: kills itself in the sixteenth training step.
if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    data = ArrayDataset(CLASSES, 8, brightness_split(70, 1), brightness_split(30, 2), brightness_split(30, 3))
    kill = AtCall(16, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train_model(network(kill), data, CONFIG, Path(sys.argv[1]), progress=False)


@pytest.mark.parametrize("kernel, stride, padding", [(3, 1, 1), (3, 2, 1), (1, 2, 0), ((3, 2), (1, 2), (0, 1))])
def test_small_maps_as_matrix_products_are_convolutions(kernel, stride, padding):
    torch.manual_seed(0)
    plain = nn.Conv2d(64, 5, kernel, stride, padding, bias=False).double()
    other = nn.Conv2d(64, 5, kernel, stride, padding, bias=False).double()
    other.load_state_dict(plain.state_dict())
    use_matmul_convolutions(other)
    assert type(other) is not nn.Conv2d
    x = torch.randn(2, 64, 4, 3, dtype=torch.float64, requires_grad=True)
    y = other(x)
    torch.testing.assert_close(y, plain(x))
    assert "MatmulConv" in y.grad_fn.name()
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, other.weight), grad)
    torch.testing.assert_close(got, torch.autograd.grad(plain(x), (x, plain.weight), grad))


def test_matrix_products_leave_other_convolutions_alone():
    layers = [
        nn.Conv2d(64, 8, 3, bias=True),
        nn.Conv2d(64, 64, 3, groups=64, bias=False),
        nn.Conv2d(64, 8, 3, dilation=2, bias=False),
        nn.Conv2d(64, 8, 3, padding="same", bias=False),
        nn.Conv2d(64, 8, 3, padding=1, padding_mode="reflect", bias=False),
        nn.Conv2d(3, 8, 3, bias=False),
    ]
    use_matmul_convolutions(nn.Sequential(*layers))
    assert [type(layer) for layer in layers] == [nn.Conv2d] * 6
    large = nn.Conv2d(64, 8, 3, bias=False)
    use_matmul_convolutions(large)
    # oneDNN's, for maps this large
    assert "MatmulConv" not in large(torch.zeros(1, 64, 8, 8)).grad_fn.name()
    with pytest.raises(RuntimeError):
        large(torch.zeros(1, 64, 2, 2))


def test_matrix_products_under_autocast_keep_float32_weights():
    layer = nn.Conv2d(64, 8, 3, padding=1, bias=False)
    use_matmul_convolutions(layer)
    x = torch.randn(2, 64, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), nn.functional.conv2d(x, layer.weight, padding=1), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_mixed_images_and_labels(mix):
    """The loss is that of the shares in which images are in the mixture."""
    module = ClassificationModule(nn.Identity(), TrainConfig(mix=mix), 4, 8)
    torch.manual_seed(1)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).contiguous()
    mixed, shares = module._mix(images, torch.arange(4))
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    # Constant images: the mean of a mixture is the mean of its parts.
    torch.testing.assert_close(mixed.mean((1, 2, 3)), shares @ torch.arange(4.0))
    assert ((shares > 0).sum(1) == 2).all()


def test_mixing_takes_its_share_of_the_batches(dataset, tmp_path):
    """Of 90 batches. Mixtures have pixels between those of images, whole numbers of 255ths, but for shares near 0 or 1."""

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.batches = []

        def forward(self, images):
            if self.training:
                self.batches.append(bool(torch.allclose(images * 255, (images * 255).round(), atol=1e-3)))
            return images

    for share, least, greatest in ((0.0, 0, 0), (0.4, 15, 50), (1.0, 70, 90)):
        whole = Whole()
        config = dataclasses.replace(CONFIG, epochs=10, augment="none", mix="mixup", mix_share=share)
        config = dataclasses.replace(config, early_stop_patience=None)
        train_model(network(whole), dataset, config, tmp_path / str(share), progress=False)
        assert len(whole.batches) == 10 * STEPS_AN_EPOCH
        assert least <= whole.batches.count(False) <= greatest


@pytest.mark.parametrize("factor", [0.0, 0.1])
def test_offsets_have_a_learning_rate_of_their_own(dataset, tmp_path, factor):
    """At a factor of zero, offsets and masks stay as they start; the convolution itself learns."""
    layer = DeformableConv2d(3, 3, 3, padding=1)
    before = {name: value.clone() for name, value in layer.named_parameters()}
    config = dataclasses.replace(CONFIG, offset_learning_rate=factor, ema_decay=None)
    train_model(network(layer), dataset, config, tmp_path, progress=False)
    for name, value in layer.named_parameters():
        assert torch.equal(value, before[name]) == (factor == 0 and "regular" not in name), name
    groups = torch.load(tmp_path / "last.ckpt", weights_only=False)["optimizer_states"][0]["param_groups"]
    assert [group["initial_lr"] for group in groups] == pytest.approx([0.01, 0.01 * factor])
    assert len(groups[1]["params"]) == 4


class TestDistillation:
    def test_the_loss_is_the_labels_and_the_teachers(self):
        torch.manual_seed(0)
        config = TrainConfig(distillation=0.25, distillation_temperature=3.0, temperature_anneal=None)
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
        module = ClassificationModule(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), config, 4, 2, teacher=teacher)
        module.log = lambda *args, **options: None
        batch = Batch(torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 3, 0]), 7)
        loss = module.training_step(batch, 0)
        pupil, wanted = module.model(batch.images), teacher(batch.images)
        p, q = (wanted / 3).softmax(1), (pupil / 3).softmax(1)
        divergence = 9 * (p * (p / q).log()).sum(1)
        labels = nn.functional.cross_entropy(pupil, batch.labels, reduction="none")
        torch.testing.assert_close(loss, (0.75 * labels + 0.25 * divergence).mean())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert not any("teacher" in name for name in module.state_dict())

    def test_a_teacher_and_its_weight_come_together(self):
        model, teacher = nn.Identity(), nn.Linear(1, 1)
        with pytest.raises(StudyError, match="distillation: got 0.5, but no teacher"):
            ClassificationModule(model, TrainConfig(distillation=0.5), 4, 8)
        with pytest.raises(StudyError, match="distillation: got 0.0, but a teacher"):
            ClassificationModule(model, TrainConfig(), 4, 8, teacher=teacher)

    def test_a_pupil_learns_from_its_teacher_alone(self, dataset, tmp_path):
        """Without any weight on the labels, it ends with the teacher's opinion, right or wrong."""

        class Fixed(nn.Module):
            def forward(self, images):
                # The class after the true one: brightness in steps of 55 / 255.
                place = ((images.mean((1, 2, 3)) * 255 - 20) / 55).round().long().clamp(0, 3)
                return 10 * nn.functional.one_hot((place + 1) % 4, 4).float()

        config = dataclasses.replace(
            CONFIG, epochs=12, augment="none", mix="none", learning_rate=0.05, ema_decay=None, distillation=1.0
        )
        model = network()
        train_model(model, dataset, config, tmp_path, teacher=Fixed(), progress=False)
        # best.ckpt is chosen on labels, so look at the last weights.
        state = read_checkpoint(tmp_path / "last.ckpt")["state_dict"]
        model.load_state_dict({name.removeprefix("model."): value for name, value in state.items() if "model." in name})
        images = torch.from_numpy(dataset.test.images).float() / 255
        with torch.no_grad():
            told = model.eval()(images).argmax(1)
        assert (told == torch.from_numpy((dataset.test.labels + 1) % 4)).float().mean() > 0.8
