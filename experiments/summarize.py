# SPDX-License-Identifier: BSD-3-Clause
"""Summarise runs of a task over seeds: tables with confidence intervals, the study's aims, a chart.

    python experiments/summarize.py FOLDER [--against FOLDER]

FOLDER holds the folders of runs with one recipe and size, each with its networks and its seed, done or not. Writes
summary.md, summary.json, summary.csv, per_seed.csv, channels.png (Task I) or trade_off.png (Task II), and ablations.png
into it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dynconv_vision.reporting import write_summary


def main(argv: Sequence[str] | None = None) -> int:
    """Summarise; 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(description="Means over seeds, confidence intervals and aims.")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="Task II: runs of another recipe, to compare with their ResNet-34",
    )
    options = parser.parse_args(argv)
    try:
        print(write_summary(options.folder, against=options.against))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
