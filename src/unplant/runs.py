"""One run, one folder: what is written, and under which environment it was made."""

import csv
import io
import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from unplant import __version__
from unplant.behaviour import check_fits, returns_probabilities
from unplant.classifier import Classifier
from unplant.errors import ModelFileError, UsageError
from unplant.files import Checkpoint, check_fits_weights, load_checkpoint, load_into, save_weights, write_atomically
from unplant.images import LabeledImages
from unplant.limits import DEFAULT, Limits
from unplant.models import architectures, build
from unplant.params import Config, Real
from unplant.results import Erasure


def environment() -> dict[str, Any]:
    """Versions, platform and threads, as a result needs them to be repeated."""
    import numpy

    return {
        "unplant": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON object, atomically."""
    write_atomically(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table, atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


class ModelCard(Config):
    """What a file of weights says about itself, in its safetensors metadata; checked, as files lie."""

    arch: str | None = Field(default=None, max_length=500, description="architecture's id")
    classes: tuple[str, ...] = Field(default=(), max_length=100_000, description="class names in label order")
    mean: tuple[Real, ...] = Field(
        default=(0.0,), min_length=1, max_length=4, description="per channel, in pixel units"
    )
    std: tuple[Annotated[Real, Field(gt=0)], ...] = Field(
        default=(1.0,), min_length=1, max_length=4, description="the same"
    )
    shape: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), max_length=3, description="(C, H, W) of its images"
    )

    @classmethod
    def of(cls, model: Classifier, arch: str, data: LabeledImages) -> "ModelCard":
        """The card of a classifier of that architecture for such data."""
        mean, std = (tuple(part.flatten().tolist()) for part in (model.mean, model.std))
        return cls(arch=arch, classes=data.classes, mean=mean, std=std, shape=data.shape)


def save_classifier(path: Path, model: nn.Module, card: ModelCard) -> None:
    """Writes a model's weights under their own keys, with the card that `open_classifier` reads."""
    save_weights(path, model.backbone if isinstance(model, Classifier) else model, card.model_dump(mode="json"))


def card_of(checkpoint: Checkpoint) -> ModelCard:
    """What a file says about itself; an empty card if it says nothing.

    Raises:
        ModelFileError: it says something that can't be.
    """
    try:
        return ModelCard(**checkpoint.metadata)
    except UsageError as error:
        raise ModelFileError(f"{checkpoint.path} has damaged metadata: {error}") from None


def open_classifier(
    path: Path,
    data: LabeledImages,
    *,
    arch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    limits: Limits = DEFAULT,
) -> tuple[Classifier, ModelCard]:
    """The classifier in a file, and its card; files that Unplant wrote say themselves what they need.

    A file can name a registered architecture only: Python files are run only if the user names them. A network that
    ends in softmax gets `outputs="probabilities"`.

    Args:
        path: a file of weights, or a folder with `model.safetensors`.
        data: what it shall run on; gives the channels, and the classes unless the file does.
        arch: architecture; needed for other people's files.
        mean: per channel, in pixel units; default: the file's, else 0.
        std: per channel, in pixel units; default: the file's, else 1.
        limits: on the file.

    Raises:
        UsageError: no architecture is given.
        ModelFileError: the file can't be loaded, or doesn't fit the architecture or the data.
    """
    checkpoint = load_checkpoint(path, limits)
    card = card_of(checkpoint)
    if arch is None:
        if card.arch is None or ".py" in card.arch:
            raise UsageError(f"{path} needs --arch: a registered id, or path/to/file.py:factory")
        arch = card.arch
        if arch.partition(":")[0] not in architectures:
            raise ModelFileError(f"{checkpoint.path} names an unknown architecture, {arch!r}; pass --arch")
    card = card.but(
        arch=arch,
        classes=card.classes or data.classes,
        mean=tuple(mean) if mean else card.mean,
        std=tuple(std) if std else card.std,
        shape=data.shape,
    )
    size = {"num_classes": len(card.classes), "channels": data.shape[0]}
    if ".py" not in arch:
        with torch.device("meta"):  # a hostile card can't make us allocate more than its file holds
            check_fits_weights(build(arch, **size), checkpoint)
    backbone = build(arch, **size)
    load_into(backbone, checkpoint)
    model = Classifier(backbone, card.mean, card.std).eval()
    check_fits(model, data)
    if returns_probabilities(model, data):
        model.outputs = "probabilities"
    return model, card


def save_erasure(
    folder: Path, erasure: Erasure, data: LabeledImages, card: ModelCard, config: Config, about: dict[str, Any]
) -> dict[str, Any]:
    """Writes a run's folder: the purified model, the ranked suspects and images in doubt, what every round did, and the
    configuration.

    Returns:
        What `result.json` holds.
    """
    save_classifier(folder / "model.safetensors", erasure.model, card)
    write_json(
        folder / "config.json", {"model": card.model_dump(mode="json"), "eraser": config.model_dump(mode="json")}
    )
    ranked, doubtful, suspicion = erasure.ranked().tolist(), erasure.ranked_in_doubt().tolist(), erasure.suspicion
    if suspicion is not None:
        names = data.names or tuple(str(index) for index in range(len(data)))
        for name, places in {"suspects.csv": ranked, "in_doubt.csv": doubtful}.items():
            if places or name == "suspects.csv":
                rows = [(names[i], data.classes[int(data.labels[i])], f"{float(suspicion[i]):.6f}") for i in places]
                write_csv(folder / name, ("file", "label", "suspicion"), rows)
    lines = [json.dumps(entry, ensure_ascii=False) for entry in erasure.rounds]
    write_atomically(folder / "events.jsonl", "\n".join(lines) + "\n")
    result = {
        **about,
        "suspects": len(ranked) if suspicion is not None else None,
        "in_doubt": len(doubtful) if suspicion is not None else None,
        "findings": erasure.findings.to_json() if erasure.findings else None,
        "images": len(data),
        "fingerprint": data.fingerprint(),
        "rounds": erasure.rounds,
        "environment": environment(),
    }
    write_json(folder / "result.json", result)
    return result
