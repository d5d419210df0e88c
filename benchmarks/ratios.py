# SPDX-License-Identifier: BSD-3-Clause
"""Turns the JSON that pytest-benchmark saves into a table of ratios, ours against every peer of the same run.

    pytest benchmarks --benchmark-only --benchmark-json=run.json
    python benchmarks/ratios.py run.json [--output table.md] [--json ratios.json]

A ratio is the peer's median time over ours: above 1, ours is faster. ``X_channels_last`` is raced against
``ours_channels_last``, everything else against ``ours``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def load(path: Path) -> dict[str, Any]:
    """The saved run.

    Raises:
        SystemExit: the file is missing or not pytest-benchmark's.
    """
    try:
        run = json.loads(path.read_text())
        run["benchmarks"], run["machine_info"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path}: expected the JSON of `pytest --benchmark-json`, got {error!r}") from None
    return run


def ratios(run: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per race and peer: op, case, dtype, direction, ours, peer, ratio, rounds."""
    races: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for benchmark in run["benchmarks"]:
        info = benchmark["extra_info"]
        key = tuple(info[k] for k in ("op", "case", "dtype", "direction"))
        races.setdefault(key, {})[info["impl"]] = benchmark["stats"]
    table = []
    for (op, case, dtype, direction), stats in races.items():
        for peer in stats:
            ours = "ours_channels_last" if peer.endswith("_channels_last") else "ours"
            if peer in ("ours", "ours_channels_last") or ours not in stats:
                continue
            table.append(
                {
                    "op": op,
                    "case": case,
                    "dtype": dtype,
                    "direction": direction,
                    "ours": ours,
                    "peer": peer,
                    "ratio": stats[peer]["median"] / stats[ours]["median"],
                    "rounds": stats[ours]["rounds"],
                }
            )
    return table


def markdown(table: list[dict[str, Any]], run: dict[str, Any]) -> str:
    """The table, a row per case, dtype and direction, a column per peer, one block per operator."""
    cpu = run["machine_info"].get("cpu", {})
    threads = {b["extra_info"].get("threads") for b in run["benchmarks"]}
    lines = [
        "Times of a peer over ours, medians of interleaved runs: above 1, ours is faster.",
        f"{cpu.get('brand_raw', 'unknown CPU')}, {', '.join(map(str, sorted(threads)))} threads.",
    ]
    for op in dict.fromkeys(row["op"] for row in table):
        rows = [row for row in table if row["op"] == op]
        peers = list(dict.fromkeys(row["peer"] for row in rows))
        lines += ["", f"### {op}", "", "| case | direction | dtype | " + " | ".join(peers) + " |"]
        lines.append("|---|---|---|" + "---:|" * len(peers))
        for key in dict.fromkeys((r["case"], r["direction"], r["dtype"]) for r in rows):
            found = {r["peer"]: r["ratio"] for r in rows if (r["case"], r["direction"], r["dtype"]) == key}
            cells = [f"{found[p]:.2f}" if p in found else "" for p in peers]
            lines.append("| " + " | ".join((*key, *cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="JSON saved by pytest --benchmark-json")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    parser.add_argument("--json", type=Path, help="write the ratios as JSON to this file")
    options = parser.parse_args()
    run = load(options.run)
    table = ratios(run)
    if not table:
        raise SystemExit(f"{options.run}: no race with a peer in it")
    text = markdown(table, run)
    sys.stdout.write(text)
    if options.output:
        options.output.write_text(text)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
