"""What a model does that Unplant can't work with, can work around, or should tell of."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unplant.classifier import ENOUGH, Classifier, blamed_on_the_model, device_of, frozen, logits
from unplant.devices import global_state_kept
from unplant.errors import ModelFileError
from unplant.images import LabeledImages

SAMPLE = 64
"""Images that a check looks at."""


def with_logits(model: nn.Module, data: LabeledImages) -> nn.Module:
    """The model itself, or, if its outputs are probabilities, a `Classifier` around it that returns their logarithm.

    Outputs are probabilities if no row has a negative number and each sums to 1, on 64 of the images.

    Raises:
        ModelFileError: it can't run on them.
    """
    with global_state_kept(), blamed_on_the_model("run on the data"):
        out = logits(model, _sample(data))
    sums = out.sum(1)
    if out.shape[1] > 1 and bool((out >= 0).all()) and bool(((sums - 1).abs() < 0.01).all()):
        wrapped = Classifier(model, outputs="probabilities").to(device_of(model))
        wrapped.training = model.training  # train() would change the modes within the model too
        return wrapped
    return model


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
    if bool((first >= 0).all() and (first <= 1).all()):
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
