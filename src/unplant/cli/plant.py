"""`unplant plant`: an infected model, its poisoned training set, and the truth about it in a folder apart."""

from pathlib import Path
from typing import Any

import torch

from unplant.cache import plant_cached
from unplant.cli.common import check_apart, open_journal, parse_labels, parse_limits, read, set_threads
from unplant.cli.output import emit, percent, progress_bar, say, say_warnings
from unplant.controlled import ControlsTraining
from unplant.data import write_folder
from unplant.devices import check_precision, pick_device, pick_precision
from unplant.errors import UsageError
from unplant.evaluation import evaluate
from unplant.files import OutputFolder
from unplant.params import parse_settings
from unplant.planting import TrainConfig, parse_attack, plant
from unplant.planting import poison_only as poison_data
from unplant.poisoning import Attack, PoisonedImages
from unplant.runs import ModelCard, environment, save_classifier, write_csv, write_json


def run(
    *, data: str, out: Path, attack: str, arch: str, target: int, all_to_all: bool, clean_label: bool | None,
    rate: str | None, cover_rate: str | None, sources: str | None, poison_only: bool, reuse: bool, test: str | None,
    max_images: int | None, seed: int, settings: list[str] | None, image_size: str | None, skip_bad_images: bool,
    device: str, precision: str, threads: int | None, save_every: float, limit: list[str] | None, force: bool,
    json: bool,
) -> None:  # fmt: skip
    """Writes `model.safetensors`, `suspect/` (all that a defender may see) and `truth/` (what it may not)."""
    check_apart(out, data, test)
    set_threads(threads)
    limits = parse_limits(limit)
    where = pick_device(device)
    label_map = "all-to-all" if all_to_all else "all-to-one"
    wishes = {
        "poisoning_rate": rate,
        "clean_label": clean_label,
        "cover_rate": cover_rate,
        "sources": parse_labels(sources),
    }
    given = {name: value for name, value in wishes.items() if value is not None}
    planned = parse_attack(attack, target=target, label_map=label_map, **given)
    if poison_only and (test or settings or reuse):
        raise UsageError("--poison-only trains no model; leave out --test, --set and --reuse")
    if poison_only and isinstance(planned.trigger, ControlsTraining):
        raise UsageError(f"{planned.trigger.id} controls training: its data alone would infect no model")
    config = TrainConfig(**{"precision": pick_precision(precision, where), **parse_settings(settings or [])})
    if not poison_only:
        say_warnings(check_precision(config.precision, where))
    output = OutputFolder(out, force=force)
    with output as folder:
        files: dict[str, Any] = {"image_size": image_size, "skip_bad": skip_bad_images, "limits": limits}
        images = read(data, max_images=max_images, seed=seed, **files)
        test_images = read(test, **files) if test else None
        result: dict[str, Any] = {"command": "plant", "seed": seed, "data": images.fingerprint()}
        with progress_bar() as progress:
            if poison_only:
                truth, done = poison_data(images, planned, seed=seed, device=where, progress=progress)
            else:
                how = {"seed": seed, "device": where, "progress": progress}
                if reuse:
                    planted, result["from_cache"] = plant_cached(images, planned, arch, config, **how)
                else:
                    journal = open_journal(output, ModelCard(arch=arch), save_every)
                    planted = plant(images, planned, arch, config, journal=journal, **how)
                truth, done = planted.training_set, planted.attack
                card = ModelCard.of(planted.model, arch, images)
                save_classifier(folder / "model.safetensors", planted.model, card)
                about = {"model": card.model_dump(mode="json"), "training": config.model_dump(mode="json")}
                write_json(folder / "config.json", about)
                scores = evaluate(planted.model, test_images, done) if test_images is not None else None
                result["scores"] = scores.to_json() if scores else None
        _write_data(folder, truth, done)
        result |= {
            "attack": done.to_json(weights=False),
            "images": len(images),
            "poisoned": int(torch.count_nonzero(truth.poisoned)),
            "cover": int(torch.count_nonzero(truth.covered)),
            "environment": environment(),
        }
        write_json(folder / "result.json", result)
    if json:
        emit(result)
        return
    what = "poisoned images only" if poison_only else f"{arch} infected"
    cover = f", {result['cover']} cover images" if result["cover"] else ""
    say(f"{out}: {what} by {attack}, {result['poisoned']} of {len(images)} training images poisoned{cover}")
    if result.get("scores"):
        say(", ".join(f"{name.upper()} {percent(result['scores'][name])}" for name in ("acc", "asr", "ra")))
    if poison_only:
        say(f"Train on {out}/suspect; what was done to it is in {out}/truth")
    else:
        say(f"Try: unplant erase {out} --suspect {out}/suspect -o {out}-erased")


def _write_data(folder: Path, truth: PoisonedImages, attack: Attack) -> None:
    """The training set, and the truth about it in a folder apart."""
    data = truth.data
    for name in ("suspect", "truth"):
        (folder / name).mkdir()
    write_folder(data, folder / "suspect")
    write_json(folder / "truth" / "attack.json", attack.to_json())
    columns = (data.labels, truth.true_labels, truth.poisoned.int(), truth.covered.int())
    rows = zip(*(column.tolist() for column in columns), strict=True)
    write_csv(
        folder / "truth" / "poison.csv",
        ("file", "label", "true_label", "poisoned", "cover"),
        [(f"{data.classes[y]}/{i:06d}.png", y, *rest) for i, (y, *rest) in enumerate(rows)],
    )
