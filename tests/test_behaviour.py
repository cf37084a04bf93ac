"""Models that don't do what a classifier should: each is recognised, worked around, told of or refused."""

import copy
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unplant
from unplant.behaviour import check_behaviour, check_fits, check_knows, with_logits
from unplant.classifier import Classifier, logits
from unplant.data import digits
from unplant.demo import TRAINING
from unplant.devices import global_state_kept
from unplant.erasers import erasers
from unplant.errors import DataError, ModelFileError, UnplantWarning
from unplant.evaluation import evaluate
from unplant.planting import parse_attack, plant
from unplant.runs import ModelCard, open_classifier, save_classifier


@pytest.fixture(scope="module")
def some(digits_test):
    return digits_test.select(torch.arange(0, 360, 4))


class Odd(nn.Module):
    """The trained model with something done to its pixels or outputs."""

    def __init__(self, model, after=lambda out: out, before=lambda pixels: pixels):
        super().__init__()
        self.model = copy.deepcopy(model)
        self.after, self.before = after, before

    def forward(self, pixels):
        return self.after(self.model(self.before(pixels)))


# Nothing to say.


@pytest.mark.parametrize(
    "after",
    [
        lambda out: out,
        lambda out: out.log_softmax(1),
        lambda out: out * 2,
        lambda out: out - out.mean(1, keepdim=True),
    ],
    ids=["plain", "log-softmax", "surer", "centred"],
)
def test_honest_models_are_taken_as_they_are(trained, some, after):
    model = Odd(trained, after)
    assert check_fits(model, some) == 10
    assert with_logits(model, some) is model
    assert check_behaviour(model, some) == []


@pytest.mark.parametrize("by", [1000, 30, 0.05, 1e-4])
def test_logits_of_an_unusual_size_are_brought_to_a_usual_one_and_told_of(trained, some, by):
    model = Odd(trained, lambda out: out * by)
    scored = with_logits(model, some)
    assert scored.backbone is model
    out = logits(scored, some)
    assert torch.equal(out.argmax(1), logits(trained, some).argmax(1))
    assert torch.allclose(out, logits(trained, some) * by * scored.scale, rtol=1e-4)
    if by > 1:
        highest = out.topk(2).values
        assert float((highest[:, 0] - highest[:, 1]).median()) == pytest.approx(12, rel=1e-3)
    else:
        accuracy = float((out.argmax(1) == some.labels).float().mean())
        assert float(out.softmax(1).amax(1).mean()) == pytest.approx(accuracy - 0.1, abs=1e-3)
    (line,) = check_behaviour(scored, some)
    assert float(line.split(" times")[0].split()[-1]) == pytest.approx(1 / scored.scale, rel=0.01)


def test_a_model_that_knows_little_is_not_made_surer(some):
    """Its confidence is where its accuracy is; and without a difference between logits there is nothing to enlarge."""
    random = torch.Generator().manual_seed(0)
    answers = torch.randn(len(some), 10, generator=random) * 0.01

    class Guess(nn.Module):
        def forward(self, pixels):
            return answers[: len(pixels)]

    assert with_logits(Guess(), some.select(torch.arange(64))).__class__ is Guess


def test_checks_leave_the_model_and_the_global_state_alone(trained, some):
    model = Odd(trained, lambda out: F.dropout(out, 0.1)).train()
    model.model.backbone[1].eval()
    next(model.parameters()).requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    check_behaviour(with_logits(model, some), some)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == (modes, flags)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


# Probabilities.


def softmax_twin(model):
    return Odd(model, lambda out: out.softmax(1))


def test_probabilities_are_recognised_and_their_logarithm_is_taken(trained, some):
    model = softmax_twin(trained)
    scored = with_logits(model, some)
    assert isinstance(scored, Classifier)
    assert scored.backbone is model
    assert (logits(scored, some).softmax(1) - logits(model, some)).abs().max() < 1e-6
    assert (logits(scored, some) - logits(trained, some).log_softmax(1)).abs().max() < 1e-4
    (line,) = check_behaviour(scored, some)
    assert "probabilities" in line


