"""Find and erase backdoors planted in image classifiers.

    result = unplant.erase(model, train_data)          # PBE: no clean data
    result = unplant.erase(model, clean=clean_data)    # AFT: a small clean set
    result.model, result.suspects, result.rounds

`import unplant` doesn't import torch: the names below are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "erase": "unplant.api",
    "Classifier": "unplant.classifier",
    "Erasure": "unplant.results",
    "Journal": "unplant.journal",
    "LabeledImages": "unplant.images",
    "UnplantError": "unplant.errors",
    "UnplantWarning": "unplant.errors",
    "evaluate": "unplant.evaluation",
    "open_data": "unplant.data",
    "pgd": "unplant.adversarial",
    "plant": "unplant.planting",
}

__all__ = [
    "Classifier",
    "Erasure",
    "Journal",
    "LabeledImages",
    "UnplantError",
    "UnplantWarning",
    "__version__",
    "erase",
    "evaluate",
    "open_data",
    "pgd",
    "plant",
]

if TYPE_CHECKING:
    from unplant.adversarial import pgd
    from unplant.api import erase
    from unplant.classifier import Classifier
    from unplant.data import open_data
    from unplant.errors import UnplantError, UnplantWarning
    from unplant.evaluation import evaluate
    from unplant.images import LabeledImages
    from unplant.journal import Journal
    from unplant.planting import plant
    from unplant.results import Erasure


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'unplant' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
