# SPDX-License-Identifier: BSD-3-Clause
"""The frame of both studies: command line, data, training of several networks, test, results and report.

A run's folder holds config.json (all settings), results.json, report.md with its figures, and for each network a folder
with history.csv, best.ckpt, last.ckpt, predictions.npz, result.json (written when the network is done) and logs/.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import torch.distributed
import torchvision

from dynconv_vision.data import load_dataset
from dynconv_vision.data.derived import CHANNEL_NAMES, channel_correlation, channel_statistics
from dynconv_vision.models import ChannelNorm, VariableInputConv, count_flops, count_parameters, create_model
from dynconv_vision.reporting import ResultsError, write_report
from dynconv_vision.reporting.source_report import CHANNEL_SETS

from .callbacks import BEST, TrainingInterrupted
from .checkpoints import ModelCard, load_network
from .config import DEVICES, PRECISIONS, StudyError, TrainConfig, read_json, write_json
from .datamodule import Dataset, Split, prepare_images
from .hardware import describe_hardware, resolve_device, resolve_precision
from .train import Predictions, predict, train_model

CONFIG, RESULT, RESULTS, PREDICTIONS = "config.json", "result.json", "results.json", "predictions.npz"
_DATA_LOCK = ".data.lock"

#: Settings of a modern recipe for 64 pixels, which both studies' preset "strong" builds on.
STRONG_RECIPE: Mapping[str, Any] = {
    "epochs": 30,
    "batch_size": 128,
    "optimizer": "adamw",
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "gradient_clip": 2.0,
    "schedule": "cosine",
    "warmup_epochs": 2.0,
    "label_smoothing": 0.1,
    "augment": "strong",
    "ema_decay": 0.998,
}
#: What becomes of it where there is time for few epochs: less to be learned from, sooner.
SHORT_RECIPE: Mapping[str, Any] = {**STRONG_RECIPE, "epochs": 8, "warmup_epochs": 0.8, "augment": "light"}


@dataclass(frozen=True)
class Preset:
    """A set of settings that one word asks for; explicit options override it.

    Attributes:
        models: Networks to train.
        image_size: Height and width of the images, in pixels.
        denoise, normalize: Preprocessing, see `dynconv_vision.data.load_dataset`.
        limits: Greatest numbers of generated images by split.
        train: Settings for `TrainConfig`.
        options: Keyword arguments of `create_model` for every network.
    """

    models: tuple[str, ...]
    image_size: int
    denoise: bool = False
    normalize: bool = False
    limits: Mapping[str, int] | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """A network of a study, and how it departs from the other ones' training.

    Attributes:
        model: Its name in `dynconv_vision.models`; the study's own name for it if empty.
        options: Keyword arguments of `create_model`, over those of the preset.
        train: Settings of `TrainConfig`.
        teacher: A network of the same run, earlier in it, that this one learns from; its settings have the weight,
            `distillation`.
        test_sets: Task I: sets of channels that it is tested on, the last one being the whole; None: the seven of R, G
            and B.
    """

    model: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    test_sets: tuple[tuple[str, ...], ...] | None = None
    teacher: str = ""


@dataclass(frozen=True)
class Study:
    """One of the source report's two tasks.

    Attributes:
        task: "task1" or "task2".
        question: One line for `--help`.
        networks: The networks to choose from, by the name that results have.
        presets: By name; "demo" is the default and "smoke" is what `--smoke` takes.
        groups: Names that stand for several networks on the command line.
    """

    task: str
    question: str
    networks: Mapping[str, Network]
    presets: Mapping[str, Preset]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyConfig:
    """All settings of one run, saved as config.json; `limits` None means all images."""

    task: str
    preset: str
    data: str
    image_size: int
    denoise: bool
    normalize: bool
    limits: dict[str, int] | None
    skip_bad_images: bool
    models: tuple[str, ...]
    train: TrainConfig
    options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return dataclasses.asdict(self) | {"models": list(self.models), "train": self.train.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StudyConfig:
        """The inverse of `to_dict`.

        Raises:
            StudyError: A setting is missing, unknown or of another type.
        """
        try:
            train = TrainConfig.from_dict(values["train"])
            config = cls(**values | {"models": tuple(values["models"]), "train": train})
        except (KeyError, TypeError) as error:
            raise StudyError(f"{CONFIG}: a setting is missing or unknown: {error}") from None
        kinds = {"task": str, "preset": str, "data": str, "image_size": int, "denoise": bool, "normalize": bool}
        for name, kind in kinds.items():
            if not isinstance(getattr(config, name), kind):
                raise StudyError(f"{CONFIG}: {name}: got {getattr(config, name)!r}, expected a {kind.__name__}")
        if not isinstance(config.limits, dict | None):
            raise StudyError(f"{CONFIG}: limits: got {config.limits!r}, expected numbers by split, or null")
        if not isinstance(config.options, dict):
            raise StudyError(f"{CONFIG}: options: got {config.options!r}, expected settings of networks by name")
        return config


def main(study: Study, argv: Sequence[str] | None = None) -> int:
    """Run a study from its command line.

    Returns:
        The exit code: 0, 2 after an error that the user can mend, 130 or 143 after Ctrl-C or SIGTERM.
    """
    options = _parser(study).parse_args(argv)
    folder: Path | None = None
    try:
        folder, config = _open_run(study, options)
        run_study(study, config, folder)
    except (StudyError, TrainingInterrupted, KeyboardInterrupt) as stop:
        if isinstance(stop, StudyError):
            _say(f"error: {stop}")
            if folder is not None and not options.resume:
                _remove_if_unused(folder)
            return 2
        number = stop.signal if isinstance(stop, TrainingInterrupted) else 2
        if folder is not None:
            _say(f"Stopped; resume with: python {sys.argv[0]} --output {folder} --resume")
        return 128 + number
    return 0


def _remove_if_unused(folder: Path) -> None:
    """Take back a run's folder that holds nothing but its settings, so that the mended command may use it."""
    if _is_main_process() and {path.name for path in folder.iterdir()} <= {CONFIG, _DATA_LOCK}:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def run_study(study: Study, config: StudyConfig, folder: Path) -> dict[str, Any]:
    """Train and test the networks of a run that are not done yet, and write results and report.

    Args:
        study: The study.
        config: Settings of the run.
        folder: The run's folder, which exists.

    Returns:
        The contents of results.json.

    Raises:
        StudyError: Data or settings are wrong, or training diverged.
        TrainingInterrupted: SIGINT or SIGTERM came; the state is saved.
    """
    device = resolve_device(config.train.device)
    precision = resolve_precision(config.train.precision, device)
    try:
        with _one_at_a_time(folder):
            dataset = load_dataset(
                config.data,
                image_size=config.image_size,
                denoise=config.denoise,
                normalize=config.normalize,
                skip_bad_images=config.skip_bad_images,
                limits=config.limits,
                progress=_is_main_process(),
            )
    except (ValueError, OSError) as error:
        raise StudyError(str(error)) from error
    sizes = {name: len(getattr(dataset, name)) for name in ("train", "val", "test")}
    _print(
        f"{dataset.name}: {len(dataset.classes)} classes, {config.image_size}x{config.image_size} pixels, "
        + ", ".join(f"{count} {name}" for name, count in sizes.items())
    )
    _print(f"{describe_hardware(device)}; {precision}; results in {folder}")

    models: dict[str, Any] = {}
    for name in config.models:
        result = folder / name / RESULT
        if not result.exists():
            entry = _train_and_test(study, config, name, dataset, folder / name)
            if _is_main_process():
                write_json(result, entry)
        if _is_main_process():
            models[name] = read_json(result)
            if not isinstance(models[name], dict):
                raise StudyError(f"{result}: got {models[name]!r}, expected an object; delete it to test {name} again")
    results = {
        "task": config.task,
        "dataset": dataset.name,
        "image_size": config.image_size,
        "seed": config.train.seed,
        "epochs": config.train.epochs,
        "models": models,
        "images": sizes,
        "num_classes": len(dataset.classes),
        "device": device,
        "hardware": describe_hardware(device),
        "precision": precision,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "lightning": lightning.__version__,
        },
        "config": config.to_dict(),
    }
    if _is_main_process():
        write_json(folder / RESULTS, results)
        try:
            report = write_report(folder)
        except ResultsError as error:
            raise StudyError(str(error)) from error
        print(f"\n{report}\nReport, figures and results: {folder}")
    return results


