"""The demo over attacks and seeds: one JSON line a run, resumable, then the table.

    python benchmarks/demo_grid.py docs/research/results/demo.jsonl

A run that is in the file already is not repeated.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from unplant.demo import ERASING, TRAINING, run_demo
from unplant.runs import environment


def main() -> None:
    """Runs what is missing and prints a Markdown table with mean and worst."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--attacks", nargs="+", default=["badnets", "blended", "sig"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    rows = [json.loads(line) for line in wanted.results.read_text().splitlines()] if wanted.results.exists() else []
    done = {(row["attack"], row["seed"]) for row in rows}
    for attack in wanted.attacks:
        for seed in wanted.seeds:
            if (attack, seed) in done:
                continue
            start = time.perf_counter()
            demo = run_demo(attack, seed)
            row = {
                "attack": attack,
                "seed": seed,
                "before": demo.before.to_json(),
                "after": demo.after.to_json(),
                "suspects": demo.suspects,
                "rounds": demo.erasure.rounds,
                "seconds": round(time.perf_counter() - start, 1),
                "training": TRAINING.model_dump(mode="json"),
                "erasing": ERASING.model_dump(mode="json"),
                "environment": environment(),
            }
            with wanted.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
            print(table([row])[-1], flush=True)
    print("\n".join(table(rows, summary=True)))


def passes(row: dict) -> bool:
    """The demo's own bar: infected ACC ≥ 97 %, ASR ≥ 95 %; then ASR ≤ 3 %, ACC drop ≤ 2 points, RA ≥ 0.9 ACC."""
    before, after = row["before"], row["after"]
    infected = before["acc"] >= 0.97 and before["asr"] >= 0.95
    erased = after["asr"] <= 0.03 and before["acc"] - after["acc"] <= 0.02 and after["ra"] >= 0.9 * after["acc"]
    return infected and erased


def table(rows: list[dict], *, summary: bool = False) -> list[str]:
    """Markdown lines."""
    lines = [
        "| attack | seed | ACC before | ASR before | ACC after | ASR after | RA after"
        " | precision | recall | AUROC | pass |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        b, a, s = row["before"], row["after"], row["suspects"]
        numbers = [b["acc"], b["asr"], a["acc"], a["asr"], a["ra"], s["precision"], s["recall"]]
        cells = ["–" if v is None else f"{100 * v:.1f}" for v in numbers]
        cells += [f"{s['auroc']:.4f}", "yes" if passes(row) else "**no**"]
        lines.append(f"| {row['attack']} | {row['seed']} | {' | '.join(cells)} |")
    if summary:
        drops = [100 * (row["before"]["acc"] - row["after"]["acc"]) for row in rows]
        rates = [100 * row["after"]["asr"] for row in rows]
        ratios = [row["after"]["ra"] / row["after"]["acc"] for row in rows]
        lines.append(
            f"\n{sum(map(passes, rows))} of {len(rows)} runs pass. ASR after: mean {sum(rates) / len(rates):.2f} %, "
            f"worst {max(rates):.2f} %. ACC drop: mean {sum(drops) / len(drops):.2f} points, worst {max(drops):.2f}. "
            f"RA/ACC: worst {min(ratios):.3f}."
        )
    return lines


if __name__ == "__main__":
    main()
