# SPDX-License-Identifier: BSD-3-Clause
"""The studies' scripts: smoke runs, results, options, stopping and continuing, evaluate.py and its errors."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from dynconv_ext import DeformableConv2d
from dynconv_vision.models import count_parameters, create_model, registry
from dynconv_vision.models.weights import write_weights
from dynconv_vision.reporting.summary import write_summary
from dynconv_vision.training import ClassificationModule, ModelCard, StudyError, TrainConfig, load_network
from dynconv_vision.training.study import CHANNEL_SETS, Network, Preset, Study, StudyConfig, main

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", EXPERIMENTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name: str, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXPERIMENTS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNCONV_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with list files: three classes of noisy images told apart by their colour."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 12), ("test", 15)):
        lines = []
        for index in range(count):
            image = generator.integers(0, 120, (20, 24, 3))
            image[..., index % 3] += 100
            assert cv2.imwrite(str(folder / f"{split}{index}.png"), image.astype(np.uint8))
            lines.append(f"{split}{index}.png {index % 3}\r\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def smoke_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, subprocess.CompletedProcess[str]]]:
    runs = {}
    for name in ("task1", "task2"):
        folder = tmp_path_factory.mktemp("smoke") / name
        runs[name] = (folder, run_script(name, "--smoke", "--device", "cpu", "--output", folder))
    return runs


@pytest.fixture(scope="module")
def photograph_run(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of Task I on the photographs."""
    folder = tmp_path_factory.mktemp("run") / "task1"
    arguments = ["--smoke", "--data", photographs, "--models", "variable_resnet18", "--device", "cpu"]
    assert main(load_script("task1").STUDY, [*map(str, arguments), "--output", str(folder)]) == 0
    return folder


