# SPDX-License-Identifier: BSD-3-Clause
"""Draw the kernels that a network of Task I has learned for each channel, and its attention over images.

    python experiments/draw_stem.py --checkpoint FILE --data FOLDER --list test.txt --output FOLDER

Writes kernels.png (mean mixture over the images: each channel alone and in the set of all) and attention.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dynconv_vision.data import load_list
from dynconv_vision.data.derived import channel_sets, derive_channels
from dynconv_vision.models import VariableInputConv
from dynconv_vision.reporting.stem import draw_attention, draw_kernels
from dynconv_vision.training import EvaluationLoader, StudyError, load_network, prepare_images


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Draw; 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(description="Pictures of a VariableInputConv's kernels and attention.")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="best.ckpt, or safetensors")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where the list's paths start")
    parser.add_argument("--list", type=Path, required=True, metavar="FILE", help="list file, relative to --data")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args(argv)
    try:
        model, card = load_network(options.checkpoint)
        stem = getattr(model, "conv1", None)
        if not isinstance(stem, VariableInputConv) or stem.attention is None or stem.groups > 1:
            raise StudyError(f"--checkpoint: {card.model!r} has no VariableInputConv with an attention")
        file = options.data / options.list
        split = load_list(file, root=options.data, num_classes=card.num_classes, **card.preprocessing)
        whole = f"in {''.join(stem.channels)}"
        mixtures: dict[str, np.ndarray] = {}
        kernels: dict[str, dict[str, np.ndarray]] = {whole: {}, "alone": {}}
        for names in channel_sets(stem.channels):
            # Of more than three channels, those alone and all together.
            if len(stem.channels) > 3 and 1 < len(names) < len(stem.channels):
                continue
            parts = []
            for batch in EvaluationLoader(split):
                images = model.norm(derive_channels(prepare_images(batch.images), names), names)
                parts.append(stem.mixture(images, names))
            mixture = torch.cat(parts)
            mixtures["".join(names)] = mixture.numpy()
            if len(names) in (1, len(stem.channels)):
                weight = stem.to_conv2d(names, mixture.mean(0).tolist()).weight.detach().numpy()
                row = kernels["alone" if len(names) == 1 else whole]
                row |= {name: np.array(weight[:, place]) for place, name in enumerate(names)}
        options.output.mkdir(parents=True, exist_ok=True)
        draw_kernels(options.output / "kernels.png", kernels, f"{card.model}: effective kernels")
        draw_attention(options.output / "attention.png", mixtures, f"{card.model}: attention over {len(split)} images")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: kernels.png, attention.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
