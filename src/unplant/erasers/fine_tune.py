"""Plain fine-tuning (FT): the control beside every other eraser. It erases some attacks and leaves others alone.

With `sharpness` it is FT-SAM (Zhu et al., ICCV 2023, arXiv:2304.11823), which erases more of them.
"""

import copy

import torch
from pydantic import Field
from torch import nn

from unplant.erasers.base import EraserConfig, Method, erasers, settle
from unplant.images import LabeledImages
from unplant.journal import NOTHING, Journal
from unplant.params import Real
from unplant.results import Erasure, Progress
from unplant.training import fit, steps_of


class FineTuneConfig(EraserConfig):
    """FT as BackdoorBench (Wu et al., NeurIPS 2022) and others set it: SGD at lr 0.01 on clean data."""

    epochs: Real = Field(default=20, gt=0, description="passes over the data")


def fine_tune(
    infected: nn.Module,
    data: LabeledImages,
    config: FineTuneConfig,
    *,
    generator: torch.Generator,
    progress: Progress | None = None,
    journal: Journal = NOTHING,
) -> Erasure:
    """Trains a copy of the model on the data as they are: the control without an adversarial step."""
    config = settle(config, infected, data)
    purified = copy.deepcopy(infected)
    steps = steps_of(config.epochs, data, config.batch_size)
    around = {"generator": generator, "progress": progress, "journal": journal}
    loss = fit(purified, data, steps=steps, config=config, sharpness=config.sharpness, title="fine-tuning", **around)
    passes = round(steps * config.passes_a_step * config.batch_size / len(data), 2)
    done = {"step": "fine-tuning", "images": len(data), "steps": steps, "passes": passes, "loss": loss}
    return Erasure(purified, rounds=[done])


FT_SAM = {"sharpness": 2, "epochs": 100, "batch_size": 256, "schedule": "cosine"}
"""FT-SAM as BackdoorBench runs it on 5 % of CIFAR-10, but for its label smoothing of 0.1."""

erasers.add("fine_tune", Method("fine_tune", "clean", FineTuneConfig, fine_tune, presets={"ft_sam": FT_SAM}))
