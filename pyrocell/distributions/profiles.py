"""Log-probabilities of counts whose mean is a share of a cell's size, as loops that take the softmax along.

The exponential of the softmax is that of the mean, so that a zero costs one exponential, and slopes in the log mean
become slopes in the logits while the cell's row is in the cache. See `compiled.py` for the loops over other means.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyrocell.distributions.compiled import (
    BLOCK,
    LANES,
    add_up,
    at,
    dispersions,
    end_of_block,
    inflate,
    total_of,
    zeros_of_nb,
    zeros_of_poisson,
)
from pyrocell.distributions.elementary import compiled, ends_of, exp_of_negative, log1p
from pyrocell.distributions.positive_counts import nonzeros_of_nb, nonzeros_of_poisson

__all__ = ["exponentials", "negative_binomial_of_profile", "poisson_of_profile"]

Array = np.ndarray
Number = Any  # float32 or float64: the compiler tells them apart, and knows nothing of annotations
Arrays = tuple[np.ndarray, ...]
Index = tuple[np.ndarray, np.ndarray, np.ndarray]
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]

F, D = np.float32, np.float64
_ZERO, _ONE = F(0.0), F(1.0)
_NOTHING = F(-87.0)  # has no exponential in float32
_MODERATE = 60.0
"""Within e^-60 to e^60 means have, over any theta in its range, a ratio and a logarithm with all digits in float32."""


# ------------------------------------------------------------------------------------------------ softmax of one cell


@compiled
def exponentials(logits: Array, powers: Array, lanes: Array) -> tuple[Number, Number, Number]:
    """Write exp(logit - largest), and return the smallest and largest logit and the sum; ``lanes`` are for use here."""
    smallest, largest = ends_of(logits)
    for a in range(0, logits.shape[0], BLOCK):
        b = min(a + BLOCK, logits.shape[0])
        _exponentials(logits[a:b], largest, powers[a:b])
        add_up(powers[a:b], lanes)
    return smallest, largest, total_of(lanes)


@compiled
def _exponentials(logits: Array, largest: Number, powers: Array) -> None:
    for g in range(logits.shape[0]):
        powers[g] = exp_of_negative(logits[g] - largest)


@compiled
def _drop_the_smallest(logits: Array, largest: Number, powers: Array) -> None:
    for g in range(logits.shape[0]):
        powers[g] = _ZERO if logits[g] - largest < _NOTHING else powers[g]


@compiled
def _softmax(logits: Array, log_size: Number, powers: Array, lanes: Array) -> tuple[Number, Number, Number]:
    """Write exp(logit - largest); return their sum, what makes a log mean of a logit, and if all means are moderate."""
    smallest, largest, total = exponentials(logits, powers, lanes)
    shift = D(log_size) - D(largest) - math.log(total)
    log_scale = D(log_size) - math.log(total)
    is_moderate = (
        D(smallest) + shift >= -_MODERATE and log_scale <= _MODERATE and smallest - largest > _NOTHING
    )
    if not is_moderate:
        _drop_the_smallest(logits, largest, powers)
    return total, shift, is_moderate


@compiled
def _log_means(logits: Array, shift: Number, log_mean: Array) -> None:
    for g in range(logits.shape[0]):
        log_mean[g] = F(D(logits[g]) + shift)


@compiled
def _pass_on(slope: Array, powers: Array, share: Number) -> None:
    """Make slopes in the logits of slopes in the log mean: what raises one mean lowers the others."""
    for g in range(slope.shape[0]):
        slope[g] -= powers[g] * share


# ------------------------------------------------------------------------------------------------ zeros of one cell


@compiled
def _zeros_of_nb(powers: Array, scale: Number, theta: Array, inverse_theta: Array, rows: Rows) -> None:
    """Write log P(0) = -theta log(1 + mean / theta) and its slopes in the log mean and log theta."""
    value, mean_slope, theta_slope = rows
    for g in range(powers.shape[0]):
        mean = powers[g] * scale
        ratio = mean * inverse_theta[g]
        inverse = _ONE / (_ONE + ratio)
        up, share = theta[g] * log1p(ratio, inverse), mean * inverse
        value[g] = -up
        mean_slope[g] = -share
        theta_slope[g] = share - up


@compiled
def _zeros_of_poisson(powers: Array, scale: Number, value: Array, slope: Array) -> None:
    for g in range(powers.shape[0]):
        rate = powers[g] * scale
        value[g] = -rate
        slope[g] = -rate


# ------------------------------------------------------------------------------------------------ all cells


@compiled
def negative_binomial_of_profile(index: Index, parameters: Arrays, sums: Array, slopes: Arrays) -> None:
    """Score counts by NB(x | size softmax(logits), theta), or with a fourth parameter by ZINB.

    Parameters
    ----------
    index
        Where each row begins among the non-zeros (one more than rows), their columns, in order within a row, and the
        counts there in float64.
    parameters
        Logits, log size, log theta and, for zero inflation, its logits: float32, (n_samples or 1, n_rows or 1,
        n_columns); of log size the last dimension is 1. Logits have all samples and rows, and one column at least.
    sums
        Log-probabilities summed over columns, written, float32, (n_samples, n_rows).
    slopes
        Derivatives of the sum in each parameter, written, shaped as the logits or one row; of log size (n_samples,
        n_rows, 1).
    """
    starts, cols, counts = index
    n_samples, n_rows, n_columns = parameters[0].shape
    phi, theta, inverse = np.empty(n_columns, F), np.empty(n_columns, F), np.empty(n_columns, F)
    powers, value, log_mean = np.empty(n_columns, F), np.empty(BLOCK, F), np.empty(BLOCK, F)
    seen, places, owned = np.empty((5, BLOCK), F), np.empty((3, BLOCK + 1), np.int64), np.empty(BLOCK, F)
    in_value, in_slope = np.zeros(LANES), np.zeros(LANES)
    shared = parameters[2].shape[1] == 1
    for sample in range(n_samples):
        for row in range(n_rows):
            if row == 0 or not shared:
                dispersions(at(parameters[2], sample, row), phi, theta, inverse)
            logits, log_size = at(parameters[0], sample, row), at(parameters[1], sample, row)[0]
            in_mean, in_theta = at(slopes[0], sample, row), at(slopes[2], sample, row)
            zi_logits, in_zi = at(parameters[-1], sample, row), at(slopes[-1], sample, row)
            total, shift, is_moderate = _softmax(logits, log_size, powers, in_value)
            begin = starts[row]
            for a in range(0, n_columns, BLOCK):
                b = min(a + BLOCK, n_columns)
                end = end_of_block(cols, begin, starts[row + 1], b)
                there, rows = (
                    (cols[begin:end], counts[begin:end], a),
                    (value[: b - a], in_mean[a:b], in_theta[a:b]),
                )
                if is_moderate:
                    scale = F(math.exp(D(log_size)) / total)
                    _zeros_of_nb(powers[a:b], scale, theta[a:b], inverse[a:b], rows)
                else:
                    _log_means(logits[a:b], shift, log_mean)
                    zeros_of_nb(log_mean[: b - a], phi[a:b], theta[a:b], rows)
                nonzeros_of_nb(there, (logits[a:b], phi[a:b]), shift, inverse[a:b], rows, places)
                if len(parameters) == 4:
                    inflate(there, zi_logits[a:b], in_zi[a:b], rows, seen, owned[: b - a])
                add_up(rows[0], in_value)
                add_up(rows[1], in_slope)
                begin = end
            sums[sample, row] = total_of(in_value)
            slope = total_of(in_slope)
            slopes[1][sample, row, 0] = slope
            _pass_on(in_mean, powers, F(slope / total))


@compiled
def poisson_of_profile(index: Index, parameters: Arrays, sums: Array, slopes: Arrays) -> None:
    """Score counts by Poisson(x | size softmax(logits)), or with a third parameter by ZIP.

    The parameters are logits, log size and, for zero inflation, its logits; all else as for
    :func:`negative_binomial_of_profile`.
    """
    starts, cols, counts = index
    n_samples, n_rows, n_columns = parameters[0].shape
    powers, value, log_rate = np.empty(n_columns, F), np.empty(BLOCK, F), np.empty(BLOCK, F)
    seen, owned = np.empty((5, BLOCK), F), np.empty(BLOCK, F)
    in_value, in_slope = np.zeros(LANES), np.zeros(LANES)
    for sample in range(n_samples):
        for row in range(n_rows):
            logits, log_size = at(parameters[0], sample, row), at(parameters[1], sample, row)[0]
            in_rate = at(slopes[0], sample, row)
            zi_logits, in_zi = at(parameters[-1], sample, row), at(slopes[-1], sample, row)
            total, shift, is_moderate = _softmax(logits, log_size, powers, in_value)
            begin = starts[row]
            for a in range(0, n_columns, BLOCK):
                b = min(a + BLOCK, n_columns)
                end = end_of_block(cols, begin, starts[row + 1], b)
                there, rows = (cols[begin:end], counts[begin:end], a), (value[: b - a], in_rate[a:b])
                if is_moderate:
                    _zeros_of_poisson(powers[a:b], F(math.exp(D(log_size)) / total), rows[0], rows[1])
                else:
                    _log_means(logits[a:b], shift, log_rate)
                    zeros_of_poisson(log_rate[: b - a], rows[0], rows[1])
                nonzeros_of_poisson(there, logits[a:b], shift, rows[0], rows[1])
                if len(parameters) == 3:
                    inflate(there, zi_logits[a:b], in_zi[a:b], rows, seen, owned[: b - a])
                add_up(rows[0], in_value)
                add_up(rows[1], in_slope)
                begin = end
            sums[sample, row] = total_of(in_value)
            slope = total_of(in_slope)
            slopes[1][sample, row, 0] = slope
            _pass_on(in_rate, powers, F(slope / total))
