"""Log-probabilities of counts as loops in machine code: every entry is read once, and nothing is stored in between.

Zeros are scored by float32 loops that the compiler turns into vector instructions, non-zeros one by one in float64
(`positive_counts.py`). The functions release Python's lock. They are compiled on first use and kept in the user's cache
folder (`elementary.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyrocell.distributions.elementary import (
    compiled,
    ends_of,
    exp,
    exp_and_rest,
    exp_of_negative,
    log1p,
    log_with,
    minus_expm1,
)
from pyrocell.distributions.positive_counts import (
    LOG_RATIO_LIMIT,
    deflate,
    nonzeros_of_nb,
    nonzeros_of_poisson,
    put,
    take,
)

__all__ = [
    "BLOCK",
    "LANES",
    "LOG_RATIO_LIMIT",
    "LOG_THETA_RANGE",
    "add_up",
    "at",
    "dispersions",
    "end_of_block",
    "inflate",
    "negative_binomial",
    "poisson",
    "total_of",
    "zeros_of_nb",
    "zeros_of_poisson",
]

Array = np.ndarray
Number = Any  # float32 or float64: the compiler tells them apart, and knows nothing of annotations
Arrays = tuple[np.ndarray, ...]
Index = tuple[np.ndarray, np.ndarray, np.ndarray]
Block = tuple[np.ndarray, np.ndarray, int]
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]

F, D = np.float32, np.float64

LOG_THETA_RANGE = (-16.0, 20.0)
"""log theta is held in this range (gradients pass straight through): theta in [1.1e-7, 4.8e8]."""

BLOCK = 1024
"""Columns that are scored at once: what is read and written for them lies in the processor's nearest cache."""

LANES = BLOCK // 8
"""Sums that are added to side by side."""

_LOWEST_PHI, _HIGHEST_PHI = (F(end) for end in LOG_THETA_RANGE)
_ZERO, _HALF, _ONE = F(0.0), F(0.5), F(1.0)
_LOWEST_LOGIT = F(-70.0)
_NOTHING = F(87.0)  # its negative has no exponential in float32


# ------------------------------------------------------------------------------------------------ zeros of one cell


@compiled
def dispersions(log_theta: Array, phi: Array, theta: Array, inverse: Array) -> None:
    """Write log theta, held in its range, theta and 1 / theta."""
    for g in range(log_theta.shape[0]):
        value = log_theta[g]
        value = _LOWEST_PHI if value < _LOWEST_PHI else value
        phi[g] = _HIGHEST_PHI if value > _HIGHEST_PHI else value
        theta[g] = exp(phi[g])
        inverse[g] = _ONE / theta[g]


@compiled
def zeros_of_nb(log_mean: Array, phi: Array, theta: Array, rows: Rows) -> None:
    """Write log P(0) = -theta log(1 + mean / theta), which tends to minus the mean itself, down to mean 0."""
    value, mean_slope, theta_slope = rows
    for g in range(log_mean.shape[0]):
        log_ratio = log_mean[g] - phi[g]
        distance = abs(log_ratio)
        tail = _ZERO if distance > _NOTHING else exp_of_negative(-distance)
        inverse = _ONE / (_ONE + tail)
        up = (log_ratio if log_ratio > _ZERO else _ZERO) + log1p(tail, inverse)
        share = inverse if log_ratio > _ZERO else tail * inverse
        value[g] = -theta[g] * up
        mean_slope[g] = -theta[g] * share
        theta_slope[g] = theta[g] * (share - up)


@compiled
def zeros_of_poisson(log_rate: Array, value: Array, slope: Array) -> None:
    """Write log P(0), which is minus the rate, as its slope is."""
    for g in range(log_rate.shape[0]):
        rate = exp(log_rate[g])
        value[g] = -rate
        slope[g] = -rate