class TestSmoke:
    @pytest.mark.parametrize("task", ["task1", "task2"])
    def test_results(self, smoke_runs: dict, task: str) -> None:
        folder, done = smoke_runs[task]
        assert done.returncode == 0, done.stderr
        results = json.loads((folder / "results.json").read_text())
        assert results["task"] == task
        assert results["dataset"] == "generated"
        assert results["seed"] == 0 and results["epochs"] == 1
        assert results["image_size"] == results["config"]["image_size"]
        expected = {
            "task1": ["resnet18", "variable_resnet18", "task1_published"],
            "task2": ["task2_published", "four_conv", "resnet34"],
        }
        assert list(results["models"]) == expected[task]
        for entry in results["models"].values():
            for key in ("params", "flops", "seconds", "train_loss", "val_loss"):
                assert entry[key] > 0
            for key in ("train_acc", "val_acc", "test_acc"):
                assert 0 <= entry[key] <= 100
            # Of 50 test images each one counts two percent.
            assert entry["test_acc"] % 2 == 0
            if task == "task1":
                assert list(entry["channels"]) == list(CHANNEL_SETS)
                assert entry["channels"]["RGB"] == entry["test_acc"]
        if task == "task2":
            assert results["models"]["resnet34"]["params"] == 21_310_322

    @pytest.mark.parametrize("task", ["task1", "task2"])
    def test_files_and_output(self, smoke_runs: dict, task: str) -> None:
        folder, done = smoke_runs[task]
        report = (folder / "report.md").read_text()
        assert report.strip() in done.stdout
        figures = {path.name for path in folder.glob("*.png")}
        assert {"learning_curves.png", "accuracy.png", "complexity.png"} <= figures
        assert ("channels.png" in figures) == (task == "task1")
        for name in json.loads((folder / "results.json").read_text())["models"]:
            for file in ("history.csv", "best.ckpt", "last.ckpt", "result.json"):
                assert (folder / name / file).is_file()
            assert f"\n{name}: " in done.stdout
        config = json.loads((folder / "config.json").read_text())
        assert StudyConfig.from_dict(config).to_dict() == config
        assert "Traceback" not in done.stderr

    def test_two_processes(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        arguments = ["--smoke", "--device", "cpu", "--precision", "float32", "--models", "task2_published"]
        done = subprocess.run(
            [*command, str(EXPERIMENTS / "task2.py"), *arguments, "--output", str(tmp_path / "run")],
            capture_output=True,
            text=True,
            timeout=240,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / "run" / "results.json").read_text())
        assert results["models"]["task2_published"]["test_acc"] % 2 == 0
        assert done.stdout.count("epoch 1/1") == 1
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        again = subprocess.run(
            done.args, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert again.returncode != 0 and "exists and is not empty" in again.stderr
        assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


class TestPresets:
    def test_paper(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: dict[str, StudyConfig] = {}
        monkeypatch.setattr(
            "dynconv_vision.training.study.run_study", lambda study, config, folder: seen.update({study.task: config})
        )
        for task in ("task1", "task2"):
            arguments = ["--preset", "paper", "--data", str(tmp_path), "--output", str(tmp_path / task)]
            assert main(load_script(task).STUDY, arguments) == 0
            config = seen[task]
            assert (config.image_size, config.denoise, config.normalize, config.limits) == (124, True, True, None)
            assert (config.train.learning_rate, config.train.batch_size, config.train.epochs) == (1e-3, 32, 30)
            assert config.train.schedule == "constant" and config.train.augment == "none"
        one, two = seen["task1"].train, seen["task2"].train
        assert (one.weight_decay, one.gradient_clip, one.early_stop_patience) == (1e-4, 2.0, 6)
        assert (two.weight_decay, two.gradient_clip, two.early_stop_patience) == (0.0, None, None)

    def test_explicit_options_override(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[StudyConfig] = []
        monkeypatch.setattr(
            "dynconv_vision.training.study.run_study", lambda study, config, folder: seen.append(config)
        )
        arguments = "--preset paper --image-size 64 --no-denoise --epochs 3 --batch-size 8 --seed 7 --models resnet34"
        assert main(load_script("task2").STUDY, [*arguments.split(), "--output", str(tmp_path / "run")]) == 0
        (config,) = seen
        assert (config.image_size, config.denoise, config.normalize) == (64, False, True)
        assert (config.train.epochs, config.train.batch_size, config.train.seed) == (3, 8, 7)
        assert config.models == ("resnet34",)
        assert StudyConfig.from_dict(json.loads((tmp_path / "run" / "config.json").read_text())) == config


class Linear(nn.Module):
    """A network that can press Ctrl-C."""

    press_at: int | None = None
    calls = 0

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(3 * image_size**2, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            type(self).calls += 1
            if type(self).calls == self.press_at:
                os.kill(os.getpid(), signal.SIGINT)
        return self.fc(self.dropout(images.flatten(1)))


@pytest.fixture
def tiny_study(monkeypatch: pytest.MonkeyPatch) -> Study:
    """Two linear networks on 60 generated images: ten steps an epoch, two epochs."""
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    monkeypatch.setattr(Linear, "calls", 0)
    for name in ("first", "second"):
        registry.register_model(name, task="task2")(lambda num_classes, image_size: Linear(num_classes, image_size))
    preset = Preset(
        models=("first", "second"),
        image_size=8,
        limits={"train": 60, "val": 50, "test": 50},
        train={"epochs": 2, "batch_size": 6, "device": "cpu", "precision": "float32"},
    )
    return Study("task2", "A study of this test.", {"first": Network(), "second": Network()}, {"demo": preset})


def numbers(folder: Path) -> dict:
    models = json.loads((folder / "results.json").read_text())["models"]
    return {name: {key: value for key, value in entry.items() if key != "seconds"} for name, entry in models.items()}


class TestStoppingAndContinuing:
    @pytest.mark.parametrize("press_at", [3, 27])
    def test_ctrl_c_and_resume(
        self,
        tiny_study: Study,
        tmp_path: Path,
        capsys: pytest.CaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        press_at: int,
    ) -> None:
        """In the first network and in the second one: the run ends with the numbers of one that was left alone."""
        assert main(tiny_study, ["--output", str(tmp_path / "whole")]) == 0
        monkeypatch.setattr(Linear, "calls", 0)
        monkeypatch.setattr(Linear, "press_at", press_at)
        broken = tmp_path / "broken"
        assert main(tiny_study, ["--output", str(broken)]) == 130
        last_line = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.fullmatch(rf"Stopped; resume with: python .* --output {re.escape(str(broken))} --resume", last_line)
        assert not (broken / "results.json").exists()
        assert main(tiny_study, ["--output", str(broken), "--resume"]) == 0
        assert numbers(broken) == numbers(tmp_path / "whole")
        # No step was taken twice, so no finished network was trained again.
        assert Linear.calls == 40

    def test_finished_run_is_not_trained_again(self, tiny_study: Study, tmp_path: Path) -> None:
        arguments = ["--output", str(tmp_path / "run")]
        assert main(tiny_study, arguments) == 0
        before, calls = numbers(tmp_path / "run"), Linear.calls
        assert main(tiny_study, [*arguments, "--resume"]) == 0
        assert numbers(tmp_path / "run") == before and Linear.calls == calls

    def test_real_signal(self, tmp_path: Path) -> None:
        command = [sys.executable, str(EXPERIMENTS / "task2.py"), "--smoke", "--models", "task2_published"]
        command += ["--image-size", "16", "--epochs", "100000", "--device", "cpu", "--precision", "float32"]
        with subprocess.Popen(
            [*command, "--output", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if "epoch 1/" in line:
                    break
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 130, errors
        assert "--resume" in errors.strip().splitlines()[-1] and "Traceback" not in errors
        assert (tmp_path / "run" / "task2_published" / "last.ckpt").is_file()

    def test_latest_run_without_output(
        self, tiny_study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(tiny_study, ["--resume"]) == 2
        assert "no run of task2 under runs/" in capsys.readouterr().err
        assert main(tiny_study, ["--models", "first", "--epochs", "1"]) == 0
        (run,) = Path("runs").iterdir()
        assert re.fullmatch(r"task2-\d{8}-\d{6}", run.name)
        assert main(tiny_study, ["--resume"]) == 0


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["--models", "resnet50"], "--models: got 'resnet50', expected names out of first, second"),
            (["--models", "first", "first"], "expected each name once"),
            (["--image-size", "0"], "--image-size: got 0, expected a whole number >= 1"),
            (["--epochs", "0"], "epochs: got 0, expected a whole number >= 1"),
            (["--data", "/does/not/exist"], "/does/not/exist"),
            (["--data", ""], "--data: got '', expected a folder"),
            (["--seed", str(2**63)], f"seed: got {2**63}, expected a whole number >= 0 and <= {2**63 - 1}"),
        ],
    )
    def test_options(
        self, tiny_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], text: str
    ) -> None:
        assert main(tiny_study, [*arguments, "--output", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert error.splitlines()[-1].startswith("error: ") and text in error
        assert not (tmp_path / "run").exists()  # the mended command may use the same folder

    def test_output_that_cannot_be_written(
        self, tiny_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("kept")
        assert main(tiny_study, ["--output", str(tmp_path / "file" / "run")]) == 2
        assert capsys.readouterr().err.startswith(f"error: --output: cannot write in {tmp_path / 'file' / 'run'}: ")
        assert (tmp_path / "file").read_text() == "kept"

    @pytest.mark.parametrize(
        ("file", "change", "text"),
        [
            ("config.json", {"models": ["resnet99"]}, "models: got 'resnet99', expected names out of first, second"),
            ("config.json", {"data": 5}, "data: got 5, expected a str"),
            ("config.json", {"limits": 5}, "limits: got 5, expected numbers by split, or null"),
            ("first/result.json", {"params": "many"}, "first.params: got 'many', expected a number or null"),
            ("first/result.json", None, "result.json: got None, expected an object; delete it to test first again"),
        ],
    )
    def test_resume_of_a_damaged_run(
        self, tiny_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture, file: str, change: dict, text: str
    ) -> None:
        arguments = ["--output", str(tmp_path), "--models", "first", "--epochs", "1"]
        assert main(tiny_study, arguments) == 0
        content = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps(None if change is None else content | change))
        assert main(tiny_study, ["--output", str(tmp_path), "--resume"]) == 2
        assert text in capsys.readouterr().err
        (tmp_path / file).write_text(json.dumps(content))
        assert main(tiny_study, ["--output", str(tmp_path), "--resume"]) == 0

    def test_device_that_is_not_there(
        self,
        tiny_study: Study,
        tmp_path: Path,
        capsys: pytest.CaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(tiny_study, ["--device", "cuda", "--output", str(tmp_path / "run")]) == 2
        assert "error: device: got 'cuda', but" in capsys.readouterr().err

    def test_earlier_run_is_kept(self, tiny_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        arguments = ["--output", str(tmp_path), "--models", "first", "--epochs", "1"]
        assert main(tiny_study, arguments) == 0
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert main(tiny_study, arguments) == 2
        assert "exists and is not empty; continue it with --resume" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    def test_resume_with_other_settings(self, tiny_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        arguments = ["--output", str(tmp_path), "--models", "first"]
        assert main(tiny_study, [*arguments, "--epochs", "1"]) == 0
        assert main(tiny_study, [*arguments, "--epochs", "3", "--resume"]) == 2
        assert f"--resume: epochs is 1 in {tmp_path}, got 3" in capsys.readouterr().err

    def test_resume_of_the_other_task(self, smoke_runs: dict, capsys: pytest.CaptureFixture) -> None:
        assert main(load_script("task2").STUDY, ["--resume", "--output", str(smoke_runs["task1"][0])]) == 2
        assert "is a run of task1, expected task2" in capsys.readouterr().err

    def test_wrong_settings_file(self, tiny_study: Study, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        (tmp_path / "config.json").write_text("{")
        assert main(tiny_study, ["--resume", "--output", str(tmp_path)]) == 2
        assert "not a JSON file" in capsys.readouterr().err
        (tmp_path / "config.json").write_text(json.dumps({"train": TrainConfig().to_dict(), "models": []}))
        assert main(tiny_study, ["--resume", "--output", str(tmp_path)]) == 2
        assert "a setting is missing or unknown" in capsys.readouterr().err

    def test_broken_image(
        self, tiny_study: Study, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        data = tmp_path / "data"
        data.mkdir()
        for file in photographs.iterdir():
            (data / file.name).write_bytes(file.read_bytes())
        (data / "train3.png").write_bytes(b"no image")
        arguments = ["--data", str(data), "--models", "first", "--epochs", "1", "--output"]
        assert main(tiny_study, [*arguments, str(tmp_path / "one")]) == 2
        assert "train.txt:4" in capsys.readouterr().err
        with pytest.warns(UserWarning):
            assert main(tiny_study, [*arguments, str(tmp_path / "two"), "--skip-bad-images"]) == 0
        assert json.loads((tmp_path / "two" / "results.json").read_text())["images"]["train"] == 39


class TestEvaluate:
    def test_agrees_with_the_run(self, photographs: Path, photograph_run: Path, capsys: pytest.CaptureFixture) -> None:
        (entry,) = json.loads((photograph_run / "results.json").read_text())["models"].values()
        checkpoint = photograph_run / "variable_resnet18" / "best.ckpt"
        arguments = ["--checkpoint", checkpoint, "--data", photographs, "--list", "test.txt", "--device", "cpu"]
        arguments += ["--precision", "float32"]
        assert load_script("evaluate").main([*map(str, arguments)]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        measured = json.loads(line)
        assert measured["model"] == "variable_resnet18" and measured["images"] == 15
        assert measured["accuracy"] == entry["test_acc"]
        assert measured["channels"] == entry["channels"]

    def test_as_a_program(self, photographs: Path, smoke_runs: dict) -> None:
        checkpoint = smoke_runs["task2"][0] / "task2_published" / "best.ckpt"
        done = run_script(
            "evaluate", "--checkpoint", checkpoint, "--data", photographs, "--list", photographs / "val.txt"
        )
        assert done.returncode == 0, done.stderr
        measured = json.loads(done.stdout)
        assert measured["images"] == 12 and "channels" not in measured

    @pytest.fixture
    def checkpoint(self, photograph_run: Path) -> dict:
        return torch.load(photograph_run / "variable_resnet18" / "best.ckpt", weights_only=True)

    def fails(self, capsys: pytest.CaptureFixture, checkpoint: Path, data: Path, list_file: Path) -> str:
        arguments = ["--checkpoint", checkpoint, "--data", data, "--list", list_file, "--device", "cpu"]
        assert load_script("evaluate").main([*map(str, arguments)]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        return output.err

    def fails_in_one_line(self, capsys: pytest.CaptureFixture, checkpoint: Path, data: Path, list_file: Path) -> str:
        (line,) = self.fails(capsys, checkpoint, data, list_file).splitlines()
        assert line.startswith("error: checkpoint: ")
        return line

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"model": "resnet34"}, "does not fit 'resnet34' with 3 classes: "),
            ({"model": "resnet99"}, "holds 'resnet99', which cannot be built here"),
            ({"classes": ["a", "b", "c", "d"]}, "fc.bias: got shape (3,), expected (4,)"),
            ({"classes": 5}, "classes: got 5, expected a list"),
            ({"image_size": "big"}, "image_size: got 'big', expected a int"),
            ({"options": {"depth": 9}}, "depth: no option of the model 'variable_resnet18'"),
            ({"format": 2}, "got format 2, expected 1"),
        ],
        ids=str,
    )
    def test_checkpoint_with_another_card(
        self,
        photographs: Path,
        tmp_path: Path,
        checkpoint: dict,
        capsys: pytest.CaptureFixture,
        change: dict,
        text: str,
    ) -> None:
        checkpoint["dynconv_vision"] |= change
        torch.save(checkpoint, tmp_path / "other.ckpt")
        line = self.fails_in_one_line(capsys, tmp_path / "other.ckpt", photographs, photographs / "test.txt")
        assert "other.ckpt" in line and text in line

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"dynconv_vision": [1]}, "got a card that is a list, expected a dictionary"),
            ({"state_dict": [1]}, "state_dict: got a list, expected a dictionary of tensors"),
            ({"state_dict": {"model.fc.bias": None}}, "bn1.bias is missing"),
        ],
        ids=str,
    )
    def test_checkpoint_with_other_entries(
        self,
        photographs: Path,
        tmp_path: Path,
        checkpoint: dict,
        capsys: pytest.CaptureFixture,
        change: dict,
        text: str,
    ) -> None:
        torch.save(checkpoint | change, tmp_path / "other.ckpt")
        line = self.fails_in_one_line(capsys, tmp_path / "other.ckpt", photographs, photographs / "test.txt")
        assert "other.ckpt" in line and text in line

    def test_checkpoint_with_other_weights(
        self, photographs: Path, tmp_path: Path, checkpoint: dict, capsys: pytest.CaptureFixture
    ) -> None:
        checkpoint["state_dict"]["model.fc.bias"].fill_(float("nan"))
        torch.save(checkpoint, tmp_path / "other.ckpt")
        line = self.fails_in_one_line(capsys, tmp_path / "other.ckpt", photographs, photographs / "test.txt")
        assert "got a loss of nan: the network has diverged" in line
        checkpoint["state_dict"]["model.fc.bias"] = None
        torch.save(checkpoint, tmp_path / "other.ckpt")
        line = self.fails_in_one_line(capsys, tmp_path / "other.ckpt", photographs, photographs / "test.txt")
        assert "fc.bias: got a NoneType, expected a tensor" in line

    def test_damaged_and_missing_checkpoints(
        self, photographs: Path, photograph_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        whole = (photograph_run / "variable_resnet18" / "best.ckpt").read_bytes()
        (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
        line = self.fails_in_one_line(capsys, tmp_path / "half.ckpt", photographs, photographs / "test.txt")
        assert "cannot be read: damaged, or no torch checkpoint" in line
        line = self.fails_in_one_line(capsys, tmp_path / "none.ckpt", photographs, photographs / "test.txt")
        assert "none.ckpt is not a file" in line
        line = self.fails_in_one_line(capsys, photographs / "test0.png", photographs, photographs / "test.txt")
        assert "cannot be read: damaged, or no torch checkpoint" in line and "weights_only" not in line

    def test_label_out_of_range(
        self, photographs: Path, photograph_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        (tmp_path / "list.txt").write_text("test0.png 0\ntest1.png 3\n")
        checkpoint = photograph_run / "variable_resnet18" / "best.ckpt"
        error = self.fails(capsys, checkpoint, photographs, tmp_path / "list.txt")
        assert "error: " in error and "list.txt:2: label out of range" in error

    def test_missing_list(self, photographs: Path, photograph_run: Path, capsys: pytest.CaptureFixture) -> None:
        checkpoint = photograph_run / "variable_resnet18" / "best.ckpt"
        error = self.fails(capsys, checkpoint, photographs, Path("none.txt"))
        assert error == f"error: --list: no such list file: neither none.txt nor {photographs / 'none.txt'}\n"
        error = self.fails(capsys, checkpoint, photographs / "none", photographs / "test.txt")
        assert error == f"error: --data: got {str(photographs / 'none')!r}, expected a folder that exists\n"


class TestTask1Protocol:
    @pytest.mark.parametrize("preset", ["strong", "reduced", "reduced_paper"])
    def test_networks_can_be_built(self, preset: str) -> None:
        study = load_script("task1").STUDY
        for name, network in study.networks.items():
            train = TrainConfig.from_dict(dict(study.presets[preset].train) | dict(network.train))
            options = dict(study.presets[preset].options) | dict(network.options)
            model = registry.create_model(network.model or name, 5, 16, **options)
            teacher = registry.create_model(network.teacher, 5, 16) if network.teacher else None
            ClassificationModule(model, dataclasses.replace(train, ema_decay=None), 5, 16, teacher=teacher)
            known = set(getattr(model, "channels", "RGB"))
            assert network.test_sets is None or any(set(names) <= known for names in network.test_sets)
        for group in study.groups.values():
            assert set(group) <= set(study.networks)
        assert [name for name in study.networks if name.startswith("specialist_")] == list(study.groups["specialists"])

    def test_reduced_networks(self, photographs: Path, tmp_path: Path) -> None:
        """A preset's options reach the networks, the run's settings, its weights and its summary."""
        size = {"layers": [1, 1, 1, 1], "width": 32}
        arguments = f"--preset reduced --image-size 16 --epochs 1 --batch-size 8 --device cpu --data {photographs}"
        run = tmp_path / "runs" / "a"
        more = ["--precision", "float32", "--models", "variable_resnet18", "--output", str(run)]
        assert main(load_script("task1").STUDY, arguments.split() + more) == 0
        results = json.loads((run / "results.json").read_text())
        assert results["config"]["options"] == size
        model, card = load_network(run / "variable_resnet18" / "best.ckpt")
        assert card.options == size
        assert results["models"]["variable_resnet18"]["params"] == count_parameters(model) < 1_300_000
        assert "16 px, networks with layers [1, 1, 1, 1], width 32, recipe `reduced`" in write_summary(
            tmp_path / "runs"
        )

    def test_distilled(self, photographs: Path, tmp_path: Path) -> None:
        """It learns, on drawn channels, from the run's own network on all of them."""
        arguments = ["--smoke", "--data", photographs, "--device", "cpu", "--output", tmp_path / "a"]
        assert (
            main(load_script("task1").STUDY, [*map(str, arguments), "--models", "resnet18", "variable_distilled"]) == 0
        )
        results = json.loads((tmp_path / "a" / "results.json").read_text())
        assert set(results["models"]["variable_distilled"]["channels"]) == set(CHANNEL_SETS)

    def test_channels_never_seen(self, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        names = ["specialist_RB", "variable_without_B", "static_without_B"]
        arguments = [
            "--smoke",
            "--data",
            photographs,
            "--models",
            *names,
            "--device",
            "cpu",
            "--output",
            tmp_path / "a",
        ]
        assert main(load_script("task1").STUDY, [*map(str, arguments)]) == 0
        models = json.loads((tmp_path / "a" / "results.json").read_text())["models"]
        assert list(models["specialist_RB"]["channels"]) == ["RB"]
        assert list(models["variable_without_B"]["channels"]) == list(CHANNEL_SETS)
        # Without kernels for B, blue alone says nothing, and RB is R.
        static = models["static_without_B"]["channels"]
        assert list(static) == [each for each in CHANNEL_SETS if each != "B"]
        assert static["RB"] == static["R"] and static["RGB"] == static["RG"]
        with np.load(tmp_path / "a" / "variable_without_B" / "predictions.npz") as file:
            right = file["test/RB"] == file["test/labels"]
            assert 100 * right.mean() == pytest.approx(models["variable_without_B"]["channels"]["RB"], abs=1e-3)
        capsys.readouterr()
        assert load_script("summarize").main([str(tmp_path)]) == 0
        output = capsys.readouterr().out
        assert "channels never seen" in output and "`variable_without_B`" in output

    def test_summarize_an_empty_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        assert load_script("summarize").main([str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no network is done")

    def test_run_all_goes_on_where_it_was(self, tmp_path: Path) -> None:
        """With a program in Python's place that notes its arguments, and fails once in the midst of a run."""
        fake = tmp_path / "python"
        fake.write_text(
            "#!/usr/bin/env bash\n"
            f'echo "$@" >> {tmp_path}/calls\n'
            '[[ $2 == --output ]] || exit 0\nmkdir -p "$3"; touch "$3/config.json"\n'
            f"[[ $3 != *seed1-specialists || -e {tmp_path}/failed ]] || {{ touch {tmp_path}/failed; exit 7; }}\n"
        )
        fake.chmod(0o755)
        settings = {"PYTHON": str(fake), "SEEDS": "0 1", "SIZES": "64", "RECIPES": "strong", "EPOCHS": "2"}
        settings |= {"TASKS": "task1"}

        def run() -> tuple[int, list[str]]:
            (tmp_path / "calls").write_text("")
            command = ["bash", str(EXPERIMENTS / "run_all.sh"), "DATA", str(tmp_path / "out")]
            done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=60)
            return done.returncode, (tmp_path / "calls").read_text().splitlines()

        code, calls = run()
        assert code == 7 and len(calls) == 4
        runs = tmp_path / "out" / "task1" / "strong-64px"
        assert calls[0] == (
            f"{EXPERIMENTS}/task1.py --output {runs}/seed0-stems --device auto --data DATA --image-size 64 --epochs 2 "
            "--preset strong --seed 0 --models stems"
        )
        code, calls = run()
        assert code == 0
        assert calls[0] == f"{EXPERIMENTS}/task1.py --output {runs}/seed1-specialists --resume --device auto"
        assert [call.split()[-1] for call in calls[1:5]] == ["ablations", "ablations", "wide", "wide"]
        assert calls[5] == f"{EXPERIMENTS}/summarize.py {runs}"
        assert len((tmp_path / "out" / "times.csv").read_text().splitlines()) == 8
        code, calls = run()
        assert code == 0 and calls == [f"{EXPERIMENTS}/summarize.py {runs}"]

    def test_run_all_of_task2(self, tmp_path: Path) -> None:
        fake = tmp_path / "python"
        fake.write_text(f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/calls\n[[ $2 != --output ]] || mkdir -p "$3"\n')
        fake.chmod(0o755)
        settings = {"PYTHON": str(fake), "SEEDS": "0", "SIZES": "64 124", "TASKS": "task2", "LONG": "90"}
        command = ["bash", str(EXPERIMENTS / "run_all.sh"), "DATA", str(tmp_path / "out")]
        subprocess.run(command, env=os.environ | settings, check=True, capture_output=True, timeout=60)
        calls = [call.replace(str(tmp_path / "out"), "OUT") for call in (tmp_path / "calls").read_text().splitlines()]
        runs = [(call.split("OUT/task2/")[1].split()[0], call.split()[-1]) for call in calls if "--output" in call]
        assert runs == [
            ("strong-64px/seed0-main", "main"),
            ("strong-64px/seed0-sizes", "sizes"),
            ("strong-64px/seed0-ablations", "ablations"),
            ("strong-124px/seed0-main", "main"),
            ("paper-64px/seed0-main", "main"),
            ("paper-124px/seed0-main", "main"),
            ("strong-64px-long/seed0-main", "main"),
        ]
        assert "--epochs 90" in calls[6]
        summaries = {call.split()[1]: call.split()[2:] for call in calls if "summarize.py" in call}
        assert summaries["OUT/task2/strong-64px-long"] == ["--against", "OUT/task2/paper-64px"]
        assert summaries["OUT/task2/strong-124px"] == ["--against", "OUT/task2/paper-124px"]
        assert summaries["OUT/task2/paper-64px"] == []


class TestExport:
    def test_weights_of_half_the_size(
        self, photographs: Path, photograph_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        checkpoint, file = photograph_run / "variable_resnet18" / "best.ckpt", tmp_path / "new" / "half.safetensors"
        assert load_script("export_weights").main(["--checkpoint", str(checkpoint), "--output", str(file)]) == 0
        assert file.stat().st_size < 24e6
        model, card = load_network(checkpoint)
        halved = create_model("variable_resnet18", pretrained=file).eval()
        assert halved.fc.out_features == card.num_classes == 3
        x = torch.rand(4, 2, 16, 16)
        with torch.no_grad():
            expected, out = model(x, ("B", "G")), halved(x, ("B", "G"))
        torch.testing.assert_close(out, expected, atol=0.05, rtol=0.05)
        assert torch.equal(halved.norm.mean, model.norm.mean)

        capsys.readouterr()
        arguments = ["--data", photographs, "--list", "test.txt", "--device", "cpu", "--precision", "float32"]
        assert load_script("evaluate").main([*map(str, ["--checkpoint", file, *arguments])]) == 0
        assert json.loads(capsys.readouterr().out)["model"] == "variable_resnet18"

        with pytest.raises(ValueError, match="has weights of 'variable_resnet18', expected 'resnet18'"):
            create_model("resnet18", pretrained=file)
        with pytest.raises(ValueError, match="pretrained: the weights of 'variable_resnet18' do not fit"):
            create_model("variable_resnet18", num_classes=7, pretrained=file)
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(StudyError, match="half.safetensors cannot be read: damaged"):
            load_network(file)

    def test_export_of_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        arguments = ["--checkpoint", str(tmp_path / "none.ckpt"), "--output", str(tmp_path / "file")]
        assert load_script("export_weights").main(arguments) == 2
        assert "none.ckpt is not a file" in capsys.readouterr().err


class TestDrawStem:
    def test_pictures(self, photographs: Path, photograph_run: Path, tmp_path: Path) -> None:
        checkpoint = photograph_run / "variable_resnet18" / "best.ckpt"
        arguments = ["--checkpoint", checkpoint, "--data", photographs, "--list", "test.txt", "--output", tmp_path]
        assert load_script("draw_stem").main([*map(str, arguments)]) == 0
        for name in ("kernels.png", "attention.png"):
            picture = cv2.imread(str(tmp_path / name))
            # Something is drawn, in more than one colour.
            assert min(picture.shape[:2]) > 300 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20

    def test_other_networks(self, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        checkpoint = tmp_path / "plain.safetensors"
        card = ModelCard("task1", "resnet18", {}, ("a", "b", "c"), 16, False, False)
        write_weights(checkpoint, create_model("resnet18", 3).state_dict(), card.to_dict())
        arguments = ["--checkpoint", checkpoint, "--data", photographs, "--list", "test.txt", "--output", tmp_path]
        assert load_script("draw_stem").main([*map(str, arguments)]) == 2
        assert "'resnet18' has no VariableInputConv with an attention" in capsys.readouterr().err


class TestDistillation:
    def test_a_pupil_learns_from_the_runs_own_teacher(self, photographs: Path, tmp_path: Path) -> None:
        study = dataclasses.replace(
            load_script("task2").STUDY,
            networks={
                "resnet34": Network(options={"layers": (1, 1, 1, 1)}),
                "pupil": Network("four_conv", {"widths": (8, 8, 8, 8)}, {"distillation": 0.5}, teacher="resnet34"),
            },
        )
        arguments = ["--smoke", "--data", str(photographs), "--device", "cpu", "--output"]
        folder = tmp_path / "both"
        assert main(study, [*arguments, str(folder), "--models", "resnet34", "pupil"]) == 0
        results = json.loads((folder / "results.json").read_text())
        assert list(results["models"]) == ["resnet34", "pupil"]
        # Checkpoints hold the pupil alone.
        assert load_network(folder / "pupil" / "best.ckpt")[1].model == "four_conv"

    def test_without_its_teacher(self, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        arguments = ["--smoke", "--data", str(photographs), "--device", "cpu", "--output", str(tmp_path / "one")]
        assert main(load_script("task2").STUDY, [*arguments, "--models", "four_conv_distilled"]) == 2
        message = "--models: four_conv_distilled learns from resnet34, expected that earlier in the same run"
        assert message in capsys.readouterr().err


class TestDrawDeformable:
    def test_pictures(self, photographs: Path, tmp_path: Path) -> None:
        checkpoint = tmp_path / "small.safetensors"
        options = {"widths": (8, 16, 16, 8)}
        card = ModelCard("task2", "four_conv", options, ("a", "b", "c"), 32, False, False)
        torch.manual_seed(0)
        model = create_model("four_conv", 3, **options)
        for layer in (model.stages[2].conv, model.stages[3].conv):
            torch.nn.init.normal_(layer.offset_conv.weight, std=0.05)
        write_weights(checkpoint, model.state_dict(), card.to_dict())
        folder = tmp_path / "new"
        arguments = ["--checkpoint", checkpoint, "--data", photographs, "--list", "test.txt", "--output", folder]
        assert load_script("draw_deformable").main([*map(str, arguments), "--images", "3"]) == 0
        for name in ("samples.png", "maps.png"):
            picture = cv2.imread(str(folder / name))
            assert min(picture.shape[:2]) > 300 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
        with (folder / "offsets.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["layer"] for row in rows] == ["stages.2.conv", "stages.3.conv"]
        few = [photographs / "test0.png", photographs / "test1.png"]
        assert load_script("draw_deformable").main([*map(str, [*arguments, "--pictures", *few])]) == 0
        assert cv2.imread(str(folder / "maps.png")).shape[1] < picture.shape[1]
        for row in rows:
            shares = [float(value) for key, value in row.items() if key.startswith("share")]
            assert len(shares) == 6 and sum(shares) == pytest.approx(1, abs=1e-3)
            assert float(row["mask mean"]) == 1 and float(row["mask sd"]) == 0

    def test_samples_are_where_the_operator_samples(self) -> None:
        """On an image whose value is a linear function of the place, bilinear sampling gives the place away."""
        script = load_script("draw_deformable")
        torch.manual_seed(0)
        y, x = torch.meshgrid(torch.arange(13.0), torch.arange(11.0), indexing="ij")
        image = (100 * y + x)[None, None]
        layer = DeformableConv2d(1, 9, 3, stride=2, padding=1, bias=False)
        with torch.no_grad():
            # Output channel k is tap k.
            layer.regular_conv.weight.copy_(torch.eye(9).view(9, 1, 3, 3))
            torch.nn.init.uniform_(layer.offset_conv.bias, -0.9, 0.9)
            torch.nn.init.uniform_(layer.modulator_conv.bias, -1, 1)
            out = layer(image)
            offset, mask = script.predictions(layer, image)
            samples = script.sampled(layer, offset, mask, 0, (3, 2))
        expected = samples.weights * (100 * samples.taps[:, 0] + samples.taps[:, 1])
        np.testing.assert_allclose(out[0, :, 3, 2].numpy(), expected, rtol=1e-4)
        assert samples.centre.tolist() == [6, 4]

    def test_class_activation_is_the_weighted_map(self) -> None:
        """For mean pooling and a linear classifier, Grad-CAM's weights are the class's, over the number of pixels."""
        script = load_script("draw_deformable")
        maps = torch.rand(2, 3, 4, 4, requires_grad=True)
        weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 0.0]])
        found, classes = script.class_activation(maps.mean((2, 3)) @ weight.t(), maps)
        assert classes.tolist() == [1, 1]
        expected = maps.detach()[:, 1].numpy()
        np.testing.assert_allclose(found, expected / expected.max((1, 2), keepdims=True), rtol=1e-5)

    def test_other_networks(self, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        checkpoint = tmp_path / "plain.safetensors"
        card = ModelCard("task2", "resnet34", {"layers": [1, 1, 1, 1]}, ("a", "b", "c"), 16, False, False)
        model = create_model("resnet34", 3, layers=(1, 1, 1, 1))
        write_weights(checkpoint, model.state_dict(), card.to_dict())
        arguments = ["--checkpoint", checkpoint, "--data", photographs, "--list", "test.txt", "--output", tmp_path]
        assert load_script("draw_deformable").main([*map(str, arguments)]) == 2
        assert "'resnet34' has no DeformableConv2d" in capsys.readouterr().err
        assert load_script("draw_deformable").main([*map(str, arguments), "--images", "0"]) == 2
        assert "--images: got 0, expected at least 1" in capsys.readouterr().err

    def test_labels_that_the_network_does_not_have(
        self, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        checkpoint = tmp_path / "small.safetensors"
        card = ModelCard("task2", "four_conv", {"widths": [8, 8, 8, 8]}, ("a", "b"), 16, False, False)
        write_weights(checkpoint, create_model("four_conv", 2, widths=(8, 8, 8, 8)).state_dict(), card.to_dict())
        arguments = ["--checkpoint", checkpoint, "--data", photographs, "--list", "test.txt", "--output", tmp_path]
        assert load_script("draw_deformable").main([*map(str, arguments)]) == 2
        assert "label" in capsys.readouterr().err

    def test_unreadable_pictures(self, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        checkpoint, broken = tmp_path / "small.safetensors", tmp_path / "broken.png"
        broken.write_bytes(b"no image")
        card = ModelCard("task2", "four_conv", {"widths": [8, 8, 8, 8]}, ("a", "b", "c"), 16, False, False)
        write_weights(checkpoint, create_model("four_conv", 3, widths=(8, 8, 8, 8)).state_dict(), card.to_dict())
        arguments = ["--checkpoint", checkpoint, "--data", photographs, "--list", "test.txt", "--output", tmp_path]
        assert load_script("draw_deformable").main([*map(str, [*arguments, "--pictures", broken])]) == 2
        assert "broken.png" in capsys.readouterr().err
