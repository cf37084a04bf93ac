"""Prints the results of benchmarks/attacks.py as Markdown.

python benchmarks/attack_table.py docs/research/results/attacks.jsonl
python benchmarks/attack_table.py docs/research/results/attacks-rates-digits.jsonl --rates
python benchmarks/attack_table.py docs/research/results/never-infected.jsonl --never-infected
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any


def main() -> None:
    """Reads the lines and prints one of three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument("--rates", action="store_true", help="ASR by poisoning rate, mean over seeds")
    tables.add_argument(
        "--never-infected", action="store_true", help="what a clean model that was trained alike makes of each trigger"
    )
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
    table = rates if args.rates else never_infected if args.never_infected else scores
    print("\n".join(table(rows)))


def scores(rows: list[dict[str, Any]]) -> list[str]:
    """One line a cell, beside the clean model that was trained alike."""
    lines = [
        "| cell | images | poison + cover | ACC (clean model's) | ASR | RA | natural | PSNR | SSIM | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    clean = {(row["images"], row["seed"]): row["scores"]["acc"] for row in rows if row["attack"] is None}
    for row in rows:
        if row["attack"] is None:
            continue
        s, never_infected = row["scores"], row.get("never_infected") or {}
        beside = never_infected.get("acc", clean.get((row["images"], row["seed"])))
        cells = [
            row["cell"] + (f", seed {row['seed']}" if row["seed"] else ""),
            f"{row['images']:,}",
            f"{row['poisoned']:,}" + (f" + {row['cover']:,}" if row["cover"] else ""),
            f"{percent(s['acc'])} ({percent(beside)})",
            percent(s["asr"]),
            percent(s["ra"]),
            percent(s["natural_target_rate"]),
            f"{row['psnr']:.1f}" if row["psnr"] else "–",
            f"{row['ssim']:.3f}",
            f"{row['seconds']:,}" if row["seconds"] else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def rates(rows: list[dict[str, Any]]) -> list[str]:
    """ASR by attack and poisoning rate; cells are named ATTACK@RATE."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        name, at, rate = row["cell"].partition("@")
        if at:
            found.setdefault(name, {}).setdefault(float(rate), []).append(row["scores"]["asr"])
    columns = sorted({rate for by_rate in found.values() for rate in by_rate}, reverse=True)
    lines = [
        "| attack | " + " | ".join(f"{100 * rate:g} %" for rate in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, by_rate in found.items():
        cells = []
        for rate in columns:
            values = by_rate.get(rate, [])
            spread = f" ({percent(min(values))}–{percent(max(values))})" if len(values) > 1 else ""
            cells.append(percent(mean(values)) + spread if values else "–")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def never_infected(rows: list[dict[str, Any]]) -> list[str]:
    """The clean model's ASR and RA under each trigger, the best that an eraser can be asked for."""
    lines = [
        "| cell | infected: ACC | ASR | never infected: ACC | ASR | RA | RA / ACC |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        clean = row.get("never_infected")
        if not clean:
            continue
        cells = [
            row["cell"] + (f", seed {row['seed']}" if row["seed"] else ""),
            *(percent(row["scores"][name]) for name in ("acc", "asr")),
            *(percent(clean[name]) for name in ("acc", "asr", "ra")),
            percent(clean["ra"] / clean["acc"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def percent(value: float | None) -> str:
    """A share for people."""
    return "–" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    main()
