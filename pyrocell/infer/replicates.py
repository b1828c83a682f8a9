"""Effects between replicates: a linear model of the levels of donors, whose spread is learned from all features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pyrocell.infer.levels import Levels, Scale

__all__ = ["ReplicateEvidence", "linear_evidence", "replicate_evidence"]

LN2 = float(np.log(2.0))

LARGEST_SPREAD, N_SPREADS = 10.0, 16
"""Squared coefficients of variation between replicates that are considered, for log ratios: 0, and 1e-4 to this or the
number of replicates."""

RELATIVE_SPREADS = np.append(0.0, np.geomspace(1e-2, 1e4, 16))
"""The same for differences: variances between replicates over the mean variance within, or over a thousandth of the
variance seen between them, if that is more."""

SMOOTHING = 10.0
"""Features' worth of prior belief that all spreads are as likely."""

FEWEST_TO_LEAVE_OUT = 3
"""Degrees of freedom from which on it is seen what one replicate does to the estimate."""

_N_STEPS = 25
_LARGEST_STEP = 3.0

Fit = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Coefficients ``(n_features, p)``, restricted log likelihood ``(n_features,)``, covariances ``(n_features, p, p)``."""


@dataclass(frozen=True)
class ReplicateEvidence:
    """Likelihood of a contrast for each feature: a mixture of Normals, over the spread between its replicates.

    Parameters
    ----------
    estimates, errors
        Estimate and standard error at each spread, shape ``(n_spreads, n_features)``.
    weights
        Posterior probability of each spread, same shape; the columns sum to one.
    """

    estimates: np.ndarray
    errors: np.ndarray
    weights: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        """Mean estimate, shape ``(n_features,)``."""
        return np.asarray((self.weights * self.estimates).sum(axis=0))

    @property
    def error(self) -> np.ndarray:
        """Standard deviation of the likelihood, read as a density of the effect."""
        square = self.errors**2 + (self.estimates - self.centre) ** 2
        return np.asarray(np.sqrt((self.weights * square).sum(axis=0)))

    def log_likelihood(self, effect: np.ndarray, rows: slice) -> np.ndarray:
        """Log of the mixture, shape ``(n_rows, n_values)``."""
        total = np.full(effect.shape, -np.inf)
        parts = (table[:, rows, None] for table in (self.estimates, self.errors, self.weights))
        for estimate, error, weight in zip(*parts, strict=True):
            log_weight = np.log(np.maximum(weight, 1e-300) / error)
            total = np.logaddexp(total, log_weight - 0.5 * ((effect - estimate) / error) ** 2)
        return total

    def moved(self, by: float) -> ReplicateEvidence:
        """Return the same with a constant taken off every estimate."""
        return ReplicateEvidence(self.estimates - by, self.errors, self.weights)

    def among(self, chosen: np.ndarray) -> ReplicateEvidence:
        """Return the same of some features."""
        return ReplicateEvidence(self.estimates[:, chosen], self.errors[:, chosen], self.weights[:, chosen])


def replicate_evidence(
    levels: Levels, scale: Scale, design: np.ndarray, contrast: np.ndarray
) -> ReplicateEvidence:
    """Fit levels of replicates that are linear in a design, and return what they say of one contrast.

    For bare log ratios, counts have mean ``exposure * exp(design @ coefficients)`` and relative variance
    ``dispersion / mean + spread``; otherwise levels, on their scale, have the variance within the replicate plus a
    spread. The spread between replicates differs from feature to feature. How it is spread over features is learned
    from all of them by restricted likelihood, and each feature averages over it: with few replicates, the tails are
    those of what is not known of the spread. And no error is less than what one replicate alone moves the estimate.

    Parameters
    ----------
    levels
        Of each replicate.
    scale
        On what scale levels are compared.
    design
        Of full rank, shape ``(n_replicates, n_coefficients)``, with fewer columns than rows.
    contrast
        Weights of the coefficients, shape ``(n_coefficients,)``.

    Returns
    -------
    ReplicateEvidence
        Base 2 for log ratios.
    """
    if scale.is_bare_ratio and levels.by == "ratio":
        largest = max(LARGEST_SPREAD, float(len(design)))  # of D values one alone of which is not zero: D - 1
        spreads = np.append(0.0, np.geomspace(1e-4, largest, N_SPREADS))
        return _over_spreads(_Counts(levels, design), spreads, contrast, LN2)
    expected, variance = levels.level, levels.variance
    if levels.by == "ratio":
        expected, variance = _as_designed(levels, design)
    elif levels.by == "excess":
        plain = design @ np.linalg.lstsq(design, levels.level, rcond=None)[0]
        expected = np.maximum(plain, 0.05 * levels.level.mean(axis=0))
    within = variance * scale.slope(expected) ** 2
    return linear_evidence(scale.of(levels.level), within, design, contrast)


def linear_evidence(
    response: np.ndarray, within: np.ndarray, design: np.ndarray, contrast: np.ndarray
) -> ReplicateEvidence:
    """Fit values of replicates that are linear in a design; see `replicate_evidence`.

    Parameters
    ----------
    response, within
        Values, and their variances within the replicates, shape ``(n_replicates, n_features)``.
    design, contrast
        As in `replicate_evidence`.
    """
    rest = response - design @ np.linalg.lstsq(design, response, rcond=None)[0]
    between = (rest**2).sum(axis=0) / max(len(design) - design.shape[1], 1)
    # the widest spread is 1e4 units: at least ten times what is seen between replicates
    unit = np.maximum(within.mean(axis=0), 1e-3 * between)
    unit = np.maximum(unit, 1e-12 * (response**2).mean(axis=0) + np.finfo(np.float64).tiny ** 0.5)
    return _over_spreads(
        _Values(response, np.maximum(within, 1e-6 * unit), unit, design), RELATIVE_SPREADS, contrast, 1.0
    )


class _Fitted(Protocol):
    """Values of replicates, of which the means are fitted given the spread between replicates."""

    @property
    def design(self) -> np.ndarray:
        """Design, shape ``(n_replicates, n_coefficients)``."""

    def fit(self, spread: np.ndarray) -> Fit:
        """Fit at a spread, that of all features or of each."""

    def part(self, rows: np.ndarray, features: np.ndarray) -> _Fitted:
        """Return some replicates and features."""


def _over_spreads(
    fitted: _Fitted, spreads: np.ndarray, contrast: np.ndarray, unit: float
) -> ReplicateEvidence:
    """Fit at each spread, and weigh the spreads."""
    fits = [fitted.fit(spread) for spread in spreads]
    weights = _posterior_of_spread(np.stack([found[1] for found in fits], axis=1)).T
    estimates = np.stack([found[0] @ contrast for found in fits])
    errors = np.stack([np.sqrt(np.einsum("p,gpq,q->g", contrast, found[2], contrast)) for found in fits])
    evidence = ReplicateEvidence(estimates, errors, weights)
    widened = errors * _caution(fitted, evidence, spreads, contrast)
    return ReplicateEvidence(estimates / unit, widened / unit, weights)


def _caution(
    fitted: _Fitted, evidence: ReplicateEvidence, spreads: np.ndarray, contrast: np.ndarray
) -> np.ndarray:
    """Factors of the errors, at least 1, so that no error is less than what one replicate alone moves the estimate.

    A feature that one replicate alone has is no evidence of a difference between groups, whatever curve its values are
    taken to follow. Estimates smaller than their errors are left as they are.
    """
    n, p = fitted.design.shape
    factor = np.ones_like(evidence.centre)
    doubtful = np.flatnonzero(np.abs(evidence.centre) > evidence.error)
    if n - p < FEWEST_TO_LEAVE_OUT or not len(doubtful):
        return factor
    spread = (evidence.weights * spreads[:, None]).sum(axis=0)[doubtful]
    every = np.arange(n)
    whole = fitted.part(every, doubtful).fit(spread)[0] @ contrast
    moved = np.zeros(len(doubtful))
    for left_out in every:
        rows = np.delete(every, left_out)
        if np.linalg.matrix_rank(fitted.design[rows]) == p:
            estimate = fitted.part(rows, doubtful).fit(spread)[0] @ contrast
            moved = np.maximum(moved, np.abs(estimate - whole))
    factor[doubtful] = np.maximum(1.0, moved / evidence.error[doubtful])
    return factor


@dataclass(frozen=True)
class _Counts:
    """Counts whose logarithm of the mean is linear."""

    levels: Levels
    design: np.ndarray

    def part(self, rows: np.ndarray, features: np.ndarray) -> _Counts:
        return _Counts(self.levels.part(rows, features), self.design[rows])

    def fit(self, spread: np.ndarray) -> Fit:
        """Fit by scoring."""
        coefficients = self._start()
        for _ in range(_N_STEPS):
            departure, weight = self._working(coefficients, spread)
            step = _solve(weight, self.design, departure)[0]
            largest = np.abs(step).max(axis=1, keepdims=True)
            coefficients = coefficients + step * np.minimum(1.0, _LARGEST_STEP / np.maximum(largest, 1e-12))
            if largest.max() < 1e-6:
                break
        departure, weight = self._working(coefficients, spread)
        return coefficients, *_restricted(weight, self.design, departure)

    def _start(self) -> np.ndarray:
        """Fit logarithms of levels, each drawn to that of all by half a count."""
        counted, exposure = self.levels.counted, self.levels.exposure
        usual = counted.sum(axis=0) / exposure.sum(axis=0)
        response = np.log(counted + 0.5) - np.log(exposure + 0.5 / usual)
        return _solve((counted + 0.5) / self.levels.dispersion, self.design, response)[0]

    def _working(self, coefficients: np.ndarray, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Relative residuals, and their precisions."""
        mean = np.exp(np.clip(self.design @ coefficients.T, -300, 300)) * self.levels.exposure
        return self.levels.counted / mean - 1.0, 1.0 / (self.levels.dispersion / mean + spread)


