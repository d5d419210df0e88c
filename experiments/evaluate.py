# SPDX-License-Identifier: BSD-3-Clause
"""Measure a trained network on the images of a list file and print one JSON line.

    python experiments/evaluate.py --checkpoint runs/NAME/resnet34/best.ckpt --data FOLDER --list test.txt

A line of the list file is `<path> <label>`, the path relative to FOLDER. The checkpoint says which network it holds and
how images are prepared for it. Networks of Task I are measured on each channel set.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dynconv_vision.data import load_list
from dynconv_vision.training import StudyError, read_card
from dynconv_vision.training.config import DEVICES, PRECISIONS
from dynconv_vision.training.study import measure_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate; 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(description="Accuracy of a trained network on a list of images, as JSON.")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help="best.ckpt or last.ckpt of a run"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="where the list's paths start")
    parser.add_argument("--list", type=Path, required=True, metavar="FILE", help="list file; also relative to --data")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--skip-bad-images", action="store_true", help="go on without images that cannot be used")
    options = parser.parse_args(argv)
    try:
        if options.batch_size < 1:
            raise StudyError(f"--batch-size: got {options.batch_size}, expected a whole number >= 1")
        if not options.data.is_dir():
            raise StudyError(f"--data: got {str(options.data)!r}, expected a folder that exists")
        found = [path for path in (options.list, options.data / options.list) if path.is_file()]
        if not found:
            raise StudyError(f"--list: no such list file: neither {options.list} nor {options.data / options.list}")
        card = read_card(options.checkpoint)
        split = load_list(
            found[0],
            root=options.data,
            num_classes=card.num_classes,
            skip_bad_images=options.skip_bad_images,
            **card.preprocessing,
        )
        settings = {"batch_size": options.batch_size, "device": options.device, "precision": options.precision}
        print(json.dumps(measure_checkpoint(options.checkpoint, split, **settings)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
