"""Infected models by the hash of their configuration: the same settings are trained once, others are another model."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from unplant.classifier import Classifier
from unplant.errors import UnplantError, WriteError
from unplant.files import write_atomically
from unplant.images import LabeledImages
from unplant.journal import Journal
from unplant.models import code_of
from unplant.planting import Planted, TrainConfig, plant, shuffled_choice, train
from unplant.poisoning import Attack, PoisonedImages, parse_attack
from unplant.results import Progress
from unplant.runs import ModelCard, open_classifier, save_classifier, write_json

T = TypeVar("T")

FORMAT = 2
"""Raised whenever planting changes what the same settings give."""

DAMAGE = (UnplantError, OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, SafetensorError)
"""What reading an entry raises whose files are missing, cut off, garbled or someone else's."""


def default_folder() -> Path:
    """`$UNPLANT_CACHE`, else `~/.cache/unplant`."""
    return Path(os.environ.get("UNPLANT_CACHE") or Path.home() / ".cache" / "unplant")


def settings_of(
    data: LabeledImages, attack: Attack | None, architecture: str, config: TrainConfig, seed: int
) -> dict[str, Any]:
    """All that decides what is planted; of an architecture in a Python file, what the file says too."""
    settings = {
        "format": FORMAT,
        "attack": attack.to_json() if attack else None,
        "architecture": architecture,
        "training": config.model_dump(mode="json"),
        "seed": seed,
        "data": data.fingerprint(),
    }
    code = code_of(architecture)
    return {**settings, "code": code} if code else settings


