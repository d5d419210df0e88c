# SPDX-License-Identifier: BSD-3-Clause
"""dynconv_vision.data: formats, errors, preprocessing, cache, generated set."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data_helpers import FailingSource, random_image, write_cifar10, write_image, write_list_folder
from dynconv_vision import data
from dynconv_vision.data import (
    cache,
    preprocessing,
    splits,
    workers,
)
from dynconv_vision.data.cache import prepare
from dynconv_vision.data.derived import CHANNEL_NAMES, channel_correlation, channel_statistics, derive_channels
from dynconv_vision.data.generated import CLASSES, COLOURS, SHAPES, GeneratedSource, draw
from dynconv_vision.data.preprocessing import PreprocessConfig, UnreadableImageError, preprocess, read_bgr
from dynconv_vision.data.sources import ArraySource


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DYNCONV_CACHE", str(folder))
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the images that were preprocessed in this process."""
    seen: list[tuple[int, ...]] = []

    def counted(image: np.ndarray, config: PreprocessConfig) -> np.ndarray:
        seen.append(image.shape)
        return preprocess(image, config)

    monkeypatch.setattr(workers, "preprocess", counted)
    return seen


def load(source, **options) -> data.ImageDataset:
    return data.load_dataset(source, **{"image_size": 8, "progress": False, "workers": 0} | options)


def expected_pixels(path: Path, size: int = 8) -> np.ndarray:
    """The report's first step, written out: resize, then RGB, channels first."""
    image = cv2.resize(cv2.imread(str(path)), (size, size), interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB).transpose(2, 0, 1)


# ---- preprocessing


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp"])
def test_reading_gives_the_pixels_of_imread(tmp_path: Path, suffix: str) -> None:
    path = write_image(tmp_path / f"a b{suffix}", 3)
    np.testing.assert_array_equal(read_bgr(path), cv2.imread(str(path)))


@pytest.mark.parametrize("denoise", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_steps_equal_direct_opencv_calls(denoise: bool, normalize: bool) -> None:
    image = random_image(5, 40, 33) // 2 + 20
    expected = cv2.resize(image, (24, 24), interpolation=cv2.INTER_AREA)
    if denoise:
        expected = cv2.fastNlMeansDenoising(expected, None, 3, 7, 21)
    if normalize:
        expected = cv2.normalize(expected, None, 0, 255, cv2.NORM_MINMAX)
        assert expected.min() == 0 and expected.max() == 255
    result = preprocess(image, PreprocessConfig(24, denoise, normalize))
    assert result.dtype == np.uint8 and result.flags.c_contiguous
    np.testing.assert_array_equal(result, expected[:, :, ::-1].transpose(2, 0, 1))


def test_red_is_channel_0(tmp_path: Path) -> None:
    red = np.zeros((10, 10, 3), np.uint8)
    red[:, :, 2] = 255  # BGR
    cv2.imwrite(str(tmp_path / "red.png"), red)
    result = preprocess(read_bgr(tmp_path / "red.png"), PreprocessConfig(4))
    assert result[0].min() == 255 and result[1:].max() == 0


def test_greyscale_and_transparent_files_become_rgb(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "grey.png"), random_image(0)[:, :, 0])
    cv2.imwrite(str(tmp_path / "alpha.png"), np.dstack([random_image(0), random_image(1)[:, :, :1]]))
    grey, alpha = (preprocess(read_bgr(tmp_path / name), PreprocessConfig(6)) for name in ("grey.png", "alpha.png"))
    assert grey.shape == alpha.shape == (3, 6, 6)
    np.testing.assert_array_equal(grey[0], grey[2])


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("kept", [0.5, 0.9, -1])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, kept: float) -> None:
    path = write_image(tmp_path / f"a{suffix}", 1, height=90, width=90)
    content = path.read_bytes()
    path.write_bytes(content[:-40] if kept == -1 else content[: int(len(content) * kept)])
    with pytest.raises(UnreadableImageError):
        read_bgr(path)


def test_bytes_after_the_end_of_a_jpeg_are_no_truncation(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.jpg", 1)
    pixels = read_bgr(path)
    path.write_bytes(path.read_bytes() + b"\0\0camera's own data")
    np.testing.assert_array_equal(read_bgr(path), pixels)


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UnreadableImageError):
        read_bgr(tmp_path / "a.jpg")


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "64"])
def test_wrong_image_size(size) -> None:
    with pytest.raises(ValueError, match="image_size: got"):
        data.load_dataset("generated", image_size=size)


# ---- list files


