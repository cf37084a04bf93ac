"""What a model does that Unplant can't work with, can work around, or should tell of."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unplant.classifier import Classifier, device_of, frozen, logits
from unplant.devices import global_state_kept, is_out_of_memory
from unplant.errors import ModelFileError, NumericalError, UnplantError
from unplant.images import LabeledImages

SAMPLE = 64
"""Images that a check looks at."""

HARM = 0.05
"""A purified model whose accuracy fell by more than this is told of."""

ENOUGH = 50
"""With fewer images an accuracy says too little to refuse a model."""


SURE = 12.0
"""Median difference of the two highest logits from which a model is surer than training makes it: the digits have 9."""

MODEST = 0.1
"""How far the mean probability of the likeliest label may lie below the accuracy: label smoothing of 0.1 gives that."""


@contextmanager
def blamed_on_the_model(doing: str) -> Iterator[None]:
    """Turns whatever a model raises into our error: its code is the user's own.

    Raises:
        ModelFileError: the kind of the exception and its first line. Running out of memory stays what it is.
    """
    try:
        yield
    except UnplantError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        raise ModelFileError(f"the model can't {doing}: {type(error).__name__}: {first[:300]}") from None


def check_fits(model: nn.Module, data: LabeledImages) -> int:
    """Runs two images through the model and returns its number of classes.

    Raises:
        ModelFileError: it can't run on images of this shape, or doesn't return logits for the data's classes.
    """
    pixels = data.pixels(slice(0, 2)).to(device_of(model))
    with (
        global_state_kept(),
        frozen(model),
        torch.no_grad(),
        blamed_on_the_model(f"run on images of shape {data.shape}"),
    ):
        out = model(pixels)
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(pixels):
        raise ModelFileError(f"the model must return logits ({len(pixels)}, K), got {_kind_and_remedy(out)}")
    if not out.is_floating_point():
        raise ModelFileError(
            f"the model must return logits, got whole numbers ({out.dtype}); return its scores instead"
        )
    if not torch.isfinite(out).all():
        raise ModelFileError("the model's outputs are NaN or infinite on the first images; its weights are damaged")
    if out.shape[1] < data.num_classes:
        raise ModelFileError(f"the model has {out.shape[1]} classes, the data {data.num_classes}")
    return out.shape[1]


def _kind_and_remedy(out: Any) -> str:
    wrap = "wrap it in a module whose forward returns model(pixels)"
    if isinstance(out, Tensor):
        return f"a tensor of shape {tuple(out.shape)}; wrap it in a module that returns one row of scores an image"
    if isinstance(out, Mapping) and "logits" in out:
        return f"{type(out).__name__} with 'logits'; {wrap}['logits']"
    if hasattr(out, "logits"):
        return f"{type(out).__name__} with .logits; {wrap}.logits"
    if isinstance(out, (tuple, list)):
        return f"{type(out).__name__} of {len(out)}; {wrap}[0], if the logits come first"
    return f"{type(out).__name__}; wrap it in a module whose forward returns the logits alone"


def check_knows(model: nn.Module, data: LabeledImages) -> None:
    """Refuses a model that does no better on (at most 1,000 of) the images than always saying the commonest label.

    Raises:
        ModelFileError: it knows nothing about these images.
    """
    part = data.sample(1000, torch.Generator().manual_seed(0))
    if len(part) < ENOUGH:
        return
    with blamed_on_the_model("run on the data"):
        accuracy = float((logits(model, part).argmax(1) == part.labels).float().mean())
    guess = float(torch.bincount(part.labels).max()) / len(part)
    if accuracy <= guess + 2 * math.sqrt(guess * (1 - guess) / len(part)):
        raise ModelFileError(
            f"the model gets {accuracy:.1%} of the data's labels right, no more than guessing ({guess:.1%}); "
            "check --mean and --std, the order of the classes, and whether these are its weights and data"
        )


def returns_probabilities(model: nn.Module, data: LabeledImages) -> bool:
    """Whether no row of the outputs has a negative number and each sums to 1, on 64 of the images.

    Raises:
        ModelFileError: it can't run on them.
    """
    with global_state_kept(), blamed_on_the_model("run on the data"):
        out = logits(model, _sample(data))
    return out.shape[1] > 1 and bool((out >= 0).all()) and bool(((out.sum(1) - 1).abs() < 0.01).all())


def with_logits(model: nn.Module, data: LabeledImages) -> nn.Module:
    """The model itself, or a `Classifier` around it if its outputs are probabilities or of an unusual size.

    See `returns_probabilities`, of which the logarithm is taken, and `usual_scale`.

    Raises:
        ModelFileError: it can't run on the data.
    """
    wrapped = Classifier(model).to(device_of(model))
    if returns_probabilities(model, data):
        wrapped.outputs = "probabilities"
    wrapped.scale = usual_scale(wrapped, data)
    wrapped.training = model.training  # train() would change the modes within the model too
    return model if (wrapped.outputs, wrapped.scale) == ("logits", 1) else wrapped


def usual_scale(model: nn.Module, data: LabeledImages) -> float:
    """What to multiply a model's logits by so that it is as sure of itself as trained models are; usually 1.

    A positive factor changes no answer, but it changes gradients and how much of its label's probability an image
    loses, which erasers go by. So whoever multiplies the last layer of an infected model could hide its backdoor.

    Args:
        model: pixels in [0, 1] → logits.
        data: at most 1,000 of its images are asked.

    Returns:
        Less than 1 if the two highest logits differ by more than 12 in the median image (then they differ by that);
        more than 1 if the model's mean confidence lies below its accuracy by more than 0.1 (then by that much).

    Raises:
        ModelFileError: it can't run on them.
    """
    part = data.sample(1000, torch.Generator().manual_seed(0))
    with global_state_kept(), blamed_on_the_model("run on the data"):
        out = logits(model, part).double()
    if out.shape[1] < 2 or not bool(torch.isfinite(out).all()):
        return 1.0
    highest = out.topk(2).values
    margin = float((highest[:, 0] - highest[:, 1]).median())
    if margin > SURE:
        return SURE / margin
    wanted = float((out.argmax(1) == part.labels).double().mean()) - MODEST

    def confidence(scale: float) -> float:
        return float((out * scale).softmax(1).amax(1).mean())

    if margin <= 0 or confidence(1.0) >= wanted:
        return 1.0
    low, high = 1.0, max(1.0, SURE / margin)  # no surer than a trained model is
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if confidence(middle) < wanted else (low, middle)
    return high


def check_behaviour(model: nn.Module, data: LabeledImages) -> list[str]:
    """Warnings about a model that fits the data (`check_fits`), one line each; none if there is nothing to say.

    Looks at 64 of the images: two forward passes and a backward pass in eval mode, a forward pass of a copy in train
    mode. Model and global random state are left as they were.

    Args:
        model: pixels in [0, 1] → logits; see `with_logits`.
        data: images to look at.

    Raises:
        ModelFileError: it fails, says the same of all images, has no gradient for its pixels, can't be copied or
            trained, or changes torch's default dtype.
    """
    part, dtype, said = _sample(data), torch.get_default_dtype(), []
    with global_state_kept(), blamed_on_the_model("run on the data"):
        first, second = logits(model, part), logits(model, part)
        gradient = _gradient(model, part)
        changed = torch.get_default_dtype()
    with global_state_kept(), blamed_on_the_model("be copied and run in train mode"):
        trained = copy.deepcopy(model).train()(part.pixels().to(device_of(model)))
    if changed != dtype:
        raise ModelFileError(
            f"the model sets torch's default dtype to {changed} when it runs; take that out of its code"
        )
    size = float(first.abs().max())
    if not bool(torch.isfinite(first).all()):
        raise ModelFileError("the model's outputs are NaN or infinite on some images; its weights are damaged")
    if len(part) > 1 and float((first - first[0]).abs().max()) <= 1e-6 * size:
        raise ModelFileError("the model says the same of all images; check --mean and --std, and whether it is trained")
    if gradient is None or not gradient.any():
        raise ModelFileError(
            "the model has no gradient with respect to its pixels (it rounds, detaches or has an argmax in it), "
            "so no adversarial examples can be made; take that out"
        )
    if not bool(torch.isfinite(gradient).all()):
        raise ModelFileError(
            "the model's gradient with respect to its pixels is NaN or infinite; adversarial examples need it"
        )
    if not isinstance(trained, Tensor) or trained.shape != first.shape:
        raise ModelFileError(
            f"the model returns logits in eval mode, but not in train mode (got {type(trained).__name__}); "
            "leave out its auxiliary outputs, as with aux_logits=False"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelFileError("the model has no weights to train: requires_grad is False for all; set it")
    if isinstance(model, Classifier) and model.outputs == "probabilities":
        said.append(
            "the model's outputs are probabilities (it ends in softmax): their logarithm is taken for its logits"
        )
    scale = model.scale if isinstance(model, Classifier) else 1
    if scale != 1:
        said.append(
            f"the model's logits are {1 / scale:.3g} times as large as trained models' are; they are divided by "
            "that while it is purified (its answers stay the same)"
        )
    if bool((first >= 0).all() and (first / scale <= 1).all()):
        said.append(
            "the model's outputs lie in [0, 1] and don't sum to 1 (it ends in a sigmoid?); taken for logits they leave "
            "training little to work with: pass the model without that layer"
        )
    if float((first - second).abs().max()) > 1e-3 * max(1.0, size):
        said.append(
            "the model says something else each time (dropout left on?): results can't be repeated, scores vary"
        )
    if len(data) < ENOUGH:
        said.append(f"with fewer than {ENOUGH} images it isn't checked whether the model knows anything about them")
    return said


def _sample(data: LabeledImages) -> LabeledImages:
    return data.sample(SAMPLE, torch.Generator().manual_seed(0))


def _gradient(model: nn.Module, data: LabeledImages) -> Tensor | None:
    """Of the loss under each image's second most likely label, so that a sure and right model has one too."""
    pixels = data.pixels().to(device_of(model)).requires_grad_()
    with frozen(model), torch.enable_grad():
        out = model(pixels).float()
        if not out.requires_grad:
            return None
        loss = F.cross_entropy(out, out.detach().topk(2).indices[:, 1], reduction="sum")
        return torch.autograd.grad(loss, pixels, allow_unused=True)[0]


