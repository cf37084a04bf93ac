"""`unplant plant`: an infected model, its poisoned training set, and the truth about it in a folder apart."""

from pathlib import Path
from typing import Any

import torch

from unplant.cli.common import read, set_threads
from unplant.cli.output import emit, percent, progress_bar, say
from unplant.data import write_folder
from unplant.devices import pick_device, pick_precision
from unplant.evaluation import evaluate
from unplant.files import OutputFolder
from unplant.params import parse_settings
from unplant.planting import TrainConfig, parse_attack, plant
from unplant.runs import ModelCard, environment, save_classifier, write_csv, write_json


def run(
    *, data: str, out: Path, attack: str, arch: str, target: int, all_to_all: bool, clean_label: bool, rate: str,
    test: str | None, max_images: int | None, seed: int, settings: list[str] | None, image_size: str | None,
    skip_bad_images: bool, device: str, precision: str, threads: int | None, force: bool, json: bool,
) -> None:  # fmt: skip
    """Writes `model.safetensors`, `suspect/` (all that a defender may see) and `truth/` (what it may not)."""
    set_threads(threads)
    where = pick_device(device)
    label_map = "all-to-all" if all_to_all else "all-to-one"
    recipe = {"target": target, "label_map": label_map, "clean_label": clean_label, "poisoning_rate": rate}
    planned = parse_attack(attack, **recipe)
    wishes = parse_settings(settings or [])
    with OutputFolder(out, force=force) as folder:
        images = read(data, image_size=image_size, skip_bad=skip_bad_images, max_images=max_images, seed=seed)
        test_images = read(test, image_size=image_size, skip_bad=skip_bad_images) if test else None
        config = TrainConfig(**{"precision": pick_precision(precision, where), **wishes})
        with progress_bar() as progress:
            planted = plant(images, planned, arch, config, seed=seed, device=where, progress=progress)
        scores = evaluate(planted.model, test_images, planned) if test_images is not None else None
        truth = planted.training_set
        card = ModelCard.of(planted.model, arch, images)
        save_classifier(folder / "model.safetensors", planted.model, card)
        for name in ("suspect", "truth"):
            (folder / name).mkdir()
        write_folder(truth.data, folder / "suspect")
        write_json(folder / "truth" / "attack.json", planned.to_json())
        rows = zip(truth.data.labels.tolist(), truth.true_labels.tolist(), truth.poisoned.tolist(), strict=True)
        write_csv(
            folder / "truth" / "poison.csv",
            ("file", "label", "true_label", "poisoned"),
            [(f"{images.classes[y]}/{i:06d}.png", y, true, int(bad)) for i, (y, true, bad) in enumerate(rows)],
        )
        result: dict[str, Any] = {
            "command": "plant",
            "attack": planned.to_json(),
            "scores": scores.to_json() if scores else None,
            "images": len(images),
            "poisoned": int(torch.count_nonzero(truth.poisoned)),
            "seed": seed,
            "data": images.fingerprint(),
            "environment": environment(),
        }
        write_json(
            folder / "config.json", {"model": card.model_dump(mode="json"), "training": config.model_dump(mode="json")}
        )
        write_json(folder / "result.json", result)
    if json:
        emit(result)
        return
    say(f"{out}: {arch} infected by {attack}, {result['poisoned']} of {len(images)} training images poisoned")
    if scores:
        say(f"ACC {percent(scores.acc)}, ASR {percent(scores.asr)}, RA {percent(scores.ra)}")
    say(f"Try: unplant erase {out} --suspect {out}/suspect -o {out}-erased")
