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
