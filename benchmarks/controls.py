"""What models that were never infected do on each attack's triggered test images: one JSON line a cell, then the table.

    python benchmarks/controls.py cells.txt --data cifar10.zip/train --test cifar10.zip/test \
        --arch preact_resnet18:width=16 --set epochs=8 --clean-seed 0 --clean-seed 1 --out controls.jsonl

A trigger changes images: it hides parts of them, and may lead to its target by what it looks like. No eraser is to be
asked for less ASR or more RA than training on clean data gives. Models come from the cache (--cache) or are trained
into it, those never infected with the same settings, once for each --clean-seed. Cells: see benchmarks/cells.py;
`clean` is passed over, so that the cells of a testbed can be given.
"""

import dataclasses
from typing import Any

from cells import parser, run_missing, setting
from testbed import percent

from unplant.cache import plant_cached, train_cached
from unplant.evaluation import evaluate
from unplant.poisoning import Attack
from unplant.runs import environment


def main() -> None:
    """Measures what is missing and prints a Markdown table."""
    options = parser(__doc__)
    options.add_argument("--clean-seed", type=int, action="append", default=[], help="of a never-infected model")
    args = options.parse_args()
    here = setting(args)
    seeds = sorted(set(args.clean_seed or [here.seed]))

    def measure(name: str, attack: Attack | None) -> dict[str, Any] | None:
        if attack is None:
            return None
        planted, _ = plant_cached(here.data, attack, here.arch, here.training, **here.around)
        controls = []
        for seed in seeds:
            clean, _ = train_cached(here.data, here.arch, here.training, **dataclasses.replace(here, seed=seed).around)
            controls.append({"seed": seed, **evaluate(clean, here.test, planted.attack).to_json()})
        row = {
            "cell": name,
            **here.to_json(),
            "attack": planted.attack.to_json(weights=False),
            "infected": evaluate(planted.model, here.test, planted.attack).to_json(),
            "controls": controls,
            "environment": environment(),
        }
        print(line_of(row), flush=True)
        return row

    rows = run_missing(
        args,
        lambda row: (row["cell"], row["seed"], row["images"], [control["seed"] for control in row["controls"]]),
        lambda name: (name, here.seed, len(here.data), seeds),
        measure,
    )
    print("\n".join(table(rows)))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines; of several never-infected models the lowest and the highest."""
    head = "cell | infected: ACC | ASR | never infected: ACC | ASR | natural | RA | RA / ACC"
    return [f"| {head} |", "|---" * (head.count("|") + 1) + "|", *map(line_of, rows)]


def line_of(row: dict[str, Any]) -> str:
    """One line of the table."""
    infected, controls = row["infected"], row["controls"]
    columns = [[control[name] for control in controls] for name in ("acc", "asr", "natural_target_rate", "ra")]
    columns.append([control["ra"] / control["acc"] for control in controls])
    cells = (row["cell"], percent(infected["acc"]), percent(infected["asr"]), *map(span, columns))
    return f"| {' | '.join(cells)} |"


def span(values: list[float]) -> str:
    """The lowest and the highest, as one figure where they are the same."""
    low, high = percent(min(values)), percent(max(values))
    return low if low == high else f"{low} to {high}"


if __name__ == "__main__":
    main()
