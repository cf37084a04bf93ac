"""`unplant.erase`: the whole product in one call."""

from typing import Any

import torch
from torch import nn

from unplant.classifier import check_fits, check_knows
from unplant.data import open_data
from unplant.erasers import EraserConfig, erasers
from unplant.errors import UsageError
from unplant.journal import NOTHING, Journal
from unplant.results import Erasure, Progress


def erase(
    model: nn.Module,
    suspect: Any = None,
    *,
    clean: Any = None,
    method: str | None = None,
    config: EraserConfig | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    journal: Journal = NOTHING,
) -> Erasure:
    """Gives back a model without the backdoor, if there is one.

    Args:
        model: any module that takes pixels (N, C, H, W) in [0, 1] and returns logits; not modified. Put a model that
            wants normalised images into `unplant.Classifier(model, mean, std)`.
        suspect: training data that may be poisoned: PBE. A path, `LabeledImages`, or any (image, label) Dataset.
        clean: data that you trust: AFT. Named, so that nobody passes untrusted data as trusted by habit.
        method: an eraser's id; default `pbe` or `aft`.
        config: the eraser's settings.
        seed: of all that is random.
        progress: told what is done.
        journal: `unplant.Journal(folder)`: where the run is written down; if it is killed, the same call goes on.

    Returns:
        The purified model, the ranked suspects (PBE), and what every round did.

    Raises:
        UsageError: not exactly one of `suspect` and `clean`, or a method that needs the other one.
        DataError: the data can't be read.
        ModelFileError: the model doesn't return logits for these images, or knows nothing about them.
    """
    if (suspect is None) == (clean is None):
        raise UsageError("pass exactly one: suspect data (PBE) or clean data (AFT)")
    kind = "suspect" if suspect is not None else "clean"
    chosen = erasers[method or ("pbe" if kind == "suspect" else "aft")]
    if chosen.needs != kind:
        raise UsageError(f"{chosen.name} needs {chosen.needs} data, got {kind} data")
    if config is not None and not isinstance(config, chosen.config):
        raise UsageError(f"{chosen.name} needs a {chosen.config.__name__}, got a {type(config).__name__}")
    data = open_data(suspect if suspect is not None else clean)
    check_fits(model, data)
    check_knows(model, data)
    generator = torch.Generator().manual_seed(seed)
    around = {"generator": generator, "progress": progress, "journal": journal}
    return chosen.run(model, data, config or chosen.configure(), **around)