def test_the_gradient_through_the_logarithm_is_that_of_the_logits(trained, some):
    """Also of probabilities down to 1e-30, where a clamp at 1e-12 would have cut it off."""
    out = logits(trained, some)
    factor = 70 / float((out.amax(1) - out.amin(1)).max())
    sharp = Odd(trained, lambda out: out * factor)
    scored = with_logits(softmax_twin(sharp), some)
    gradients = []
    for model in (sharp, scored):
        pixels = some.pixels().requires_grad_()
        out = model.eval()(pixels)
        gradients.append(torch.autograd.grad(F.cross_entropy(out, out.argmin(1)), pixels)[0])
    assert float(logits(scored, some).min()) < np.log(1e-25)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[0].abs().max()


def test_probabilities_that_fell_to_zero_stay_finite(some):
    class Sure(nn.Module):
        def forward(self, pixels):
            return F.one_hot((pixels.mean((1, 2, 3)) * 30).long() % 10, 10).float()

    out = logits(Classifier(Sure(), outputs="probabilities"), some)
    assert torch.isfinite(out).all()
    assert (out.softmax(1) - logits(Sure(), some)).abs().max() < 1e-37


def test_the_wrapping_keeps_the_modes_within_the_model(trained, some):
    model = softmax_twin(trained).train()
    model.model.backbone[1].eval()
    with_logits(model, some)
    assert not model.model.backbone[1].training
    assert model.model.backbone[0].training


QUICK = erasers["aft"].configure(steps=40, warm_up=10, batch_size=64, eps=0.1, flip=False)


@pytest.fixture(scope="module")
def planted():
    """An infected digits net of good accuracy, in a few seconds."""
    return plant(digits("train"), parse_attack("badnets"), "small_cnn:width=8", TRAINING.but(epochs=8), seed=0)


def test_a_model_that_ends_in_softmax_is_purified_as_well_as_its_twin(planted, digits_test):
    clean = digits("train").sample(300, torch.Generator().manual_seed(0))
    before = evaluate(planted.model, digits_test, planted.attack)
    assert before.asr > 0.9
    twin = softmax_twin(planted.model)
    plain = unplant.erase(planted.model, clean=clean, config=QUICK).model
    with pytest.warns(UnplantWarning, match="probabilities"):
        soft = unplant.erase(twin, clean=clean, config=QUICK).model
    assert type(soft) is Odd
    assert soft.state_dict().keys() == twin.state_dict().keys()
    assert (logits(soft, clean).sum(1) - 1).abs().max() < 1e-5
    scores = [evaluate(model, digits_test, planted.attack) for model in (plain, soft)]
    assert scores[0].asr < 0.2
    # The same mathematics in another order of rounding: the twins drift apart by a few test images.
    assert scores[1].acc == pytest.approx(scores[0].acc, abs=0.03)
    assert scores[1].asr == pytest.approx(scores[0].asr, abs=0.1)


def test_softmax_taken_for_logits_would_have_been_worse(planted, digits_test):
    """The control: without the logarithm the same run leaves an ASR of 0.99 to 1.00 (three seeds).

    Without its last part and without the infected model's features, which come before the logarithm and mend all that.
    """
    clean = digits("train").sample(300, torch.Generator().manual_seed(0))
    twin = softmax_twin(planted.model)
    run = erasers["aft"].run
    config = QUICK.but(see_through=0, likeness=0, steadiness=0)
    naive = run(twin, clean, config, generator=torch.Generator().manual_seed(0)).model
    right = run(with_logits(twin, clean), clean, config, generator=torch.Generator().manual_seed(0)).model
    naive, right = (evaluate(model, digits_test, planted.attack) for model in (naive, right))
    assert right.asr < 0.1
    assert naive.asr > 0.9


def test_a_softmax_net_in_a_file_is_opened_as_such_and_saved_under_its_own_keys(tmp_path, trained, some):
    (tmp_path / "net.py").write_text(
        "from torch import nn\nfrom unplant.models import build\n"
        "def net(**size):\n    return nn.Sequential(build('small_cnn:width=8', **size), nn.Softmax(1))\n"
    )
    weights = nn.Sequential(trained.backbone, nn.Softmax(1))
    torch.save(weights.state_dict(), tmp_path / "net.pth")
    mean, std = (part.flatten().tolist() for part in (trained.mean, trained.std))
    options = {"arch": f"{tmp_path / 'net.py'}:net", "mean": mean, "std": std}
    model, card = open_classifier(tmp_path / "net.pth", some, **options)
    assert model.outputs == "probabilities"
    assert (logits(model, some) - logits(trained, some).log_softmax(1)).abs().max() < 1e-4
    save_classifier(tmp_path / "again.safetensors", model, card)
    again, _ = open_classifier(tmp_path / "again.safetensors", some, **options)
    assert again.backbone.state_dict().keys() == weights.state_dict().keys()
    save_classifier(tmp_path / "plain.safetensors", trained, ModelCard.of(trained, "small_cnn:width=8", some))
    assert open_classifier(tmp_path / "plain.safetensors", some)[0].outputs == "logits"


