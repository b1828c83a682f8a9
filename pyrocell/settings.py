"""Process-wide settings: plain module attributes, read when a model is made or a call starts.

``pyrocell.settings.seed = 0`` seeds the models made afterwards; the seed is recorded in each model.
"""

from __future__ import annotations

import logging

import torch

__all__ = ["default_device", "device", "logger", "progress", "seed"]

seed: int = 0
"""Seed of the models made afterwards."""

device: str | None = None
"""``"cpu"``, ``"cuda"``, ``"mps"`` or ``None`` for the best device present."""

progress: bool = True
"""Whether long calls show a progress bar."""

logger = logging.getLogger("pyrocell")
"""Set ``pyrocell.settings.logger.setLevel(...)`` for more or less talk."""


def default_device(requested: str | torch.device | None = None) -> torch.device:
    """Choose the device: the one requested, else the one set here, else the best one present.

    Parameters
    ----------
    requested
        Such as ``"cpu"`` or ``"cuda:0"``.
    """
    chosen = requested if requested is not None else device
    if chosen is not None:
        return torch.device(chosen)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
