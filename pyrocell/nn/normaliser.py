"""Sums of exponentials over features, as a loop in machine code: the input is read twice, and nothing stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrocell.distributions.elementary import compiled, exp_of_negative
from pyrocell.distributions.threads import in_parts

__all__ = ["largest_and_sum"]

Array = np.ndarray
Number = Any  # float32 or float64: the compiler tells them apart, and knows nothing of annotations
_LANES = 64
"""Sums that are added to side by side: the compiler keeps the order of each, so that one alone would be slow."""


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
        lanes[j] = np.float32(0.0)
    for start in range(0, whole, _LANES):
        for j in range(_LANES):
            lanes[j] += exp_of_negative(row[start + j] - largest)
    total = 0.0
    for j in range(_LANES):
        total += np.float64(lanes[j])
    for g in range(whole, n):
        total += np.float64(exp_of_negative(row[g] - largest))
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
    values, outcome = x.detach().numpy(), (largest.numpy()[:, 0], sums.numpy()[:, 0])
    in_parts(
        lambda start, stop: _fill(values[start:stop], *(row[start:stop] for row in outcome)),
        len(x),
        n_numbers=x.numel(),
    )
    return largest, sums
