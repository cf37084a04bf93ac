"""PGD against closed forms on linear models and against foolbox on a trained net."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unplant.adversarial import pgd
from unplant.errors import UsageError

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # foolbox 3.3.4 imports scipy.ndimage.filters
    import foolbox


@pytest.fixture(scope="module")
def batch(digits_test):
    return digits_test.pixels(slice(0, 64)), digits_test.labels[:64]


class Linear(nn.Module):
    """Two logits, ±⟨w, x⟩: the loss of label 0 grows along −w in every point."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, pixels):
        score = (pixels * self.weights).flatten(1).sum(1)
        return torch.stack([score, -score], 1)


@pytest.fixture
def linear():
    weights = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1))
    return Linear(weights * 0.02)  # small: a saturated softmax has the gradient 0


@pytest.fixture
def pixels():
    return torch.rand(8, 3, 6, 5, generator=torch.Generator().manual_seed(2))


def mean_loss(model, pixels, labels):
    with torch.no_grad():
        return float(F.cross_entropy(model(pixels), labels))


@pytest.mark.parametrize("eps", [2 / 255, 8 / 255, 0.1])
@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("relative", [0.25, 1.0])
def test_equals_foolbox(trained, batch, eps, steps, relative):
    pixels, labels = batch
    oracle = foolbox.attacks.LinfPGD(rel_stepsize=relative, steps=steps, random_start=False)
    theirs, _, theirs_success = oracle(
        foolbox.PyTorchModel(trained, (0, 1), device="cpu"), pixels, labels, epsilons=eps
    )
    ours = pgd(trained, pixels, labels, eps=eps, step_size=relative * eps, steps=steps)
    assert (ours - theirs).abs().max() <= 1e-6
    success = (trained(ours).argmax(1) != labels).float().mean()
    assert abs(float(success) - float(theirs_success.float().mean())) <= 0.01
    assert mean_loss(trained, ours, labels) == pytest.approx(mean_loss(trained, theirs, labels), rel=0.01)


def test_equals_foolbox_with_an_absolute_step(trained, batch):
    pixels, labels = batch
    oracle = foolbox.attacks.LinfPGD(abs_stepsize=2 / 255, steps=7, random_start=False)
    theirs, _, _ = oracle(foolbox.PyTorchModel(trained, (0, 1), device="cpu"), pixels, labels, epsilons=8 / 255)
    ours = pgd(trained, pixels, labels, eps=8 / 255, step_size=2 / 255, steps=7)
    assert (ours - theirs).abs().max() <= 1e-6
    assert (ours - pixels).abs().max() > 7 / 255  # before-check: the attack does move the images


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("eps", [1 / 255, 8 / 255, 0.3, 1.0])
def test_a_million_pixels_stay_in_the_ball_and_in_range(random_start, eps):
    count = 300  # 300 × 3 × 20 × 20 × 4 radii × 2 starts = 2.9 million pixels
    random = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).eval()
    pixels = torch.rand(count, 3, 20, 20, generator=random).mul(1.4).sub(0.2).clamp(0, 1)  # many at 0 and at 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model(pixels[:1])
    labels = torch.randint(0, 3, (count,), generator=random)
    settings = {"random_start": random_start, "generator": random}
    moved = pgd(model, pixels, labels, eps=eps, step_size=eps, steps=2, **settings)
    assert moved.shape == pixels.shape
    assert moved.dtype == torch.float32
    assert (moved - pixels).abs().max() <= eps + 1e-6
    assert 0 <= moved.min() <= moved.max() <= 1
    assert (moved - pixels).abs().max() > 0.9 * eps


@pytest.mark.parametrize("random_start", [False, True])
def test_eps_zero_returns_the_images_bit_for_bit(trained, batch, random_start):
    pixels, labels = batch
    moved = pgd(trained, pixels, labels, eps=0, step_size=0.1, steps=5, random_start=random_start)
    assert torch.equal(moved, pixels)
    assert moved.data_ptr() != pixels.data_ptr()


@pytest.mark.parametrize(("eps", "step_size", "steps"), [(0.03, 0.03, 1), (0.1, 0.02, 5), (0.3, 0.2, 4), (1.0, 1.0, 1)])
@pytest.mark.parametrize("label", [0, 1])
def test_a_linear_model_gives_the_closed_form(linear, pixels, eps, step_size, steps, label):
    uphill = (-1 if label == 0 else 1) * linear.weights.detach().sign()
    labels = torch.full((len(pixels),), label)
    moved = pgd(linear, pixels, labels, eps=eps, step_size=step_size, steps=steps)
    assert (moved - (pixels + eps * uphill).clamp(0, 1)).abs().max() <= 1e-6


def test_a_random_start_ends_at_the_same_optimum_of_a_linear_model(linear, pixels, generator):
    labels = torch.zeros(len(pixels), dtype=torch.int64)
    moved = pgd(linear, pixels, labels, eps=0.1, step_size=0.1, steps=2, random_start=True, generator=generator)
    assert (moved - (pixels - 0.1 * linear.weights.detach().sign()).clamp(0, 1)).abs().max() <= 1e-6