def test_list_files_as_they_occur(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for index, name in enumerate(["a.png", "my photo 2.png", "deep/er/c.png", "win/d.png"]):
        write_image(folder / name, index)
    train = "\ufeffa.png 0\r\n\r\nmy photo 2.png 1\r\n  ./deep/er/c.png\t1  \r\nwin\\d.png 0"
    (folder / "train.txt").write_bytes(train.encode())
    write_image(folder / "v.png", 7)
    (folder / "validation.txt").write_text("v.png 1\n")
    (folder / "test.txt").write_text(f"{write_image(tmp_path / 'elsewhere' / 't.png', 8)} 0\n")
    result = load(folder)
    assert result.name == "set" and result.classes == ("0", "1") and result.image_size == 8
    np.testing.assert_array_equal(result.train.labels, [0, 1, 1, 0])
    assert result.train.labels.dtype == np.int64 and result.train.images.dtype == np.uint8
    for index, name in enumerate(["a.png", "my photo 2.png", "deep/er/c.png", "win/d.png"]):
        np.testing.assert_array_equal(result.train.images[index], expected_pixels(folder / name))
    np.testing.assert_array_equal(result.val.images[0], expected_pixels(folder / "v.png"))
    np.testing.assert_array_equal(result.test.images[0], expected_pixels(tmp_path / "elsewhere" / "t.png"))


def write_broken_folder(folder: Path) -> Path:
    """Each kind of problem, in known lines."""
    write_list_folder(folder, {"train": 6, "val": 4, "test": 4})
    write_image(folder / "cut.jpg", 1, height=90, width=90)
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:600])
    with open(folder / "train.txt", "a") as file:
        file.write("images/nolabel.png\r\n\r\nimages/x.png one\ncut.jpg 1\nimages/train_0.png -1\n")
    with open(folder / "val.txt", "a") as file:
        file.write("gone.png 1\nimages/val_0.png 2\n")
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


def test_everything_wrong_is_one_error_with_lines(tmp_path: Path) -> None:
    folder = write_broken_folder(tmp_path / "set")
    with pytest.raises(data.DataError) as caught:
        load(folder)
    found = {(problem.where, problem.kind) for problem in caught.value.problems}
    assert found == {
        ("train.txt:7", "malformed line"),
        ("train.txt:9", "malformed line"),
        ("train.txt:10", "unreadable image"),
        ("train.txt:11", "label out of range"),
        ("val.txt:5", "missing image"),
        ("val.txt:6", "label out of range"),
    }
    text = str(caught.value)
    assert "6 problems" in text and "skip_bad_images" in text and "expected 0..1" in text
    assert all(where in text for where, _ in found)


def test_unreadable_images_alone_are_an_error_too(tmp_path: Path) -> None:
    folder = write_list_folder(tmp_path / "set", {"train": 4, "val": 2, "test": 2})
    (folder / "images/train_1.png").write_bytes(b"x")
    (folder / "images/test_0.png").write_bytes(b"")
    for _ in range(2):  # the second time the cache knows
        with pytest.raises(data.DataError) as caught:
            load(folder)
        assert [p.where for p in caught.value.problems] == ["train.txt:2", "test.txt:1"]
    write_image(folder / "images/train_1.png", 1)
    write_image(folder / "images/test_0.png", 6)
    assert len(load(folder).train) == 4


def test_skipping_goes_on_and_says_how_many(tmp_path: Path) -> None:
    folder = write_broken_folder(tmp_path / "set")
    for _ in range(2):
        with pytest.warns(UserWarning, match="left out 6 problems"):
            result = load(folder, skip_bad_images=True)
        assert (len(result.train), len(result.val), len(result.test)) == (6, 4, 4)
        np.testing.assert_array_equal(result.train.labels, [0, 1] * 3)
        for index in range(6):
            np.testing.assert_array_equal(
                result.train.images[index], expected_pixels(folder / f"images/train_{index}.png")
            )
        assert any("left out 6" in note for note in result.notes)
        assert [problem.where for problem in result.train.skipped] == ["train.txt:10"]


