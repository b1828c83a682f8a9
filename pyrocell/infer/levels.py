"""Level of a quantity in sets of cells: the model's mean, corrected by what was counted beyond what it expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

from pyrocell.infer.moments import StratumMoments

__all__ = ["Correction", "Levels", "Scale", "corrected_levels"]

Correction = Literal["ratio", "shift", "excess"]
"""How counts correct the model's mean."""

PRIOR_COUNT = 0.5
"""Counts, at the rate that the model expects, that the prior of the correction is worth."""

BORROWED = 10.0
"""Observations that what is common to similar features is worth, when the dispersion of one is estimated."""

_ROUNDING = 1e-13
"""Variances that are less than this part of the mean square are rounding errors."""

_FEATURES_A_BIN, _MOST_BINS = 20, 20


@dataclass(frozen=True)
class Scale:
    """On what scale two levels are compared.

    Parameters
    ----------
    effect
        ``"log2_ratio"`` or ``"difference"``.
    pseudocount
        Added to both levels before the ratio; 0 for the bare ratio.
    """

    effect: Literal["log2_ratio", "difference"]
    pseudocount: float = 0.0

    @property
    def is_bare_ratio(self) -> bool:
        """Whether effects are log ratios of the levels themselves."""
        return self.effect == "log2_ratio" and self.pseudocount == 0.0

    def of(self, level: np.ndarray) -> np.ndarray:
        """Put levels on the scale on which effects are differences."""
        if self.effect == "difference":
            return level
        smallest = np.finfo(np.float64).tiny
        return np.log2(np.maximum(level + self.pseudocount, smallest))

    def slope(self, level: np.ndarray) -> np.ndarray:
        """Return the derivative of `of`."""
        if self.effect == "difference":
            return np.ones_like(level)
        return 1.0 / (np.log(2.0) * np.maximum(level + self.pseudocount, np.finfo(np.float64).tiny))


@dataclass(frozen=True)
class Levels:
    """Levels of some sets of cells, shape ``(n_sets, n_features)`` each.

    Parameters
    ----------
    model
        Mean of the quantity as the model has it.
    level
        The same after the correction.
    variance
        Sampling variance of ``level``.
    counted, exposure, dispersion
        Of a quantity that is corrected by a ratio: the effective counts with the prior's share, what they are divided
        by to give the level, and the variance of the level over that of a Poisson count.
    total
        What was counted, in all cells.
    by
        How the model's mean was corrected, as in `corrected_levels`.
    """

    model: np.ndarray
    level: np.ndarray
    variance: np.ndarray
    counted: np.ndarray
    exposure: np.ndarray
    dispersion: np.ndarray
    total: np.ndarray
    by: Correction = "ratio"

    def among(self, chosen: np.ndarray) -> Levels:
        """Return the levels of some features."""
        return self.part(np.arange(len(self.level)), chosen)

    def part(self, rows: np.ndarray, features: np.ndarray) -> Levels:
        """Return the levels of some sets of cells and features."""
        chosen = np.arange(self.level.shape[0])[rows], np.arange(self.level.shape[1])[features]
        tables = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "by"}
        return replace(self, **{name: table[np.ix_(*chosen)] for name, table in tables.items()})


