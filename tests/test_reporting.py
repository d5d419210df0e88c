# SPDX-License-Identifier: BSD-3-Clause
"""Reports: every table of the source report, pictures, incomplete runs, broken files."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from dynconv_vision.models import count_flops, count_parameters, create_model, list_models
from dynconv_vision.reporting import ResultsError, load_history, load_results, write_report, write_summary
from dynconv_vision.reporting.figures import model_colours
from dynconv_vision.reporting.outcomes import Bootstrap
from dynconv_vision.reporting.source_report import CHANNEL_SETS, FIGURE_3, FIGURE_4, FIGURES, corrected

TASK1 = {
    "resnet18": {"params": 11_194_482, "flops": 1_121_503_232, "test_acc": 51.25, "seconds": 812.4},
    "variable_resnet18": {"params": 11_199_782, "flops": 1_121_517_376, "test_acc": 48.5, "seconds": 59.04},
    "task1_published": {"params": 11_192_754, "flops": 1_121_517_098, "test_acc": 15.75, "seconds": 7265.0},
}
TASK2 = {
    "task2_published": {"params": 421_751, "flops": 96_843_264, "test_acc": 42.0, "seconds": 300.0},
    "resnet34": {"params": 21_310_322, "flops": 598_132_736, "test_acc": 48.0, "seconds": 900.0},
}


def make_run(folder: Path, task: str, epochs: int = 3, **changes: Any) -> dict[str, Any]:
    """Write what a complete run leaves, and return the content of results.json."""
    models = {}
    for place, (name, numbers) in enumerate((TASK1 if task == "task1" else TASK2).items()):
        models[name] = {
            **numbers,
            "train_acc": 61.5 + place,
            "val_acc": 44.5 + place,
            "train_loss": 1.25 + place,
            "val_loss": 2.125 + place,
        }
        if task == "task1":
            models[name]["channels"] = {key: 10.5 + place + 5 * len(key) for key in CHANNEL_SETS}
        (folder / name).mkdir(parents=True)
        lines = ["epoch,train_loss,train_acc,val_loss,val_acc,seconds"]
        lines += [
            f"{epoch},{3 / epoch:.3f},{20 * epoch},{3.5 / epoch:.3f},{15 * epoch},9.5" for epoch in range(1, epochs + 1)
        ]
        (folder / name / "history.csv").write_text("\n".join(lines) + "\n")
    data = {"task": task, "dataset": "generated", "image_size": 64, "seed": 7, "epochs": epochs, "models": models}
    data.update(changes)
    (folder / "results.json").write_text(json.dumps(data))
    return data


def row(text: str, *cells: str) -> bool:
    """Whether a table of ``text`` has a line that starts with these cells."""
    wanted = list(cells)
    return any(
        [cell.strip() for cell in line.strip("| ").split("|")][: len(wanted)] == wanted for line in text.splitlines()
    )


def assert_picture(path: Path, colours: list[str]) -> None:
    """The file is a picture that is large enough to read and holds areas of these colours."""
    pixels = (imread(path)[:, :, :3] * 255).round().astype(int)
    assert pixels.shape[0] >= 300
    assert pixels.shape[1] >= 1000
    for colour in colours:
        wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        assert (abs(pixels - wanted).sum(axis=2) <= 3).sum() >= 100, f"{path.name} has no {colour}"


def test_task1_report(tmp_path: Path) -> None:
    make_run(tmp_path, "task1")
    text = write_report(tmp_path)
    assert text == (tmp_path / "report.md").read_text()
    assert "generated, 64 px, 3 epochs, seed 7" in text
    assert "## Missing" not in text
    make_run(tmp_path / "small", "task1", config={"options": {"layers": [1, 1], "width": 32}})
    assert "generated, 64 px, networks with layers [1, 1], width 32, 3 epochs" in write_report(tmp_path / "small")
    # Figure 1
    assert row(text, "`resnet18`", "parameters", "11.1927 M", "11.2022 M (7x7 stem)", "11.1945 M")
    assert row(text, "`resnet18`", "operations", "251.993 G", "cannot be reproduced", "1.1215 G")
    assert row(text, "`task1_published`", "parameters", "11.1939 M", "11.1928 M", "11.1928 M")
    assert row(text, "`task1_published`", "operations", "301.994 G", "cannot be reproduced", "1.1215 G")
    assert row(text, "`variable_resnet18`", "parameters", "–", "–", "11.1998 M")
    # Figure 2
    assert row(text, "`resnet18`", "epochs", "30", "30", "3")
    assert row(text, "`resnet18`", "training accuracy", "63.32 %", "63.32 %", "61.50 %")
    assert row(text, "`resnet18`", "test accuracy on RGB", "54.89 %", "54.89 %", "51.25 %")
    assert row(text, "`task1_published`", "training accuracy", "16.67 %", "56.97 %", "63.50 %")
    assert row(text, "`task1_published`", "validation loss", "3.6941", "3.6941", "4.1250")
    assert row(text, "`task1_published`", "test accuracy on RGB", "14.60 %", "10.89 %", "15.75 %")
    # Figure 3
    assert row(text, "channels", "published", "corrected", "measured `resnet18`", "measured `variable_resnet18`")
    assert row(text, "R", "18.67 %", "18.67 %", "15.50 %", "16.50 %", "17.50 %")
    assert row(text, "G", "16.67 %", "14.67 %", "15.50 %")
    assert row(text, "RG", "16.05 %", "17.11 %", "20.50 %")
    assert row(text, "RGB", "14.60 %", "10.89 %", "25.50 %", "26.50 %", "27.50 %")
    # Training time
    assert row(text, "`resnet18`", "13 min 32 s")
    assert row(text, "`variable_resnet18`", "59.0 s")
    assert row(text, "`task1_published`", "2 h 01 min")
    for name in ("learning_curves", "accuracy", "complexity", "channels"):
        assert f"]({name}.png)" in text
        assert_picture(tmp_path / f"{name}.png", list(model_colours(list(TASK1)).values()))


def test_many_networks_can_be_told_apart(tmp_path: Path) -> None:
    data = make_run(tmp_path, "task1")
    names = [f"variable_{place}" for place in range(12)]
    for name in names:
        data["models"][name] = data["models"]["variable_resnet18"]
        shutil.copytree(tmp_path / "variable_resnet18", tmp_path / name)
    write_report(tmp_path)
    heights = {name: imread(tmp_path / f"{name}.png").shape[0] for name in ("channels", "learning_curves")}
    (tmp_path / "results.json").write_text(json.dumps(data))
    write_report(tmp_path)
    colours = model_colours(list(data["models"]))
    assert len(set(colours.values())) == len(colours)
    for name, height in heights.items():
        assert_picture(tmp_path / f"{name}.png", list(colours.values()) if name == "channels" else [])
        # The legend has more rows.
        assert imread(tmp_path / f"{name}.png").shape[0] > height


def test_task2_report(tmp_path: Path) -> None:
    make_run(tmp_path, "task2")
    text = write_report(str(tmp_path))
    # Figure 4
    assert row(text, "`resnet34`", "parameters", "21.3103 M", "21.3103 M", "21.3103 M")
    assert row(text, "`resnet34`", "operations", "59.874 G", "0.5987 G (at 64 px; 2.36 G at 124 px)", "0.5981 G")
    assert row(
        text, "`task2_published`", "parameters", "1.1090 M", "1.1099 M (at 128 px; 1.0534 M at 124 px)", "0.4218 M"
    )
    # Figure 5
    assert row(text, "`resnet34`", "training loss", "0.0018", "0.0587", "2.2500")
    assert row(text, "`resnet34`", "validation loss", "0.0586", "never computed", "3.1250")
    assert row(text, "`task2_published`", "validation accuracy", "46.88 %", "46.88 %", "44.50 %")
    assert row(text, "`task2_published`", "test accuracy", "44.00 %", "44.00 %", "42.00 %")
    assert row(text, "`task2_published`", "90 %", "95.2 %", "95.2 %", "87.5 %")
    assert not (tmp_path / "channels.png").exists()
    assert "channels.png" not in text
    for name in ("learning_curves", "accuracy", "complexity"):
        assert_picture(tmp_path / f"{name}.png", list(model_colours(list(TASK2)).values()))


def test_tables_read_as_text(tmp_path: Path) -> None:
    make_run(tmp_path, "task2")
    tables = [block.splitlines() for block in write_report(tmp_path).split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({len(line) for line in table}) == 1


def test_one_network_without_history_and_test(tmp_path: Path) -> None:
    data = make_run(tmp_path, "task2")
    entry = data["models"]["resnet34"]
    del entry["test_acc"]
    entry["val_loss"] = None
    del data["seed"]
    data["models"] = {"resnet34": entry}
    (tmp_path / "results.json").write_text(json.dumps(data))
    (tmp_path / "resnet34" / "history.csv").unlink()
    (tmp_path / "learning_curves.png").write_bytes(b"of an earlier run")
    text = write_report(tmp_path)
    missing = text.split("## Missing")[1]
    assert "- results.json has no `seed`." in missing
    assert "- `task2_published` was not run." in missing
    assert "- `resnet34`: test accuracy, validation loss." in missing
    assert "- `resnet34`: no resnet34/history.csv, so no learning curves." in missing
    assert "- learning_curves.png: nothing to draw." in missing
    assert not (tmp_path / "learning_curves.png").exists()
    assert "(learning_curves.png)" not in text
    assert row(text, "`resnet34`", "test accuracy", "46.22 %", "46.22 %", "–")
    assert row(text, "`task2_published`", "90 %", "95.2 %", "95.2 %", "–")
    assert_picture(tmp_path / "accuracy.png", ["#0072B2"])


def test_some_sets_of_channels(tmp_path: Path) -> None:
    data = make_run(tmp_path, "task1")
    data["models"]["resnet18"]["channels"] = {"RGB": 33.0, "RGBN": 34.0}
    data["models"]["task1_published"]["channels"] = None
    (tmp_path / "results.json").write_text(json.dumps(data))
    text = write_report(tmp_path)
    assert row(text, "RGB", "14.60 %", "10.89 %", "33.00 %", "26.50 %", "–")
    assert row(text, "RGBN", "–", "–", "34.00 %", "–", "–")
    assert "- `resnet18`: test accuracy on R, G, B, RG, RB, GB." in text
    assert_picture(tmp_path / "channels.png", ["#0072B2", "#009E73"])


def test_a_run_with_nothing_measured(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"task": 1, "models": {"resnet18": {}}}')
    text = write_report(tmp_path)
    for name in ("learning_curves", "accuracy", "complexity", "channels"):
        assert f"- {name}.png: nothing to draw." in text
    assert list(tmp_path.glob("*.png")) == []


def test_networks_of_ones_own(tmp_path: Path) -> None:
    models = {
        "mine": {"params": 5_000_000, "test_acc": 24.0},
        "other": {"test_acc": 0.0},
        "resnet34": {"test_acc": 48.0},
    }
    make_run(tmp_path, "task2", models=models)
    text = write_report(tmp_path)
    assert row(text, "`mine`", "parameters", "–", "–", "5.0000 M")
    assert row(text, "`mine`", "90 %", "–", "–", "50.0 %")
    colours = model_colours(list(models))
    assert len(set(colours.values())) == 3
    assert colours["resnet34"] == model_colours(["resnet34"])["resnet34"]
    assert_picture(tmp_path / "accuracy.png", [colours["mine"], colours["resnet34"]])


@pytest.mark.parametrize("epochs", [1, 40])
def test_learning_curves_of_any_length(tmp_path: Path, epochs: int) -> None:
    make_run(tmp_path, "task2", epochs=epochs)
    write_report(tmp_path)
    assert_picture(tmp_path / "learning_curves.png", ["#0072B2", "#D55E00"])


def test_diverged_loss(tmp_path: Path) -> None:
    data = make_run(tmp_path, "task2")
    data["models"]["resnet34"]["train_loss"] = float("nan")
    (tmp_path / "results.json").write_text(json.dumps(data))
    history = tmp_path / "resnet34" / "history.csv"
    history.write_text("epoch,train_loss,train_acc,val_loss,val_acc,seconds\n1,nan,2.0,inf,2.0,3\n2,,2.0,,2.0,3\n")
    assert row(write_report(tmp_path), "`resnet34`", "training loss", "0.0018", "0.0587", "nan")
    assert_picture(tmp_path / "learning_curves.png", ["#0072B2"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("epoch,train_loss\n1,abc\n", "line 2, train_loss: got 'abc', expected a number"),
        ("loss\n1\n", r"got the columns \['loss'\], expected epoch, train_loss"),
        ("epoch,train_loss\n", "no epochs in it"),
        ("", "got the columns None"),
    ],
)
def test_broken_history(tmp_path: Path, content: str, reason: str) -> None:
    make_run(tmp_path, "task2")
    path = tmp_path / "resnet34" / "history.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=reason):
        load_history(path)
    text = write_report(tmp_path)
    assert "- `resnet34`: resnet34/history.csv can't be read: " in text
    assert_picture(tmp_path / "learning_curves.png", ["#D55E00"])


def test_history_of_a_killed_run(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    path.write_text("epoch,train_loss,train_acc,val_loss,val_acc,seconds\n1,3.5,10,3.0,12,4\n2,3.1")
    history = load_history(path)
    assert history["train_loss"] == [3.5, 3.1]
    assert history["val_acc"][0] == 12
    assert history["val_acc"][1] != history["val_acc"][1]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, r"results\.json: not found; expected the folder of a run"),
        ("{", r"results\.json: no valid JSON"),
        ("[1]", "got a list, expected an object"),
        ('{"models": {}}', r"no 'task'; got the keys \['models'\]"),
        ('{"task": "task3", "models": {"a": {}}}', "task: got 'task3', expected 'task1' or 'task2'"),
        ('{"task": "task1", "models": {}}', "models: got {}, expected an object with an entry for every network"),
        ('{"task": "task1", "models": {"a": 3}}', "models.a: got 3, expected an object"),
        ('{"task": "task1", "models": {"a": {"params": "many"}}}', r"models\.a\.params: got 'many', expected a number"),
        ('{"task": "task1", "models": {"a": {"val_acc": 101}}}', r"models\.a\.val_acc: got 101, expected an accuracy"),
        ('{"task": "task1", "models": {"a": {"flops": -1}}}', r"models\.a\.flops: got -1, expected a number >= 0"),
        (
            '{"task": "task1", "models": {"a": {"channels": [1]}}}',
            r"models\.a\.channels: got \[1\], expected an object",
        ),
        ('{"task": "task1", "models": {"a": {"channels": {"R": true}}}}', r"models\.a\.channels\.R: got True"),
        (
            '{"task": "task1", "models": {"a": {"channels": {"R": -2}}}}',
            r"models\.a\.channels\.R: got -2, expected an acc",
        ),
    ],
)
def test_broken_results(tmp_path: Path, content: str | None, text: str) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ResultsError, match=text):
        write_report(tmp_path)


def test_load_results(tmp_path: Path) -> None:
    make_run(tmp_path, "task1", precision="bf16")
    results = load_results(tmp_path)
    assert results.task == "task1"
    assert results.settings["precision"] == "bf16"
    assert results.number("resnet18", "channels.RG") == 20.5
    assert results.number("resnet18", "epochs") == 3
    assert results.number("absent", "epochs") is None


def test_source_report_is_consistent() -> None:
    """Its networks exist, and the published running averages follow from the corrected counts."""
    for figure in FIGURES:
        assert {row.model for row in figure.rows} <= set(list_models(figure.task))
    total = 0.0
    for count, source in enumerate(FIGURE_3.rows, start=1):
        assert source.corrected is not None
        total += source.corrected
        assert source.published == pytest.approx(total / count, abs=0.01)
    assert corrected("task1_published", "channels.RGB") == corrected("task1_published", "test_acc")
    assert corrected("nobody", "test_acc") is None


def test_figure_4_at_the_size_of_the_source_report() -> None:
    """What the corrections say of 124 pixels is what the networks have there."""
    remarks = {(row.model, row.key): row.remark for row in FIGURE_4.rows}
    networks = {name: create_model(name, num_classes=50, image_size=124) for name in ("resnet34", "task2_published")}
    for name, digits in (("resnet34", 2), ("task2_published", 4)):
        operations = count_flops(networks[name], (1, 3, 124, 124))
        assert f"{operations / 1e9:.{digits}f} G at 124 px" in remarks[name, "flops"]
    parameters = count_parameters(networks["task2_published"])
    assert f"{parameters / 1e6:.4f} M at 124 px" in remarks["task2_published", "params"]


def test_no_display_is_needed(tmp_path: Path) -> None:
    """Not even matplotlib.pyplot, which chooses a backend by the environment, is imported."""
    make_run(tmp_path, "task2")
    program = (
        "import sys; from dynconv_vision.reporting import write_report; write_report(sys.argv[1]); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env={"PYTHONPATH": ":".join(sys.path)})


# Summaries of several runs

IMAGES = 200
LABELS = np.arange(IMAGES) % 5


def add_run(folder: Path, seed: int, networks: dict[str, dict[str, int]], val: int = 20, **changes: Any) -> None:
    """What a run leaves of each network: so many of the 200 test images right, by set of channels, and of 50 val."""
    train = {"seed": seed, "epochs": 4, "device": "cpu"}
    config = {"task": "task1", "data": "here", "preset": "strong", "image_size": 64, "train": train}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | changes | {"models": [*networks, "not done yet"]}))
    for name, counts in networks.items():
        arrays = {"test/labels": LABELS, "val/labels": LABELS[:50]}
        for each, count in counts.items():
            arrays[f"test/{each}"] = np.where(np.arange(IMAGES) < count, LABELS, LABELS + 1)
            arrays[f"val/{each}"] = np.where(np.arange(50) < val, LABELS[:50], 7)
        (folder / name).mkdir()
        np.savez(folder / name / "predictions.npz", **arrays)
        entry = {
            "params": 1e6,
            "flops": 2e9,
            "train_acc": 50.0,
            "seconds": 8.0 if name == "resnet18" else 10.0,
            "epochs": 4,
        }
        (folder / name / "result.json").write_text(json.dumps(entry))


def counts(rgb: int, pair: int, single: int) -> dict[str, int]:
    return {each: {3: rgb, 2: pair, 1: single}[len(each)] for each in CHANNEL_SETS}


def test_summary(tmp_path: Path) -> None:
    for seed in (0, 1):
        stems = {
            "resnet18": counts(120, 40, 20),
            "static_resnet18": counts(100, 96, 90 + 2 * seed),
            "variable_resnet18": counts(119 + seed, 110, 100),
            "variable_k1": counts(117, 108, 100),
            "variable_without_B": counts(90, 80, 70),
        }
        add_run(tmp_path / f"seed{seed}-stems", seed, stems)
    specialists = {f"specialist_{each}": {each: 113} for each in CHANNEL_SETS[:5]}
    add_run(tmp_path / "seed0-specialists", 0, specialists)
    text = write_summary(tmp_path, resamples=200)
    assert (tmp_path / "summary.md").read_text() == text
    assert_picture(tmp_path / "channels.png", ["#009E73", "#E69F00", "#999999", "#0072B2"])
    # The static stem is worse by more than the interval.
    assert_picture(tmp_path / "ablations.png", ["#D55E00"])

    aims = {aim["aim"]: aim for aim in json.loads((tmp_path / "summary.json").read_text())["aims"]}
    rgb = aims["RGB, less plain ResNet-18"]
    assert rgb["met"] and rgb["measured"].startswith("-0.25 [")
    assert aims["RG, less its specialist"]["met"] and not aims["R, less its specialist"]["met"]
    assert "GB, less its specialist" not in aims
    # (119.5 + 3 * 110 + 3 * 100 - 100 - 3 * 96 - 3 * 91) / 7 / 2 percent
    assert aims["mean of the seven, less the static stem"]["measured"].startswith("6.32 [")

    assert "60.00 [" in next(line for line in text.splitlines() if line.startswith("| RGB "))
    assert row(text, "`variable_k1`", "2", "58.50", "54.00", "50.00")
    assert row(text, "`variable_without_B`", "2", "1", "3")
    with (tmp_path / "summary.csv").open() as file:
        lines = {(line["network"], line["channels"]): line for line in csv.DictReader(file)}
    line = lines["static_resnet18", "R"]
    assert (line["seeds"], line["test_acc"], line["val_acc"]) == ("2", "45.5000", "40.0000")
    assert float(line["sd_over_seeds"]) == pytest.approx(0.5 * 2**0.5, abs=1e-3)
    assert float(line["low"]) < 45.5 < float(line["high"])
    assert lines["specialist_R", "R"]["sd_over_seeds"] == ""
    with (tmp_path / "per_seed.csv").open() as file:
        assert sum(1 for _ in csv.DictReader(file)) == 2 * 5 * 7 + 5


def test_summary_of_task2(tmp_path: Path) -> None:
    for seed in (0, 1):
        networks = {
            "resnet34": {"": 100},
            "task2_published": {"": 91 - 2 * seed},
            "four_conv": {"": 96},
            "four_conv_distilled": {"": 120},
            "four_conv_plain": {"": 92},
        }
        add_run(tmp_path / "strong" / f"seed{seed}", seed, networks, task="task2")
    # Better on the validation images, but with one seed of two.
    add_run(tmp_path / "strong" / "seed0-sizes", 0, {"four_conv_small": {"": 97}}, val=25, task="task2")
    paper = {"resnet34": {"": 95}, "task2_published": {"": 86}, "four_conv": {"": 94}}
    add_run(tmp_path / "paper" / "seed0", 0, paper, task="task2", preset="paper")
    text = write_summary(tmp_path / "strong", resamples=200, against=tmp_path / "paper")
    assert_picture(tmp_path / "strong" / "trade_off.png", ["#009E73", "#0072B2", "#D55E00"])
    # The distilled one is better by more than the interval, the plain one is not worse by as much.
    assert_picture(tmp_path / "strong" / "ablations.png", ["#009E73", "#7F7F7F"])
    assert "](ablations.png)" in text
    content = json.loads((tmp_path / "strong" / "summary.json").read_text())
    aims = {aim["aim"]: aim for aim in content["aims"]}
    # All of ours have the same validation accuracy here; the distilled one is no candidate.
    assert aims["`four_conv`, share of ResNet-34's accuracy"]["measured"].startswith("96.00 [")
    assert aims["`four_conv`, share of ResNet-34's accuracy"]["met"]
    # That is an aim of the source report's recipe.
    assert "published network, share of ResNet-34's accuracy" not in aims
    other = aims["`four_conv`, share of the accuracy of ResNet-34 under the other recipe"]
    assert other["measured"].startswith("101.05 [") and other["met"]
    # The stub gives all networks the same operations.
    assert not aims["`four_conv`, operations over ResNet-34's"]["met"]
    write_summary(tmp_path / "paper", resamples=200)
    aims = {aim["aim"]: aim for aim in json.loads((tmp_path / "paper" / "summary.json").read_text())["aims"]}
    published = aims["published network, share of ResNet-34's accuracy"]
    assert published["measured"].startswith("90.53 [") and published["met"]
    ours = aims["`four_conv`, share of ResNet-34's accuracy"]
    assert ours["wanted"] == ">= 100 %" and not ours["met"]
    line = next(line for line in text.splitlines() if line.startswith("| `four_conv_plain` "))
    assert "46.00 [" in line and "92.00 [" in line and "-2.00 [" in line
    with (tmp_path / "strong" / "summary.csv").open() as file:
        assert [line["test_acc"] for line in csv.DictReader(file)][:2] == ["50.0000", "45.0000"]


def test_summary_compares_runs_on_the_same_images_alone(tmp_path: Path) -> None:
    add_run(tmp_path / "one", 0, {"resnet34": {"": 9}}, task="task2")
    add_run(tmp_path / "other", 0, {"resnet34": {"": 9}}, task="task2", image_size=32)
    with pytest.raises(ResultsError, match="against: .*other: image_size is 32, expected 64"):
        write_summary(tmp_path / "one", against=tmp_path / "other")
    add_run(tmp_path / "task1", 0, {"resnet18": counts(9, 9, 9)})
    with pytest.raises(ResultsError, match="against: got .* for runs of task1, expected runs of task2"):
        write_summary(tmp_path / "task1", against=tmp_path / "other")


def test_bootstrap_is_that_of_a_share() -> None:
    """The interval of a share p of n images is near p -+ 1.96 sqrt(p (1 - p) / n), and paired differences are tighter."""
    bootstrap = Bootstrap(1000, 4000)
    right = (np.arange(1000) < 300).astype(float)
    estimate = bootstrap.estimate(right)
    assert estimate.mean == pytest.approx(30)
    assert (estimate.low, estimate.high) == pytest.approx((30 - 2.84, 30 + 2.84), abs=0.25)
    assert bootstrap.estimate(right - right).high == 0
    ratio = bootstrap.ratio(right, right)
    assert (ratio.mean, ratio.low, ratio.high) == (100, 100, 100)
    # The relative errors of two independent shares add in squares: 0.7 / 0.3 of each, over 1000 images.
    ratio = bootstrap.ratio(right, right[::-1])
    assert ratio.mean == pytest.approx(100) and 15 < (ratio.high - ratio.low) / 2 < 20
    other = (np.arange(1000) < 310).astype(float)
    difference = bootstrap.estimate(other - right)
    assert difference.mean == pytest.approx(1) and difference.high - difference.low < 1.5


def test_summary_explains_runs_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no network is done in it"):
        write_summary(tmp_path)
    add_run(tmp_path / "one", 0, {"resnet18": counts(9, 9, 9)})
    add_run(tmp_path / "two", 0, {"resnet18": counts(9, 9, 9)})
    with pytest.raises(ResultsError, match="a second resnet18 with seed 0"):
        write_summary(tmp_path)
    add_run(tmp_path / "other", 0, {"resnet18": counts(9, 9, 9)}, image_size=32)
    with pytest.raises(ResultsError, match="differs from the other runs under .* in image_size"):
        write_summary(tmp_path)
    add_run(tmp_path / "newer", 0, {"resnet18": counts(9, 9, 9)}, train={"seed": 0, "momentum": 0.9})
    with pytest.raises(ResultsError, match=r"config.json: TrainConfig: unknown settings momentum"):
        write_summary(tmp_path / "newer")


def test_summary_takes_runs_from_before_a_setting_came(tmp_path: Path) -> None:
    """They were made with what is its default now."""
    add_run(tmp_path / "older", 0, {"resnet18": counts(9, 9, 9)})
    train = {"seed": 1, "epochs": 4, "device": "cuda", "distillation": 0.0}
    add_run(tmp_path / "newer", 1, {"resnet18": counts(9, 9, 9)}, train=train)
    assert row(write_summary(tmp_path, resamples=200), "`resnet18`", "2")
    add_run(tmp_path / "other", 2, {"resnet18": counts(9, 9, 9)}, train=train | {"seed": 2, "distillation": 0.5})
    with pytest.raises(ResultsError, match="differs from the other runs under .* in train"):
        write_summary(tmp_path, resamples=200)
