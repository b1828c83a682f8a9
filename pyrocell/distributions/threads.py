"""Loops in parts, on threads of torch.

The threads of torch's OpenMP wait for its next operation by spinning: others that ran meanwhile would share the cores.
So it is asked to run the parts of a loop, where it can be found; see ADR 0029.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["in_parts"]

_WORTH = 2**13
"""Numbers that a loop has to go through, for each thread, to repay the start of all."""

_PROCESS = os.getpid()
"""A process forked from this one has the library, without its threads."""

_LIBRARY = re.compile(r"/lib(gomp|iomp5|omp)\b[^/]*\.so[^/]*$")
_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Region = Callable[[Any, None, int, int], None]


def in_parts(work: Callable[[int, int], None], n: int, *, n_numbers: int) -> None:
    """Call ``work(start, stop)`` for ranges that make up 0 to n: one for each thread of torch, all at once.

    Parameters
    ----------
    work : callable
        It lets go of Python's lock for most of its time, and writes to no place that others write to.
    n : int
        How many items there are.
    n_numbers : int
        How many numbers the loop goes through in all; few are not worth the start.

    Raises
    ------
    BaseException
        The first one that ``work`` raised, after all parts have come to an end.
    """
    n_parts = min(torch.get_num_threads(), n)
    is_worth_it = n_parts > 1 and n_numbers >= _WORTH * torch.get_num_threads()
    region = _region() if is_worth_it and os.getpid() == _PROCESS else None
    if region is None:
        work(0, n)
        return
    bounds = [n * part // n_parts for part in range(n_parts + 1)]
    tickets, failures = itertools.count(), []

    def take_parts(_: Any) -> None:
        try:
            while (part := next(tickets)) < n_parts:
                work(bounds[part], bounds[part + 1])
        except BaseException as failure:  # what is raised here would be printed and forgotten
            failures.append(failure)

    region(_Body(take_parts), None, torch.get_num_threads(), 0)
    if failures:
        raise failures[0]


@cache
def _region() -> _Region | None:
    """Find the function by which torch's OpenMP runs another on all its threads; None where it cannot be found."""
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        region: Any = ctypes.CDLL(_only(_loaded_libraries())).GOMP_parallel  # Intel's and LLVM's have it too
    except (OSError, ValueError, AttributeError):
        return None
    region.argtypes, region.restype = [_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return region if _works(region) else None


def _loaded_libraries() -> set[str]:
    with Path("/proc/self/maps").open() as lines:  # Linux; elsewhere there is no such file
        return {line.split(maxsplit=5)[-1].strip() for line in lines if _LIBRARY.search(line.strip())}


def _only(libraries: set[str]) -> str:
    """Choose torch's own of several OpenMPs: the only one, or the only one in its folders."""
    site = Path(torch.__file__).parents[1]
    own = {path for path in libraries if path.startswith((f"{site}/torch/", f"{site}/torch.libs/"))}
    (library,) = libraries if len(libraries) == 1 else own
    return library


def _works(region: _Region) -> bool:
    seen: list[int] = []
    region(_Body(lambda _: seen.append(1)), None, 2, 0)
    return 1 <= len(seen) <= 2