def test_rows_stay_with_labels_when_images_in_the_middle_are_skipped(tmp_path: Path) -> None:
    folder = write_list_folder(tmp_path / "set", {"train": 9, "val": 3, "test": 3}, num_classes=3)
    for index in (0, 4):
        (folder / f"images/train_{index}.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="2 unreadable image"):
        train = load(folder, skip_bad_images=True).train
    good = [1, 2, 3, 5, 6, 7, 8]
    np.testing.assert_array_equal(train.labels, np.array(good) % 3)
    for row, index in enumerate(good):
        np.testing.assert_array_equal(train.images[row], expected_pixels(folder / f"images/train_{index}.png"))


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    folder = write_list_folder(tmp_path / "set", {"train": 2, "val": 1, "test": 1})
    (folder / "images/val_0.png").write_bytes(b"x")
    with pytest.warns(UserWarning, match="left out"), pytest.raises(data.DataError, match="no usable image in the val"):
        load(folder, skip_bad_images=True)


def test_empty_training_list_is_not_blamed_on_the_others(tmp_path: Path) -> None:
    folder = write_list_folder(tmp_path / "set", {"train": 2, "val": 1, "test": 1})
    (folder / "train.txt").write_text("\n")
    with pytest.raises(data.DataError) as caught:
        load(folder)
    assert [str(problem) for problem in caught.value.problems] == [
        "train.txt: empty list: expected lines '<path> <label>'"
    ]
    (folder / "train.txt").write_text("images/train_0.png,0\n")
    with pytest.raises(data.DataError, match="expected '<path> <label>' with a whole number") as caught:
        load(folder)
    assert [problem.where for problem in caught.value.problems] == ["train.txt:1"]


def test_long_lists_of_problems_are_cut(tmp_path: Path) -> None:
    folder = write_list_folder(tmp_path / "set", {"train": 2, "val": 1, "test": 1})
    with open(folder / "train.txt", "a") as file:
        file.writelines(f"gone{i}.png 0\n" for i in range(500))
    with pytest.raises(data.DataError, match="500 problems") as caught:
        load(folder)
    assert len(caught.value.problems) == 500
    assert len(str(caught.value).splitlines()) < 30 and "and 480 more" in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


def test_labels_without_classes_file_are_bounded_by_the_training_list(tmp_path: Path) -> None:
    folder = write_list_folder(tmp_path / "set", {"train": 4, "val": 2, "test": 2})
    (folder / "test.txt").write_text("images/test_0.png 2\n")
    with pytest.raises(data.DataError, match=r"test.txt:1: label out of range: got 2, expected 0..1 \(the largest"):
        load(folder)
    (folder / "classes.txt").write_text("red\nblue\n")
    with pytest.raises(data.DataError, match=r"expected 0..1 \(2 classes in classes.txt\)"):
        load(folder)
    (folder / "classes.txt").unlink()
    with pytest.warns(UserWarning, match="1 of 3 classes have no training image"):
        assert len(load(folder, num_classes=3).classes) == 3
    (folder / "train.txt").write_text("images/train_0.png 999999999\n")
    with pytest.raises(data.DataError, match="largest label is 999999999"):
        load(folder)


def test_class_names(tmp_path: Path) -> None:
    folder = write_list_folder(tmp_path / "set", {"train": 4, "val": 2, "test": 2})
    (folder / "classes.txt").write_text("0 n01443537 goldfish, Carassius auratus\r\n1 n01629819 salamander\r\n")
    assert load(folder).classes == ("goldfish", "salamander")
    (folder / "classes.txt").write_text("goldfish\nfire salamander\n")
    assert load(folder).classes == ("goldfish", "fire salamander")
    for label, name in enumerate(["n1", "n2"]):
        write_image(folder / name / "a.png", label)
    (folder / "classes.txt").unlink()
    (folder / "train.txt").write_text("n1/a.png 0\nn2/a.png 1\n")
    assert load(folder).classes == ("n1", "n2")


def test_leaks_and_repetitions_warn_and_contradictions_are_errors(tmp_path: Path) -> None:
    folder = write_list_folder(tmp_path / "set", {"train": 4, "val": 2, "test": 2})
    with open(folder / "test.txt", "a") as file:
        file.write("images/../images/train_1.png 1\n")
    with pytest.warns(UserWarning, match=r"leak: 1 images of the test list are in the train list(.|\n)*test.txt:3"):
        assert any("leak" in note for note in load(folder).notes)
    with open(folder / "train.txt", "a") as file:
        file.write("images/train_2.png 1\n")
    with (
        pytest.warns(UserWarning, match="leak"),
        pytest.raises(data.DataError, match=r"train.txt:5: contradictory label: .* label 1, but 0 in train.txt:3"),
    ):
        load(folder)


def test_load_list(tmp_path: Path) -> None:
    folder = write_list_folder(tmp_path / "set", {"some": 5}, num_classes=3)
    options = {"image_size": 8, "progress": False, "workers": 0}
    split = data.load_list(folder / "some.txt", num_classes=3, **options)
    np.testing.assert_array_equal(split.labels, [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(split.images[4], expected_pixels(folder / "images/some_4.png"))
    with pytest.raises(data.DataError, match=r"some.txt:3: label out of range: got 2, expected 0..1"):
        data.load_list(folder / "some.txt", num_classes=2, **options)
    with pytest.warns(UserWarning, match="1 label out of range"):
        split = data.load_list(folder / "some.txt", num_classes=2, skip_bad_images=True, **options)
    assert len(split) == 4 and [problem.where for problem in split.skipped] == ["some.txt:3"]
    elsewhere = tmp_path / "lists" / "some.txt"
    elsewhere.parent.mkdir()
    elsewhere.write_text("some_0.png 0\n")
    assert len(data.load_list(elsewhere, folder / "images", **options)) == 1
    with pytest.raises(data.DataError, match="no such list file"):
        data.load_list(tmp_path / "nothing.txt", **options)
    (folder / "empty.txt").write_text("\n\n")
    with pytest.raises(data.DataError, match="no usable image"):
        data.load_list(folder / "empty.txt", **options)


# ---- folder trees


def test_tiny_imagenet_tree(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-imagenet-200"
    wnids = ["n02000000", "n01000000"]  # wnids.txt isn't sorted
    for offset, wnid in enumerate(wnids):
        for index in range(3):
            write_image(folder / "train" / wnid / "images" / f"{wnid}_{index}.JPEG.jpg", 10 * offset + index)
        for path in (folder / "train" / wnid / "images").iterdir():
            path.rename(path.with_suffix(""))
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes\n")
    (folder / "wnids.txt").write_text("\n".join(wnids))
    (folder / "words.txt").write_text("n00000001\tentity\nn01000000\tcat, feline\nn02000000\tdog\n")
    lines = []
    for index in range(8):
        write_image(folder / "val" / "images" / f"val_{index}.jpg", 100 + index)
        lines.append(f"val_{index}.jpg\t{wnids[index % 2]}\t0\t0\t10\t10\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    write_image(folder / "test" / "images" / "test_0.jpg", 200)
    result = load(folder)
    assert result.classes == ("cat", "dog")
    np.testing.assert_array_equal(result.train.labels, [0, 0, 0, 1, 1, 1])
    assert sorted(result.val.labels) == sorted(result.test.labels) == [0, 0, 1, 1]
    rows = {image.tobytes() for split in (result.val, result.test) for image in split.images}
    assert len(rows) == 8
    assert any("half of its val images" in note for note in result.notes)
    np.testing.assert_array_equal(load(folder, seed=5).test.images, result.test.images)

    with open(folder / "val" / "val_annotations.txt", "a") as file:
        file.write("val_9.jpg\tn01000000\t0\nval_0.jpg\nval_1.jpg\tn03000000\t1\n")
    with pytest.raises(data.DataError) as caught:
        load(folder)
    assert {(p.where.rpartition(":")[2], p.kind) for p in caught.value.problems} == {
        ("9", "missing image"),
        ("10", "malformed line"),
        ("11", "unknown class"),
    }


def write_classes(folder: Path, counts: dict[str, int], start: int = 0) -> None:
    for offset, (name, count) in enumerate(counts.items()):
        for index in range(count):
            write_image(folder / name / f"{index}.png", start + 100 * offset + index)


def test_class_folders(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_classes(folder / "train", {"dog": 3, "cat": 2})
    write_classes(folder / "valid", {"dog": 1}, 1000)
    write_classes(folder / "test", {"cat": 1, "dog": 2}, 2000)
    (folder / "train" / "cat" / ".hidden.png").write_bytes(b"")
    (folder / "train" / "cat" / "notes.md").write_bytes(b"")
    result = load(folder)
    assert result.classes == ("cat", "dog") and not result.notes
    np.testing.assert_array_equal(result.train.labels, [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(result.val.labels, [1])
    np.testing.assert_array_equal(result.test.labels, [0, 1, 1])
    np.testing.assert_array_equal(result.train.images[2], expected_pixels(folder / "train/dog/0.png"))

    (folder / "train" / "emu").mkdir()
    write_classes(folder / "test", {"fox": 1})
    with pytest.raises(data.DataError) as caught:
        load(folder)
    found = {(problem.where, problem.kind) for problem in caught.value.problems}
    assert found == {("train/emu", "class without images"), ("test/fox", "unknown class")}


@pytest.mark.parametrize("inside", ["train", "."])
def test_missing_splits_are_held_out_always_the_same(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / "set"
    write_classes(folder / inside, {"cat": 30, "dog": 20})
    write_image(folder / "test" / "unlabelled.png") if inside == "train" else None
    result = load(folder)
    assert [len(result.train), len(result.val), len(result.test)] == [40, 5, 5]
    np.testing.assert_array_equal(np.bincount(result.val.labels), [3, 2])
    rows = [image.tobytes() for s in (result.train, result.val, result.test) for image in s.images]
    assert len(set(rows)) == 50
    assert sum("held out of train" in note for note in result.notes) == 2
    np.testing.assert_array_equal(load(folder, seed=9).val.images, result.val.images)


def test_holding_out_depends_on_names_alone() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), [1, 2, 10, 40, 100])
    names = [f"{label}/{i}.png" for i, label in enumerate(labels)]
    kept, held = splits.hold_out(labels, names)
    np.testing.assert_array_equal(np.bincount(labels[held], minlength=5), [0, 1, 1, 4, 10])
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(len(labels)))
    order = rng.permutation(len(labels))
    _, shuffled = splits.hold_out(labels[order], [names[i] for i in order])
    assert {names[i] for i in held} == {names[order[i]] for i in shuffled}


def test_subsets_are_balanced_and_nested() -> None:
    labels = np.repeat(np.arange(4), [50, 30, 30, 2])
    names = [str(i) for i in range(len(labels))]
    small, large = splits.subset(labels, names, 10), splits.subset(labels, names, 40)
    assert len(small) == 10 and set(small) <= set(large)
    assert np.bincount(labels[small]).min() >= 2 and np.bincount(labels[small]).max() <= 3
    np.testing.assert_array_equal(splits.subset(labels, names, 1000), np.arange(len(labels)))


def test_limits(tmp_path: Path) -> None:
    folder = write_list_folder(tmp_path / "set", {"train": 12, "val": 4, "test": 4}, num_classes=3)
    result = load(folder, limits={"train": 6, "val": 100})
    np.testing.assert_array_equal(np.bincount(result.train.labels), [2, 2, 2])
    assert len(result.val) == 4 and "6 of 12 train images are used" in result.notes
    for limits, text in [({"training": 1}, "got the split 'training'"), ({"val": 0}, r"limits\['val'\]: got 0")]:
        with pytest.raises(ValueError, match=text):
            load(folder, limits=limits)


def test_unknown_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match="no dataset found. Expected list files"):
        load(tmp_path / "empty")
    with pytest.raises(data.DataError, match="no such folder"):
        load(tmp_path / "nothing")
    (tmp_path / "train.txt").write_text("")
    with pytest.raises(data.DataError, match="a file, not a folder"):
        load(str(tmp_path / "train.txt"))
    with pytest.raises(data.DataError, match="no usable image to train on"):
        load(tmp_path)
    with pytest.raises(ValueError, match="workers: got -1"):
        load("generated", workers=-1)


# ---- CIFAR-10


@pytest.mark.parametrize("key", [str, str.encode])
def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key) -> None:
    folder = write_cifar10(tmp_path / "data", key=key)
    with pytest.warns(UserWarning, match="not the published CIFAR-10"):
        result = load(f"cifar10:{tmp_path / 'data'}", image_size=32)
    assert result.name == "cifar10" and result.classes[0] == "airplane" and len(result.classes) == 10
    assert (len(result.train), len(result.val), len(result.test)) == (90, 10, 20)
    np.testing.assert_array_equal(np.bincount(result.val.labels), [1] * 10)
    # At the images' own size the pipeline leaves the pixels alone: rows are R, G, B planes.
    raw = pickle.loads((folder / "test_batch").read_bytes())
    np.testing.assert_array_equal(result.test.images, raw[key("data")].reshape(-1, 3, 32, 32))
    np.testing.assert_array_equal(result.test.labels, raw[key("labels")])
    monkeypatch.setenv("DYNCONV_DATA", str(tmp_path / "data"))
    for source in ("cifar10", f"cifar10:{folder}"):
        with pytest.warns(UserWarning, match="not the published"):
            np.testing.assert_array_equal(load(source, image_size=32).val.images, result.val.images)


def test_published_cifar10_is_read_by_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = write_cifar10(tmp_path)
    with pytest.warns(UserWarning, match="not the published"):
        ours = load(f"cifar10:{tmp_path}", cache_dir=tmp_path / "1")
    for name in ("train_list", "test_list"):
        files = [[file, hashlib.md5((folder / file).read_bytes()).hexdigest()] for file, _ in getattr(CIFAR10, name)]
        monkeypatch.setattr(CIFAR10, name, files)
    md5 = hashlib.md5((folder / "batches.meta").read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = load(f"cifar10:{tmp_path}", cache_dir=tmp_path / "2")
    assert ours.classes == theirs.classes and not any("published" in note for note in theirs.notes)
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(getattr(ours, split).images, getattr(theirs, split).images)
        np.testing.assert_array_equal(getattr(ours, split).labels, getattr(theirs, split).labels)


def test_missing_cifar10_says_what_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match="missing data_batch_1, .*test_batch") as caught:
        load("cifar10")
    assert str(tmp_path / "data" / "cifar-10-batches-py") in str(caught.value) and "download=True" in str(caught.value)
    folder = write_cifar10(tmp_path / "data")
    (folder / "data_batch_3").unlink()
    with pytest.raises(data.DataError, match="missing data_batch_3\n"):
        load("cifar10")


class Boom:
    def __reduce__(self):
        return os.mkdir, ("boom",)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data_batch_2", pickle.dumps({b"data": Boom(), b"labels": []})),
        ("data_batch_2", b"not a pickle"),
        ("data_batch_2", pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)})),
        ("test_batch", pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]})),
        ("test_batch", pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]})),
        ("test_batch", pickle.dumps({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]})),
    ],
)
def test_other_pickles_are_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_cifar10(tmp_path)
    (folder / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(data.DataError, match="cifar-10-batches-py"):
            load(f"cifar10:{tmp_path}")
    assert not (tmp_path / "boom").exists()


# ---- the generated set


def test_generated_set() -> None:
    result = load("generated", image_size=24, limits={"train": 100, "val": 50, "test": 50})
    assert len(result.classes) == 50 == len(set(result.classes)) == len(SHAPES) * len(COLOURS)
    assert result.train.images.shape == (100, 3, 24, 24)
    np.testing.assert_array_equal(np.bincount(result.train.labels), [2] * 50)
    rows = [image.tobytes() for s in (result.train, result.val, result.test) for image in s.images]
    assert len(set(rows)) == 200
    default = data.GeneratedConfig()
    assert default.train % 50 == default.val % 50 == default.test % 50 == 0
    sized = load(data.GeneratedConfig(train=50, val=60, test=70), image_size=24)
    assert (len(sized.train), len(sized.val), len(sized.test)) == (50, 60, 70)
    np.testing.assert_array_equal(sized.train.images, result.train.images[:50])


def test_generated_images_depend_on_seed_split_and_number_alone(tmp_path: Path) -> None:
    limits = {"train": 60, "val": 50, "test": 50}
    here = load("generated", image_size=16, limits=limits)
    there = load("generated", image_size=16, limits=limits, workers=2, cache_dir=tmp_path / "other")
    np.testing.assert_array_equal(here.train.images, there.train.images)
    np.testing.assert_array_equal(here.train.labels, there.train.labels)
    other = load("generated", image_size=16, limits=limits, seed=1)
    assert not any((a == b).all() for a, b in zip(here.train.images, other.train.images, strict=True))
    source = GeneratedSource(data.GeneratedConfig(), 16, 0, "train", tuple(range(10)))
    np.testing.assert_array_equal(source.take([7, 2]).load(0), source.load(7))
    np.testing.assert_array_equal(source.load(7)[:, :, ::-1].transpose(2, 0, 1), here.train.images[7])


@pytest.mark.parametrize("size", [1, 7, 64, 131])
def test_generated_images_of_any_size(size: int) -> None:
    image = GeneratedSource(data.GeneratedConfig(), size, 3, "val", (4,)).load(0)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8


def test_generated_scene_is_the_same_at_every_size() -> None:
    config = data.GeneratedConfig(noise=0)
    for number in range(10):
        small, large = (GeneratedSource(config, size, 0, "test", (number,)).load(0) for size in (32, 128))
        shrunk = cv2.resize(large, (32, 32), interpolation=cv2.INTER_AREA)
        assert np.abs(shrunk.astype(int) - small).mean() < 12


def test_classes_differ_in_the_shape_alone_or_the_colour_alone() -> None:
    """With the same random numbers, two colours of a shape differ in its pixels, which are of the named hues."""
    options = {"clutter": 0, "noise": 0.0}
    for shape in range(len(SHAPES)):
        for seed in range(5):
            pictures = {
                name: draw(shape * len(COLOURS) + i, 64, np.random.default_rng(seed), **options)
                for i, name in enumerate(COLOURS)
            }
            inside = (pictures["red"] != pictures["green"]).any(axis=2) & (pictures["red"] != pictures["blue"]).any(2)
            inside = cv2.erode(inside.astype(np.uint8), np.ones((3, 3))) > 0
            assert 60 < inside.sum() < 2000
            for name, picture in pictures.items():
                hues = 2.0 * cv2.cvtColor(picture, cv2.COLOR_BGR2HSV)[inside][:, 0]
                away = {other: np.median(np.abs((hues - hue + 180) % 360 - 180)) for other, hue in COLOURS.items()}
                assert min(away, key=away.get) == name
    assert CLASSES[0] == "red disc" and CLASSES[-1] == "magenta arrow"
    grounds = [draw(label, 64, np.random.default_rng(0), **options) for label in range(0, 50, 5)]
    assert len({ground.tobytes() for ground in grounds}) == len(SHAPES)


@pytest.mark.parametrize("options", [{"train": 0}, {"val": 2.5}, {"noise": -1.0}, {"clutter": True}])
def test_wrong_generated_config(options: dict) -> None:
    with pytest.raises(ValueError, match=rf"GeneratedConfig.{next(iter(options))}: got"):
        data.GeneratedConfig(**options)
    with pytest.raises(ValueError, match="seed: got -1"):
        load("generated", seed=-1)


# ---- cache and processes


def entries(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.rglob("images.npy"))


def test_the_second_time_no_image_is_read(
    tmp_path: Path, cache_folder: Path, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_list_folder(tmp_path / "set", {"train": 6, "val": 2, "test": 2})
    first = load(folder)
    assert len(calls) == 10 and len(entries(cache_folder)) == 3
    assert isinstance(first.train.images, np.memmap) and not first.train.images.flags.writeable
    before = {path: path.stat().st_mtime_ns for path in cache_folder.rglob("*.npy")}
    monkeypatch.setattr("dynconv_vision.data.sources.read_bgr", None)
    second = load(folder)
    np.testing.assert_array_equal(first.train.images, second.train.images)
    assert len(calls) == 10 and {path: path.stat().st_mtime_ns for path in before} == before
    assert not list(cache_folder.rglob("partial.npy")) and not list((tmp_path / "set").rglob("*.npy"))


def test_other_settings_are_another_entry(tmp_path: Path, cache_folder: Path, calls: list) -> None:
    folder = write_list_folder(tmp_path / "set", {"train": 2, "val": 1, "test": 1})
    for number, options in enumerate([{}, {"image_size": 9}, {"denoise": True}, {"normalize": True}], 1):
        load(folder, **options)
        assert len(calls) == 4 * number and len(entries(cache_folder)) == 3 * number
    load(folder, seed=3)
    assert len(calls) == 16
    explicit = tmp_path / "explicit"
    load(folder, cache_dir=explicit)
    assert len(calls) == 20 and len(entries(explicit)) == 3


def test_only_changed_and_new_images_are_made_again(tmp_path: Path, calls: list) -> None:
    folder = write_list_folder(tmp_path / "set", {"train": 6, "val": 2, "test": 2})
    load(folder)
    calls.clear()
    write_image(folder / "images/train_3.png", 77, height=31)
    write_image(folder / "images/new.png", 78)
    with open(folder / "train.txt", "a") as file:
        file.write("images/new.png 0\n")
    result = load(folder)
    assert len(calls) == 2 and (31, 24, 3) in calls
    for index in range(6):
        np.testing.assert_array_equal(result.train.images[index], expected_pixels(folder / f"images/train_{index}.png"))
    np.testing.assert_array_equal(result.train.images[6], expected_pixels(folder / "images/new.png"))
    (folder / "train.txt").write_text("images/new.png 1\nimages/train_5.png 0\n")  # fewer, other order, other labels
    result = load(folder)
    assert len(calls) == 2
    np.testing.assert_array_equal(result.train.images[1], expected_pixels(folder / "images/train_5.png"))
    np.testing.assert_array_equal(result.train.labels, [1, 0])


@pytest.mark.parametrize("damage", ["cut", "gone", "meta"])
def test_damaged_entries_are_made_again(tmp_path: Path, cache_folder: Path, damage: str) -> None:
    folder = write_list_folder(tmp_path / "set", {"train": 6, "val": 2, "test": 2})
    pixels = np.array(load(folder).train.images)
    entry = next(path for path in entries(cache_folder) if "train" in path.name)
    if damage == "cut":
        (entry / "images.npy").write_bytes((entry / "images.npy").read_bytes()[:300])
    elif damage == "gone":
        (entry / "images.npy").unlink()
    else:
        (entry / "meta.json").write_text("{")
    np.testing.assert_array_equal(load(folder).train.images, pixels)


def test_an_image_that_becomes_readable_is_taken_in(tmp_path: Path, calls: list) -> None:
    """Permissions and network drives change what can be read without changing size or time."""
    folder = write_list_folder(tmp_path / "set", {"train": 4, "val": 2, "test": 2})
    path = folder / "images/train_1.png"
    content, stat = path.read_bytes(), path.stat()
    path.write_bytes(b"\0" * len(content))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.warns(UserWarning, match="1 unreadable"):
        assert len(load(folder, skip_bad_images=True).train) == 3
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    calls.clear()
    result = load(folder)
    assert len(result.train) == 4 and len(calls) == 1
    np.testing.assert_array_equal(result.train.images[1], expected_pixels(path))


def test_processes_give_the_same_as_this_process(tmp_path: Path) -> None:
    folder = write_list_folder(tmp_path / "set", {"train": 30, "val": 2, "test": 2})
    (folder / "images/train_7.png").write_bytes(b"broken")
    images = []
    for count in (0, 2):
        with pytest.warns(UserWarning, match="train.txt:8: unreadable image: images/train_7.png: 6 bytes"):
            images.append(
                load(folder, workers=count, denoise=True, skip_bad_images=True, cache_dir=tmp_path / str(count))
            )
    np.testing.assert_array_equal(images[0].train.images, images[1].train.images)


def test_long_work_moves_to_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, calls: list) -> None:
    monkeypatch.setattr(workers, "WORTH_PROCESSES_SECONDS", 0.0)
    monkeypatch.setattr(workers, "available_cores", lambda: 2)
    source = ArraySource(np.stack([random_image(i, 64, 64)[:, :, ::-1] for i in range(100)]))
    result = prepare(source, PreprocessConfig(64, denoise=True), name="x", progress=False)
    assert 0 < len(calls) < 100
    assert len(result.images) == 100
    expected = preprocess(random_image(99, 64, 64), PreprocessConfig(64, denoise=True))
    np.testing.assert_array_equal(result.images[99], expected)


@pytest.mark.parametrize(("end", "text"), [("raise", "ZeroDivisionError: a bug"), ("die", "exit code 7")])
def test_failing_workers_are_reported(end: str, text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        prepare(FailingSource(end), PreprocessConfig(8), name="x", workers=1, progress=False)


def test_unwritable_and_full_caches_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_list_folder(tmp_path / "set", {"train": 2, "val": 1, "test": 1})
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="can't create the cache folder .* set DYNCONV_CACHE"):
        load(folder, cache_dir=tmp_path / "file" / "cache")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match="MB are free; set DYNCONV_CACHE"):
        load(folder)


