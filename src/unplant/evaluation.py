"""ACC, ASR, RA and the natural target rate; the quality of suspects; the pass rule of all tables.

The only place where an attack meets a defence.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from unplant import metrics
from unplant.classifier import logits
from unplant.images import LabeledImages
from unplant.poisoning import Attack, triggered_test_set
from unplant.results import Erasure, Scores

LEAST_ASR = 0.8
"""An attack that reaches less on the infected model doesn't count: nothing is shown by its end."""

MOST_ASR = 0.05
"""What may be left of it, by its upper 95 % bound."""

MOST_LOST, MOST_LOST_IF_CLEAN, MOST_LOST_BY_THE_WORST = 0.02, 0.01, 0.05
"""What may be lost: of ACC, of a clean model's ACC, and of the accuracy of the class that is worst."""

LEAST_RA = 0.9
"""The least RA, in shares of ACC."""

ROUNDING = 1e-9
"""What float arithmetic may add to a difference."""


def evaluate(model: nn.Module, test: LabeledImages, attack: Attack | None = None) -> Scores:
    """Scores of a model on clean test images and, if the attack is known, on triggered ones.

    ASR counts only images whose true label is not the wanted one. Without an attack ASR, RA and the natural target
    rate are unknown: None.
    """
    predicted = logits(model, test).argmax(1)
    right = predicted == test.labels
    per_class = tuple(metrics.share(right[test.labels == k].numpy()) for k in range(test.num_classes))
    worst = min((share for share in per_class if share is not None), default=None)
    acc, unknown = metrics.share(right.numpy()), (None, None, None)
    only_clean = Scores(acc, *unknown, worst_class_acc=worst, clean_images=len(test), class_acc=per_class)
    if attack is None:
        return only_clean
    clean, triggered = triggered_test_set(test, attack)
    if not len(clean):
        return only_clean
    wanted, true = triggered.labels, clean.labels
    got = logits(model, triggered).argmax(1)
    natural = logits(model, clean).argmax(1)
    hits = got == wanted
    return replace(
        only_clean,
        asr=metrics.share(hits.numpy()),
        ra=metrics.share((got == true).numpy()),
        natural_target_rate=metrics.share((natural == wanted).numpy()),
        asr_upper=metrics.upper_bound(int(hits.sum()), len(hits)),
        triggered_images=len(hits),
    )


def missed(before: Scores, after: Scores, accused: bool = False) -> tuple[str, ...] | None:
    """What a purified model misses of the pass rule, clause by clause; empty if it passes.

    ASR at most 5 % by its upper 95 % bound, ACC at most 2 points lower, the accuracy of the class that is worst at most
    5 points, RA at least 0.9 ACC. Without an attack: ACC at most 1 point lower, the worst class as before, and the
    model isn't called infected (`accused`). The worst class may be another one afterwards. None if it doesn't count:
    the attack reached less than 80 % on the infected model, or there was nothing to measure it on.
    """
    if before.acc is None or after.acc is None:
        return None
    infected = before.asr is not None or after.asr is not None
    clauses = []
    if infected:
        if before.asr is None or before.asr < LEAST_ASR or after.asr is None or after.ra is None:
            return None
        if (after.asr_upper or 0.0) > MOST_ASR:
            clauses.append(f"ASR {100 * after.asr:.1f}, at most {100 * (after.asr_upper or 0.0):.1f}")
        if after.ra < LEAST_RA * after.acc - ROUNDING:
            clauses.append(f"RA {100 * after.ra:.1f} of {100 * LEAST_RA * after.acc:.1f}")
    lost = before.acc - after.acc
    if lost > (MOST_LOST if infected else MOST_LOST_IF_CLEAN) + ROUNDING:
        clauses.append(f"ACC −{100 * lost:.1f}")
    worst = (before.worst_class_acc or 0.0) - (after.worst_class_acc or 0.0)
    if worst > MOST_LOST_BY_THE_WORST + ROUNDING:
        clauses.append(f"worst class −{100 * worst:.1f}")
    if accused and not infected:
        clauses.append("called infected")
    return tuple(clauses)


def largest_fall(before: Scores, after: Scores) -> tuple[int, float] | None:
    """The class that loses most, and how much; None where classes weren't told apart."""
    pairs = enumerate(zip(before.class_acc, after.class_acc, strict=False))
    falls = [(k, b - a) for k, (b, a) in pairs if b is not None and a is not None]
    return max(falls, key=lambda entry: entry[1], default=None)


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
