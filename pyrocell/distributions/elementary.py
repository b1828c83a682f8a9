"""Exponentials and logarithms in float32 for compiled loops, which turn them into vector instructions."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numba
import numpy as np

__all__ = [
    "compiled",
    "ends_of",
    "exp",
    "exp_and_rest",
    "exp_of_negative",
    "log",
    "log1p",
    "log_with",
    "minus_expm1",
]

Number = Any  # float32 or float64: the compiler tells them apart, and knows nothing of annotations
F, I = np.float32, np.int32  # noqa: E741


_SOURCES = ("elementary", "positive_counts", "compiled", "profiles", "rows")
"""The files with compiled functions that others call."""


@cache
def _cache_folder() -> Path | None:
    """Where compiled code is kept, by the state of the sources; None where nothing can be written.

    That is in the user's cache folder. Beside the package, Numba's own choice, it would outlive the package: pip leaves
    files that it did not install, and the folder that they keep alive hides a later installation from source. Numba
    itself asks only the file of a function whether it has changed.
    """
    config: Any = numba.config  # its entries are made when it is imported
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyrocell"
    try:
        sources = (Path(__file__).with_name(f"{name}.py").read_bytes() for name in _SOURCES)
        digest = hashlib.sha256(b"".join(sources)).hexdigest()[:16]
        folder = Path(config.CACHE_DIR or user) / f"compiled-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError:
        return None
    return folder


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Let Numba keep what it compiles in a folder; other packages keep their own."""
    config: Any = numba.config
    chosen, config.CACHE_DIR = config.CACHE_DIR, str(folder)
    try:
        yield
    finally:
        config.CACHE_DIR = chosen


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function on its first call, to run without Python's lock.

    NaN and infinity keep their meaning, and sums their order: nothing is reassociated. What was compiled is kept for
    later processes, where there is a place for it.
    """
    make = partial(numba.njit, nogil=True, error_model="numpy", fastmath={"contract", "nsz", "arcp"})
    folder = _cache_folder()
    if folder is None:
        return make()(function)
    try:
        with _kept_in(folder):
            made = make(cache=True)(function)
    except RuntimeError:  # Numba finds no place for it
        return make()(function)
    _forgive_a_full_disk(made)
    return made


def _forgive_a_full_disk(made: Any) -> None:
    """Let a function that was compiled be used, also where it cannot be kept."""
    cache_of_function = getattr(made, "_cache", None)
    if cache_of_function is None:  # NUMBA_DISABLE_JIT leaves plain Python
        return
    save = cache_of_function.save_overload

    def save_if_possible(*what: Any) -> None:
        with suppress(OSError):
            save(*what)

    cache_of_function.save_overload = save_if_possible


_UNDERFLOW, _OVERFLOW = F(-87.0), F(88.0)
_LOG2_E, _LN2_HIGH, _LN2_LOW = F(1.4426950408889634), F(0.693359375), F(-2.12194440e-4)
_ROUNDING, _ONE_BITS = (
    F(1.5 * 2**23),
    I(0x3F800000),
)  # added, the first leaves the nearest whole number in the last bits
# Taylor's coefficients of (exp(r) - 1 - r) / r^2: 1.2e-7 where |r| is at most log(2) / 2.
_6, _5, _4, _3, _2 = (F(1 / factorial) for factorial in (720, 120, 24, 6, 2))
_ALL_BUT_SIGN = I(0x7FFFFFFF)
_SQRT_HALF_BITS = I(0x3F3504F3)
_EXP = tuple(F(1.0 / math.factorial(n)) for n in (6, 5, 4, 3))
_EXP_FIRST = F(1.0 / math.factorial(7))
# Cephes' minimax polynomial of [log(1 + f) - f + f^2 / 2] / f^3 on sqrt(1/2) - 1 <= f <= sqrt(2) - 1 (Moshier 1989).
_LOG_FIRST = F(7.0376836292e-2)
_LOG = tuple(
    F(c)
    for c in (
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
)
_ZERO, _HALF, _ONE, _INFINITY = F(0.0), F(0.5), F(1.0), F(np.inf)


@compiled
def _power_of_two(n: int) -> Number:
    return I(I(n + I(127)) << I(23)).view(F)


@compiled
def _whole(x: Number) -> Number:
    """Round to the nearest whole number: the conversion cuts, hence the detour over positive numbers."""
    return I(x + F(128.5)) - I(128)


@compiled
def _exp_minus_one_of_rest(r: Number) -> Number:
    """Compute exp(r) - 1 for |r| <= log(2) / 2."""
    p = _EXP_FIRST
    for c in _EXP:
        p = p * r + c
    p = p * r + _HALF
    return p * (r * r) + r


@compiled
def exp(x: Number) -> Number:
    """Compute exp(x) in float32 to 1e-7, 0 below -87, and infinity above 88."""
    low, high = x < _UNDERFLOW, x > _OVERFLOW
    x = _ZERO if low or high else x
    n = I(_whole(x * _LOG2_E))
    r = (x - F(n) * _LN2_HIGH) - F(n) * _LN2_LOW
    inside = (_exp_minus_one_of_rest(r) + _ONE) * _power_of_two(n)
    return _ZERO if low else (_INFINITY if high else inside)


@compiled
def exp_of_negative(x: Number) -> Number:
    """Compute exp(x) in float32 for x <= 0, in half the instructions of one for all x."""
    x = _UNDERFLOW if x < _UNDERFLOW else x
    shifted = F(x * _LOG2_E + _ROUNDING)
    k = shifted - _ROUNDING
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    p = _6 * r + _5
    p = p * r + _4
    p = p * r + _3
    p = p * r + _2
    power = I(I(shifted.view(I) << I(23)) + _ONE_BITS).view(F)
    return (p * (r * r) + (r + _ONE)) * power


@compiled
def exp_and_rest(x: Number) -> tuple[Number, Number]:
    """Compute exp(x) and 1 - exp(x) in float32 for x <= 0, the latter with all digits where x tends to 0."""
    low = x < _UNDERFLOW
    x = _UNDERFLOW if low else x
    n = I(_whole(x * _LOG2_E))
    r = (x - F(n) * _LN2_HIGH) - F(n) * _LN2_LOW
    scale = _power_of_two(n)
    part = _exp_minus_one_of_rest(r) * scale
    return _ZERO if low else scale + part, (_ONE - scale) - part


@compiled
def minus_expm1(x: Number) -> Number:
    """Compute 1 - exp(x) in float32 for x <= 0, with all digits where x tends to 0."""
    return exp_and_rest(x)[1]


@compiled
def _in_order(x: Number) -> Number:
    """Make a whole number of x, such that they are in the order of the numbers; NaN comes first or last."""
    bits = F(x).view(I)
    return I(bits ^ I(I(bits >> I(31)) & _ALL_BUT_SIGN))


@compiled
def ends_of(row: Any) -> tuple[Number, Number]:
    """Return the smallest and the largest of some float32 numbers, at least one; NaN counts as such.

    In whole numbers: of others, the compiler keeps the order of comparisons, which is slow.
    """
    smallest = largest = _in_order(row[0])
    for g in range(row.shape[0]):
        value = _in_order(row[g])
        smallest = value if value < smallest else smallest
        largest = value if value > largest else largest
    return _number(smallest), _number(largest)


@compiled
def _number(in_order: Number) -> Number:
    return I(in_order ^ I(I(in_order >> I(31)) & _ALL_BUT_SIGN)).view(F)


@compiled
def log_with(y: Number, lost: Number) -> Number:
    """Compute log(y) + lost in float32 for a normal number y > 0, where ``lost`` is next to nothing."""
    bits = F(y).view(I)
    k = I(I(bits - _SQRT_HALF_BITS) >> I(23))
    f = I(bits - I(k << I(23))).view(F) - _ONE
    p = _LOG_FIRST
    for c in _LOG:
        p = p * f + c
    square = f * f
    p = f * square * p + F(k) * _LN2_LOW + lost
    return f + (p - _HALF * square) + F(k) * _LN2_HIGH


@compiled
def log(y: Number) -> Number:
    """Compute log(y) in float32 for a normal number y > 0."""
    return log_with(y, _ZERO)


@compiled
def log1p(t: Number, inverse: Number) -> Number:
    """Compute log(1 + t) in float32 for t >= -1/2, with all digits where t tends to 0; ``inverse`` is 1 / (1 + t)."""
    y = F(_ONE + t)
    return log_with(y, (t - (y - _ONE)) * inverse)  # with what the sum rounded away