def corrected_levels(
    moments: StratumMoments,
    sets: Sequence[Sequence[int]],
    *,
    by: Correction,
    prior: float | np.ndarray = PRIOR_COUNT,
    bound: float = np.inf,
) -> Levels:
    """Correct the model's mean in each set of cells by the counts.

    By ``"ratio"``, the level is the model's mean times (a + counted) / (a + expected): the posterior mean of a factor
    with a Gamma(a, a) prior, of which counts are Poisson with the model's expectation as offset. By ``"shift"``, for
    values that may be negative, it is the mean plus the mean of observed minus expected. By ``"excess"``, for one part
    of what is counted (proteins over a background), it is the same, and at least half a count in all cells.

    Parameters
    ----------
    moments
        Of disjoint strata.
    sets
        Strata of each set of cells.
    by
        Kind of correction.
    prior
        Counts a of the prior, of all sets or of each, shape ``(n_sets,)``: replicates share those of their side.
    bound
        Largest value that the quantity can have: levels end there, their errors do not. Where there is one, the total
        counted in a set over the total expected is taken for the depth of its cells that the model missed, and left
        out.

    Returns
    -------
    Levels

    Notes
    -----
    Where n cells have counts x, expectations e and quantities m, the relative error of the level is, to first order,
    the sum over cells of m / sum(m) - 1 / n + x / (a + sum(x)) - e / (a + sum(e)): its variance is that of the Bayesian
    bootstrap over cells, and counts of zeros and ones give it that of the gamma posterior. The number of counts turns
    it into a dispersion, which is averaged with that of the other sets of cells and of features of similar counts.
    Where some cells stand for more (their stratum was cut), counts are effective ones: those whose Poisson variance is
    that of the estimated total.
    """
    united = moments.united(sets)
    n, (counted, expected, quantity) = united.n[:, None], united.sums
    model = quantity / n
    if by != "ratio":
        return _shifted(united, by, bound)
    inflation, prior = united.inflation, np.reshape(prior, (-1, 1))
    depth = _missed_depth(counted, expected) if np.isfinite(bound) else 1.0
    counted, expected = counted / inflation + prior, depth * expected / inflation + prior
    safe = np.maximum(quantity, np.finfo(np.float64).tiny)
    counts, model_counts = inflation * counted, inflation * expected
    departure = (united.sums[0] / counts - depth * united.sums[1] / model_counts) / n
    relative = united.weighted(1.0 / counts, -depth / model_counts, 1.0 / safe) - 1.0 / n - 2.0 * departure
    dispersion = _dispersion(np.maximum(relative, 0.0) * counted, united)
    exposure = expected / np.maximum(model, np.finfo(np.float64).tiny)
    level = counted / exposure
    return Levels(
        model,
        np.minimum(level, bound),
        level**2 * dispersion / counted,
        counted,
        exposure,
        dispersion,
        united.sums[0],
    )


def _missed_depth(counted: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """All that was counted over all that was expected, shape ``(n_sets, 1)``: what a model missed of the cells' depth.

    Shares of all counts have the depth in their total; probabilities have it in the model alone. Totals and not a
    median: of few cells, most regions were not seen at all.
    """
    total = expected.sum(axis=1, keepdims=True)
    return np.where(total > 0, counted.sum(axis=1, keepdims=True) / np.where(total > 0, total, 1.0), 1.0)


def _shifted(united: StratumMoments, by: Correction, bound: float) -> Levels:
    """Levels of values to which what the model missed is added."""
    n, seen = united.n[:, None], united.n_seen[:, None]
    counted, expected, quantity = united.sums
    one = np.ones_like(quantity)
    level = (quantity + counted - expected) / n
    square = united.weighted(one, -one, one) / n**2
    variance = square - level**2 / n
    variance = np.where(variance > _ROUNDING * square, variance, 0.0)
    freedom = np.maximum(seen - 1.0, 0.0)
    own = variance * seen**2 / np.maximum(freedom, 1.0)  # of one cell
    pooled = (freedom * own).sum(axis=0) / np.maximum(freedom.sum(), 1.0)
    variance = (freedom * own + BORROWED * pooled) / (freedom + BORROWED) / seen
    if by == "excess":
        level = np.maximum(level, PRIOR_COUNT / n)
    return Levels(quantity / n, np.minimum(level, bound), variance, one, one, variance, np.abs(counted), by)


def _dispersion(own: np.ndarray, united: StratumMoments) -> np.ndarray:
    """Average the dispersion of each set of cells with that of all sets, and of features with similar counts."""
    n, total = united.n_seen[:, None], united.sums[0] / united.inflation
    own = own * n / np.maximum(n - 1.0, 1.0)
    is_counted = (total.sum(axis=0) > 0) | (united.sums[1].sum(axis=0) > 0)
    weight = np.where(is_counted, np.minimum(total, n - 1.0), n - 1.0)
    support = weight.sum(axis=0)
    pooled = (weight * own).sum(axis=0) / np.maximum(support, 1e-12)
    usual = _usual(pooled, total.sum(axis=0), support > 0)
    pooled = (support * pooled + BORROWED * usual) / (support + BORROWED)
    mixed = (weight * own + BORROWED * pooled) / (weight + BORROWED)
    return np.maximum(mixed, 1e-9)


def _usual(dispersion: np.ndarray, total: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Median dispersion of features with similar totals, shape ``(n_features,)``."""
    if not known.any():
        return np.ones_like(dispersion)
    order = np.flatnonzero(known)[np.argsort(total[known], kind="stable")]
    bins = np.array_split(order, int(np.clip(len(order) // _FEATURES_A_BIN, 1, _MOST_BINS)))
    size = np.log1p(total)
    middles = [float(size[members].mean()) for members in bins]
    return np.interp(size, middles, [float(np.median(dispersion[members])) for members in bins])