def check_purified(
    infected: nn.Module, purified: nn.Module, data: LabeledImages, suspects: Tensor | None
) -> tuple[dict[str, float], list[str]]:
    """Accuracy before and after on (at most 1,000 of) the data, and a warning if it fell by more than 5 points.

    The model learnt from these images, so it is no test accuracy; but a model that fell here has come to harm.

    Args:
        infected: pixels in [0, 1] → logits.
        purified: what became of it.
        data: what it was purified with.
        suspects: bool (N,), images that don't count; None: all do.

    Raises:
        NumericalError: the purified model's outputs aren't finite.
    """
    trusted = data if suspects is None or suspects.all() else data.select(~suspects)
    part = trusted.sample(1000, torch.Generator().manual_seed(0))
    outputs = {"before": logits(infected, part), "after": logits(purified, part)}
    if not torch.isfinite(outputs["after"]).all():
        raise NumericalError("the purified model's outputs are NaN or infinite; it isn't written; try a smaller lr")
    accuracy = {when: float((out.argmax(1) == part.labels).float().mean()) for when, out in outputs.items()}
    if accuracy["after"] >= accuracy["before"] - HARM:
        return accuracy, []
    fell = f"from {accuracy['before']:.1%} to {accuracy['after']:.1%}"
    return accuracy, [f"accuracy on the data fell {fell}: the purified model has come to harm"]
