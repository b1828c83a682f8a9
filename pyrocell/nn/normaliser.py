"""Sums of exponentials over features, as a loop in machine code: the input is read twice, and nothing stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrocell.distributions.elementary import compiled

__all__ = ["largest_and_sum"]

Array = np.ndarray
Number = Any  # float32 or float64: the compiler tells them apart, and knows nothing of annotations
F, I = np.float32, np.int32  # noqa: E741

_LANES = 64
"""Sums that are added to side by side: the compiler keeps the order of each, so that one alone would be slow."""

_LOWEST = F(-87.0)  # below, the exponential is no normal number: its share of a sum of at least 1 is nothing
_LOG2_E, _LN2_HIGH, _LN2_LOW = F(1.4426950408889634), F(0.693359375), F(-2.12194440e-4)
_ROUNDING = F(1.5 * 2**23)  # added, it leaves the nearest whole number in the last bits
_ONE_BITS, _ONE, _ZERO = I(0x3F800000), F(1.0), F(0.0)
# Taylor's coefficients of (exp(r) - 1 - r) / r^2: 1.2e-7 where |r| is at most log(2) / 2.
_6, _5, _4, _3, _2 = (F(1 / factorial) for factorial in (720, 120, 24, 6, 2))


@compiled
def _exp_of_negative(x: Number) -> Number:
    """Compute exp(x) in float32 for x <= 0, in half the instructions of one for all x."""
    x = _LOWEST if x < _LOWEST else x
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
def _largest(row: Array, lanes: Array) -> Number:
    n, whole = len(row), len(row) - len(row) % _LANES
    for j in range(_LANES):
        lanes[j] = row[0]
    for start in range(0, whole, _LANES):
        for j in range(_LANES):
            value = row[start + j]
            lanes[j] = value if value > lanes[j] else lanes[j]
    largest = row[0]
    for j in range(_LANES):
        largest = lanes[j] if lanes[j] > largest else largest
    for g in range(whole, n):
        largest = row[g] if row[g] > largest else largest
    return largest


@compiled
def _sum_of_exp(row: Array, largest: Number, lanes: Array) -> Number:
    n, whole = len(row), len(row) - len(row) % _LANES
    for j in range(_LANES):
        lanes[j] = _ZERO
    for start in range(0, whole, _LANES):
        for j in range(_LANES):
            lanes[j] += _exp_of_negative(row[start + j] - largest)
    total = 0.0
    for j in range(_LANES):
        total += np.float64(lanes[j])
    for g in range(whole, n):
        total += np.float64(_exp_of_negative(row[g] - largest))
    return total


@compiled
def _fill(values: Array, largest: Array, sums: Array) -> None:
    lanes = np.empty(_LANES, np.float32)
    for i in range(values.shape[0]):
        largest[i] = _largest(values[i], lanes)
        sums[i] = _sum_of_exp(values[i], largest[i], lanes)


def largest_and_sum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return m, the largest value in the last dimension, and sum(exp(x - m)): log-sum-exp in its two halves.

    Apart, they keep the digits that their sum would lose. On the CPU, in float32 and without gradients, it is a
    compiled loop.

    Parameters
    ----------
    x
        Shape (n_rows, n_features).

    Returns
    -------
    tuple of Tensor
        Shape (n_rows, 1) each.
    """
    looped = x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() and x.shape[-1] > 0
    if not looped or (x.requires_grad and torch.is_grad_enabled()):
        largest = x.amax(-1, keepdim=True)
        return largest, (x - largest).exp().sum(-1, keepdim=True)
    largest, sums = x.new_empty(len(x), 1), x.new_empty(len(x), 1)
    _fill(x.detach().numpy(), largest.numpy()[:, 0], sums.numpy()[:, 0])
    return largest, sums
