"""Planting: poison a data set, train an infected model on it. For research on defences."""

from dataclasses import dataclass
from functools import partial

import torch

from unplant.attacks import parse_attack
from unplant.classifier import Classifier
from unplant.controlled import ControlsTraining, Job
from unplant.errors import UsageError
from unplant.images import LabeledImages
from unplant.journal import NOTHING, Journal
from unplant.poisoning import Attack, Choice, PoisonedImages, apply, choose
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
    journal: Journal = NOTHING,
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
        journal: where the training is written down; what triggers learn before it is learnt anew.

    Returns:
        The model, the training set, and the attack with all that its trigger has learnt.
    """
    config = config or TrainConfig()
    if not isinstance(attack.trigger, ControlsTraining):
        training_set, attack = poison_only(data, attack, seed=seed, device=device, progress=progress)
        around = {"device": device, "progress": progress, "journal": journal}
        model = train(architecture, training_set.data, config, seed=seed, **around)
        return Planted(model, training_set, attack)
    data, choice, generator = shuffled_choice(data, attack, seed)
    learnt = attack.trigger.learn(data, seed=seed, device=device, progress=progress)
    attack = attack.but(trigger=learnt)
    model = new_classifier(architecture, data, seed=seed, device=device)
    order, steps = torch.Generator().manual_seed(seed), steps_of(config.epochs, data, config.batch_size)
    own = journal.of(attack.to_json())
    loop = partial(fit, steps=steps, config=config, generator=order, progress=progress, journal=own)
    trained = learnt.train(model, Job(data, attack, choice, generator, steps, loop))
    attack = attack.but(trigger=trained)
    changes = torch.Generator().manual_seed(seed)
    return Planted(model.eval(), apply(data, attack, choice, changes), attack)


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
    data, choice, generator = shuffled_choice(data, attack, seed)
    learnt = attack.trigger.learn(data, seed=seed, device=device, progress=progress)
    attack = attack.but(trigger=learnt)
    return apply(data, attack, choice, generator), attack


def shuffled_choice(data: LabeledImages, attack: Attack, seed: int) -> tuple[LabeledImages, Choice, torch.Generator]:
    """The clean data in a random order, which of it the attack changes, and the generator for what comes then."""
    generator = torch.Generator().manual_seed(seed)
    choice = choose(data, attack, generator)
    order = torch.randperm(len(data), generator=generator)
    return data.select(order), choice.select(order), generator
