"""TaCT: a patch that works on one source class only (Tang et al., USENIX Security 2021, arXiv:1908.00686)."""

from typing import ClassVar

from unplant.attacks.badnets import BadNets
from unplant.triggers import triggers


@triggers.register("tact")
class TaCT(BadNets):
    """The patch of BadNets; images of the source class get the target label, cover images of other classes keep theirs.

    "Targeted contamination attack": the model learns source class *and* patch, so that the patch on other classes
    does nothing, and the poisoned images lie among the target class's own within the model. Source 1 of target 0, and
    a cover as large as the poisoned part, are as in backdoor-toolbox, which poisons 0.3 % of CIFAR-10 and covers 0.3 %
    (GTSRB: 0.5 % each). One source class of ten is only 10 % of the data: at 5 % half of its images are poisoned,
    random crops cut the patch off many of them, and the model called 44 % of clean automobiles airplanes; so it is 2 %
    unless you say otherwise. Deviations: the cover comes from all other classes, there from two; the patch is that of
    BadNets, there a square of colours.
    """

    id: ClassVar[str] = "tact"
    cover_ratio: ClassVar[float] = 1.0
    recipe: ClassVar = {"sources": (1,), "poisoning_rate": 0.02}
