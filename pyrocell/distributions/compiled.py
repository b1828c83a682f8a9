"""Log-probabilities of counts as loops in machine code: every entry is read once, and nothing is stored in between.

Zeros are scored by float32 loops that the compiler turns into vector instructions, non-zeros one by one in float64. The
functions release Python's lock. They are compiled on first use and kept in the user's cache folder (`elementary.py`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyrocell.distributions.elementary import compiled, exp, log1p, minus_expm1

__all__ = [
    "LOG_RATIO_LIMIT",
    "LOG_THETA_RANGE",
    "negative_binomial",
    "ordered_by_column",
    "poisson",
    "positions_of_rows",
    "row_by_row",
]

Array = np.ndarray
Number = Any  # float32 or float64: the compiler tells them apart, and knows nothing of annotations
Pair = tuple[np.ndarray, np.ndarray]
Arrays = tuple[np.ndarray, ...]
Index = tuple[np.ndarray, np.ndarray, np.ndarray]

F, D = np.float32, np.float64

LOG_RATIO_LIMIT = 40.0
"""At non-zero counts log(mean / theta) is held within +-40 (gradients pass straight through)."""

LOG_THETA_RANGE = (-16.0, 20.0)
"""log theta is held in this range (gradients pass straight through): theta in [1.1e-7, 4.8e8]."""

_LOWEST_PHI, _HIGHEST_PHI = (F(end) for end in LOG_THETA_RANGE)
_ZERO, _HALF, _ONE = F(0.0), F(0.5), F(1.0)


# ------------------------------------------------------------------------------------------------ zeros of one cell


@compiled
def _dispersions(log_theta: Array, phi: Array, theta: Array) -> None:
    for g in range(log_theta.shape[0]):
        value = log_theta[g]
        value = _LOWEST_PHI if value < _LOWEST_PHI else value
        phi[g] = _HIGHEST_PHI if value > _HIGHEST_PHI else value
        theta[g] = exp(phi[g])


@compiled
def _zeros_of_nb(
    log_mean: Array, phi: Array, theta: Array, value: Array, mean_slope: Array, theta_slope: Array
) -> None:
    """Write log P(0) = -theta log(1 + mean / theta), which tends to minus the mean itself, down to mean 0."""
    for g in range(log_mean.shape[0]):
        log_ratio = log_mean[g] - phi[g]
        tail = exp(-abs(log_ratio))
        inverse = _ONE / (_ONE + tail)
        up = (log_ratio if log_ratio > _ZERO else _ZERO) + log1p(tail, inverse)
        share = inverse if log_ratio > _ZERO else tail * inverse
        value[g] = -theta[g] * up
        mean_slope[g] = -theta[g] * share
        theta_slope[g] = theta[g] * (share - up)


@compiled
def _zeros_of_poisson(log_rate: Array, value: Array, slope: Array) -> None:
    for g in range(log_rate.shape[0]):
        rate = exp(log_rate[g])
        value[g] = -rate
        slope[g] = -rate


@compiled
def _inflate(logits: Array, value: Array, owned: Array, logits_slope: Array) -> None:
    """Replace log P(0) of the base by log[zi + (1 - zi) P(0)], and say what share of such zeros is the base's own.

    While the result is above log(1/2), it is log1p(-(1 - zi)(1 - P(0))), whose digits stay as it tends to 0. Below,
    it is the larger exponent and a rest, max(log P(0), logits) - max(logits, 0) + log[(1 + b) / (1 + a)].
    """
    for g in range(logits.shape[0]):
        base, logit = value[g], logits[g]
        a = exp(-abs(logit))
        to_a = _ONE / (_ONE + a)
        not_zi = a * to_a if logit > _ZERO else to_a
        b = exp(-abs(base - logit))
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
def _scale(slope: Array, owned: Array) -> None:
    for g in range(slope.shape[0]):
        slope[g] *= owned[g]


# ------------------------------------------------------------------------------------------------ non-zeros of one cell


@compiled
def _rising(x: Number, theta: Number) -> tuple[Number, Number]:
    """Compute log[theta (theta + 1) ... (theta + x - 1)] and its slope in theta, for any x > 0, in float64.

    The first eight factors are taken as they are; from z = theta + 8 on, Stirling's series is differenced by hand.
    """
    slope, first, second = 0.0, 1.0, 1.0
    for i in range(4):
        low, next_low = theta + i, theta + i + 4
        first *= low / (low + x)
        second *= next_low / (next_low + x)
        slope += x / (low * (low + x)) + x / (next_low * (next_low + x))
    low, high = theta + 8.0, theta + 8.0 + x
    growth = math.log1p(x / low)
    a, b = 1.0 / high, 1.0 / low
    a2, b2 = a * a, b * b
    lgamma_tail = a * (1 / 12 + a2 * (-1 / 360 + a2 * (1 / 1260 - a2 / 1680)))
    lgamma_tail -= b * (1 / 12 + b2 * (-1 / 360 + b2 * (1 / 1260 - b2 / 1680)))
    digamma_tail = a2 * (1 / 12 + a2 * (-1 / 120 + a2 * (1 / 252 - a2 / 240)))
    digamma_tail -= b2 * (1 / 12 + b2 * (-1 / 120 + b2 * (1 / 252 - b2 / 240)))
    value = (
        math.log(first) + math.log(second) + (low - 0.5) * growth + x * (math.log(high) - 1.0) + lgamma_tail
    )
    return value, slope + growth + 0.5 * x / (low * high) - digamma_tail


@compiled
def _few(x: Number, theta: Number) -> tuple[Number, Number]:
    """Compute log[(1 + 1/theta) ... (1 + (x - 1)/theta) / x!] and theta [psi(x + theta) - psi(theta)], x = 2, 3, 4."""
    product, slope, i = 1.0, 1.0, 1.0
    while i < x:
        product *= (1.0 + i / theta) / (i + 1.0)
        slope += 1.0 / (1.0 + i / theta)
        i += 1.0
    return math.log(product), slope


@compiled
def _ratio(log_ratio: Number) -> tuple[Number, Number, Number]:
    """Return the log ratio in its bounds, log(1 + exp(-|.|)) of it, and its sigmoid."""
    bound = min(max(log_ratio, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT)
    bound = bound if log_ratio == log_ratio else log_ratio
    tail = math.log1p(math.exp(-abs(bound)))
    return bound, tail, 1.0 / (1.0 + math.exp(-bound))


@compiled
def _one_of_nb(
    x: Number, log_mean: Number, phi: Number, theta: Number, up: Number, share: Number
) -> tuple[Number, Number, Number]:
    """Score one count above zero; ``up`` is log(1 + mean / theta) and ``share`` is mean / (mean + theta)."""
    if x == 1.0 or x == 2.0 or x == 3.0 or x == 4.0:  # 97 % of the non-zeros of UMI data
        if abs(log_mean - phi) > LOG_RATIO_LIMIT:
            bound, tail, share = _ratio(log_mean - phi)
            log_mean, up = phi + bound, max(bound, 0.0) + tail
        # log P(x) = x log(mean) - (x + theta) up + finite sum: nothing cancels while x is small
        value, slope = _few(x, theta) if x > 1.0 else (0.0, 1.0)
        mean_slope = x - share * (x + theta)
        return value + x * log_mean - (x + theta) * up, mean_slope, slope - theta * up - mean_slope
    exact_theta = math.exp(phi)  # large summands cancel
    bound, tail, share = _ratio(log_mean - phi)
    up = max(bound, 0.0) + tail
    rising, slope = _rising(x, exact_theta)
    value = rising - math.lgamma(x + 1.0) - exact_theta * up - x * (tail - min(bound, 0.0))
    mean_slope = x - share * (x + exact_theta)
    return value, mean_slope, exact_theta * (slope - up) - mean_slope


@compiled
def _nonzeros_of_nb(
    cols: Array,
    counts: Array,
    log_mean: Array,
    dispersions: Pair,
    zeros: Pair,
    seen: Array,
) -> None:
    """Score the non-zeros of a cell from log P(0) and its slope in the log mean, as found at their places."""
    phi, theta = dispersions
    value, mean_slope = zeros
    for i in range(cols.shape[0]):
        g = cols[i]
        size = D(theta[g])
        up, share = -D(value[g]) / size, -D(mean_slope[g]) / size
        found = _one_of_nb(counts[i], D(log_mean[g]), D(phi[g]), size, up, share)
        seen[0, i], seen[1, i], seen[2, i] = found


@compiled
def _nonzeros_of_poisson(cols: Array, counts: Array, log_rate: Array, seen: Array) -> None:
    for i in range(cols.shape[0]):
        x, eta = counts[i], D(log_rate[cols[i]])
        rate = math.exp(eta)
        seen[0, i] = x * eta - rate - math.lgamma(x + 1.0)
        seen[1, i] = x - rate


@compiled
def _deflate(cols: Array, logits: Array, logits_slope: Array, seen: Array) -> None:
    """Take log(1 - zi) into the score of non-zeros, and write its slope in the logits."""
    for i in range(cols.shape[0]):
        logit = D(logits[cols[i]])
        tail = math.exp(-abs(logit))
        seen[0, i] -= max(logit, 0.0) + math.log1p(tail)
        logits_slope[cols[i]] = -(1.0 if logit > 0.0 else tail) / (1.0 + tail)


@compiled
def _put(cols: Array, seen: Array, row: Array) -> None:
    for i in range(cols.shape[0]):
        row[cols[i]] = seen[i]


@compiled
def _sum(row: Array) -> Number:
    """Sum in float64, in eight streams that the processor adds at once."""
    streams = np.zeros(8)
    n = row.shape[0] // 8 * 8
    for g in range(0, n, 8):
        for j in range(8):
            streams[j] += row[g + j]
    total = 0.0
    for j in range(8):
        total += streams[j]
    for g in range(n, row.shape[0]):
        total += row[g]
    return total


# ------------------------------------------------------------------------------------------------ all cells


@compiled
def _at(array: Array, sample: int, row: int) -> Array:
    """Read a row of an array (n_samples or 1, n_rows or 1, n_columns)."""
    return array[sample if array.shape[0] > 1 else 0, row if array.shape[1] > 1 else 0]


@compiled
def _longest(starts: Array) -> int:
    longest = 0
    for row in range(starts.shape[0] - 1):
        longest = max(longest, starts[row + 1] - starts[row])
    return longest


@compiled
def negative_binomial(index: Index, parameters: Arrays, value: Array, sums: Array, slopes: Arrays) -> None:
    """Score counts by NB(x | mean, theta), or with a third parameter by ZINB.

    Parameters
    ----------
    index
        Where each row begins among the non-zeros (one more than rows), their columns, and the counts there in float64.
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
    phi, theta = np.empty(n_columns, dtype=F), np.empty(n_columns, dtype=F)
    seen, owned = np.empty((3, _longest(starts))), np.empty(n_columns, dtype=F)
    shared, inflated = parameters[1].shape[1] == 1, len(parameters) == 3
    for sample in range(n_samples):
        for row in range(n_rows):
            if row == 0 or not shared:
                _dispersions(_at(parameters[1], sample, row), phi, theta)
            log_mean, out = _at(parameters[0], sample, row), _at(value, sample, row)
            in_mean, in_theta = _at(slopes[0], sample, row), _at(slopes[1], sample, row)
            at, there = cols[starts[row] : starts[row + 1]], counts[starts[row] : starts[row + 1]]
            _zeros_of_nb(log_mean, phi, theta, out, in_mean, in_theta)
            _nonzeros_of_nb(at, there, log_mean, (phi, theta), (out, in_mean), seen)
            if inflated:
                logits, in_logits = _at(parameters[-1], sample, row), _at(slopes[-1], sample, row)
                _inflate(logits, out, owned, in_logits)
                _scale(in_mean, owned)
                _scale(in_theta, owned)
                _deflate(at, logits, in_logits, seen)
            _put(at, seen[0], out)
            _put(at, seen[1], in_mean)
            _put(at, seen[2], in_theta)
            if sums.size:
                sums[sample, row] = _sum(out)


