"""Backdoor attacks: one file each; a new one is that file and one import line here."""

from unplant.attacks import (
    adaptive_blend,
    adaptive_patch,
    badnets,
    blended,
    bpp,
    ctrl,
    input_aware,
    label_consistent,
    lf,
    sig,
    ssba,
    tact,
    trojannn,
    wanet,
)
from unplant.poisoning import parse_attack
from unplant.triggers import triggers

__all__ = [
    "adaptive_blend",
    "adaptive_patch",
    "badnets",
    "blended",
    "bpp",
    "ctrl",
    "input_aware",
    "label_consistent",
    "lf",
    "parse_attack",
    "sig",
    "ssba",
    "tact",
    "triggers",
    "trojannn",
    "wanet",
]
