# SPDX-License-Identifier: BSD-3-Clause
"""Task II: how close does a network of four convolutions come to ResNet-34?

    python experiments/task2.py                                     # a demonstration on generated images
    python experiments/task2.py --data FOLDER --image-size 64 --epochs 5
    python experiments/task2.py --data FOLDER --preset paper        # the source report's settings
    python experiments/task2.py --data FOLDER --preset strong       # a modern recipe, and our network
    python experiments/task2.py --data FOLDER --preset strong --models sizes ablations
    bash experiments/run_all.sh FOLDER                              # the whole protocol, on one GPU

Measured on a CPU in bfloat16, seed 0, on 25,000 photographs of 50 classes at 64 px: with --preset strong four_conv has
56.8 % of the test images, resnet34 52.2 %; with --preset paper task2_published 40.6 %, resnet34 38.3 %. See
experiments/README.md for the options and all results.
"""

from __future__ import annotations

import sys

from dynconv_vision.training.study import SHORT_RECIPE, STRONG_RECIPE, Network, Preset, Study, main

FEW = ("task2_published", "four_conv", "resnet34")
REPORTED = ("task2_published", "resnet34")
STRONG = STRONG_RECIPE | {"mix": "both", "mix_share": 0.5}


def ours(**options: object) -> Network:
    """The improved network, with a part changed."""
    return Network("four_conv", options)


PLAIN = ("plain",) * 4
MAIN = {
    "resnet34": Network(),
    "task2_published": Network(),
    "four_conv": ours(),
    # A row of its own: it learns from ResNet-34's answers as well.
    "four_conv_distilled": Network("four_conv", train={"distillation": 0.7}, teacher="resnet34"),
}
SIZES = {
    "resnet10": Network("resnet34", {"layers": (1, 1, 1, 1)}),
    "resnet18": Network("resnet34", {"layers": (2, 2, 2, 2)}),
    "four_conv_tiny": ours(widths=(32, 48, 80, 112)),
    "four_conv_small": ours(widths=(48, 80, 128, 160)),
    "four_conv_wide": ours(widths=(64, 160, 288, 384)),
}
ABLATIONS = {
    "four_conv_plain": ours(convolutions=PLAIN),
    "four_conv_no_modulation": ours(modulation=False),
    "four_conv_offset_groups": ours(offset_groups=4),
    "four_conv_slow_offsets": Network("four_conv", train={"offset_learning_rate": 0.1}),
    # Where the deformable layer stands; by default at the third and fourth place.
    "four_conv_deformable_2": ours(convolutions=("plain", "deformable", "plain", "plain")),
    "four_conv_deformable_3": ours(convolutions=("plain", "plain", "deformable", "plain")),
    "four_conv_deformable_4": ours(convolutions=("plain", "plain", "plain", "deformable")),
    "four_conv_dynamic_2": ours(convolutions=("plain", "dynamic", "deformable", "deformable")),
    "four_conv_dynamic_3": ours(convolutions=("plain", "plain", "dynamic", "deformable"), widths=(64, 96, 144, 256)),
    "four_conv_no_attention": ours(attention="none"),
    "four_conv_pixel_attention": ours(attention="pixel"),
    "four_conv_cbam": ours(attention="cbam"),
    "four_conv_group_norm": ours(norm="group"),
    "four_conv_map_norm": ours(norm="map"),
    "four_conv_wide_kernels": ours(kernel_sizes=(7, 5, 3, 3)),
    "four_conv_mean_pooling": ours(pooling="mean"),
    "four_conv_last_map": ours(levels=1),
}

STUDY = Study(
    task="task2",
    question="Train a small network with a deformable convolution and ResNet-34 side by side.",
    networks=MAIN | SIZES | ABLATIONS,
    groups={"main": tuple(MAIN), "sizes": tuple(SIZES), "ablations": tuple(ABLATIONS)},
    presets={
        "demo": Preset(
            models=FEW,
            image_size=32,
            limits={"train": 4000, "val": 500, "test": 500},
            # float32: ResNet-34's maps are too small at this size for bfloat16 to pay on a CPU.
            train={"epochs": 5, "batch_size": 32, "learning_rate": 1e-3, "precision": "float32"},
        ),
        "paper": Preset(
            models=REPORTED,
            image_size=124,
            denoise=True,
            normalize=True,
            train={"epochs": 30, "batch_size": 32, "learning_rate": 1e-3},
        ),
        "strong": Preset(models=tuple(MAIN), image_size=64, train=STRONG),
        "short": Preset(models=tuple(MAIN), image_size=64, train=SHORT_RECIPE),
        # As Task I's: minutes a network on a CPU.
        "reduced": Preset(models=tuple(MAIN), image_size=32, train=STRONG_RECIPE | {"augment": "light"}),
        "smoke": Preset(
            models=FEW,
            image_size=32,
            limits={"train": 100, "val": 50, "test": 50},
            # float32: compiling bfloat16 kernels takes longer than these few steps.
            train={"epochs": 1, "batch_size": 25, "learning_rate": 1e-3, "precision": "float32"},
        ),
    },
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
