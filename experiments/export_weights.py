# SPDX-License-Identifier: BSD-3-Clause
"""Write the weights of a checkpoint as a safetensors file of half the size.

    python experiments/export_weights.py --checkpoint runs/NAME/variable_resnet18/best.ckpt --output FILE.safetensors

evaluate.py takes the file in a checkpoint's place. Under python/dynconv_vision/models/pretrained/<model>.safetensors,
create_model(<model>, pretrained=True) takes it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dynconv_vision.models.weights import write_weights
from dynconv_vision.training import load_network


def main(argv: Sequence[str] | None = None) -> int:
    """Export; 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(description="Weights of a checkpoint as safetensors, half precision.")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="best.ckpt or last.ckpt")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args(argv)
    try:
        model, card = load_network(options.checkpoint)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_weights(options.output, model.state_dict(), card.to_dict())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
