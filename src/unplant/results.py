"""What erasers and evaluations return."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

Progress = Callable[[str, float], None]
"""Told what is being done and which share of it is done, in [0, 1]."""


@dataclass(frozen=True)
class Findings:
    """What a run says about the backdoor, from the data that it was given alone: no trigger, no test images.

    Attributes:
        infected: by suspects: whether a class holds a group of images that hang on their label by a link that could be
            broken; by inversion: whether one perturbation takes most images to one class. False means that nothing was
            found, which is no proof that nothing is there.
        targets: the labels of those classes, the one with the most suspects, or the strongest perturbation, first.
        by: what the verdict goes by: `suspects` in a training set, or `inversion` of the model on clean images.
        poisoning_rate: share of all images that are suspects: the estimated poisoning rate; None by inversion.
        witnesses: number of suspects that were never trained on, and whose label isn't theirs by right.
        asr_left: share of the witnesses to which the purified model still gives their suspicious label; None without
            witnesses.
        asr_left_upper: its one-sided upper 95 % bound.
        trigger_before: where the suspects have a trigger in common that works on other images, or one was inverted:
            share of other images in which the infected model obeys it; None where none could be recovered.
        trigger_after: share in which the purified model does.
        sources: the classes on whose images alone the recovered trigger was seen to work; empty: on any.
        in_doubt: the classes, not among the targets, that hold a group which hangs on its label as poison does, or
            nearly, or stands as far apart. Whether it is poison is undecided; it was not erased, and the estimates
            don't cover it.
        flagged: how many suspects each of the targets has, in their order; empty by inversion.
    """

    infected: bool
    targets: tuple[int, ...]
    by: Literal["suspects", "inversion"] = "suspects"
    poisoning_rate: float | None = None
    witnesses: int = 0
    asr_left: float | None = None
    asr_left_upper: float | None = None
    trigger_before: float | None = None
    trigger_after: float | None = None
    sources: tuple[int, ...] = ()
    in_doubt: tuple[int, ...] = ()
    flagged: tuple[int, ...] = ()

    @property
    def asr_estimate(self) -> float | None:
        """The estimated ASR that is left: by the recovered trigger, else by the witnesses; None where neither is there.

        The trigger goes first, as witnesses of a clean-label attack keep labels that are right.
        """
        return self.trigger_after if self.trigger_after is not None else self.asr_left

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self) | {
            "targets": list(self.targets),
            "sources": list(self.sources),
            "in_doubt": list(self.in_doubt),
            "flagged": list(self.flagged),
            "asr_estimate": self.asr_estimate,
        }


@dataclass(frozen=True, eq=False)
class Erasure:
    """What an eraser returns.

    Attributes:
        model: the purified model, a new module of the infected one's kind.
        suspicion: float (N,), one score per image of the suspect set, high means poisoned; None where the method
            doesn't judge images.
        suspects: bool (N,), the images that the method takes for poisoned; None where it doesn't judge images.
        rounds: what each round did, as plain numbers and strings.
        extra_sets: bool (N,) per round, the images that were trained on under their own labels (PBE's D_ext).
        findings: what the run says about the backdoor; None where the method doesn't look for one.
        trigger: what was recovered from the suspects as the trigger, pixels (N, C, H, W) in [0, 1] → the same with it;
            None where nothing was.
        in_doubt: bool (N,), images of which it isn't decided whether they are poisoned, see `Findings`; None where the
            method doesn't judge images.
    """

    model: nn.Module
    suspicion: Tensor | None = None
    suspects: Tensor | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    extra_sets: list[Tensor] = field(default_factory=list)
    findings: Findings | None = None
    trigger: Callable[[Tensor], Tensor] | None = None
    in_doubt: Tensor | None = None

    def ranked(self) -> Tensor:
        """Indices of the flagged images, the most suspicious first; empty where nothing is flagged."""
        return self._ranked(self.suspects)

    def ranked_in_doubt(self) -> Tensor:
        """Indices of the images in doubt, the most suspicious first."""
        return self._ranked(self.in_doubt)

    def _ranked(self, chosen: Tensor | None) -> Tensor:
        import torch

        if chosen is None or self.suspicion is None:
            return torch.empty(0, dtype=torch.int64)
        places = chosen.nonzero().flatten()
        return places[self.suspicion[places].argsort(descending=True, stable=True)]


@dataclass(frozen=True)
class Scores:
    """A model's scores on test images, as fractions; None is unknown.

    Attributes:
        acc: accuracy on clean test images.
        asr: attack success rate: share of triggered test images whose true label is not the target that get the
            target label.
        ra: robust accuracy: share of the same images that get their true label.
        natural_target_rate: share of the same images *without* the trigger that get the target label; no ASR can
            honestly go below it.
        worst_class_acc: the lowest accuracy of a class on clean test images.
        class_acc: the accuracy of each class on them, unknown where it has none; empty if they weren't told apart.
        asr_upper: one-sided upper 95 % bound of the ASR.
        clean_images: number of clean test images.
        triggered_images: number of triggered test images.
    """

    acc: float | None
    asr: float | None
    ra: float | None
    natural_target_rate: float | None
    worst_class_acc: float | None = None
    asr_upper: float | None = None
    clean_images: int = 0
    triggered_images: int = 0
    class_acc: tuple[float | None, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)
