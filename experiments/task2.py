# SPDX-License-Identifier: BSD-3-Clause
"""Task II: how close does a network of four convolutions, one of them deformable, come to ResNet-34?

    python experiments/task2.py                                     # a demonstration on generated images
    python experiments/task2.py --data FOLDER --image-size 64 --epochs 5
    python experiments/task2.py --data FOLDER --preset paper        # the source report's settings

Measured on 2 CPU threads (AVX-512, AMX; bfloat16), seed 0, with --preset paper --image-size 64 --no-denoise --epochs 5
--batch-size 64 on 25,000 photographs of 50 classes: task2_published 29.4 % of the test images, ResNet-34 32.1 %. See
experiments/README.md for the options and all results.
"""

from __future__ import annotations

import sys

from dynconv_vision.training.study import Network, Preset, Study, main

MODELS = ("task2_published", "resnet34")

STUDY = Study(
    task="task2",
    question="Train a small network with a deformable convolution and ResNet-34 side by side.",
    networks={name: Network() for name in MODELS},
    presets={
        "demo": Preset(
            models=MODELS,
            image_size=32,
            limits={"train": 4000, "val": 500, "test": 500},
            # float32: ResNet-34's maps are too small at this size for bfloat16 to pay on a CPU.
            train={"epochs": 5, "batch_size": 32, "learning_rate": 1e-3, "precision": "float32"},
        ),
        "paper": Preset(
            models=MODELS,
            image_size=124,
            denoise=True,
            normalize=True,
            train={"epochs": 30, "batch_size": 32, "learning_rate": 1e-3},
        ),
        "smoke": Preset(
            models=MODELS,
            image_size=32,
            limits={"train": 100, "val": 50, "test": 50},
            # float32: compiling bfloat16 kernels takes longer than these few steps.
            train={"epochs": 1, "batch_size": 25, "learning_rate": 1e-3, "precision": "float32"},
        ),
    },
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
