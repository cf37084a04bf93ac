"""Runs one configuration of an eraser over cells of attacks: one JSON line a cell, resumable, then the table.

    python benchmarks/testbed.py cells.txt --data digits:train --test digits:test --set epochs=20 \
        --set batch_size=64 --method pbe --eraser batch_size=64 --out testbed.jsonl

Infected models come from the cache (--cache) or are planted into it. Cells: see benchmarks/cells.py. The pass rule is
`unplant.evaluation.missed`; only cells whose attack worked (ASR at least 80 %) count.
"""

import time
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from cells import (
    Infected,
    defence_seed_of,
    eraser_of,
    eraser_options,
    infected_by,
    lengthened,
    parser,
    run_missing,
    setting,
    suspect_options,
    test_part,
)

from unplant.erasers import EraserConfig
from unplant.erasers.base import Method
from unplant.evaluation import evaluate, largest_fall, missed, suspect_quality
from unplant.images import LabeledImages
from unplant.poisoning import Attack
from unplant.results import Scores
from unplant.runs import environment


def main() -> None:
    """Erases what is missing and prints a Markdown table with mean and worst."""
    options = parser(__doc__)
    eraser_options(options, "pbe")
    suspect_options(options)
    args = options.parse_args()
    defence_seed = defence_seed_of(args)
    here = setting(args)
    test, (method, config, label) = test_part(args, here.test), eraser_of(args)

    def measure(name: str, attack: Attack | None) -> dict[str, Any]:
        it = infected_by(here, attack, args.suspect_images)
        it = replace(it, model=lengthened(it.model, args.lengthen))
        row = measured(it, test, method, config, defence_seed)
        row = {"cell": name, "label": label, **here.to_json(), "lengthened": args.lengthen, **row}
        print(line_of(row), flush=True)
        return row

    rows = run_missing(
        args,
        lambda row: (row["cell"], row["seed"], row["defence_seed"], row["images"], row["label"]),
        lambda name: (name, here.seed, defence_seed, len(here.data), label),
        measure,
    )
    print("\n".join(table([row for row in rows if row["label"] == label])))


def measured(
    it: Infected, test: LabeledImages, method: Method, config: EraserConfig, defence_seed: int
) -> dict[str, Any]:
    """Erases, and says what came of it: the part of a result line that an eraser decides."""
    start = time.monotonic()
    erasure = method.run(it.model, it.data, config, generator=torch.Generator().manual_seed(defence_seed))
    return {
        "defence_seed": defence_seed,
        "suspect_images": len(it.data),
        "attack": it.attack.to_json(weights=False) if it.attack else None,
        "eraser": {"method": method.name, **config.model_dump(mode="json")},
        "before": evaluate(it.model, test, it.attack).to_json(),
        "after": evaluate(erasure.model, test, it.attack).to_json(),
        "suspects": suspect_quality(erasure, it.poisoned),
        "findings": erasure.findings.to_json() if erasure.findings else None,
        "rounds": erasure.rounds,
        "poison_in_extra_sets": [int((part & it.poisoned).sum()) for part in erasure.extra_sets],
        "passes": sum(step.get("passes", 0) for step in erasure.rounds),
        "seconds": round(time.monotonic() - start),
        "environment": environment(),
    }


def scores_of(row: dict[str, Any]) -> tuple[Scores, Scores]:
    """Of the model before and after; rows of earlier versions don't tell classes apart."""
    before, after = (Scores(**row[name]) for name in ("before", "after"))
    return before, after


def missed_by(row: dict[str, Any]) -> tuple[str, ...] | None:
    """What a cell misses of the pass rule; None if its attack didn't work in the first place."""
    return missed(*scores_of(row), accused=bool((row.get("findings") or {}).get("infected")))


def passes(row: dict[str, Any]) -> bool | None:
    """Whether a cell passes; None as above."""
    clauses = missed_by(row)
    return None if clauses is None else not clauses


