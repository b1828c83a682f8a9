"""Loops in parts, on threads of torch.

The threads of torch's OpenMP wait for its next operation by spinning: others that ran meanwhile would share the cores.
So it is asked to run the parts of a loop, where it can be found; see ADR 0029.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

__all__ = ["in_parts"]

_WORTH = 2**13
"""Numbers that a loop has to go through, for each thread, to repay the start of all."""

_PROCESS = os.getpid()
"""A process forked from this one has the library without its threads; so has one forked before, as for torch's own."""

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Region = Callable[[Any, None, int, int], None]


def in_parts(work: Callable[[int, int], None], n: int, *, n_numbers: int) -> None:
    """Call ``work(start, stop)`` for ranges that make up 0 to n: at most one for each thread of torch, side by side.

    Parameters
    ----------
    work : callable
        It lets go of Python's lock for most of its time, uses no operation of torch, whose threads these are, and
        writes to no place that others write to.
    n : int
        How many items there are.
    n_numbers : int
        How many numbers the loop goes through in all; few are not worth the start.

    Raises
    ------
    BaseException
        The first one that ``work`` raised, after all parts have come to an end.
    """
    n_threads = torch.get_num_threads()
    n_parts = min(n_threads, n)
    is_worth_it = n_parts > 1 and n_numbers >= _WORTH * n_threads
    region = _region() if is_worth_it and os.getpid() == _PROCESS and not sys.is_finalizing() else None
    if region is None:
        work(0, n)
        return
    bounds = [n * part // n_parts for part in range(n_parts + 1)]
    tickets, begun = itertools.count(), set[int]()
    failures: list[BaseException] = []

    def take_parts(_: Any) -> None:
        try:
            begun.add(threading.get_ident())
            while (part := next(tickets)) < n_parts:
                work(bounds[part], bounds[part + 1])
        except BaseException as failure:  # ctypes would print it and go on
            failures.append(failure)

    region(_Body(take_parts), None, n_threads, 0)
    if failures:
        raise failures.pop(0)
    if threading.get_ident() not in begun:  # Ctrl-C came before the first line, and ctypes printed it
        raise KeyboardInterrupt


@cache
def _region() -> _Region | None:
    """Find the function by which torch's OpenMP runs another on all its threads; None where it cannot be found.

    torch loads its libraries such that their names are known to the whole process: the name leads to the library that
    torch itself got. Those of Intel and LLVM have it as well as GNU's.
    """
    if sys.platform != "linux" or "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        region: Any = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError):
        return None
    region.argtypes, region.restype = [_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    found: _Region = region
    return found
