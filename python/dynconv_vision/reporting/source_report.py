# SPDX-License-Identifier: BSD-3-Clause
"""What the source report printed, and what is true of it: the data behind the columns "published" and "corrected".

The source report compares networks in five figures, which are tables. ``published`` is the number as printed;
``corrected`` is the number that the report's own notebook supports, None where it supports none. Accuracies are in
percent of 450 images (9 of each of 50 classes), parameters and operations are plain counts. Every correction has its
reason in the figure's notes.
"""

from __future__ import annotations

from dataclasses import dataclass

#: The sets of channels that Task I networks are tested on, in the report's order.
CHANNEL_SETS = ("R", "G", "B", "RG", "RB", "GB", "RGB")

#: What the published numbers were measured on.
DATASET = "ImageNet-mini, 50 classes"
IMAGE_SIZE = 124

#: The goal of Task II: this share of ResNet-34's test accuracy, in percent.
TASK2_GOAL = 90.0


@dataclass(frozen=True)
class Row:
    """One number of the source report.

    Attributes:
        model: Name of the network in :func:`dynconv_vision.models.list_models`.
        key: Where ``results.json`` keeps the measured counterpart: a key of the model's entry, or ``epochs``.
        quantity: What it is, in words.
        published: As printed.
        corrected: As the notebook supports it; None if it supports none.
        remark: Goes with the corrected number: the image size of an operation count, or why there is no number.
    """

    model: str
    key: str
    quantity: str
    published: float | None
    corrected: float | None
    remark: str = ""


@dataclass(frozen=True)
class SourceFigure:
    """One figure of the source report.

    Attributes:
        number: In the report.
        task: ``"task1"`` or ``"task2"``.
        title: What it shows.
        rows: Its numbers, model by model.
        notes: Why corrected numbers differ from the published ones.
    """

    number: int
    task: str
    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


FIGURE_1 = SourceFigure(
    1,
    "task1",
    "Parameters and operations",
    (
        Row("resnet18", "params", "parameters", 11_192_700, 11_202_162, "7x7 stem"),
        Row("resnet18", "flops", "operations", 251.993e9, None, "cannot be reproduced"),
        Row("task1_published", "params", "parameters", 11_193_900, 11_192_775),
        Row("task1_published", "flops", "operations", 301.994e9, None, "cannot be reproduced"),
    ),
    (
        "The parameters published for ResNet-18 are those of the variable network (ResNet-18 without its stem, and 21 "
        "attention weights); those published for the variable network include 1,152 of another module.",
        "Measured `resnet18` has the 3x3 stem of Task I (1,728 weights at full width) in place of the 7x7 one (9,408). "
        "Measured `task1_published` is without the 21 attention weights, which are drawn and never learned.",
    ),
)

FIGURE_2 = SourceFigure(
    2,
    "task1",
    "Experiment results",
    (
        Row("resnet18", "epochs", "epochs", 30, 30),
        Row("resnet18", "train_acc", "training accuracy", 63.32, 63.32),
        Row("resnet18", "train_loss", "training loss", 1.1510, 1.1510),
        Row("resnet18", "val_acc", "validation accuracy", 59.11, 59.11),
        Row("resnet18", "val_loss", "validation loss", 1.4622, 1.4622),
        Row("resnet18", "test_acc", "test accuracy on RGB", 54.89, 54.89),
        Row("task1_published", "epochs", "epochs", 30, 30),
        Row("task1_published", "train_acc", "training accuracy", 16.67, 56.97),
        Row("task1_published", "train_loss", "training loss", 1.3967, 1.3967),
        Row("task1_published", "val_acc", "validation accuracy", 16.67, 16.67),
        Row("task1_published", "val_loss", "validation loss", 3.6941, 3.6941),
        Row("task1_published", "test_acc", "test accuracy on RGB", 14.60, 100 * 49 / 450),
    ),
    (
        "The training accuracy published for the variable network is its validation accuracy.",
        "The published test accuracy of the variable network is a running average over sets of channels: see figure 3.",
    ),
)