@compiled
def poisson(index: Index, parameters: Arrays, value: Array, sums: Array, slopes: Arrays) -> None:
    """Score counts by Poisson(x | rate), or with a second parameter by ZIP.

    The parameters are log rate and, for zero inflation, its logits; all else as for :func:`negative_binomial`.
    """
    starts, cols, counts = index
    n_samples, n_rows, n_columns = parameters[0].shape
    seen, owned = np.empty((2, _longest(starts))), np.empty(n_columns, dtype=F)
    for sample in range(n_samples):
        for row in range(n_rows):
            log_rate, out = _at(parameters[0], sample, row), _at(value, sample, row)
            in_rate, at = _at(slopes[0], sample, row), cols[starts[row] : starts[row + 1]]
            _zeros_of_poisson(log_rate, out, in_rate)
            _nonzeros_of_poisson(at, counts[starts[row] : starts[row + 1]], log_rate, seen)
            if len(parameters) == 2:
                logits, in_logits = _at(parameters[-1], sample, row), _at(slopes[-1], sample, row)
                _inflate(logits, out, owned, in_logits)
                _scale(in_rate, owned)
                _deflate(at, logits, in_logits, seen)
            _put(at, seen[0], out)
            _put(at, seen[1], in_rate)
            if sums.size:
                sums[sample, row] = _sum(out)