def test_one_step_is_fgsm(trained, batch):
    pixels, labels = batch
    leaf = pixels.clone().requires_grad_(True)
    F.cross_entropy(trained(leaf), labels).backward()
    fgsm = (pixels + 0.05 * leaf.grad.sign()).clamp(0, 1)
    moved = pgd(trained, pixels, labels, eps=0.05, step_size=0.05, steps=1)
    assert (moved - fgsm).abs().max() <= 1e-6


def test_steps_and_radius_raise_the_loss_of_a_linear_model(linear, pixels):
    labels = torch.zeros(len(pixels), dtype=torch.int64)
    by_steps = [
        mean_loss(linear, pgd(linear, pixels, labels, eps=0.1, step_size=0.02, steps=n), labels) for n in range(8)
    ]
    by_eps = [
        mean_loss(linear, pgd(linear, pixels, labels, eps=e, step_size=e, steps=2), labels)
        for e in (0, 0.01, 0.03, 0.1, 0.5, 1.0)
    ]
    for losses in (by_steps, by_eps):
        assert losses == sorted(losses)
        assert losses[-1] > losses[0]


def test_steps_and_radius_raise_the_loss_of_a_trained_net(trained, batch):
    pixels, labels = batch
    by_steps = [
        mean_loss(trained, pgd(trained, pixels, labels, eps=0.1, step_size=0.02, steps=n), labels)
        for n in range(0, 9, 2)
    ]
    by_eps = [
        mean_loss(trained, pgd(trained, pixels, labels, eps=e, step_size=e / 4, steps=8), labels)
        for e in (0, 0.02, 0.05, 0.1, 0.2)
    ]
    for losses in (by_steps, by_eps):
        # Sign steps overshoot where the net is curved: 1 % of the loss is allowed.
        assert all(later >= 0.99 * earlier for earlier, later in itertools.pairwise(losses))
        assert losses[-1] > 2 * losses[0]


def test_the_model_is_left_as_it_was(trained, batch):
    model = copy.deepcopy(trained).train()
    model.backbone[1].eval()  # one BatchNorm frozen, as a user may have it
    model.backbone[0].weight.requires_grad_(False)
    model.backbone[3].weight.grad = torch.ones_like(model.backbone[3].weight)
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    pgd(model, *batch, eps=0.1, step_size=0.05, steps=2)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for name, parameter in model.named_parameters():
        if name == "backbone.3.weight":
            assert torch.equal(parameter.grad, torch.ones_like(parameter))
        else:
            assert parameter.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_attack_sees_the_model_in_eval_mode(trained, batch):
    training = copy.deepcopy(trained).train()
    settings = {"eps": 0.1, "step_size": 0.05, "steps": 2}
    assert torch.equal(pgd(training, *batch, **settings), pgd(trained, *batch, **settings))


@pytest.mark.parametrize("mode", ["a step raises", "a forward pass raises"])
def test_the_model_is_put_back_after_an_error(mode):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            out = self.layer(x.flatten(1))
            if mode == "a forward pass raises":
                raise RuntimeError("broken")
            return out.detach()

    model = Fails().train()
    with pytest.raises(RuntimeError):
        pgd(model, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), eps=0.1, step_size=0.1, steps=1)
    assert model.training
    assert model.layer.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("random_start", [False, True])
def test_inputs_and_global_random_state_are_untouched(trained, batch, generator, random_start):
    pixels, labels = batch
    pixels, labels = pixels.clone().requires_grad_(True), labels.clone()
    before, state = (pixels.detach().clone(), labels.clone()), torch.get_rng_state()
    settings = {"random_start": random_start, "generator": generator}
    with torch.no_grad():  # also inside somebody's no_grad
        moved = pgd(trained, pixels, labels, eps=0.1, step_size=0.05, steps=2, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pixels.detach(), before[0])
    assert torch.equal(labels, before[1])
    assert pixels.grad is None
    assert not moved.requires_grad
    assert not torch.equal(moved, before[0])


def test_the_random_start_is_the_generators(trained, batch):
    def run(seed):
        random = torch.Generator().manual_seed(seed)
        return pgd(trained, *batch, eps=0.1, step_size=0.02, steps=2, random_start=True, generator=random)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_a_random_start_without_steps_fills_the_ball(batch, trained, generator):
    pixels = torch.full((64, 1, 16, 16), 0.5)
    moved = pgd(trained, pixels, batch[1], eps=0.2, step_size=0.1, steps=0, random_start=True, generator=generator)
    offset = (moved - pixels).flatten()
    # 16,384 uniform numbers in [-0.2, 0.2]: the mean is off 0 by 5 standard errors at most, the ends are reached.
    assert abs(float(offset.mean())) < 5 * 0.2 / 3**0.5 / 128
    assert float(offset.std()) == pytest.approx(0.2 / 3**0.5, rel=0.05)
    assert float(offset.abs().max()) > 0.199


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 8}, "8/255"),
        ({"eps": -0.1}, "-0.1"),
        ({"eps": float("nan")}, "nan"),
        ({"eps": 1000}, r"\[0, 1\], got 1000$"),
        ({"step_size": -1}, "step_size"),
        ({"step_size": float("nan")}, "step_size"),
        ({"steps": -1}, "steps"),
    ],
)
def test_impossible_settings_are_refused(trained, batch, changes, message):
    with pytest.raises(UsageError, match=message):
        pgd(trained, *batch, **{"eps": 0.1, "step_size": 0.1, "steps": 1, **changes})