#: Figure 3's correct answers out of 450, set by set.
_FIGURE_3 = {
    "R": (18.67, 84),
    "G": (16.67, 66),
    "B": (15.70, 62),
    "RG": (16.05, 77),
    "RB": (15.60, 62),
    "GB": (15.22, 60),
    "RGB": (14.60, 49),
}

FIGURE_3 = SourceFigure(
    3,
    "task1",
    "Test accuracy on sets of channels",
    tuple(
        Row("task1_published", f"channels.{name}", name, published, 100 * correct / 450)
        for name, (published, correct) in _FIGURE_3.items()
    ),
    (
        "The published numbers are running averages: one counter was never reset over the seven sets. Undone, they are "
        "the corrected numbers, each a count out of 450.",
        "The source report read images as BGR: its R is blue, its B red. Measured sets are named as they are.",
        "`resnet18` takes three channels: the missing ones are zeros.",
    ),
)

FIGURE_4 = SourceFigure(
    4,
    "task2",
    "Parameters and operations",
    (
        Row("resnet34", "params", "parameters", 21_310_300, 21_310_322),
        Row("resnet34", "flops", "operations", 59.874e9, 0.598744064e9, "at 64 px; 2.36 G at 124 px"),
        Row("task2_published", "params", "parameters", 1_109_000, 1_109_879, "at 128 px; 1.0534 M at 124 px"),
        Row(
            "task2_published",
            "flops",
            "operations",
            23.282e9,
            0.232821760e9,
            "at 128 px, without the deformable product; with it 0.3633 G at 124 px",
        ),
    ),
    (
        "Published operations are 100 times too high, and taken at different image sizes.",
        "A multiplication and an addition are two operations. Measured counts are of convolutions and matrix products, "
        "the deformable convolution among them.",
        "The parameters of `task2_published` depend on the image size: its layer norms are over whole feature maps.",
    ),
)

FIGURE_5 = SourceFigure(
    5,
    "task2",
    "Experiment results",
    (
        Row("resnet34", "epochs", "epochs", 30, 30),
        Row("resnet34", "train_acc", "training accuracy", 97.83, 97.83),
        Row("resnet34", "train_loss", "training loss", 0.0018, 0.0587),
        Row("resnet34", "val_acc", "validation accuracy", 48.88, 48.88),
        Row("resnet34", "val_loss", "validation loss", 0.0586, None, "never computed"),
        Row("resnet34", "test_acc", "test accuracy", 46.22, 46.22),
        Row("task2_published", "epochs", "epochs", 30, 30),
        Row("task2_published", "train_acc", "training accuracy", 50.55, 50.55),
        Row("task2_published", "train_loss", "training loss", 0.0514, 1.6459),
        Row("task2_published", "val_acc", "validation accuracy", 46.88, 46.88),
        Row("task2_published", "val_loss", "validation loss", 0.0514, None, "never computed"),
        Row("task2_published", "test_acc", "test accuracy", 44.00, 44.00),
    ),
    (
        "Published training losses are sums of batch means divided by the number of images, 1/32 of the mean loss that "
        "the notebook prints. The notebook computes no validation loss: the published ones are training losses again.",
        "The notebook's last saved cells print a test accuracy of 46.22 % for both networks.",
    ),
)

#: All of them, in order.
FIGURES = (FIGURE_1, FIGURE_2, FIGURE_3, FIGURE_4, FIGURE_5)


def figures_of(task: str) -> tuple[SourceFigure, ...]:
    """The figures of one task, ``"task1"`` or ``"task2"``."""
    return tuple(figure for figure in FIGURES if figure.task == task)


def corrected(model: str, key: str) -> float | None:
    """The corrected number of a network, None where there is none.

    Example:
        >>> corrected("task2_published", "test_acc")
        44.0
    """
    for figure in FIGURES:
        for row in figure.rows:
            if (row.model, row.key) == (model, key):
                return row.corrected
    return None
