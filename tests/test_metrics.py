"""Scores against definitions in slow loops."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest

from unplant import metrics


@pytest.mark.parametrize(("hits", "expected"), [([1, 0, 1, 1], 0.75), ([0], 0.0), ([True], 1.0), ([], None)])
def test_share(hits, expected):
    assert metrics.share(hits) == expected


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (0, 1000), (3, 100), (50, 100), (99, 100), (100, 100), (1, 1)])
def test_the_upper_bound_is_wilsons(hits, count):
    # A one-sided 95 % bound is the upper end of the two-sided 90 % interval.
    interval = binomtest(hits, count).proportion_ci(0.9, method="wilson")
    assert metrics.upper_bound(hits, count) == pytest.approx(interval.high, abs=1e-12)


def test_the_upper_bound_of_nothing_is_unknown_and_grows_with_confidence():
    assert metrics.upper_bound(0, 0) is None
    bounds = [metrics.upper_bound(5, 100, confidence) for confidence in (0.6, 0.9, 0.95, 0.99)]
    assert bounds == sorted(bounds)
    assert 0.05 < bounds[0] < bounds[-1] < 0.2


@pytest.mark.parametrize("seed", range(4))
def test_auroc_is_the_chance_that_a_positive_is_above_a_negative(seed):
    random = np.random.default_rng(seed)
    scores, positive = random.integers(0, 6, 40), random.random(40) < 0.3  # few levels: many ties
    pairs = itertools.product(scores[positive], scores[~positive])
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs]
    assert metrics.auroc(scores, positive) == pytest.approx(sum(wins) / len(wins))


@pytest.mark.parametrize("positive", [[True, True], [False, False], []])
def test_auroc_of_one_kind_is_unknown(positive):
    assert metrics.auroc([0.1] * len(positive), positive) is None


@pytest.mark.parametrize(
    ("flagged", "positive", "precision", "recall"),
    [
        ([1, 1, 0, 0], [1, 0, 1, 1], 1 / 2, 1 / 3),
        ([0, 0, 0], [1, 0, 1], None, 0.0),
        ([1, 1, 0], [0, 0, 0], 0.0, None),
        ([1, 0, 1], [1, 0, 1], 1.0, 1.0),
        ([], [], None, None),
    ],
)
def test_precision_and_recall_by_hand(flagged, positive, precision, recall):
    assert metrics.precision(flagged, positive) == (pytest.approx(precision) if precision is not None else None)
    assert metrics.recall(flagged, positive) == (pytest.approx(recall) if recall is not None else None)