def predict_checkpoint(
    checkpoint: Path, split: Split, test_sets: Sequence[Sequence[str]] | None = None, **settings: Any
) -> tuple[ModelCard, dict[str, Predictions]]:
    """What the network of a checkpoint says of a split, on each set of channels if it belongs to Task I.

    Args:
        checkpoint: A best.ckpt or last.ckpt.
        split: Images and labels.
        test_sets: Task I: the sets; None: the seven of R, G and B, or those of them that the network knows. A network
            without kernels for channels of unknown identity does not see those, nor is it asked about sets of them.
        **settings: Passed to `predict`.

    Returns:
        The checkpoint's card, and the predictions by set of channels ("RG"), the whole one last; "" for Task II.

    Raises:
        StudyError: The checkpoint or the labels do not fit, or the loss is no finite number.
    """
    model, card = load_network(checkpoint)
    sets: dict[str, tuple[str, ...] | None] = {"": None}
    if card.task == "task1":
        known = getattr(model, "channels", tuple("RGB"))
        if test_sets is None:
            test_sets = [tuple(name) for name in CHANNEL_SETS if set(name) <= set(known)]
        blind = not getattr(model, "takes_unknown", False)
        sets = {"".join(names): tuple(name for name in names if name in known or not blind) for names in test_sets}
    made = {
        name: predict(model, split, card.num_classes, channels=channels, **settings)
        for name, channels in sets.items()
        if channels != ()
    }
    for each in made.values():
        if not math.isfinite(each.loss):
            raise StudyError(f"checkpoint: {checkpoint}: got a loss of {each.loss}: the network has diverged")
    return card, made


