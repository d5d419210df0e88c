# SPDX-License-Identifier: BSD-3-Clause
"""Task I: can one ResNet-18 classify images of any set of channels?

    python experiments/task1.py                                     # a demonstration on generated images
    python experiments/task1.py --data FOLDER --image-size 64 --epochs 5
    python experiments/task1.py --data FOLDER --preset paper        # the source report's settings
    python experiments/task1.py --data FOLDER --preset strong       # a modern recipe
    python experiments/task1.py --data FOLDER --preset strong --models specialists ablations wide
    bash experiments/run_all.sh FOLDER                              # the whole protocol, on one GPU

Every network is tested on sets of channels, each with counters of its own; R is red. The plain ResNet-18 sees zeros in
place of missing channels. experiments/README.md has the options and all results.
"""

from __future__ import annotations

import sys

from dynconv_vision.data.derived import channel_sets
from dynconv_vision.training.study import SHORT_RECIPE, STRONG_RECIPE, Network, Preset, Study, main

RGB = ("R", "G", "B")
# Luminance gradients, and a near-duplicate of red: see dynconv_vision.data.derived.
WIDE = (*RGB, "X", "Y", "r")

# The source report's, but for its channel order: weight decay, clipping and early stopping are Task I's alone.
PAPER = {"learning_rate": 1e-3, "weight_decay": 1e-4, "gradient_clip": 2.0, "batch_size": 32}
PAPER_RECIPE = PAPER | {"epochs": 30, "early_stop_patience": 6}
# Half of ResNet-18's width, and one block a stage.
REDUCED = {"layers": [1, 1, 1, 1], "width": 32}
SAMPLED = {"channel_sampling": "image"}


def variable(train: dict | None = None, **options: object) -> Network:
    """Ours, with a part changed."""
    return Network("variable_resnet18", options, SAMPLED | (train or {}))


def over(model: str, names: tuple[str, ...], test: tuple[str, ...], **train: object) -> Network:
    """A network that knows the channels `names`, tested on every set of the channels `test`."""
    return Network(model, {"channels": names}, SAMPLED | {"channels": names} | train, tuple(channel_sets(test)))


STEMS = {
    "resnet18": Network(),
    # The baseline to beat.
    "static_resnet18": Network(train=SAMPLED),
    "variable_resnet18": variable(),
    # Trained on all three channels, as published.
    "task1_published": Network(),
    # A row of its own: whatever channels an image has, it learns plain ResNet-18's answer on all three as well.
    "variable_distilled": Network("variable_resnet18", train=SAMPLED | {"distillation": 0.7}, teacher="resnet18"),
}
REPORTED = ("resnet18", "static_resnet18", "variable_resnet18", "task1_published")
# The ceiling: one network for each set.
SPECIALISTS = {
    f"specialist_{''.join(names)}": Network("static_resnet18", {"channels": names}, {"channels": names}, (names,))
    for names in channel_sets(RGB)
}
ABLATIONS = {
    "variable_k1": variable(num_kernels=1),
    "variable_k2": variable(num_kernels=2),
    "variable_k8": variable(num_kernels=8),
    # The temperature stays at 30, as in the source report; or is 1 from the start.
    "variable_hot": variable({"temperature_anneal": None}),
    "variable_cold": variable(temperature=1.0),
    "variable_no_attention": variable(attention=False),
    "variable_no_residual": variable(residual=False),
    "variable_no_gain": variable(gain=False),
    # Missing channels are not imputed, the rest is scaled by C / m; or imputing is all there is.
    "variable_no_imputation": variable(imputation=False),
    "variable_imputation_only": variable(num_kernels=1, residual=False, gain=False),
    # Trained on all three channels; or with one set of channels for all images of a step.
    "variable_no_sampling": variable({"channel_sampling": "none"}),
    "variable_step_sampling": variable({"channel_sampling": "step"}),
    # Half of the images keep all channels, over and above those that draw them all.
    "variable_half_full": variable({"full_share": 0.5}),
    "static_no_sampling": Network("static_resnet18", {"rescale": False}),
    "static_step_sampling": Network("static_resnet18", {}, {"channel_sampling": "step"}),
}
MORE_CHANNELS = {
    "static_wide": over("static_resnet18", WIDE, WIDE),
    "variable_wide": over("variable_resnet18", WIDE, WIDE),
    # Channels that no training step shows; now and then one that is known goes without its name.
    "variable_without_B": over("variable_resnet18", ("R", "G"), RGB, unknown_share=0.2),
    "static_without_B": over("static_resnet18", ("R", "G"), RGB),
    "variable_wide_without_X": over("variable_resnet18", ("R", "G", "B", "Y", "r"), WIDE, unknown_share=0.2),
    "static_wide_without_X": over("static_resnet18", ("R", "G", "B", "Y", "r"), WIDE),
}

STUDY = Study(
    task="task1",
    question="Train ResNet-18 with several stems; test each on R, G, B, RG, RB, GB and RGB.",
    networks=STEMS | SPECIALISTS | ABLATIONS | MORE_CHANNELS,
    groups={
        "stems": tuple(STEMS),
        "specialists": tuple(SPECIALISTS),
        "ablations": tuple(ABLATIONS),
        "wide": tuple(MORE_CHANNELS),
    },
    presets={
        "demo": Preset(
            models=("resnet18", "variable_resnet18"),
            image_size=32,
            limits={"train": 3000, "val": 500, "test": 500},
            train=PAPER | {"epochs": 4},
        ),
        "paper": Preset(
            models=REPORTED,
            image_size=124,
            denoise=True,
            normalize=True,
            train=PAPER_RECIPE,
        ),
        "strong": Preset(models=tuple(STEMS), image_size=64, train=STRONG_RECIPE),
        "short": Preset(models=tuple(STEMS), image_size=64, train=SHORT_RECIPE),
        # The whole protocol on a CPU: minutes a network, at a fiftieth of the operations.
        "reduced": Preset(
            models=tuple(STEMS), image_size=32, train=STRONG_RECIPE | {"augment": "light"}, options=REDUCED
        ),
        "reduced_paper": Preset(
            models=REPORTED, image_size=32, denoise=True, normalize=True, train=PAPER_RECIPE, options=REDUCED
        ),
        "smoke": Preset(
            models=("resnet18", "variable_resnet18", "task1_published"),
            image_size=16,
            limits={"train": 100, "val": 50, "test": 50},
            # float32: compiling bfloat16 kernels takes longer than these few steps.
            train=PAPER | {"epochs": 1, "batch_size": 25, "precision": "float32"},
        ),
    },
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