def test_default_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert data.default_cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("DYNCONV_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.default_cache_dir() == tmp_path / ".cache" / "dynconv_vision"


def test_splits_are_pickled_by_file_name(tmp_path: Path) -> None:
    train = load("generated", image_size=32, limits={"train": 100, "val": 50, "test": 50}).train
    pickled = pickle.dumps(train)
    assert len(pickled) < train.images.nbytes / 50
    np.testing.assert_array_equal(pickle.loads(pickled).images, train.images)
    copy = data.ImageSplit(np.array(train.images[:3]), train.labels[:3])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(copy)).images, train.images[:3])


SCRIPT = """
import sys
from dynconv_vision.data import cache, load_list, workers
cache.CHECKPOINT_SECONDS = 0.0
prepared = 0
def counted(image, config, preprocess=workers.preprocess):
    global prepared
    prepared += 1
    return preprocess(image, config)
workers.preprocess = counted
load_list(sys.argv[1], image_size=96, denoise=True, workers=int(sys.argv[2]), progress=False)
print(prepared)
"""


def start_script(list_file: Path, count: int) -> subprocess.Popen:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(list_file), str(count)], env=environment, stdout=subprocess.PIPE, text=True
    )


def children_of(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(stat.parent.name))
        except OSError:
            pass
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_killed_run_is_continued(tmp_path: Path, cache_folder: Path, calls: list) -> None:
    folder = write_list_folder(tmp_path / "set", {"some": 80})
    process = start_script(folder / "some.txt", 2)
    done = 0
    deadline = time.monotonic() + 60
    while done < 16 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
        for path in cache_folder.rglob("done.bin"):
            done = sum(path.read_bytes())
    children = children_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and len(children) == 2
    done = sum(next(cache_folder.rglob("done.bin")).read_bytes())
    assert 16 <= done < 80 and not entries(cache_folder)

    options = {"image_size": 96, "denoise": True, "workers": 0, "progress": False}
    resumed = data.load_list(folder / "some.txt", **options)
    assert len(calls) == 80 - done
    whole = data.load_list(folder / "some.txt", cache_dir=tmp_path / "whole", **options)
    np.testing.assert_array_equal(resumed.images, whole.images)
    while any(is_running(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(child) for child in children), "workers outlive a killed parent"


def test_an_interrupted_run_keeps_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path
) -> None:
    folder = write_list_folder(tmp_path / "set", {"some": 40})
    made = 0

    def interrupted(image: np.ndarray, config: PreprocessConfig) -> np.ndarray:
        nonlocal made
        made += 1
        if made == 20:
            raise KeyboardInterrupt
        return preprocess(image, config)

    options = {"image_size": 8, "workers": 0, "progress": False}
    monkeypatch.setattr(workers, "preprocess", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.load_list(folder / "some.txt", **options)
    assert sum(next(cache_folder.rglob("done.bin")).read_bytes()) == 16
    data.load_list(folder / "some.txt", **options)
    assert made == 20 + 24


def test_two_processes_share_the_work_of_one(tmp_path: Path) -> None:
    folder = write_list_folder(tmp_path / "set", {"some": 40})
    processes = [start_script(folder / "some.txt", 0) for _ in range(2)]
    counts = [int(process.communicate(timeout=100)[0]) for process in processes]
    assert sorted(counts) == [0, 40]


def test_importing_is_light() -> None:
    """Workers import this package: torch would cost each of them seconds."""
    code = "import sys, dynconv_vision.data.workers; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}).returncode == 0
    assert preprocessing.PIPELINE_VERSION >= 1


class TestDerivedChannels:
    def test_channels_of_a_ramp(self) -> None:
        """Values that rise by 2 to the right and by 3 downwards, in red alone."""
        red = (2 * torch.arange(6.0) + 3 * torch.arange(5.0)[:, None])[None, None]
        images = torch.cat((red, torch.zeros(1, 2, 5, 6)), 1)
        made = dict(zip("XYLrRg", derive_channels(images, "XYLrRg")[0], strict=True))
        torch.testing.assert_close(made["L"], 0.299 * red[0, 0])
        torch.testing.assert_close(made["X"][:, 1:-1], torch.full((5, 4), 4 * 0.299))
        torch.testing.assert_close(made["Y"][1:-1], torch.full((3, 6), 6 * 0.299))
        # At the borders one of the two neighbours is the pixel itself.
        torch.testing.assert_close(made["X"][:, 0], torch.full((5,), 2 * 0.299))
        torch.testing.assert_close(made["r"][1:-1, 1:-1], red[0, 0, 1:-1, 1:-1])
        assert torch.equal(made["R"], red[0, 0]) and not made["g"].any()

    def test_each_channel_by_itself(self) -> None:
        images = torch.rand(2, 3, 7, 4)
        together = derive_channels(images, CHANNEL_NAMES)
        for place, name in enumerate(CHANNEL_NAMES):
            torch.testing.assert_close(derive_channels(images, (name,)), together[:, place : place + 1])
        assert derive_channels(images, ("R", "G", "B")) is images

    def test_statistics(self) -> None:
        images = torch.rand(2, 3, 7, 4)
        images[:, 2] = 0.5
        statistics = channel_statistics(images, ("G", "B"))
        assert statistics["G"] == pytest.approx((float(images[:, 1].mean()), float(images[:, 1].std(correction=0))))
        assert statistics["B"] == (0.5, 1e-3)

    def test_correlation(self) -> None:
        images = torch.rand(4, 3, 7, 5)
        images[:, 2] = 0.5
        correlation = channel_correlation(images, ("R", "X", "G", "B"))
        planes = derive_channels(images, ("R", "X", "G")).transpose(0, 1).flatten(1)
        torch.testing.assert_close(correlation[:3, :3], planes.corrcoef())
        assert torch.equal(correlation[3], torch.tensor([0.0, 0, 0, 1])) and torch.equal(correlation, correlation.t())

    @pytest.mark.parametrize("names", [(), ("R", "R"), ("R", "Q")])
    def test_errors(self, names: tuple[str, ...]) -> None:
        with pytest.raises(ValueError, match="expected different names out of R, G, B, L, X, Y, r, g, b"):
            derive_channels(torch.zeros(1, 3, 2, 2), names)
