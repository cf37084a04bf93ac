"""Erasers: one file each; a new one is that file and one import line here."""

from unplant.erasers import aft, fine_tune, pbe
from unplant.erasers.base import EraserConfig, Method, erasers

__all__ = ["EraserConfig", "Method", "aft", "erasers", "fine_tune", "pbe"]
