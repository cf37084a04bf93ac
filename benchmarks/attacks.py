"""Trains infected models, cached, and measures how well each attack works: one JSON line a cell, resumable.

    python benchmarks/attacks.py cells.txt --data cifar10.zip/train --test cifar10.zip/test \
        --arch preact_resnet18:width=16 --set epochs=8 --set precision=bfloat16 --out attacks.jsonl

Cells: see benchmarks/cells.py. A cell that is in --out already isn't done again. Each is also put before a clean model
that was trained alike: what it makes of the trigger is the best that an eraser can be asked for.
"""

import functools
import time
from typing import Any

from cells import parser, run_missing, setting
from torch import nn

from unplant import metrics
from unplant.cache import key_of, plant_cached, settings_of, train_cached
from unplant.evaluation import evaluate
from unplant.poisoning import Attack, triggered_test_set
from unplant.runs import environment


def main() -> None:
    """Measures what is missing."""
    options = parser(__doc__)
    options.add_argument("--alone", action="store_true", help="don't train the clean model to put attacks before it")
    args = options.parse_args()
    here = setting(args)

    @functools.cache
    def never_infected() -> tuple[nn.Module, bool]:
        return train_cached(here.data, here.arch, here.training, **here.around)

    def measure(name: str, attack: Attack | None) -> dict[str, Any]:
        start = time.monotonic()
        row: dict[str, Any] = {"cell": name, **here.to_json(), "attack": None}
        if attack is None:
            model, cached = never_infected()
            seconds = None if cached else round(time.monotonic() - start)
            row |= {"seconds": seconds, "scores": evaluate(model, here.test).to_json()}
        else:
            planted, cached = plant_cached(here.data, attack, here.arch, here.training, **here.around)
            seconds = None if cached else round(time.monotonic() - start)
            clean, triggered = triggered_test_set(here.test, planted.attack)
            row |= {
                "attack": planted.attack.to_json(weights=False),
                "key": key_of(settings_of(here.data, attack, here.arch, here.training, here.seed)),
                "scores": evaluate(planted.model, here.test, planted.attack).to_json(),
                "psnr": metrics.psnr(clean.images[:1000], triggered.images[:1000]),
                "ssim": metrics.ssim(clean.images[:1000], triggered.images[:1000]),
                "poisoned": int(planted.training_set.poisoned.sum()),
                "cover": int(planted.training_set.covered.sum()),
                "seconds": seconds,
            }
            if not args.alone:
                row["never_infected"] = evaluate(never_infected()[0], here.test, planted.attack).to_json()
        scores = {key: row["scores"][key] for key in ("acc", "asr", "ra", "natural_target_rate")}
        print(name, scores, f"{row['seconds']} s", flush=True)
        return {**row, "environment": environment()}

    run_missing(
        args,
        lambda row: (row["cell"], row["seed"], row["images"]),
        lambda name: (name, here.seed, len(here.data)),
        measure,
    )


if __name__ == "__main__":
    main()
