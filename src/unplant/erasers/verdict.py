"""What is said in the end: who is cleared, what was found, and what is left of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unplant import metrics
from unplant.erasers.selection import mean_by
from unplant.results import Findings


def retrial(suspects: Tensor, heard: Tensor, after: Tensor, labels: Tensor) -> Tensor:
    """Suspects, bool (N,), without those of classes that are cleared in the end.

    A class is cleared if the purified model gives most of the suspects that are `heard` (never taught) their label
    all the same: it has learnt from the others of the class to recognise them, and no trigger is left to do it.
    """
    agree = mean_by(labels, (after.argmax(1) == labels).float(), suspects & heard)
    return suspects & (agree <= 0.5)[labels]


def findings(
    suspects: Tensor,
    left_out: Tensor,
    witnesses: Tensor,
    after: Tensor,
    labels: Tensor,
    obeyed: Sequence[float | None],
    kin: Tensor,
    sources: tuple[int, ...] = (),
    in_doubt: Sequence[int] = (),
) -> Findings:
    """What the suspects say about the backdoor, and the witnesses about what is left of it.

    Args:
        suspects: bool (N,).
        left_out: bool (N,), the groups that stayed out.
        witnesses: bool (N,), images that were not trained on where they are suspects.
        after: float (N, K), the purified model's logits.
        labels: int64 (N,).
        obeyed: how far the infected and the purified model obey the recovered trigger.
        kin: bool (N,), images that were found out by their likeness to the suspects. They aren't heard: that the
            purified model gives them another label is why they were.
        sources: the classes on whose images alone the recovered trigger works.
        in_doubt: the classes of groups that are in doubt.
    """
    counts = torch.bincount(labels[suspects & left_out], minlength=after.shape[1])
    targets = [label for label in counts.argsort(descending=True, stable=True).tolist() if counts[label]]
    flagged = torch.bincount(labels[suspects | kin], minlength=after.shape[1])
    obeying = (after.argmax(1) == labels)[suspects & witnesses]
    return Findings(
        infected=bool(targets),
        targets=tuple(targets),
        poisoning_rate=float((suspects | kin).float().mean()),
        witnesses=len(obeying),
        asr_left=metrics.share(obeying.numpy()),
        asr_left_upper=metrics.upper_bound(int(obeying.sum()), len(obeying)),
        trigger_before=obeyed[0],
        trigger_after=obeyed[1],
        sources=sources,
        in_doubt=tuple(in_doubt),
        flagged=tuple(int(flagged[label]) for label in targets),
    )
