# SPDX-License-Identifier: BSD-3-Clause
"""Summarise runs of Task I over seeds: tables with confidence intervals, the study's aims, a bar chart.

    python experiments/summarize.py FOLDER

FOLDER holds the folders of runs with one recipe and size, each with its networks and its seed, done or not. Writes
summary.md, summary.json, summary.csv, per_seed.csv and channels.png into it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dynconv_vision.reporting import write_summary


def main(argv: Sequence[str] | None = None) -> int:
    """Summarise; 0, or 2 after an error that the user can mend."""
    parser = argparse.ArgumentParser(description="Means over seeds, confidence intervals and aims of Task I.")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    options = parser.parse_args(argv)
    try:
        print(write_summary(options.folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