@dataclass(frozen=True)
class _Values:
    """Values whose mean is linear, with their variances within replicates, and the unit of the spread between them."""

    response: np.ndarray
    within: np.ndarray
    unit: np.ndarray
    design: np.ndarray

    def part(self, rows: np.ndarray, features: np.ndarray) -> _Values:
        chosen = np.ix_(rows, features)
        return _Values(self.response[chosen], self.within[chosen], self.unit[features], self.design[rows])

    def fit(self, spread: np.ndarray) -> Fit:
        """Fit by weighted least squares."""
        weight = 1.0 / (self.within + spread * self.unit)
        coefficients = _solve(weight, self.design, self.response)[0]
        return coefficients, *_restricted(weight, self.design, self.response - self.design @ coefficients.T)


def _as_designed(levels: Levels, design: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels as the design has them, and their variances there: a zero is not more certain than other counts."""
    precision = levels.exposure / levels.dispersion
    fitted = design @ _solve(precision, design, levels.level)[0].T
    usual = (precision * levels.level).sum(axis=0) / precision.sum(axis=0)
    fitted = np.maximum(fitted, 0.05 * usual)
    return fitted, fitted / precision


def _restricted(
    weight: np.ndarray, design: np.ndarray, departure: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Restricted log likelihood, and the covariances of the coefficients."""
    inverse = _solve(weight, design, departure)[1]
    residual = (weight * departure**2).sum(axis=0)
    return 0.5 * (np.log(weight).sum(axis=0) + np.linalg.slogdet(inverse)[1] - residual), inverse


def _solve(weight: np.ndarray, design: np.ndarray, response: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted least squares of each feature: coefficients ``(n_features, p)`` and inverse normal matrices."""
    normal = np.einsum("ug,up,uq->gpq", weight, design, design, optimize=True)
    inverse = np.linalg.inv(normal)
    right = np.einsum("ug,up,ug->gp", weight, design, response, optimize=True)
    return np.einsum("gpq,gq->gp", inverse, right), inverse


def _posterior_of_spread(log_likelihood: np.ndarray, n_steps: int = 500) -> np.ndarray:
    """Learn how likely each spread is over all features, and return the posterior of each feature."""
    likelihood = np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
    prior = np.full(likelihood.shape[1], 1.0 / likelihood.shape[1])
    for _ in range(n_steps):
        belongs = likelihood * prior
        belongs /= belongs.sum(axis=1, keepdims=True)
        before, prior = prior, belongs.sum(axis=0) + SMOOTHING / likelihood.shape[1]
        prior = prior / prior.sum()
        if np.abs(prior - before).max() < 1e-5:
            break
    belongs = likelihood * prior
    return np.asarray(belongs / belongs.sum(axis=1, keepdims=True))
