"""ACC, ASR, RA and the natural target rate; the quality of suspects. The only place where an attack meets a defence."""

from typing import Any

import torch
from torch import Tensor, nn

from unplant import metrics
from unplant.classifier import logits
from unplant.images import LabeledImages
from unplant.poisoning import Attack, triggered_test_set
from unplant.results import Erasure, Scores


def evaluate(model: nn.Module, test: LabeledImages, attack: Attack | None = None) -> Scores:
    """Scores of a model on clean test images and, if the attack is known, on triggered ones.

    ASR counts only images whose true label is not the wanted one. Without an attack ASR, RA and the natural target
    rate are unknown: None.
    """
    predicted = logits(model, test).argmax(1)
    right = predicted == test.labels
    per_class = [float(right[test.labels == k].float().mean()) for k in test.labels.unique()]
    acc, worst = metrics.share(right.numpy()), min(per_class, default=None)
    if attack is None:
        return Scores(acc, None, None, None, worst, None, len(test), 0)
    clean, triggered = triggered_test_set(test, attack)
    if not len(clean):
        return Scores(acc, None, None, None, worst, None, len(test), 0)
    wanted, true = triggered.labels, clean.labels
    got = logits(model, triggered).argmax(1)
    natural = logits(model, clean).argmax(1)
    hits = got == wanted
    return Scores(
        acc=acc,
        asr=metrics.share(hits.numpy()),
        ra=metrics.share((got == true).numpy()),
        natural_target_rate=metrics.share((natural == wanted).numpy()),
        worst_class_acc=worst,
        asr_upper=metrics.upper_bound(int(hits.sum()), len(hits)),
        clean_images=len(test),
        triggered_images=len(hits),
    )


def suspect_quality(erasure: Erasure, poisoned: Tensor) -> dict[str, Any]:
    """Precision, recall, F1 and AUROC of an erasure's suspects against the truth; None where undefined."""
    if erasure.suspects is None or erasure.suspicion is None:
        return {"precision": None, "recall": None, "f1": None, "auroc": None, "flagged": None}
    flagged, truth = erasure.suspects.numpy(), poisoned.numpy()
    precision, recall = metrics.precision(flagged, truth), metrics.recall(flagged, truth)
    f1 = None
    if precision is not None and recall is not None:
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "auroc": metrics.auroc(erasure.suspicion.numpy(), truth),
        "flagged": int(torch.count_nonzero(erasure.suspects)),
    }
