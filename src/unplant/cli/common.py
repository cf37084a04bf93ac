"""What several commands do alike: read options, open data and models, set threads."""

import json
from pathlib import Path

import torch

from unplant import pictures
from unplant.cli.output import say
from unplant.data import open_data
from unplant.errors import UsageError
from unplant.files import OutputFolder, write_atomically
from unplant.images import LabeledImages
from unplant.journal import Journal
from unplant.limits import DEFAULT, Limits
from unplant.models import code_of
from unplant.params import parse_settings
from unplant.poisoning import Attack, parse_attack
from unplant.results import Erasure
from unplant.runs import ModelCard

MAX_ATTACK_BYTES = 2**27
"""An attack.json holds at most 64 MiB of learnt weights."""


def set_threads(threads: int | None) -> None:
    """Sets torch's CPU threads, if a number is given."""
    if threads is not None:
        torch.set_num_threads(threads)


def open_journal(output: OutputFolder, card: ModelCard, seconds: float) -> Journal:
    """The journal of a run of a model with that card."""
    if output.resumed:
        say("going on from where an earlier run was interrupted")
    about = {**card.model_dump(mode="json"), "code": code_of(card.arch or "")}
    return Journal(output.journal, seconds=seconds, salt=json.dumps(about))


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`32x24` (width x height) → (24, 32)."""
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and 0 < int(width) <= 8192 and 0 < int(height) <= 8192):
        raise UsageError(f"--image-size is WIDTHxHEIGHT, such as 32x32, got {text!r}")
    return int(height), int(width)


def parse_numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """`0.49,0.48,0.45` → three floats."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--{name} is numbers with commas, such as 0.49,0.48,0.45, got {text!r}") from None


def read(
    source: str,
    *,
    image_size: str | None,
    skip_bad: bool,
    max_images: int | None = None,
    seed: int = 0,
    limits: Limits = DEFAULT,
) -> LabeledImages:
    """Opens a data set, or a random part of it."""
    data = open_data(source, image_size=parse_size(image_size), skip_bad=skip_bad, limits=limits)
    return data.sample(max_images, torch.Generator().manual_seed(seed)) if max_images else data


def check_apart(out: Path, *sources: str | None) -> None:
    """Refuses an output folder that is a data source, lies in one (it would become a class of it) or holds one.

    Raises:
        UsageError: it does.
    """
    place = out.resolve()
    for source in sources:
        path = Path((source or "").removeprefix("folder:").removeprefix("npz:")).resolve()
        if not source or not (path.exists() or ".zip" in source.lower()):
            continue
        if place.is_relative_to(path) or path.is_relative_to(place):
            raise UsageError(f"-o {out} and the data {source} lie in each other; choose a folder apart from the data")


def parse_limits(pairs: list[str] | None) -> Limits:
    """`["tensors=1e6"]` → the default limits but for that one."""
    return Limits(**parse_settings(pairs or []))


def parse_labels(text: str | None) -> tuple[int, ...] | None:
    """`1,2` → (1, 2)."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise UsageError(f"--sources is labels with commas, such as 1,2, got {text!r}")
    return tuple(int(part) for part in parts)


def read_attack(spec: str | None, *, target: int, all_to_all: bool) -> Attack | None:
    """An attack from the `attack.json` that `plant` wrote, or from an id with settings."""
    import unplant.attacks  # noqa: F401 (registers the triggers)

    if spec is None:
        return None
    if spec.endswith(".json"):
        try:
            if Path(spec).stat().st_size > MAX_ATTACK_BYTES or not Path(spec).is_file():
                raise UsageError(f"{spec} is no attack.json: not a file, or more than {MAX_ATTACK_BYTES:,} bytes")
            text = Path(spec).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"can't read {spec}: {error}") from None
        if not text.lstrip().startswith("{"):
            raise UsageError(f"{spec} is no attack.json: there is no JSON object in it")
        return parse_attack(text)
    return parse_attack(spec, target=target, label_map="all-to-all" if all_to_all else "all-to-one")


def save_pictures(folder: Path, data: LabeledImages, erasure: Erasure) -> list[str]:
    """`suspects.png`, `in_doubt.png` and `trigger.png`, where there is any; returns what was written."""
    written = []
    for name, ranked, title in (
        ("suspects.png", erasure.ranked(), "Top suspects"),
        ("in_doubt.png", erasure.ranked_in_doubt(), "In doubt"),
    ):
        if erasure.suspicion is not None and len(ranked):
            write_atomically(folder / name, pictures.suspects(data, ranked, erasure.suspicion, title=title))
            written.append(name)
    if erasure.trigger is not None:
        picture = pictures.recovered_trigger(data, erasure.suspects, erasure.trigger)
        write_atomically(folder / "trigger.png", picture)
        written.append("trigger.png")
    return written
