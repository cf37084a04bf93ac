"""Scores as pure functions of arrays: fractions in [0, 1], None where nothing was counted."""

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike


def share(hits: ArrayLike) -> float | None:
    """Share of true entries; None for an empty array.

    >>> share([True, False, False, False])
    0.25
    """
    hits = np.asarray(hits, dtype=bool)
    return float(hits.mean()) if hits.size else None


def upper_bound(hits: int, count: int, confidence: float = 0.95) -> float | None:
    """One-sided Wilson upper bound of a rate of which `hits` of `count` were seen (Wilson, JASA 1927, 22:158).

    >>> round(upper_bound(0, 100), 3)
    0.026
    """
    if count == 0:
        return None
    if hits == count:
        return 1.0
    z = NormalDist().inv_cdf(confidence)
    rate = hits / count
    centre = rate + z * z / (2 * count)
    spread = z * math.sqrt(rate * (1 - rate) / count + z * z / (4 * count * count))
    return min(1.0, (centre + spread) / (1 + z * z / count))


def lower_bound(hits: int, count: int, confidence: float = 0.95) -> float | None:
    """The lower bound, as `upper_bound`.

    >>> round(lower_bound(36, 36), 3), round(lower_bound(35, 36), 3)
    (0.93, 0.885)
    """
    upper = upper_bound(count - hits, count, confidence)
    return None if upper is None else 1 - upper


def auroc(scores: ArrayLike, positive: ArrayLike) -> float | None:
    """Probability that a positive's score is above a negative's, ties counted half; None without both kinds.

    >>> auroc([0.9, 0.8, 0.1], [True, False, False])
    1.0
    """
    positive = np.asarray(positive, dtype=bool)
    if positive.all() or not positive.any():
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, np.asarray(scores, dtype=float)))


def precision(flagged: ArrayLike, positive: ArrayLike) -> float | None:
    """Share of the flagged that are positive; None when nothing is flagged."""
    flagged, positive = np.asarray(flagged, dtype=bool), np.asarray(positive, dtype=bool)
    return share(positive[flagged])


def recall(flagged: ArrayLike, positive: ArrayLike) -> float | None:
    """Share of the positives that are flagged; None when nothing is positive."""
    return precision(positive, flagged)


def psnr(clean: ArrayLike, changed: ArrayLike) -> float | None:
    """Peak signal-to-noise ratio in dB, of uint8 images (N, C, H, W): mean over the images that differ; high is alike.

    >>> round(psnr([[[[0, 0]]]], [[[[255, 0]]]]), 2)
    3.01
    """
    a, b = np.asarray(clean, dtype=float), np.asarray(changed, dtype=float)
    error = ((a - b) ** 2).mean((1, 2, 3))
    error = error[error > 0]
    return float((10 * np.log10(255**2 / error)).mean()) if len(error) else None


def ssim(clean: ArrayLike, changed: ArrayLike) -> float | None:
    """Structural similarity of uint8 images (N, C, H, W), mean over images, channels and pixels; 1 is equal.

    Wang et al., IEEE TIP 2004, 13:600: Gaussian window of sigma 1.5 over 11 pixels, K1 = 0.01, K2 = 0.03; edges are
    mirrored.

    >>> import numpy as np
    >>> ssim(np.full((1, 1, 16, 16), 9), np.full((1, 1, 16, 16), 9))
    1.0
    """
    from scipy.ndimage import gaussian_filter

    def smooth(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, sigma=(0, 0, 1.5, 1.5), truncate=3.5)

    a, b = np.asarray(clean, dtype=float), np.asarray(changed, dtype=float)
    if not len(a):
        return None
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((alike / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())