def measure_checkpoint(checkpoint: Path, split: Split, **settings: Any) -> dict[str, Any]:
    """Measure the network of a checkpoint, on each channel set if it belongs to Task I.

    Args:
        checkpoint: A best.ckpt or last.ckpt.
        split: Images and labels.
        **settings: Passed to `predict_checkpoint`.

    Returns:
        {"model", "images", "accuracy", "loss"}, accuracy in percent and on all channels, and for Task I "channels", the
        accuracies by channel set.

    Raises:
        StudyError: As `predict_checkpoint`.
    """
    card, made = predict_checkpoint(checkpoint, split, **settings)
    whole = list(made.values())[-1]
    entry = {"model": card.model, "images": len(split), "accuracy": _percent(whole.accuracy), "loss": whole.loss}
    return entry | ({} if "" in made else {"channels": _by_set(made)})


def _by_set(predictions: Mapping[str, Predictions]) -> dict[str, float]:
    return {name: _percent(each.accuracy) for name, each in predictions.items()}


def _set_channel_statistics(model: torch.nn.Module, split: Split) -> None:
    """Give layers over named channels what they want to know of the training images."""
    norms = [module for module in model.modules() if isinstance(module, ChannelNorm)]
    stems = [module for module in model.modules() if isinstance(module, VariableInputConv)]
    stems = [stem for stem in stems if stem.correlation is not None]
    if norms or stems:
        # Some thousand images give three digits.
        some = np.linspace(0, len(split) - 1, min(len(split), 2000)).astype(np.int64)
        images = prepare_images(torch.from_numpy(split.images[some]), channels_last=False)
        statistics = channel_statistics(images, CHANNEL_NAMES)
        for norm in norms:
            norm.set_statistics(statistics)
        for stem in stems:
            stem.set_correlation(channel_correlation(images, stem.channels))


