"""What the benchmarks share: cells of attacks, their options, and result files that can be gone on with.

A cell is a line `NAME ATTACK [recipe setting=value ...]`, for instance `wanet-all wanet label_map=all-to-all`; the
attack `clean` means the same training on clean data.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unplant.cache import plant_cached, train_cached
from unplant.data import open_data
from unplant.devices import pick_device
from unplant.erasers import EraserConfig, erasers
from unplant.erasers.base import Method
from unplant.images import LabeledImages
from unplant.params import parse_settings
from unplant.planting import TrainConfig, parse_attack
from unplant.poisoning import Attack


@dataclass(frozen=True)
class Setting:
    """What all cells of a run have in common."""

    data: LabeledImages
    test: LabeledImages
    arch: str
    training: TrainConfig
    seed: int
    cache: Path | None
    device: torch.device

    @property
    def around(self) -> dict[str, Any]:
        """What planting and training from the cache are told."""
        return {"seed": self.seed, "folder": self.cache, "device": self.device}

    def to_json(self) -> dict[str, Any]:
        """For the result line."""
        return {
            "arch": self.arch,
            "training": self.training.model_dump(mode="json"),
            "seed": self.seed,
            "images": len(self.data),
            "data": self.data.fingerprint(),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
        }


@dataclass(frozen=True, eq=False)
class Infected:
    """A model, its suspect set, the truth, and the attack as it was planted; None for a clean model."""

    model: nn.Module
    data: LabeledImages
    poisoned: Tensor
    attack: Attack | None


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark over cells."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("cells", type=Path)
    options.add_argument("--data", required=True)
    options.add_argument("--test", required=True)
    options.add_argument("--arch", default="small_cnn")
    options.add_argument("--set", action="append", default=[], dest="training", help="of the infected model's training")
    options.add_argument("--max-images", type=int)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--cache", type=Path)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--device", default="cpu")
    options.add_argument("--out", type=Path, required=True)
    return options


def setting(args: argparse.Namespace) -> Setting:
    """Opens the data."""
    torch.set_num_threads(args.threads)
    data, test = open_data(args.data), open_data(args.test)
    if args.max_images:
        data = data.sample(args.max_images, torch.Generator().manual_seed(args.seed))
    training = TrainConfig(**parse_settings(args.training))
    return Setting(data, test, args.arch, training, args.seed, args.cache, pick_device(args.device))


def eraser_options(options: argparse.ArgumentParser, method: str) -> None:
    """The options of benchmarks that run an eraser, by default that method."""
    options.add_argument("--method", default=method)
    options.add_argument("--preset", default="default")
    options.add_argument("--eraser", action="append", default=[], help="setting=value of the eraser")
    options.add_argument("--label", default="", help="a name for this configuration of the eraser")
    options.add_argument(
        "--lengthen", type=float, default=1, help="multiply the infected model's filters before a BatchNorm by that"
    )
    options.add_argument("--test-images", type=int, help="for quick looks: measure on so many test images at random")


def suspect_options(options: argparse.ArgumentParser) -> None:
    """The options of benchmarks that run an eraser on suspect sets."""
    options.add_argument("--suspect-images", type=int, help="the eraser gets so many at random")
    options.add_argument("--defence-seed", type=int, help="of the eraser; default: --seed")


def defence_seed_of(args: argparse.Namespace) -> int:
    """What the eraser's generator begins with."""
    return args.seed if args.defence_seed is None else args.defence_seed


def eraser_of(args: argparse.Namespace) -> tuple[Method, EraserConfig, str]:
    """The eraser, its configuration and the configuration's name."""
    method = erasers[args.method]
    config = method.configure(args.preset, **parse_settings(args.eraser))
    return method, config, args.label or f"{args.method}/{args.preset}"


def test_part(args: argparse.Namespace, test: LabeledImages) -> LabeledImages:
    """The test images to measure on."""
    return test.sample(args.test_images, torch.Generator().manual_seed(0)) if args.test_images else test


def attack_of(spec: str, recipe: list[str]) -> Attack | None:
    """The attack of a cell; None for `clean`."""
    return None if spec == "clean" else parse_attack(spec, **parse_settings(recipe))


def infected_by(here: Setting, attack: Attack | None, suspect_images: int | None) -> Infected:
    """The model of a cell, from the cache or planted into it, and so many of its training images at random."""
    if attack is None:
        (model, _), data = train_cached(here.data, here.arch, here.training, **here.around), here.data
        poisoned, known = torch.zeros(len(data), dtype=torch.bool), None
    else:
        planted, _ = plant_cached(here.data, attack, here.arch, here.training, **here.around)
        model, data, known = planted.model, planted.training_set.data, planted.attack
        poisoned = planted.training_set.poisoned
    if suspect_images:
        part = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:suspect_images]
        data, poisoned = data.select(part), poisoned[part]
    return Infected(model, data, poisoned, known)


def lengthened(model: nn.Module, by: float) -> nn.Module:
    """A copy whose filters are so many times as long where a BatchNorm follows: it answers as the given one does.

    Convolutions and their norms are taken for a pair if they follow each other in `Module.modules`, which is true of
    nets that normalise after each convolution (`small_cnn`), not of pre-activation ones.
    """
    model = copy.deepcopy(model)
    for before, norm in pairwise(model.modules()):
        if isinstance(before, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
            assert norm.running_var is not None
            with torch.no_grad():
                for tensor in before.parameters():
                    tensor *= by
                norm.running_mean *= by
                norm.running_var *= by**2
    return model


def run_missing(
    args: argparse.Namespace,
    key: Callable[[dict[str, Any]], Any],
    todo: Callable[[str], Any],
    measure: Callable[[str, Attack | None], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Measures the cells that aren't in the result file yet, appends one line each, and returns all lines.

    Args:
        args: the options.
        key: of a result line, what identifies it.
        todo: of a cell's name, the key that its line would have.
        measure: the line of a cell, from its name and attack.
    """

    def rows() -> list[dict[str, Any]]:
        text = args.out.read_text(encoding="utf-8") if args.out.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    for line in args.cells.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, spec, *recipe = line.split()
        if todo(name) in map(key, rows()):
            continue
        row = measure(name, attack_of(spec, recipe))
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return rows()
