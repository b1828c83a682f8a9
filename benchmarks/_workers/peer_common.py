"""What every worker on the side of scvi-tools begins with."""

from __future__ import annotations

import logging

import scvi
import torch

__all__ = ["prepare"]


def prepare(threads: int, seed: int) -> None:
    """Set threads and seed, and silence what would cost scvi-tools time."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    scvi.settings.num_threads = threads
    scvi.settings.verbosity = logging.ERROR
    scvi.settings.seed = seed