def _train_and_test(study: Study, config: StudyConfig, name: str, dataset: Dataset, folder: Path) -> dict[str, Any]:
    network = study.networks[name]
    train = TrainConfig.from_dict(config.train.to_dict() | dict(network.train))
    model_name, options = network.model or name, config.options | dict(network.options)
    torch.manual_seed(train.seed)
    try:
        model = create_model(model_name, len(dataset.classes), config.image_size, **options)
    except (TypeError, ValueError) as error:
        raise StudyError(str(error)) from error
    _set_channel_statistics(model, dataset.train)
    params = count_parameters(model)
    flops = count_flops(model, (1, len(train.channels), config.image_size, config.image_size))
    _print(f"\n{name}: {params:,} parameters, {flops / 1e9:.4f} GFLOPs an image")
    card = ModelCard(
        config.task,
        model_name,
        options,
        tuple(dataset.classes),
        config.image_size,
        config.denoise,
        config.normalize,
    )
    teacher = None
    if network.teacher:
        checkpoint = folder.parent / network.teacher / BEST
        if network.teacher not in config.models or not checkpoint.exists():
            raise StudyError(f"--models: {name} learns from {network.teacher}, expected that earlier in the same run")
        teacher, _ = load_network(checkpoint)
    trained = train_model(
        model, dataset, train, folder, card=card.to_dict(), teacher=teacher, resume=True, progress=_is_main_process()
    )
    if not _is_main_process():
        return {}
    settings = {"device": train.device, "precision": train.precision, "channels_last": train.channels_last}
    arrays: dict[str, np.ndarray] = {}
    measured = {}
    for split in ("val", "test"):
        _, made = predict_checkpoint(
            folder / BEST, getattr(dataset, split), network.test_sets, seed=train.seed, **settings
        )
        arrays[f"{split}/labels"] = getattr(dataset, split).labels
        arrays |= {f"{split}/{channels}": each.classes for channels, each in made.items()}
        measured[split] = made
    _save_arrays(folder / PREDICTIONS, arrays)
    best = trained.best
    val, test = (list(made.values())[-1] for made in measured.values())
    entry = {
        "params": params,
        "flops": flops,
        "train_acc": _percent(best.train_acc),
        "val_acc": _percent(val.accuracy),
        "test_acc": _percent(test.accuracy),
        "train_loss": best.train_loss,
        "val_loss": val.loss,
        "test_loss": test.loss,
        "seconds": round(trained.seconds, 3),
        "best_epoch": best.epoch,
        "epochs": len(trained.history),
    }
    if config.task == "task1":
        entry["channels"], entry["val_channels"] = _by_set(measured["test"]), _by_set(measured["val"])
    _print(f"  test {test.accuracy:.2f} % with the weights of epoch {best.epoch}")
    return entry


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Class numbers by name, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **{name: values.astype(np.int16) for name, values in arrays.items()})
    partial.replace(path)


def _parser(study: Study) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=study.question, allow_abbrev=False)
    presets = [name for name in study.presets if name != "smoke"]
    add = parser.add_argument
    add("--data", metavar="PATH|cifar10|generated", help="images: a folder, cifar10 or cifar10:FOLDER, or generated")
    add("--preset", choices=presets, help="demo: minutes on a CPU; paper: the source report's settings (default: demo)")
    add("--smoke", action="store_true", help="a run of seconds that proves nothing but that everything works")
    add("--image-size", type=int, metavar="PIXELS")
    add("--denoise", action=argparse.BooleanOptionalAction, help="non-local means; slow the first time, then cached")
    add("--normalize", action=argparse.BooleanOptionalAction, help="stretch each image to 0..255")
    add("--epochs", type=int, metavar="N")
    add("--batch-size", type=int, metavar="N")
    add("--seed", type=int, metavar="N")
    groups = f"; groups of them: {', '.join(study.groups)}" if study.groups else ""
    add("--models", nargs="+", metavar="NAME", help=f"out of {', '.join(study.networks)}{groups}")
    add("--device", choices=DEVICES)
    add("--precision", choices=PRECISIONS, help="auto: bf16 where the hardware has instructions for it, else float32")
    add("--skip-bad-images", action="store_true", default=None, help="go on without images that cannot be used")
    add("--output", type=Path, metavar="FOLDER", help=f"the run's folder (default: runs/{study.task}-<time>)")
    add("--resume", action="store_true", help="continue the run in --output, or this study's latest under runs/")
    return parser


# Options by the name of the setting; the second tuple's are settings of TrainConfig.
_STUDY_OPTIONS = ("data", "image_size", "denoise", "normalize", "skip_bad_images", "models")
_TRAIN_OPTIONS = ("epochs", "batch_size", "seed", "device", "precision")


def _open_run(study: Study, options: argparse.Namespace) -> tuple[Path, StudyConfig]:
    """The run's folder and settings: new ones, or with --resume those that are there."""
    if options.preset and options.smoke:
        raise StudyError("--preset and --smoke: got both, expected at most one")
    preset = "smoke" if options.smoke else options.preset
    explicit = {name: getattr(options, name) for name in _STUDY_OPTIONS + _TRAIN_OPTIONS}
    explicit = {name: value for name, value in explicit.items() if value is not None}
    if "models" in explicit:
        explicit["models"] = tuple(each for name in explicit["models"] for each in study.groups.get(name, (name,)))
        for name in explicit["models"]:
            if name not in study.networks:
                raise StudyError(f"--models: got {name!r}, expected names out of {', '.join(study.networks)}")
        if len(set(explicit["models"])) != len(explicit["models"]):
            raise StudyError(f"--models: got {' '.join(explicit['models'])}, expected each name once")
    if explicit.get("data") == "":
        raise StudyError("--data: got '', expected a folder, 'generated' or 'cifar10[:FOLDER]'")
    if explicit.get("image_size", 1) < 1:
        raise StudyError(f"--image-size: got {explicit['image_size']}, expected a whole number >= 1")

    if options.resume:
        folder = options.output or _latest_run(study)
        return folder, _resumed(study, folder, preset, explicit)
    config = _configured(study, preset or "demo", explicit)
    if options.output is None and "WORLD_SIZE" in os.environ:
        raise StudyError("--output: needed with more than one process, so that all use the same folder")
    folder = options.output or Path("runs") / f"{study.task}-{time.strftime('%Y%m%d-%H%M%S')}"
    with _main_process_first():
        if _is_main_process():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise StudyError(
                    f"--output: {folder} exists and is not empty; continue it with --resume, or take another"
                )
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / CONFIG, config.to_dict())
            except OSError as error:
                raise StudyError(f"--output: cannot write in {folder}: {error.strerror}") from None
    return folder, config