# Told of.


def test_dropout_that_is_always_on_is_told_of(trained, some):
    always = Odd(trained, before=lambda pixels: F.dropout(pixels, 0.2, training=True))
    (line,) = check_behaviour(always, some)
    assert "something else each time" in line
    only_in_training = nn.Sequential(copy.deepcopy(trained), nn.Dropout(0.5)).train()
    assert check_behaviour(only_in_training, some) == []


def test_too_few_images_to_know_anything_are_told_of(trained, some):
    (line,) = check_behaviour(trained, some.select(torch.arange(49)))
    assert "fewer than 50 images" in line
    assert check_behaviour(trained, some.select(torch.arange(50))) == []


def test_a_sigmoid_is_told_of(trained, some):
    model = Odd(trained, lambda out: out.sigmoid())
    scored = with_logits(model, some)
    assert scored.scale > 1
    larger, line = check_behaviour(scored, some)
    assert "times as large" in larger
    assert "don't sum to 1" in line


def test_half_precision_probabilities_are_still_probabilities(trained, some):
    rounded = Odd(trained, lambda out: out.softmax(1).bfloat16())
    assert with_logits(rounded, some) is not rounded


@pytest.mark.filterwarnings("always")
def test_the_api_warns_where_it_was_called(trained, some):
    config = erasers["fine_tune"].configure(epochs=0.1, batch_size=8)
    with pytest.warns(UnplantWarning) as caught:
        unplant.erase(trained, clean=some.select(torch.arange(40)), method="fine_tune", config=config)
    said = [str(warning.message) for warning in caught]
    assert any("fewer than 50 images" in line for line in said)
    assert any("classes have fewer than 10 images" in line for line in said)
    assert {warning.filename for warning in caught} == {__file__}
    assert unplant.UnplantWarning is UnplantWarning


# Refused.


def test_images_that_are_all_alike_are_refused_by_the_api_too(trained, some):
    with pytest.raises(DataError, match="all 20 images are alike"):
        unplant.erase(trained, some.select([3] * 20))


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda out: (out, out), r"got tuple of 2; wrap it .* returns model\(pixels\)\[0\]"),
        (lambda out: {"logits": out}, r"got dict with 'logits'; wrap it .* model\(pixels\)\['logits'\]"),
        (lambda out: SimpleNamespace(logits=out), r"with .logits; wrap it .* returns model\(pixels\).logits"),
        (lambda out: {"scores": out}, "got dict; wrap it"),
        (lambda out: None, "got NoneType; wrap it"),
        (lambda out: out.argmax(1), r"got a tensor of shape \(2,\); wrap it"),
        (lambda out: (out * 100).long(), "whole numbers"),
    ],
    ids=["tuple", "dict", "object", "other dict", "nothing", "argmax", "integers"],
)
def test_outputs_that_are_no_logits_are_refused_with_the_remedy(trained, some, after, message):
    with pytest.raises(ModelFileError, match=message) as caught:
        unplant.erase(Odd(trained, after), some)
    assert "\n" not in str(caught.value)


def nan_gradient(pixels):
    return pixels + (pixels * 0).sqrt() * 0  # the square root's slope at 0 is infinite, and infinity times 0 is NaN


