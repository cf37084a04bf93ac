"""The surrogate: a clean model of the attacker's own, trained on its copy of the data to prepare the trigger with."""

from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from unplant.classifier import Classifier
from unplant.errors import UsageError
from unplant.images import LabeledImages
from unplant.models import architectures, build
from unplant.params import Config, Real
from unplant.results import Progress
from unplant.training import TrainConfig, train
from unplant.triggers import LearnedTrigger


def _registered(spec: str) -> str:
    """A stranger's attack.json must not be able to name a Python file, which building would run."""
    if spec.partition(":")[0].strip() not in architectures:
        raise ValueError(f"one of the registered architectures ({', '.join(sorted(architectures))})")
    return spec


class UsesSurrogate(Config):
    """Settings of a trigger that is prepared with a surrogate. The victim's architecture need not be the same."""

    surrogate: Annotated[str, AfterValidator(_registered)] = Field(
        default="small_cnn", description="architecture of the attacker's own model"
    )
    surrogate_epochs: Real = Field(default=10, gt=0, description="passes over the clean data to train it")

    def train_surrogate(self, data: LabeledImages, *, seed: int, device: Any, progress: Progress | None) -> Classifier:
        """The attacker's model, trained on the clean data as victims train theirs."""
        config = TrainConfig(epochs=self.surrogate_epochs)
        return train(self.surrogate, data, config, seed=seed, device=device, progress=progress, title="surrogate")


class Kept(Classifier):
    """A classifier whose tensors say all that is needed to build it anew: mean, std and number of classes too."""

    classes: Tensor

    def __init__(self, backbone: nn.Module, mean: Tensor, std: Tensor, classes: int) -> None:
        super().__init__(backbone)
        self.register_buffer("mean", mean.detach().cpu().clone())
        self.register_buffer("std", std.detach().cpu().clone())
        self.register_buffer("classes", torch.tensor(classes))


def keep(model: Classifier, num_classes: int) -> dict[str, Tensor]:
    """The tensors from which `rebuild` makes the same model."""
    return Kept(model.backbone, model.mean, model.std, num_classes).state_dict()


def rebuild(trigger: LearnedTrigger, architecture: str) -> Kept:
    """The model that `keep` took the tensors of, in eval mode, on the CPU.

    Raises:
        UsageError: nothing has been learnt yet, or the tensors are no such model's.
    """
    tensors = trigger.tensors()
    mean, std, classes = (tensors.get(name) for name in ("mean", "std", "classes"))
    if mean is None or std is None or classes is None or classes.numel() != 1:
        raise UsageError(f"the weights of the trigger {trigger.id} hold no {architecture} with its mean and std")
    channels, count = mean.numel(), int(classes)
    return trigger.network(
        lambda: Kept(build(architecture, num_classes=count, channels=channels), mean, std, count),
    )