@contextlib.contextmanager
def _main_process_first() -> Iterator[None]:
    """Under torchrun, holds the other processes back until the main one is through: what they write is then its.

    Raises:
        StudyError: In the other processes, if the main one failed.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        yield
        return
    store, rank, _ = next(torch.distributed.rendezvous("env://"))
    key = f"dynconv_vision/main_process/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank != 0:
        if store.get(key) != b"done":
            raise StudyError("the main process could not open the run's folder; its message says why")
        yield
        return
    try:
        yield
    except BaseException:
        store.set(key, "failed")
        raise
    store.set(key, "done")


def _configured(study: Study, name: str, explicit: dict[str, Any]) -> StudyConfig:
    preset = study.presets[name]
    train = dict(preset.train) | {key: explicit[key] for key in _TRAIN_OPTIONS if key in explicit}
    data = explicit.get("data", "generated")
    # A folder's name must not depend on where a resumed run is started from.
    if data != "generated" and data.partition(":")[0] != "cifar10":
        data = str(Path(data).resolve())
    limits = dict(preset.limits) if preset.limits and (data == "generated" or name == "smoke") else None
    settings = {
        "data": data,
        "image_size": preset.image_size,
        "denoise": preset.denoise,
        "normalize": preset.normalize,
        "skip_bad_images": False,
        "models": preset.models,
    } | {key: explicit[key] for key in _STUDY_OPTIONS if key in explicit and key != "data"}
    return StudyConfig(
        task=study.task,
        preset=name,
        limits=limits,
        train=TrainConfig.from_dict(train),
        options=dict(preset.options),
        **settings,
    )


def _resumed(study: Study, folder: Path, preset: str | None, explicit: dict[str, Any]) -> StudyConfig:
    """The settings of the run in `folder`; options given again must agree with them, but for the device."""
    config = StudyConfig.from_dict(read_json(folder / CONFIG))
    if config.task != study.task:
        raise StudyError(f"--resume: {folder} is a run of {config.task}, expected {study.task}")
    if unknown := [name for name in config.models if name not in study.networks]:
        known = ", ".join(study.networks)
        raise StudyError(f"--resume: {folder / CONFIG}: models: got {unknown[0]!r}, expected names out of {known}")
    wanted = _configured(study, preset or config.preset, explicit)
    for name in explicit | ({"preset": preset} if preset else {}):
        there, here = (getattr(each.train if name in _TRAIN_OPTIONS else each, name) for each in (config, wanted))
        if name != "device" and there != here:
            raise StudyError(f"--resume: {name} is {there!r} in {folder}, got {here!r}; start a new run to change it")
    device = explicit.get("device", config.train.device)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, device=device))


def _latest_run(study: Study) -> Path:
    runs = [path.parent for path in Path("runs").glob(f"{study.task}-*/{CONFIG}")]
    if not runs:
        raise StudyError(f"--resume: no run of {study.task} under runs/; name its folder with --output")
    return max(runs, key=lambda folder: (folder / CONFIG).stat().st_mtime)


def _percent(value: float) -> float:
    # float32 counters end in digits that mean nothing: 84 of 450 is 18.6667.
    return round(value, 4)


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _print(line: str) -> None:
    if _is_main_process():
        print(line, flush=True)


def _say(line: str) -> None:
    if _is_main_process():
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let the processes of a run prepare the data one after the other: the first fills the cache."""
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    import fcntl  # not on Windows, where torchrun's backends are not either

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _DATA_LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
