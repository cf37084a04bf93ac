"""Scores against definitions in slow loops."""

import itertools
import math

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


# How visible a change is.


def pictures(*shape, seed=0, noise=20):
    """Uint8 images with some structure, and the same with noise."""
    random = np.random.default_rng(seed)
    waves = 127 + 90 * np.sin(np.arange(math.prod(shape)).reshape(shape) / 9)
    clean = np.clip(waves + random.normal(0, 10, shape), 0, 255)
    return clean.astype(np.uint8), np.clip(clean + random.normal(0, noise, shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(3, 1, 4, 5), (2, 3, 6, 4), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("noise", [2, 60])
def test_psnr_by_a_loop(shape, noise):
    clean, changed = pictures(*shape, noise=noise)
    clean[0, 0, 0, 0], changed[0, 0, 0, 0] = 9, 200
    values = []
    for a, b in zip(clean.tolist(), changed.tolist(), strict=True):
        errors = [(x - y) ** 2 for p, q in zip(a, b, strict=True) for r, s in zip(p, q, strict=True)
                  for x, y in zip(r, s, strict=True)]  # fmt: skip
        if sum(errors):
            values.append(20 * math.log10(255) - 10 * math.log10(sum(errors) / len(errors)))
    assert metrics.psnr(clean, changed) == pytest.approx(sum(values) / len(values), rel=1e-12)


def test_psnr_leaves_out_images_that_are_equal():
    clean, changed = pictures(4, 1, 8, 8)
    alone = metrics.psnr(clean[:1], changed[:1])
    changed[1:] = clean[1:]
    assert metrics.psnr(clean, changed) == pytest.approx(alone)
    assert metrics.psnr(clean, clean) is None
    assert metrics.psnr(clean[:0], changed[:0]) is None


def test_psnr_of_known_changes():
    black = np.zeros((2, 3, 8, 8), np.uint8)
    assert metrics.psnr(black, black + 255) == pytest.approx(0)
    assert metrics.psnr(black, black + 1) == pytest.approx(48.13, abs=0.005)
    assert metrics.psnr(black + 200, black + 100) == metrics.psnr(black + 100, black + 200), "no wrap-around of uint8"


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 32, 20), (1, 1, 11, 40)], ids=str)
@pytest.mark.parametrize("noise", [3, 20, 80])
def test_ssim_is_that_of_scikit_image(shape, noise):
    from skimage.metrics import structural_similarity

    clean, changed = pictures(*shape, noise=noise)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255, "full": True}
    maps = [
        structural_similarity(a.astype(float), b.astype(float), **settings)[1]
        for a, b in zip(clean.reshape(-1, *shape[2:]), changed.reshape(-1, *shape[2:]), strict=True)
    ]
    assert metrics.ssim(clean, changed) == pytest.approx(float(np.mean(maps)), abs=1e-12)


def slow_ssim(a, b):
    """One channel, window by window, edges mirrored as often as it takes."""
    taps = [math.exp(-(i**2) / (2 * 1.5**2)) for i in range(-5, 6)]
    taps = [tap / sum(taps) for tap in taps]

    def mirrored(i, size):
        i %= 2 * size
        return i if i < size else 2 * size - 1 - i

    height, width = a.shape
    total = 0.0
    for y in range(height):
        for x in range(width):
            sums = np.zeros(5)
            for i, down in enumerate(taps):
                for j, right in enumerate(taps):
                    place = mirrored(y + i - 5, height), mirrored(x + j - 5, width)
                    p, q = float(a[place]), float(b[place])
                    sums += down * right * np.array([p, q, p * p, q * q, p * q])
            p, q, pp, qq, pq = sums
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            alike = (2 * p * q + c1) * (2 * (pq - p * q) + c2)
            total += alike / ((p * p + q * q + c1) * (pp - p * p + qq - q * q + c2))
    return total / (height * width)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (3, 2), (8, 8), (12, 5)], ids=str)
def test_ssim_of_tiny_images_by_a_loop(size):
    clean, changed = pictures(1, 1, *size, noise=60)
    assert metrics.ssim(clean, changed) == pytest.approx(slow_ssim(clean[0, 0], changed[0, 0]), abs=1e-9)


def test_ssim_of_known_pairs():
    clean, changed = pictures(3, 3, 16, 16)
    assert metrics.ssim(clean, clean) == 1
    assert metrics.ssim(clean, changed) == pytest.approx(metrics.ssim(changed, clean))
    each = [metrics.ssim(clean[[i]], changed[[i]]) for i in range(3)]
    assert metrics.ssim(clean, changed) == pytest.approx(np.mean(each))
    assert metrics.ssim(clean[:0], clean[:0]) is None
    # Of two flat pictures only the means count.
    for first, second in ((0, 255), (100, 110), (0, 0)):
        c1 = (0.01 * 255) ** 2
        expected = (2 * first * second + c1) / (first**2 + second**2 + c1)
        flat = [np.full((1, 1, 12, 12), value, np.uint8) for value in (first, second)]
        assert metrics.ssim(*flat) == pytest.approx(expected, abs=1e-9)
    # A picture and its negative are alike in nothing but their mean: below 0.
    waves = np.tile(np.uint8([0, 255]), (1, 1, 16, 8))
    assert metrics.ssim(waves, 255 - waves) < -0.9