# ------------------------------------------------------------------------------------------------ order


@compiled
def ordered_by_column(
    starts: Array, cols: Array, values: Array, n_columns: int
) -> tuple[Array, Array, Array]:
    """Order entries by column, and by row within one: where each column begins, and rows and values in that order."""
    ends = np.zeros(n_columns + 1, dtype=np.int64)
    for i in range(cols.shape[0]):
        ends[cols[i] + 1] += 1
    for column in range(n_columns):
        ends[column + 1] += ends[column]
    begins = ends[:-1].copy()
    rows, ordered = np.empty(cols.shape[0], dtype=np.int64), np.empty_like(values)
    for row in range(starts.shape[0] - 1):
        for i in range(starts[row], starts[row + 1]):
            place = ends[cols[i]]
            rows[place], ordered[place] = row, values[i]
            ends[cols[i]] = place + 1
    return begins, rows, ordered


@compiled
def row_by_row(rows: Array, cols: Array, n_rows: int, n_columns: int) -> tuple[Array, Array, bool]:
    """Place entries in the flattened array: their positions, where each row begins, and whether they were in order.

    In order means row by row, by column in each, without repeats, and inside of the array.
    """
    flat, bounds = np.empty(rows.shape[0], dtype=np.int64), np.empty(n_rows + 1, dtype=np.int64)
    last, begun = -1, 0
    for i in range(rows.shape[0]):
        row, column = rows[i], cols[i]
        flat[i] = row * n_columns + column
        if row < 0 or row >= n_rows or column < 0 or column >= n_columns or flat[i] <= last:
            return flat, bounds, False
        last = flat[i]
        while begun <= row:
            bounds[begun] = i
            begun += 1
    while begun <= n_rows:
        bounds[begun] = rows.shape[0]
        begun += 1
    return flat, bounds, True


@compiled
def positions_of_rows(starts: Array, ends: Array) -> tuple[Array, Array]:
    """Return the row of each entry and its position, ``starts[row]`` to ``ends[row] - 1``, one row after the other."""
    n = 0
    for row in range(starts.shape[0]):
        n += max(0, ends[row] - starts[row])
    rows, positions = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    n = 0
    for row in range(starts.shape[0]):
        for position in range(starts[row], ends[row]):
            rows[n], positions[n] = row, position
            n += 1
    return rows, positions