class Auxiliary(nn.Module):
    """Returns two outputs in train mode, as Inception does."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)

    def forward(self, pixels):
        out = self.model(pixels)
        return (out, out) if self.training else out


class Locked(Odd):
    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle '_thread.lock' object\nsecond line")


class OtherDtype(Odd):
    def forward(self, pixels):
        out = super().forward(pixels)
        torch.set_default_dtype(torch.float64)
        return out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: Odd(m, before=lambda x: (x * 16).round() / 16), "no gradient"),
        (lambda m: Odd(m, before=lambda x: x.detach()), "no gradient"),
        (lambda m: Odd(m, lambda out: out.detach()), "no gradient"),
        (lambda m: Odd(m, lambda out: F.one_hot(out.argmax(1), 10).float() * 9), "no gradient"),
        (lambda m: Odd(m, before=nan_gradient), "gradient .* is NaN"),
        (lambda m: Odd(m, lambda out: out * 0 + out[:1].detach()), "says the same of all images"),
        (lambda m: Odd(m, lambda out: out * 0), "says the same of all images"),
        (lambda m: Odd(m, before=lambda x: x.sub_(0.5)), "RuntimeError: a leaf Variable"),
        (Auxiliary, r"not in train mode \(got tuple\); leave out its auxiliary outputs"),
        (Locked, "be copied and run in train mode: TypeError: cannot pickle '_thread.lock' object$"),
        (OtherDtype, "sets torch's default dtype to torch.float64"),
        (lambda m: Odd(m).requires_grad_(False), "no weights to train"),
    ],
    ids=[
        "rounds", "detaches pixels", "detaches outputs", "argmax", "NaN gradient", "constant", "zero", "in place",
        "auxiliary outputs", "no copies", "default dtype", "frozen",
    ],
)  # fmt: skip
def test_models_that_cannot_be_purified_are_refused_in_one_line(trained, some, make, message):
    model = make(trained)
    with pytest.raises(ModelFileError, match=message) as caught:
        unplant.erase(model, some)
    assert "\n" not in str(caught.value)
    assert torch.get_default_dtype() == torch.float32


class Raises(nn.Module):
    def __init__(self, model, error, after):
        super().__init__()
        self.model, self.error, self.left = copy.deepcopy(model), error, after

    def forward(self, pixels):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.model(pixels)


@pytest.mark.parametrize(
    "error", [ValueError("one\ntwo"), KeyError("x"), TypeError(), IndexError("i"), AssertionError("a")]
)
@pytest.mark.parametrize("after", range(6))
def test_whatever_a_model_raises_when_first_run_is_one_line(trained, some, error, after):
    """The passes are: does it fit, probabilities, first, second, gradient; the sixth is the copy's in train mode."""
    with pytest.raises(ModelFileError, match=f"the model can't .*: {type(error).__name__}") as caught:
        unplant.erase(Raises(trained, error, after), some)
    assert "two" not in str(caught.value)


def test_a_model_that_raises_later_is_refused_too(trained, digits_test):
    with pytest.raises(ModelFileError, match="LookupError: that image"):
        check_knows(Raises(trained, LookupError("that image"), 2), digits_test)  # in its third batch


def test_running_out_of_memory_is_not_the_models_fault(trained, some):
    with pytest.raises(MemoryError):
        check_fits(Raises(trained, MemoryError(), 0), some)
    with pytest.raises(torch.OutOfMemoryError):
        check_fits(Raises(trained, torch.OutOfMemoryError("CUDA out of memory"), 0), some)


# The global state.


class Hostile(nn.Module):
    """Reseeds and resets all it can reach, each time it runs."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model)

    def forward(self, pixels):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = True
        self.train()
        return self.model(pixels)


def global_state():
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        random.getstate(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("how", ["pbe", "aft"])
def test_a_hostile_model_leaves_the_global_state_as_it_was(trained, some, how):
    before = global_state()
    with global_state_kept():
        Hostile(trained)(some.pixels())
        assert sum(now != then for now, then in zip(global_state(), before, strict=True)) == 6
    assert global_state() == before
    quick = {"pbe": {"steps": 2, "final_steps": 2, "rounds": 1, "initial": "random"}, "aft": {"steps": 2, "warm_up": 1}}
    config = erasers[how].configure(batch_size=8, **quick[how])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnplantWarning)
        unplant.erase(Hostile(trained), **{"suspect" if how == "pbe" else "clean": some}, config=config)
    assert global_state() == before


def test_the_state_is_put_back_after_an_error_too():
    before = global_state()

    @global_state_kept()
    def careless():
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.rand(3)
        raise KeyError

    with pytest.raises(KeyError):
        careless()
    assert global_state() == before
