"""Switches each choice of PBE off in turn, over cells of attacks: one JSON line a run, resumable, then the table.

    python benchmarks/ablations.py cells.txt --data digits:train --test digits:test --set epochs=20 \\
        --set batch_size=64 --eraser batch_size=64 --cache infected --out ablations.jsonl

The table has a line for each choice: what differs from the run with all of them. Cells: see benchmarks/cells.py.
"""

import argparse
from typing import Any

from cells import defence_seed_of, infected_by, parser, run_missing, setting, suspect_options
from testbed import measured, percent

from unplant.erasers import erasers
from unplant.params import parse_settings
from unplant.poisoning import Attack

ALL = "all choices"

WITHOUT: dict[str, dict[str, Any]] = {
    "groups (a random first D_ext)": {"initial": "random"},
    "adversarial steps": {"adversarial_share": 0},
    "adversarial examples (noise)": {"pgd_step_size": 1e-9},
    "a fitting ball (6/255)": {"eps": 6 / 255},
    "short filters": {"filter_length": 0},
    "other depths": {"other_depths": False},
    "trials of both halves": {"balanced": 1},
    "longer trials": {"longer": 1},
    "`believed`": {"believed": False},
    "`shows`": {"shows": False},
    "`heeded`": {"heeded": False},
    "`several`": {"several": False},
    "`named`": {"named": False},
    "`bared`": {"bared": False},
    "`by_right`": {"by_right": False},
    "transplants": {"transplants": 0},
    "relabelled suspects": {"relabel": False},
    "any use of suspects": {"relabel": False, "transplants": 0},
    "the loss of probability (cosine)": {"score": "cosine"},
    "thresholds (20, 50, 70 %)": {"shares": (0.2, 0.5, 0.7)},
    "`strict`": {"strict": False},
    "a second round": {"rounds": 1},
    "the ending": {"final_steps": 0},
    "`acquit`": {"acquit": None},
    "`kinship`": {"kinship": False},
    "`retrial`": {"retrial": False},
}
"""What is switched off, and how."""


def main() -> None:
    """Runs what is missing and prints the table."""
    options = parser(__doc__)
    suspect_options(options)
    options.add_argument("--eraser", action="append", default=[], help="setting=value of all runs")
    options.add_argument("--only", action="append", choices=list(WITHOUT), help="switch off that alone; repeatable")
    args = options.parse_args()
    for label in (ALL, *(args.only or WITHOUT)):
        run_label(args, label)
    rows = run_label(args, ALL)
    print("\n".join(table(rows)))


def run_label(args: argparse.Namespace, label: str) -> list[dict[str, Any]]:
    """Measures what is missing without one choice, and returns all lines of the file."""
    here, seed, method = setting(args), defence_seed_of(args), erasers["pbe"]
    config = method.configure(**{**parse_settings(args.eraser), **WITHOUT.get(label, {})})

    def measure(name: str, attack: Attack | None) -> dict[str, Any]:
        row = measured(infected_by(here, attack, args.suspect_images), here.test, method, config, seed)
        row = {"cell": name, "label": label, **here.to_json(), **row}
        print(f"{label} | {name} | {said_of(row)} | {row['seconds']} s", flush=True)
        return row

    def key(row: dict[str, Any]) -> Any:
        return row["cell"], row["seed"], row["defence_seed"], row["label"]

    return run_missing(args, key, lambda name: (name, here.seed, seed, label), measure)


def said_of(row: dict[str, Any]) -> str:
    """What is left, and what was found."""
    return f"ASR {percent(row['after']['asr'])}, ACC {percent(row['after']['acc'])}, {_verdict(row)}"


def _verdict(row: dict[str, Any]) -> str:
    """F1 of an infected model's suspects; whether a clean one is accused."""
    if row["attack"] is None:
        said = row["findings"]
        return "no verdict" if said is None else "accused" if said["infected"] else "not accused"
    return f"F1 {percent(row['suspects']['f1'])}"


def differences(row: dict[str, Any], other: dict[str, Any], least: float = 0.01) -> str:
    """What differs by so much at least, of ASR, ACC, RA and F1, and of the verdict on a clean model."""
    parts = []
    for name, of in (("ASR", "after"), ("ACC", "after"), ("RA", "after"), ("F1", "suspects")):
        before, after = (each[of][name.lower()] for each in (other, row))
        if before != after and (before is None or after is None or abs(before - after) >= least):
            parts.append(f"{name} {percent(before)} → {percent(after)}")
    if row["attack"] is None and _verdict(row) != _verdict(other):
        parts.append(_verdict(row))
    return ", ".join(parts)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: for each choice, the cells in which it makes a difference of a point or more."""

    def key(row: dict[str, Any]) -> Any:
        return row["cell"], row["seed"], row["defence_seed"]

    default = {key(row): row for row in rows if row["label"] == ALL}
    lines = ["| without | what differs | cells |", "|---|---|---|"]
    for label in dict.fromkeys(row["label"] for row in rows if row["label"] != ALL):
        mine = [row for row in rows if row["label"] == label and key(row) in default]
        changed = [(row["cell"], differences(row, default[key(row)])) for row in mine]
        told = "; ".join(f"**{cell}** {text}" for cell, text in changed if text)
        lines.append(f"| {label} | {told or 'nothing'} | {len(mine)} |")
    return lines


if __name__ == "__main__":
    main()
