"""`unplant.erase`: the whole product in one call."""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from unplant.behaviour import check_behaviour, check_fits, check_knows, check_purified, with_logits
from unplant.classifier import Classifier, device_of
from unplant.data import check_data, open_data
from unplant.devices import check_precision, global_state_kept
from unplant.erasers import EraserConfig, erasers
from unplant.errors import UnplantWarning, UsageError
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

    What is odd about the data or the model is told as an `UnplantWarning`. The global random state, torch's default
    dtype, flags and grad mode are afterwards what they were, whatever the model's own code does to them.

    Args:
        model: any module that takes pixels (N, C, H, W) in [0, 1] and returns logits; not modified. Put a model that
            wants normalised images into `unplant.Classifier(model, mean, std)`. Outputs that are probabilities are
            recognised, and taken as what they are.
        suspect: training data that may be poisoned: PBE. A path, `LabeledImages`, or any (image, label) Dataset.
        clean: data that you trust: AFT. Named, so that nobody passes untrusted data as trusted by habit.
        method: an eraser's id; default `pbe` or `aft`.
        config: the eraser's settings.
        seed: of all that is random.
        progress: told what is done.
        journal: `unplant.Journal(folder)`: where the run is written down; if it is killed, the same call goes on.

    Returns:
        The purified model, of the given one's kind, the ranked suspects (PBE), and what every round did.

    Raises:
        UsageError: not exactly one of `suspect` and `clean`, or a method that needs the other one.
        DataError: the data can't be read, or all images are alike.
        ModelFileError: the model fails, doesn't return logits for these images, has no gradient for their pixels, or
            knows nothing about them.
    """
    if (suspect is None) == (clean is None):
        raise UsageError("pass exactly one: suspect data (PBE) or clean data (AFT)")
    kind = "suspect" if suspect is not None else "clean"
    chosen = erasers[method or ("pbe" if kind == "suspect" else "aft")]
    if chosen.needs != kind:
        raise UsageError(f"{chosen.name} needs {chosen.needs} data, got {kind} data")
    if config is not None and not isinstance(config, chosen.config):
        raise UsageError(f"{chosen.name} needs a {chosen.config.__name__}, got a {type(config).__name__}")
    config = config or chosen.configure()
    data = open_data(suspect if suspect is not None else clean)
    with global_state_kept():
        said = check_data(data)
        check_fits(model, data)
        said += check_precision(config.precision, device_of(model))
        scored = with_logits(model, data)
        said += check_behaviour(scored, data)
        check_knows(scored, data)
        for line in said:
            warnings.warn(line, UnplantWarning, stacklevel=2)
        generator = torch.Generator().manual_seed(seed)
        around = {"generator": generator, "progress": progress, "journal": journal}
        erasure = chosen.run(scored, data, config, **around)
        for line in check_purified(scored, erasure.model, data, erasure.suspects)[1]:
            warnings.warn(line, UnplantWarning, stacklevel=2)
    if scored is not model and isinstance(erasure.model, Classifier):
        return replace(erasure, model=erasure.model.backbone)
    return erasure
