"""PBE's examination alone, before the first round: one JSON line a cell, resumable, the poison in view.

    python benchmarks/examined.py cells.txt --data digits:train --test digits:test --set epochs=20 \
        --set batch_size=64 --eraser batch_size=64 --out examined.jsonl

About a third of what the whole run costs (more with a longer trial), and it decides what that finds: a run whose
examination is as before is as before.
Per class: how many poisoned images it has, and how many of them are left out and in doubt. Cells: benchmarks/cells.py.
"""

import time
from typing import Any

import torch
from cells import defence_seed_of, eraser_of, eraser_options, infected_by, parser, run_missing, setting, suspect_options
from torch import Tensor

from unplant.erasers.pbe import PBEConfig
from unplant.erasers.pbe_run import Run
from unplant.erasers.steps import settle_ball
from unplant.poisoning import Attack
from unplant.runs import environment


def main() -> None:
    """Examines what is missing."""
    options = parser(__doc__)
    eraser_options(options, "pbe")
    suspect_options(options)
    args = options.parse_args()
    defence_seed = defence_seed_of(args)
    here, (_, config, label) = setting(args), eraser_of(args)
    assert isinstance(config, PBEConfig)

    def measure(name: str, attack: Attack | None) -> dict[str, Any]:
        it = infected_by(here, attack, args.suspect_images)
        start = time.monotonic()
        generator = torch.Generator().manual_seed(defence_seed)
        run = Run(it.model, it.data, settle_ball(config, it.model, it.data), generator, None)
        found = run.examine()

        def per_class(images: Tensor) -> list[int]:
            return torch.bincount(it.data.labels[images], minlength=it.data.num_classes).tolist()

        row = {
            "cell": name,
            "label": label,
            **here.to_json(),
            "defence_seed": defence_seed,
            "suspect_images": len(it.data),
            "attack": it.attack.to_json(weights=False) if it.attack else None,
            "eraser": {"method": args.method, **config.model_dump(mode="json")},
            "poisoned": per_class(it.poisoned),
            "poisoned_left_out": per_class(it.poisoned & found.left_out),
            "poisoned_in_doubt": per_class(it.poisoned & found.in_doubt),
            "in_doubt": per_class(found.in_doubt),
            "rounds": run.rounds,
            "seconds": round(time.monotonic() - start),
            "environment": environment(),
        }
        for said in (step for step in run.rounds if step["step"] == "examined"):
            for number, fall in enumerate(said["fall"]):
                if fall > 0.25:
                    told = f"fall {fall:.2f}, shows {said['shows'][number]:.2f}, left out {said['left_out'][number]}"
                    print(f"{name}, class {number}: {told}, {row['poisoned_left_out'][number]} poisoned", flush=True)
        return row

    run_missing(
        args,
        lambda row: (row["cell"], row["seed"], row["defence_seed"], row["images"], row["label"]),
        lambda name: (name, here.seed, defence_seed, len(here.data), label),
        measure,
    )


if __name__ == "__main__":
    main()
