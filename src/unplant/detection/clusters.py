"""Does a class consist of several kinds of images? Mixtures of Gaussians in the infected model's features.

Poisoned images of a class share features that its clean images don't have. Activation Clustering (Chen et al., 2018,
arXiv:1811.03728) looks at the last layer with k-means; here several depths are tried, and the evidence for two
components over one is measured. In classes that outweigh the others, where poison may be most of what there is, more
components are allowed: images of all other classes, under one label, are kinds of their own. What is most evident need
not be the poison, so that other groups at other depths are told as well.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SMALLEST_CLASS = 40
"""Classes with fewer images aren't split, and third groups with fewer don't count: ten dimensions can't be fitted."""

MANY = 5
"""Most groups of a class that outweighs the others."""

UNLIKE = 0.5
"""Groups at another depth are others if their adjusted Rand index (1: the same, 0: chance) is no more than that."""

Kinds = tuple[float, np.ndarray]
"""A class's gain and groups at one depth: see `Split`."""


@dataclass(frozen=True, eq=False)
class Split:
    """Groups within each class.

    Attributes:
        group: int64 (N,), the number of each image's group within its class, by size: 0 is the largest.
        gain: float (K,), evidence for several groups over one, in nats an image: half the difference of the BIC.
        count: int64 (K,), groups of each class; 1 where the class wasn't split.
        minor_share: float (K,), share of the class outside of its largest group.
    """

    group: Tensor
    gain: Tensor
    count: Tensor
    minor_share: Tensor

    def to_json(self) -> dict[str, list[float]]:
        """What is known of each class, as plain numbers."""
        return {name: [round(v, 3) for v in getattr(self, name).tolist()] for name in ("gain", "count", "minor_share")}


def outweighing(labels: Tensor, num_classes: int, times: float) -> Tensor:
    """Bool (K,): classes with so many times the images of the median class, of those that have any.

    Where poison is more than its class, it is the larger group: so it is at a tenth of the images with thirty classes
    and more. Such a class has far more images than others.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    return counts >= times * counts[counts > 0].float().median()


def split_classes(
    layers: list[Tensor], labels: Tensor, many: Tensor, *, least_gain: float, dimensions: int = 10
) -> list[Split]:
    """Splits each class at the depth where groups are most evident, and at others where there are others.

    Args:
        layers: features (N, D) at several depths.
        labels: int64 (N,).
        many: bool (K,), classes that may fall into up to `MANY` groups; the others into two.
        least_gain: a class with less evidence, in nats an image, isn't split.
        dimensions: principal components that are kept.

    Returns:
        First each class's most evident groups; then, as long as any class has more, the most evident ones that are
        unlike those before (`UNLIKE`).
    """
    scales = [layer.std(0).clamp(min=1e-6) for layer in layers]  # every channel counts alike
    found = []
    for label in range(len(many)):
        members = (labels == label).nonzero().flatten()
        depths = []
        if len(members) >= max(SMALLEST_CLASS, 4 * dimensions):
            most = MANY if many[label] else 2
            depths = [
                _groups((layer[members] / scale).numpy(), most, dimensions)
                for layer, scale in zip(layers, scales, strict=True)
            ]
        found.append(_unlike(depths, least_gain))
    turns = [
        {label: depths[turn] for label, depths in enumerate(found) if turn < len(depths)}
        for turn in range(max([1, *map(len, found)]))
    ]
    return [_split(kinds, labels, len(many), least_gain) for kinds in turns]


def _unlike(depths: list[Kinds], least_gain: float) -> list[Kinds]:
    """Of one class, the most evident first; then those that are evident, and unlike all before."""
    from sklearn.metrics import adjusted_rand_score

    kept: list[Kinds] = []
    for gain, group in sorted(depths, key=lambda pair: -pair[0]):
        if not kept or (gain >= least_gain and all(adjusted_rand_score(group, other) <= UNLIKE for _, other in kept)):
            kept.append((gain, group))
    return kept


def _split(kinds: dict[int, Kinds], labels: Tensor, classes: int, least_gain: float) -> Split:
    """All classes together; those that aren't named have one group."""
    group = torch.zeros(len(labels), dtype=torch.int64)
    gain, share = torch.zeros(classes), torch.zeros(classes)
    count = torch.ones(classes, dtype=torch.int64)
    for label, (evidence, best) in kinds.items():
        gain[label] = evidence
        if evidence >= least_gain:
            group[labels == label] = torch.from_numpy(best)
            count[label] = int(best.max()) + 1
            share[label] = float((best > 0).mean())
    return Split(group, gain, count, share)


def _groups(features: np.ndarray, most: int, dimensions: int) -> Kinds:
    """The gain of the best mixture of 2 to `most` Gaussians over one, and the groups, int64 (N,), by size."""
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    features = features.astype(np.float64)
    spread = features.std(0)
    features = features[:, spread > 1e-8 * max(1.0, float(spread.max(initial=0.0)))]
    if features.shape[1] == 0:
        return 0.0, np.zeros(len(features), dtype=np.int64)
    reduced = PCA(min(dimensions, features.shape[1]), random_state=0).fit_transform(features)
    one, *several = (
        GaussianMixture(count, covariance_type="tied", n_init=tries, random_state=0).fit(reduced)
        for count, tries in ((1, 1), *((count, 4) for count in range(2, most + 1)))
    )
    found = []
    for mixture in several:
        given = mixture.predict(reduced)
        sizes = np.bincount(given, minlength=mixture.n_components)
        if mixture.n_components == 2 or sizes.min() >= SMALLEST_CLASS:
            found.append((mixture.bic(reduced), np.argsort(np.argsort(-sizes, kind="stable"))[given]))
    bic, group = min(found, key=lambda pair: pair[0])
    return float(one.bic(reduced) - bic) / (2 * len(reduced)), group
