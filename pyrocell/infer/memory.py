"""Keep freed memory at hand: a step that gets its arrays from the system anew spends a third of its time on that."""

from __future__ import annotations

import sys
from functools import cache

import torch

__all__ = ["keep_freed_memory"]

_LARGEST_LESSON = 31 * 2**20


@cache
def keep_freed_memory() -> None:
    """Teach the C library (glibc) to keep up to 62 MiB of freed memory for the next minibatch.

    It returns memory to the system as soon as twice the largest block ever freed lies unused, where that block was
    of at most 32 MiB. A minibatch of counts takes one MiB, so by default every step gives its arrays back and faults
    them in again, page by page. One larger block, freed untouched, raises that limit for the life of the process.
    """
    if sys.platform == "linux":
        torch.empty(_LARGEST_LESSON, dtype=torch.uint8)