@compiled
def _inflate_zeros(logits: Array, value: Array, owned: Array, logits_slope: Array) -> None:
    """Replace log P(0) of the base by log[zi + (1 - zi) P(0)], and say what share of such zeros is the base's own.

    While the result is above log(1/2), it is log1p(-(1 - zi)(1 - P(0))), whose digits stay as it tends to 0. Below,
    it is the larger exponent and a rest, max(log P(0), logits) - max(logits, 0) + log[(1 + b) / (1 + a)].
    """
    for g in range(logits.shape[0]):
        base, logit = value[g], logits[g]
        a = exp_of_negative(-abs(logit))
        to_a = _ONE / (_ONE + a)
        not_zi = a * to_a if logit > _ZERO else to_a
        b = exp_of_negative(-abs(base - logit))
        to_b = _ONE / (_ONE + b)
        own = b * to_b if base < logit else to_b
        other = not_zi * minus_expm1(base)  # 1 - P(0)
        far = other > _HALF
        rest = (b - a) * to_a if far else -other
        larger = logit if logit > base else base
        taken = larger - (logit if logit > _ZERO else _ZERO)
        value[g] = (taken if far else _ZERO) + log1p(rest, _ONE / (_ONE + rest))
        owned[g] = own
        logits_slope[g] = not_zi - own


@compiled
def _inflate_common_zeros(logits: Array, value: Array, owned: Array, logits_slope: Array) -> None:
    """Do the same for logits of -70 and more, with fewer exponentials.

    Nothing that matters is then below the range of float32 in the sum of zi / (1 - zi) and P(0), or of one and
    P(0) (1 - zi) / zi where zi > 1/2.
    """
    for g in range(logits.shape[0]):
        logit = logits[g]
        base, other = exp_and_rest(value[g])
        a = exp_of_negative(-abs(logit))
        is_likely = logit > _ZERO
        whole = _ONE + a
        to_a, own = _ONE / whole, (a if is_likely else _ONE) * base
        every = (_ONE if is_likely else a) + own
        from_every = _ONE / every
        not_zi = (a if is_likely else _ONE) * to_a
        missing = not_zi * other  # 1 - P(0)
        far = missing > _HALF
        y = _ONE - missing
        lost = ((_ONE - y) - missing) * whole * from_every
        value[g] = log_with(every * to_a if far else y, _ZERO if far else lost)
        owned[g] = own * from_every
        logits_slope[g] = not_zi - own * from_every


@compiled
def _scale(slope: Array, owned: Array) -> None:
    for g in range(slope.shape[0]):
        slope[g] *= owned[g]


@compiled
def inflate(index: Block, logits: Array, in_logits: Array, rows: Arrays, seen: Array, owned: Array) -> None:
    """Let what the base says of a block of columns be that of its inflated distribution.

    ``rows`` are the log-probability and its slopes in the parameters of the base; ``seen`` and ``owned`` are for use
    here.
    """
    n = index[0].shape[0]
    for k in range(len(rows)):
        take(index, rows[k], seen[k])
    take(index, logits, seen[3])
    deflate(seen[3, :n], seen[0, :n], seen[4, :n])
    if ends_of(logits)[0] >= _LOWEST_LOGIT:
        _inflate_common_zeros(logits, rows[0], owned, in_logits)
    else:
        _inflate_zeros(logits, rows[0], owned, in_logits)
    for k in range(1, len(rows)):
        _scale(rows[k], owned)
    for k in range(len(rows)):
        put(index, seen[k], rows[k])
    put(index, seen[4], in_logits)


# ------------------------------------------------------------------------------------------------ all cells


@compiled
def add_up(row: Array, lanes: Array) -> None:
    """Add the numbers of a block of columns to sums side by side, in float64.

    The compiler keeps the order of additions, so that one sum alone would be slow. Eight numbers at a time are added in
    float32, in pairs.
    """
    n = row.shape[0] // 8
    r0, r1, r2, r3 = row[:n], row[n : 2 * n], row[2 * n : 3 * n], row[3 * n : 4 * n]
    r4, r5, r6, r7 = row[4 * n : 5 * n], row[5 * n : 6 * n], row[6 * n : 7 * n], row[7 * n : 8 * n]
    for g in range(n):
        half = (r0[g] + r1[g]) + (r2[g] + r3[g])
        lanes[g] += half + ((r4[g] + r5[g]) + (r6[g] + r7[g]))
    for g in range(8 * n, row.shape[0]):
        lanes[g - 8 * n] += row[g]


@compiled
def total_of(lanes: Array) -> Number:
    """Add up sums that lie side by side, and set them to zero."""
    total = 0.0
    for start in range(0, LANES, 8):
        a = (lanes[start] + lanes[start + 1]) + (lanes[start + 2] + lanes[start + 3])
        total += a + ((lanes[start + 4] + lanes[start + 5]) + (lanes[start + 6] + lanes[start + 7]))
    lanes[:] = 0.0
    return total


