# SPDX-License-Identifier: BSD-3-Clause
"""Task I: can one ResNet-18 classify images of any subset of the channels R, G, B?

    python experiments/task1.py                                     # a demonstration on generated images
    python experiments/task1.py --data FOLDER --image-size 64 --epochs 5
    python experiments/task1.py --data FOLDER --preset paper        # the source report's settings

Every network is tested on the seven channel sets, each with counters of its own; R is red. The plain ResNet-18 sees
zeros in place of missing channels.

Measured on 2 CPU threads (AVX-512, AMX; bfloat16), seed 0, with --preset paper --image-size 64 --no-denoise --epochs 5
--batch-size 64 on 25,000 photographs of 50 classes, test images right with RGB; mean of pairs; mean of single channels:
resnet18 33.0 %; 5.9 %; 2.3 %, variable_resnet18 19.5 %; 12.4 %; 5.0 %. See experiments/README.md for the options and
all results.
"""

from __future__ import annotations

import sys

from dynconv_vision.training.study import Preset, Study, main

# The source report's, but for its channel order: weight decay, clipping and early stopping are Task I's alone.
RECIPE = {"learning_rate": 1e-3, "weight_decay": 1e-4, "gradient_clip": 2.0, "batch_size": 32}

STUDY = Study(
    task="task1",
    question="Train ResNet-18 and a variable-channel ResNet-18; test both on R, G, B, RG, RB, GB and RGB.",
    networks={
        "resnet18": {},
        "variable_resnet18": {"channel_sampling": True},
        # Trained on all three channels, as published.
        "task1_published": {},
    },
    presets={
        "demo": Preset(
            models=("resnet18", "variable_resnet18"),
            image_size=32,
            limits={"train": 3000, "val": 500, "test": 500},
            train=RECIPE | {"epochs": 4},
        ),
        "paper": Preset(
            models=("resnet18", "variable_resnet18", "task1_published"),
            image_size=124,
            denoise=True,
            normalize=True,
            train=RECIPE | {"epochs": 30, "early_stop_patience": 6},
        ),
        "smoke": Preset(
            models=("resnet18", "variable_resnet18", "task1_published"),
            image_size=16,
            limits={"train": 100, "val": 50, "test": 50},
            # float32: compiling bfloat16 kernels takes longer than these few steps.
            train=RECIPE | {"epochs": 1, "batch_size": 25, "precision": "float32"},
        ),
    },
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
