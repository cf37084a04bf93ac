"""Does a class consist of two kinds of images? Mixtures of Gaussians in the infected model's features.

Poisoned images of a class share features that its clean images don't have. Activation Clustering (Chen et al., 2018,
arXiv:1811.03728) looks at the last layer with k-means; here several depths are tried, and the evidence for two
components over one is measured.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SMALLEST_CLASS = 40
"""Classes with fewer images aren't split: ten dimensions can't be fitted."""


@dataclass(frozen=True, eq=False)
class Split:
    """Two groups within each class.

    Attributes:
        minor: bool (N,), true for the images of the smaller group of their class.
        gain: float (K,), evidence for two groups over one, in nats an image: half the difference of the BIC.
        minor_share: float (K,), share of the class that is in the smaller group; 0 where the class wasn't split.
    """

    minor: Tensor
    gain: Tensor
    minor_share: Tensor

    def to_json(self) -> dict[str, list[float]]:
        """What is known of each class, as plain numbers."""
        return {name: [round(v, 3) for v in getattr(self, name).tolist()] for name in ("gain", "minor_share")}


def split_classes(
    layers: list[Tensor], labels: Tensor, num_classes: int, *, least_gain: float, dimensions: int = 10
) -> Split:
    """Splits each class at the depth where two groups are most evident.

    Args:
        layers: features (N, D) at several depths.
        labels: int64 (N,).
        num_classes: K.
        least_gain: a class with less evidence, in nats an image, isn't split.
        dimensions: principal components that are kept.
    """
    minor = torch.zeros(len(labels), dtype=torch.bool)
    gain, share = torch.zeros(num_classes), torch.zeros(num_classes)
    scales = [layer.std(0).clamp(min=1e-6) for layer in layers]  # every channel counts alike
    for label in range(num_classes):
        members = (labels == label).nonzero().flatten()
        if len(members) < max(SMALLEST_CLASS, 4 * dimensions):
            continue
        found = [
            _two_groups((layer[members] / scale).numpy(), dimensions)
            for layer, scale in zip(layers, scales, strict=True)
        ]
        best_gain, best_minor = max(found, key=lambda pair: pair[0])
        gain[label] = best_gain
        if best_gain >= least_gain:
            minor[members] = torch.from_numpy(best_minor)
            share[label] = float(best_minor.mean())
    return Split(minor, gain, share)


def _two_groups(features: np.ndarray, dimensions: int) -> tuple[float, np.ndarray]:
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    features = features.astype(np.float64)
    spread = features.std(0)
    features = features[:, spread > 1e-8 * max(1.0, float(spread.max(initial=0.0)))]
    if features.shape[1] == 0:
        return 0.0, np.zeros(len(features), dtype=bool)
    reduced = PCA(min(dimensions, features.shape[1]), random_state=0).fit_transform(features)
    one, two = (
        GaussianMixture(count, covariance_type="tied", n_init=tries, random_state=0).fit(reduced)
        for count, tries in ((1, 1), (2, 4))
    )
    group = two.predict(reduced).astype(bool)
    minor = group if group.mean() <= 0.5 else ~group
    return float(one.bic(reduced) - two.bic(reduced)) / (2 * len(reduced)), minor