def key_of(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the settings, as 16 hexadecimal digits.

    >>> key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 1, "b": 3})
    True
    """
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def plant_cached(
    data: LabeledImages,
    attack: Attack,
    architecture: str = "small_cnn",
    config: TrainConfig | None = None,
    *,
    seed: int = 0,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> tuple[Planted, bool]:
    """As `plant`; a model with the same settings that lies in the cache already is taken from there.

    Returns:
        What was planted, and whether it came from the cache. A damaged entry is planted anew.

    Raises:
        WriteError: the cache can't be written.
    """
    config = config or TrainConfig()
    settings = settings_of(data, attack, architecture, config, seed)
    entry = _entry(folder, attack.trigger.id, settings)
    cached = _found(entry, lambda: _load(entry, settings, data, attack, architecture, seed, device))
    if cached is not None:
        return cached, True
    with _new(entry) as (part, journal):
        around = {"device": device, "progress": progress, "journal": journal}
        planted = plant(data, attack, architecture, config, seed=seed, **around)
        save_planted(part, planted, settings, architecture)
    return planted, False


def train_cached(
    data: LabeledImages,
    architecture: str = "small_cnn",
    config: TrainConfig | None = None,
    *,
    seed: int = 0,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> tuple[Classifier, bool]:
    """As `train`: a clean model; one with the same settings that lies in the cache already is taken from there.

    Returns:
        The model, and whether it came from the cache. A damaged entry is trained anew.

    Raises:
        WriteError: the cache can't be written.
    """
    config = config or TrainConfig()
    settings = settings_of(data, None, architecture, config, seed)
    entry = _entry(folder, "clean", settings)
    cached = _found(entry, lambda: _open_clean(entry, settings, data, architecture, device))
    if cached is not None:
        return cached, True
    with _new(entry) as (part, journal):
        model = train(architecture, data, config, seed=seed, device=device, progress=progress, journal=journal)
        save_classifier(part / "model.safetensors", model, ModelCard.of(model, architecture, data))
        write_json(part / "result.json", {"settings": settings, "weights": _digest(part / "model.safetensors")})
    return model, False


def _entry(folder: Path | None, name: str, settings: Mapping[str, Any]) -> Path:
    """The place of an entry; its folder is there afterwards."""
    root = folder or default_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"can't write the cache {root}: {error.strerror or error}") from error
    return root / f"{name}-{key_of(settings)}"


def _found(entry: Path, load: Callable[[], T]) -> T | None:
    """What lies there, or None; a damaged entry is removed, to be made anew."""
    if entry.exists() or entry.is_symlink():
        try:
            return load()
        except DAMAGE:
            _remove(entry)
    return None


@contextmanager
def _new(entry: Path) -> Iterator[tuple[Path, Journal]]:
    """A folder to fill, made at once, before hours of work; moved to its place in one step at the end.

    And the journal of that work, which stays beside it if the work was cut off, and is thrown away once it is done.

    If the same was planted at the same time elsewhere and is there already, that entry stays.

    Raises:
        WriteError: the cache can't be written.
    """
    journal = entry.parent / f".{entry.name}.journal"
    try:
        part = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name}.", suffix=".part"))
    except OSError as error:
        raise WriteError(f"can't write the cache {entry.parent}: {error.strerror or error}") from error
    try:
        yield part, Journal(journal, salt=entry.name)
        try:
            part.chmod(0o755)
            part.rename(entry)
        except OSError as error:
            if not entry.is_dir():
                raise WriteError(f"can't write {entry}: {error.strerror or error}") from error
        shutil.rmtree(journal, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _remove(entry: Path) -> None:
    try:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    except FileNotFoundError:
        pass  # another process was quicker
    except OSError as error:
        raise WriteError(f"can't replace the damaged {entry}: {error.strerror or error}") from error


def save_planted(part: Path, planted: Planted, settings: dict[str, Any], architecture: str) -> None:
    """Fills the folder of a cache entry."""
    truth = planted.training_set
    changed = (truth.poisoned | truth.covered).nonzero().flatten()
    save_classifier(part / "model.safetensors", planted.model, ModelCard.of(planted.model, architecture, truth.data))
    write_json(part / "attack.json", planted.attack.to_json())
    write_atomically(part / "changed.safetensors", save({"places": changed, "images": truth.data.images[changed]}))
    about = {
        "settings": settings,
        "training_set": truth.data.fingerprint(),
        "weights": _digest(part / "model.safetensors"),
        "attack": _digest(part / "attack.json"),
    }
    write_json(part / "result.json", about)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load(
    entry: Path,
    settings: dict[str, Any],
    data: LabeledImages,
    attack: Attack,
    architecture: str,
    seed: int,
    device: torch.device | str,
) -> Planted:
    """Raises one of several errors if anything isn't as it was saved."""
    about = _check(entry, settings)
    found = _digest(entry / "attack.json")
    if about.get("attack", found) != found:  # the first entries didn't say
        raise ValueError("the attack is damaged")
    shuffled, choice, _ = shuffled_choice(data, attack, seed)
    stored = load((entry / "changed.safetensors").read_bytes())
    images = shuffled.images.clone()
    images[stored["places"]] = stored["images"]
    labels = torch.where(choice.poisoned, attack.wanted(shuffled.labels, data.num_classes), shuffled.labels)
    training_data = LabeledImages(images, labels, data.classes, shuffled.names)
    if training_data.fingerprint() != about["training_set"]:
        raise ValueError("the training set is damaged")
    model = _open(entry, data, architecture, device)
    learnt = parse_attack((entry / "attack.json").read_text(encoding="utf-8"))
    truth = PoisonedImages(training_data, choice.poisoned, shuffled.labels, choice.covered)
    return Planted(model, truth, learnt)


def _check(entry: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an entry says about itself; raises if it holds another model or damaged weights."""
    about = json.loads((entry / "result.json").read_text(encoding="utf-8"))
    if about["settings"] != json.loads(json.dumps(settings)):
        raise ValueError("another model has the same key")
    if about["weights"] != _digest(entry / "model.safetensors"):
        raise ValueError("the weights are damaged")
    return about


def _open_clean(
    entry: Path, settings: dict[str, Any], data: LabeledImages, architecture: str, device: torch.device | str
) -> Classifier:
    """Raises one of several errors if anything isn't as it was saved."""
    _check(entry, settings)
    return _open(entry, data, architecture, device)


def _open(entry: Path, data: LabeledImages, architecture: str, device: torch.device | str) -> Classifier:
    model, _ = open_classifier(entry, data, arch=architecture)
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
