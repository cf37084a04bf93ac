"""Untrusted model files, and writing that never leaves half a file."""

from unplant.files.atomic import write_atomically
from unplant.files.checkpoints import Checkpoint, load_checkpoint, salvage
from unplant.files.output import OutputFolder
from unplant.files.weights import check_fits_weights, load_into, save_tensors, save_weights

__all__ = [
    "Checkpoint",
    "OutputFolder",
    "check_fits_weights",
    "load_checkpoint",
    "load_into",
    "salvage",
    "save_tensors",
    "save_weights",
    "write_atomically",
]
