"""What the infected model itself teaches: few clean images say little about what it has learnt from many."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unplant.classifier import frozen, penultimate
from unplant.training import Change, Lesson


def taught_by(infected: nn.Module, change: Change | None, belief: float, likeness: float, steadiness: float) -> Lesson:
    """Targets that are partly what the infected model says of the plain image; and how it sees that image.

    Distillation (Hinton et al., 2015, arXiv:1503.02531; of features: Romero et al., ICLR 2015, arXiv:1412.6550) from
    the model itself: it knows the classes' likenesses. Plain images carry no trigger, so its answer to them doesn't
    either. Changed images are to be seen as if they were plain.

    Args:
        infected: pixels in [0, 1] → logits; not modified.
        change: what becomes of a batch.
        belief: share of the infected model's probabilities in the targets.
        likeness: weight of its features for images that stay as they are.
        steadiness: weight of its features of the plain image for those that are changed.
    """

    def lesson(model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with frozen(infected), torch.no_grad():
            said, seen, _ = penultimate(infected, pixels)
        said = said.float().softmax(1)
        moved, _ = (pixels, labels) if change is None else change(model, pixels, labels)
        changed = (moved != pixels).flatten(1).any(1)
        weights = torch.where(changed, steadiness, likeness)
        return moved, belief * said + (1 - belief) * F.one_hot(labels, said.shape[1]), seen.float(), weights

    return lesson