def judgement(row: dict[str, Any]) -> str:
    """The same for people."""
    clauses = missed_by(row)
    if clauses is None:
        return "attack too weak"
    return f"**fail** ({', '.join(clauses)})" if clauses else "pass"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines, with the mean and the worst of the cells that count."""
    head = (
        "cell | ACC before → after | ASR before → after | estimated | natural | RA | suspects P / R / AUROC | "
        "poison in D_ext | passes | worst class, largest fall of one | "
    )
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|", *map(line_of, rows)]
    counted = [row for row in rows if row["attack"] is not None and passes(row) is not None]
    if counted:
        asr = [row["after"]["asr"] for row in counted]
        drop = [row["before"]["acc"] - row["after"]["acc"] for row in counted]
        lines += [
            "",
            f"{sum(bool(passes(row)) for row in counted)} of {len(counted)} infected cells pass; "
            f"ASR mean {percent(mean(asr))}, worst {percent(max(asr))}; "
            f"ACC drop mean {percent(mean(drop))}, worst {percent(max(drop))}",
        ]
        f1 = [row["suspects"]["f1"] for row in counted if row["suspects"]["f1"] is not None]
        if f1:
            lines.append(f"suspects: F1 mean {percent(mean(f1))}, worst {percent(min(f1))}")
    return lines + honesty(rows)


def honesty(rows: list[dict[str, Any]]) -> list[str]:
    """How the reports compare with the truth, over all cells whose report says something, weak attacks too."""
    told = [row for row in rows if row.get("findings") and row["attack"] is not None]
    clean = [row for row in rows if row.get("findings") and row["attack"] is None]
    off = [
        (abs(row["findings"]["asr_estimate"] - row["after"]["asr"]), row["cell"])
        for row in told
        if row["findings"].get("asr_estimate") is not None
    ]
    lines = []
    if off:
        worst, cell = max(off)
        lines.append(
            f"estimated ASR that is left: known for {len(off)} of {len(told)} infected models, off by "
            f"{percent(mean(value for value, _ in off))} points in the mean, {percent(worst)} at worst ({cell})"
        )
    if told or clean:
        lines.append(
            f"called infected: {sum(row['findings']['infected'] for row in told)} of {len(told)} infected models, "
            f"{sum(row['findings']['infected'] for row in clean)} of {len(clean)} clean ones"
        )
    return lines


def line_of(row: dict[str, Any]) -> str:
    """One line of the table."""
    b, a, found = row["before"], row["after"], row["suspects"]
    cells = (
        row["cell"],
        f"{percent(b['acc'])} → {percent(a['acc'])}",
        f"{percent(b['asr'])} → {percent(a['asr'])}",
        estimate(row),
        percent(a["natural_target_rate"]),
        percent(a["ra"]),
        " / ".join(percent(found[name]) for name in ("precision", "recall", "auroc")),
        ", ".join(map(str, row.get("poison_in_extra_sets", []))) or "–",
        f"{row['passes']:.1f}",
        worst_class(row),
        judgement(row),
    )
    return f"| {' | '.join(cells)} |"


def estimate(row: dict[str, Any]) -> str:
    """The defender's estimate of the ASR that is left: by witnesses, then by the recovered trigger."""
    said = row.get("findings")
    if not said:
        return "–"
    if not said["infected"]:
        return "nothing found"
    parts = [percent(said["asr_left"])] if said["witnesses"] else []
    parts += [f"{percent(said['trigger_after'])} (trigger)"] if said["trigger_after"] is not None else []
    return ", ".join(parts) or "unknown"


def worst_class(row: dict[str, Any]) -> str:
    """The accuracy of the class that is worst, before and after, and by how much the class fell that lost most."""
    before, after = scores_of(row)
    fall = largest_fall(before, after)
    told = f", {-100 * fall[1]:+.1f}".replace("-", "−") if fall else ""
    return f"{percent(before.worst_class_acc)} → {percent(after.worst_class_acc)}{told}"


def percent(value: float | None) -> str:
    """A share for people."""
    return "–" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    main()
