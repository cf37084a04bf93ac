"""Draws what tells poisoned groups from natural ones: how far each fell, and which carry a working trigger.

    python benchmarks/plot_falls.py docs/pbe-falls.png docs/research/results/pbe-cifar.jsonl \
        docs/research/results/pbe-held-out.jsonl

Takes the JSON lines of benchmarks/testbed.py, all-to-one cells only.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

LOWEST = -0.4
"""Groups that gained more are drawn here."""


def main() -> None:
    """One column a cell, one point for each class that fell into two groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    rows = [json.loads(line) for file in args.results for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["attack"] is None or row["attack"]["label_map"] == "all-to-one"]
    figure = Figure(figsize=(1.0 + 0.75 * len(rows), 4.2), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(rows):
        splits, trials = ([step for step in row["rounds"] if step["step"] == name] for name in ("groups", "examined"))
        target = row["attack"]["target"] if row["attack"] else None
        tried = zip(splits, (trial["fall"] for trial in trials), strict=True)  # once more where nobody was convicted
        for groups, falls, label in ((*pair, label) for pair in tried for label in range(len(pair[1]))):
            if groups["minor_share"][label] == 0:
                continue
            poisoned = label == target
            seen = groups["carriers" if "carriers" in groups else "side"][label] != 0  # "side": in older results
            colour, mark = ("tab:red" if poisoned else "0.6"), ("*" if seen else "o")
            axis.plot(place, max(falls[label], LOWEST), mark, color=colour, markersize=11 if seen else 7)
    axis.axhline(0.5, color="0.3", linewidth=0.8, linestyle="--")
    axis.set_xticks(range(len(rows)), [row["cell"] for row in rows], rotation=35, ha="right")
    axis.set_ylabel("share of its label's probability\nthat the group loses, left out")
    axis.plot([], [], "o", color="tab:red", label="target class, poisoned group")
    axis.plot([], [], "*", color="tab:red", markersize=11, label="the same, trigger confirmed by transplant")
    axis.plot([], [], "o", color="0.6", label="natural group of a clean class")
    axis.legend(loc="lower left", fontsize=8)
    figure.savefig(args.picture, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
