"""Trains infected models, cached, and measures how well each attack works: one JSON line a cell, resumable.

    python benchmarks/attacks.py cells.txt --data cifar10.zip/train --test cifar10.zip/test \
        --arch preact_resnet18:width=16 --set epochs=8 --set precision=bfloat16 --out attacks.jsonl

A cell is a line `NAME ATTACK [recipe setting=value ...]`, for instance `wanet-all wanet label_map=all-to-all`; the
attack `clean` is the same training on clean data. A cell that is in --out already isn't done again.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from unplant import metrics
from unplant.cache import key_of, plant_cached, settings_of
from unplant.data import open_data
from unplant.evaluation import evaluate
from unplant.images import LabeledImages
from unplant.params import parse_settings
from unplant.planting import TrainConfig, parse_attack, train
from unplant.poisoning import triggered_test_set
from unplant.runs import environment


def measure(
    line: str, data: LabeledImages, test: LabeledImages, arch: str, config: TrainConfig, seed: int, cache: Path
):
    """The JSON line of one cell."""
    name, spec, *rest = line.split()
    start = time.monotonic()
    common = {"cell": name, "arch": arch, "training": config.model_dump(mode="json"), "seed": seed}
    common |= {"images": len(data), "data": data.fingerprint()}
    if spec == "clean":
        model = train(arch, data, config, seed=seed)
        seconds = time.monotonic() - start
        return common | {
            "attack": None,
            "scores": evaluate(model, test).to_json(),
            "seconds": round(seconds),
            "environment": environment(),
        }
    attack = parse_attack(spec, **parse_settings(rest))
    planted, cached = plant_cached(data, attack, arch, config, seed=seed, folder=cache)
    seconds = time.monotonic() - start
    clean, triggered = triggered_test_set(test, planted.attack)
    return common | {
        "attack": planted.attack.to_json(weights=False),
        "key": key_of(settings_of(data, attack, arch, config, seed)),
        "scores": evaluate(planted.model, test, planted.attack).to_json(),
        "psnr": metrics.psnr(clean.images[:1000], triggered.images[:1000]),
        "ssim": metrics.ssim(clean.images[:1000], triggered.images[:1000]),
        "poisoned": int(planted.training_set.poisoned.sum()),
        "cover": int(planted.training_set.covered.sum()),
        "seconds": None if cached else round(seconds),
        "environment": environment(),
    }


def main() -> None:
    """Reads the cells and appends what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--arch", default="small_cnn")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--max-images", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = TrainConfig(**parse_settings(args.settings))
    data, test = open_data(args.data), open_data(args.test)
    if args.max_images:
        data = data.sample(args.max_images, torch.Generator().manual_seed(args.seed))

    def done() -> set[tuple[str, int, int]]:
        lines = args.out.read_text().splitlines() if args.out.exists() else []
        return {(row["cell"], row["seed"], row["images"]) for row in map(json.loads, lines)}

    for line in args.cells.read_text().splitlines():
        if not line.strip() or line.startswith("#") or (line.split()[0], args.seed, len(data)) in done():
            continue
        row = measure(line, data, test, args.arch, config, args.seed, args.cache)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        scores = {key: row["scores"][key] for key in ("acc", "asr", "ra", "natural_target_rate")}
        print(row["cell"], scores, f"{row['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
