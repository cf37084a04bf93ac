"""Who takes after the suspects."""

import pytest
import torch
from torch import Tensor

from unplant.detection.kinship import FEWEST, odds_of_poison

LIKE_POISON, LIKE_CLEAN = 3.0, -3.0


class Case:
    """One class of 40 suspects, 60 trusted images and the undecided ones; a second class that must not matter."""

    def __init__(self, places: list[float], other_label: list[float], suspects: int = 40, depths: int = 2) -> None:
        """`places`: where undecided images lie in the features; `other_label`: probability of class 1 in them."""
        random = torch.Generator().manual_seed(0)
        centres = torch.tensor([LIKE_POISON] * suspects + [LIKE_CLEAN] * 60 + places)
        size = len(centres)
        self.layers = [
            torch.cat([centres[:, None] + torch.randn((size, 5), generator=random), torch.ones(size, 1)], 1)
            for _ in range(depths)
        ]
        self.labels = torch.zeros(size, dtype=torch.int64)
        self.suspects, self.trusted = torch.zeros((2, size), dtype=torch.bool)
        self.suspects[:suspects] = True
        self.trusted[suspects : suspects + 60] = True
        chance = torch.cat([torch.full((suspects + 60,), 0.5), torch.tensor(other_label)])
        self.after = torch.stack([(1 - chance).log(), chance.log(), torch.full_like(chance, -30.0)], 1)

    def kin(self) -> list[bool]:
        undecided = ~(self.suspects | self.trusted)
        given = (self.after, self.labels, self.suspects, self.trusted, undecided)
        odds = odds_of_poison(self.layers, *given)
        assert odds[~undecided].isnan().all()
        return (odds[undecided] > 0).tolist()


def test_likeness_decides_where_the_purified_model_does_not_know() -> None:
    assert Case([LIKE_POISON] * 5 + [LIKE_CLEAN] * 5, [0.5] * 10).kin() == [True] * 5 + [False] * 5


def test_the_purified_model_decides_where_likeness_does_not() -> None:
    case = Case([LIKE_POISON] * 6, [0.99] * 3 + [0.01] * 3)
    case.layers = [torch.randn(layer.shape, generator=torch.Generator().manual_seed(1)) for layer in case.layers]
    assert case.kin() == [True] * 3 + [False] * 3


def test_nobody_is_judged_where_features_say_nothing() -> None:
    case = Case([LIKE_POISON] * 2, [0.9, 0.1])
    case.layers = [torch.ones_like(layer) for layer in case.layers]
    assert case.kin() == [False, False]


@pytest.mark.parametrize(("suspects", "expected"), [(FEWEST - 1, False), (FEWEST, True)])
def test_too_few_known_images_judge_nobody(suspects: int, expected: bool) -> None:
    assert Case([LIKE_POISON], [0.9], suspects=suspects).kin() == [expected]


def test_other_classes_do_not_matter() -> None:
    case = Case([LIKE_POISON, LIKE_CLEAN], [0.6, 0.6])
    before = case.kin()

    def with_another(values: Tensor, more: Tensor) -> Tensor:
        return torch.cat([values, more])

    case.layers = [with_another(layer, -10 * layer[:50]) for layer in case.layers]
    case.labels = with_another(case.labels, torch.full((50,), 2))
    case.suspects = with_another(case.suspects, torch.arange(50) < 25)
    case.trusted = with_another(case.trusted, torch.arange(50) >= 25)
    case.after = with_another(case.after, torch.zeros(50, 3))
    assert case.kin() == before == [True, False]


def test_likeness_is_as_sure_as_it_proves_right() -> None:
    """Features that say nothing, and undecided images unlike all others in them: distance isn't certainty."""
    case = Case([0.0] * 40, [0.01] * 40, suspects=12)
    case.layers = [torch.randn((112, 100), generator=torch.Generator().manual_seed(depth)) for depth in range(2)]
    for layer in case.layers:
        layer[72:] *= 10
    assert not any(case.kin())
