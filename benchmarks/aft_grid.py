"""Runs one configuration of an eraser with clean data over cells of attacks: one JSON line a cell, then the table.

    python benchmarks/aft_grid.py cells.txt --data cifar10.zip/train --test cifar10.zip/test \
        --arch preact_resnet18:width=16 --set epochs=8 --clean-images 2500 --out aft.jsonl

With --model the cells' attacks are measured on that checkpoint instead, for instance somebody else's. Cells: see
benchmarks/cells.py; the pass rule: see benchmarks/testbed.py. The clean images are taken from --data at random, with
their true labels.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from cells import eraser_of, eraser_options, lengthened, parser, run_missing, setting, test_part
from testbed import line_of, table

from unplant.cache import plant_cached, train_cached
from unplant.evaluation import evaluate, suspect_quality
from unplant.poisoning import Attack
from unplant.runs import environment, open_classifier


def main() -> None:
    """Erases what is missing and prints a Markdown table with mean and worst."""
    options = parser(__doc__)
    eraser_options(options, "aft")
    options.add_argument("--clean-images", type=int, default=2500)
    options.add_argument("--defence-seed", type=int, default=0, help="of the clean images and of the eraser")
    options.add_argument("--model", type=Path, help="a checkpoint, instead of planting")
    args = options.parse_args()
    here = setting(args)
    clean = here.data.sample(args.clean_images, torch.Generator().manual_seed(args.defence_seed))
    test, (method, config, label) = test_part(args, here.test), eraser_of(args)

    def measure(name: str, attack: Attack | None) -> dict[str, Any]:
        if args.model:
            (model, _), known = open_classifier(args.model, here.data, arch=here.arch), attack
            model.to(here.device, memory_format=torch.channels_last)
        elif attack is None:
            (model, _), known = train_cached(here.data, here.arch, here.training, **here.around), None
        else:
            planted, _ = plant_cached(here.data, attack, here.arch, here.training, **here.around)
            model, known = planted.model, planted.attack
        model = lengthened(model, args.lengthen)
        start = time.monotonic()
        erasure = method.run(model, clean, config, generator=torch.Generator().manual_seed(args.defence_seed))
        seconds = round(time.monotonic() - start)
        about = {"cell": name, **here.to_json(), "test_images": len(test), "lengthened": args.lengthen}
        if args.model:
            about["training"] = None
        row = {
            **about,
            "label": label,
            "clean_images": len(clean),
            "defence_seed": args.defence_seed,
            "attack": known.to_json(weights=False) if known else None,
            "eraser": {"method": args.method, **config.model_dump(mode="json")},
            "before": measured_before(args.out, about) or evaluate(model, test, known).to_json(),
            "after": evaluate(erasure.model, test, known).to_json(),
            "suspects": suspect_quality(erasure, torch.zeros(len(clean), dtype=torch.bool)),
            "findings": erasure.findings.to_json() if erasure.findings else None,
            "rounds": erasure.rounds,
            "passes": sum(step.get("passes", 0) for step in erasure.rounds),
            "seconds": seconds,
            "environment": environment(),
        }
        print(line_of(row), flush=True)
        return row

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[part] for part in ("cell", "label", "clean_images", "defence_seed", "test_images", "seed"))

    about = (label, len(clean), args.defence_seed, len(test), here.seed)
    rows = run_missing(args, key, lambda name: (name, *about), measure)
    print("\n".join(table([row for row in rows if key(row)[1:3] == (label, len(clean))])))


def measured_before(file: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """The infected model's scores, class by class, if an earlier line has them of the same one and test images."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    same = (r["before"] for r in rows if all(r.get(name) == value for name, value in about.items()))
    return next((before for before in same if before.get("class_acc")), None)


if __name__ == "__main__":
    main()
