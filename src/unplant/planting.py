"""Planting: poison a data set, train an infected model on it. For research on defences."""

from dataclasses import dataclass
from functools import partial

import torch

from unplant.attacks import parse_attack
from unplant.classifier import Classifier
from unplant.errors import UsageError
from unplant.images import LabeledImages
from unplant.poisoning import Attack, Choice, ControlsTraining, Job, PoisonedImages, apply, choose
from unplant.results import Progress
from unplant.training import TrainConfig, fit, new_classifier, steps_of, train

__all__ = ["Planted", "TrainConfig", "parse_attack", "plant", "poison_only", "train"]


@dataclass(frozen=True, eq=False)
class Planted:
    """An infected model with the training set that infected it."""

    model: Classifier
    training_set: PoisonedImages
    attack: Attack


def plant(
    data: LabeledImages,
    attack: Attack,
    architecture: str = "small_cnn",
    config: TrainConfig | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Planted:
    """Poisons a copy of the data and trains an infected model on it.

    The training set comes in a random order, so that an image's place doesn't tell its true label. Where the attacker
    controls training, it is what a defender would find afterwards: the same images, with the final trigger.

    Args:
        data: clean training images.
        attack: trigger, label map and poisoning rate.
        architecture: an architecture's id.
        config: how to train.
        seed: of the choice of poisoned images, the weights and the order.
        device: where to train.
        progress: told the share of training done.

    Returns:
        The model, the training set, and the attack with all that its trigger has learnt.
    """
    config = config or TrainConfig()
    data, attack, choice, generator = _prepare(data, attack, seed, device, progress)
    if not isinstance(attack.trigger, ControlsTraining):
        training_set = apply(data, attack, choice, generator)
        model = train(architecture, training_set.data, config, seed=seed, device=device, progress=progress)
        return Planted(model, training_set, attack)
    model = new_classifier(architecture, data, seed=seed, device=device)
    order, steps = torch.Generator().manual_seed(seed), steps_of(config.epochs, data, config.batch_size)
    loop = partial(fit, steps=steps, config=config, generator=order, progress=progress)
    attack = attack.but(trigger=attack.trigger.train(model, Job(data, attack, choice, generator, loop)))
    return Planted(model.eval(), apply(data, attack, choice, generator), attack)


def poison_only(
    data: LabeledImages,
    attack: Attack,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> tuple[PoisonedImages, Attack]:
    """The training set that `plant` would train on, and the attack with all that its trigger has learnt; no model.

    Raises:
        UsageError: the attack controls training, so its data alone doesn't infect a model.
    """
    if isinstance(attack.trigger, ControlsTraining):
        raise UsageError(f"{attack.trigger.id} controls training: its data alone would infect no model; plant a model")
    data, attack, choice, generator = _prepare(data, attack, seed, device, progress)
    return apply(data, attack, choice, generator), attack


def _prepare(
    data: LabeledImages, attack: Attack, seed: int, device: torch.device | str, progress: Progress | None
) -> tuple[LabeledImages, Attack, Choice, torch.Generator]:
    """The clean data in a random order, the attack with its prepared trigger, and which images it changes."""
    generator = torch.Generator().manual_seed(seed)
    choice = choose(data, attack, generator)
    order = torch.randperm(len(data), generator=generator)
    data, choice = data.select(order), choice.select(order)
    learnt = attack.trigger.learn(data, attack, seed=seed, device=device, progress=progress)
    return data, attack.but(trigger=learnt), choice, generator
