"""Whose kin are the images that nobody has judged? Poison that escaped lies among them, and so do hard clean images."""

import torch
from torch import Tensor

FEWEST = 10
"""Fewer known images than that on one side, and nobody of the class is judged."""

FOLDS = 5
"""Parts of the decided images, each of which is kept from a discriminant once."""


def odds_of_poison(
    layers: list[Tensor], after: Tensor, labels: Tensor, suspects: Tensor, trusted: Tensor, undecided: Tensor
) -> Tensor:
    """The log odds (nats) that undecided images are poisoned, class by class.

    Two opinions, as log odds, are added: to which side an image is nearer in what the infected model sees (a linear
    discriminant at each depth, learnt from the images that are decided; the depths know much the same, so their mean
    counts); and whether the purified model would give it another label than its own. A discriminant is as sure as it
    was right on decided images that were kept from it (Platt, 1999): with few of them it separates all that it knows,
    and says hundreds of nats of what it doesn't.

    Args:
        layers: features (N, D) of θ₀ at several depths.
        after: float (N, K), logits of θ.
        labels: int64 (N,).
        suspects: bool (N,).
        trusted: bool (N,), images of D_ext under their own labels.
        undecided: bool (N,), images to be judged.

    Returns:
        Double (N,); NaN for all others, and in classes with fewer than `FEWEST` suspects or trusted images.
    """
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    others = after.double().softmax(1).scatter(1, labels[:, None], 0).amax(1)
    by_label = torch.logit(others, eps=1e-6)
    odds = torch.full_like(by_label, torch.nan)
    for label in labels[undecided].unique().tolist():
        members = labels == label
        here, known = members & undecided, members & (suspects | trusted)
        if min(int((members & suspects).sum()), int((members & trusted).sum())) < FEWEST:
            continue
        opinions, mine = [], members.nonzero().flatten()
        for layer in layers:
            features = layer[mine]
            spread = features[known[mine]].std(0)
            seen = (features[:, spread > 1e-6] / spread[spread > 1e-6]).double()
            if not seen.shape[1]:
                continue
            plain = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
            discriminant = CalibratedClassifierCV(plain, cv=FOLDS, ensemble=False)  # type: ignore[arg-type]
            discriminant.fit(seen[known[mine]].numpy(), suspects[known].numpy())
            chance = torch.from_numpy(discriminant.predict_proba(seen[here[mine]].numpy())[:, 1])
            opinions.append(torch.logit(chance, eps=1e-6))
        if opinions:
            odds[here] = torch.stack(opinions).mean(0) + by_label[here]
    return odds
