"""Untrusted model files, and writing that never leaves half a file."""

from unplant.files.atomic import write_atomically
from unplant.files.checkpoints import Checkpoint, check_fits_weights, load_checkpoint, load_into, save_weights
from unplant.files.output import OutputFolder

__all__ = [
    "Checkpoint",
    "OutputFolder",
    "check_fits_weights",
    "load_checkpoint",
    "load_into",
    "save_weights",
    "write_atomically",
]