@compiled
def at(array: Array, sample: int, row: int) -> Array:
    """Read a row of an array (n_samples or 1, n_rows or 1, n_columns)."""
    return array[sample if array.shape[0] > 1 else 0, row if array.shape[1] > 1 else 0]


@compiled
def end_of_block(cols: Array, start: int, stop: int, column: int) -> int:
    """Say where among the entries ``start`` to ``stop`` of a row those from a column on begin."""
    while start < stop and cols[start] < column:
        start += 1
    return start


@compiled
def negative_binomial(index: Index, parameters: Arrays, value: Array, sums: Array, slopes: Arrays) -> None:
    """Score counts by NB(x | mean, theta), or with a third parameter by ZINB.

    Parameters
    ----------
    index
        Where each row begins among the non-zeros (one more than rows), their columns, in order within a row, and the
        counts there in float64.
    parameters
        Log mean, log theta and, for zero inflation, its logits: float32, (n_samples or 1, n_rows or 1, n_columns).
    value
        Log-probabilities, written, (n_samples, n_rows, n_columns); where sums are wanted, one row is written over.
    sums
        Sums over columns, written, float32, (n_samples, n_rows), or without elements.
    slopes
        Derivatives of the log-probability in each parameter, written, shaped as ``value`` or one row.
    """
    starts, cols, counts = index
    n_samples, n_rows, n_columns = parameters[0].shape
    phi, theta, inverse = np.empty(n_columns, F), np.empty(n_columns, F), np.empty(n_columns, F)
    seen, places, owned = np.empty((5, BLOCK), F), np.empty((3, BLOCK + 1), np.int64), np.empty(BLOCK, F)
    shared, lanes = parameters[1].shape[1] == 1, np.zeros(LANES)
    for sample in range(n_samples):
        for row in range(n_rows):
            if row == 0 or not shared:
                dispersions(at(parameters[1], sample, row), phi, theta, inverse)
            log_mean, out = at(parameters[0], sample, row), at(value, sample, row)
            in_mean, in_theta = at(slopes[0], sample, row), at(slopes[1], sample, row)
            logits, in_logits = at(parameters[-1], sample, row), at(slopes[-1], sample, row)
            begin = starts[row]
            for a in range(0, n_columns, BLOCK):
                b = min(a + BLOCK, n_columns)
                end = end_of_block(cols, begin, starts[row + 1], b)
                there = cols[begin:end], counts[begin:end], a
                rows = out[a:b], in_mean[a:b], in_theta[a:b]
                logs = log_mean[a:b], phi[a:b]
                zeros_of_nb(logs[0], logs[1], theta[a:b], rows)
                nonzeros_of_nb(there, logs, 0.0, inverse[a:b], rows, places)
                if len(parameters) == 3:
                    inflate(there, logits[a:b], in_logits[a:b], rows, seen, owned[: b - a])
                if sums.size:
                    add_up(rows[0], lanes)
                begin = end
            if sums.size:
                sums[sample, row] = total_of(lanes)


@compiled
def poisson(index: Index, parameters: Arrays, value: Array, sums: Array, slopes: Arrays) -> None:
    """Score counts by Poisson(x | rate), or with a second parameter by ZIP.

    The parameters are log rate and, for zero inflation, its logits; all else as for :func:`negative_binomial`.
    """
    starts, cols, counts = index
    n_samples, n_rows, n_columns = parameters[0].shape
    seen, owned, lanes = np.empty((5, BLOCK), F), np.empty(BLOCK, F), np.zeros(LANES)
    for sample in range(n_samples):
        for row in range(n_rows):
            log_rate, out = at(parameters[0], sample, row), at(value, sample, row)
            in_rate = at(slopes[0], sample, row)
            logits, in_logits = at(parameters[-1], sample, row), at(slopes[-1], sample, row)
            begin = starts[row]
            for a in range(0, n_columns, BLOCK):
                b = min(a + BLOCK, n_columns)
                end = end_of_block(cols, begin, starts[row + 1], b)
                there, rows = (cols[begin:end], counts[begin:end], a), (out[a:b], in_rate[a:b])
                zeros_of_poisson(log_rate[a:b], rows[0], rows[1])
                nonzeros_of_poisson(there, log_rate[a:b], 0.0, rows[0], rows[1])
                if len(parameters) == 2:
                    inflate(there, logits[a:b], in_logits[a:b], rows, seen, owned[: b - a])
                if sums.size:
                    add_up(rows[0], lanes)
                begin = end
            if sums.size:
                sums[sample, row] = total_of(lanes)
