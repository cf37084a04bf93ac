"""Backdoor attacks: one file each; a new one is that file and one import line here."""

from unplant.attacks import badnets, blended, input_aware, sig, wanet
from unplant.poisoning import parse_attack, triggers

__all__ = ["badnets", "blended", "input_aware", "parse_attack", "sig", "triggers", "wanet"]
