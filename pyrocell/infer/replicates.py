"""Effects between replicates: a linear model of the levels of donors, whose spread is learned from all features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from pyrocell.infer.levels import Levels, Scale

__all__ = ["ReplicateEvidence", "linear_evidence", "replicate_evidence"]

LN2 = float(np.log(2.0))

SPREADS = np.append(0.0, np.geomspace(1e-4, 10.0, 16))
"""Squared coefficients of variation between replicates that are considered, for log ratios."""

RELATIVE_SPREADS = np.append(0.0, np.geomspace(1e-2, 1e4, 16))
"""The same for differences: variances between replicates over the mean variance within."""

SMOOTHING = 10.0
"""Features' worth of prior belief that all spreads are as likely."""

_N_STEPS = 12
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
    those of what is not known of the spread.

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
    if scale.is_bare_ratio:
        return _over_spreads(SPREADS, partial(_log_linear, levels, design), contrast, LN2)
    within = levels.variance * scale.slope(levels.level) ** 2
    return linear_evidence(scale.of(levels.level), np.maximum(within, 1e-12), design, contrast)


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
    return _over_spreads(RELATIVE_SPREADS, partial(_linear, response, within, design), contrast, 1.0)


def _over_spreads(
    spreads: np.ndarray, fit: Callable[[float], Fit], contrast: np.ndarray, unit: float
) -> ReplicateEvidence:
    """Fit at each spread, and weigh the spreads."""
    fits = [fit(spread) for spread in spreads]
    weights = _posterior_of_spread(np.stack([found[1] for found in fits], axis=1)).T
    estimates = np.stack([found[0] @ contrast for found in fits])
    errors = np.stack([np.sqrt(np.einsum("p,gpq,q->g", contrast, found[2], contrast)) for found in fits])
    return ReplicateEvidence(estimates / unit, errors / unit, weights)


def _log_linear(levels: Levels, design: np.ndarray, spread: float) -> Fit:
    """Fit counts by scoring."""
    response = np.log(levels.counted) - np.log(levels.exposure)
    coefficients = _solve(levels.counted / levels.dispersion, design, response)[0]
    for _ in range(_N_STEPS):
        departure, weight = _working(levels, design, coefficients, spread)
        step = _solve(weight, design, departure)[0]
        largest = np.abs(step).max(axis=1, keepdims=True)
        coefficients = coefficients + step * np.minimum(1.0, _LARGEST_STEP / np.maximum(largest, 1e-12))
        if largest.max() < 1e-6:
            break
    departure, weight = _working(levels, design, coefficients, spread)
    return coefficients, *_restricted(weight, design, departure)


def _working(
    levels: Levels, design: np.ndarray, coefficients: np.ndarray, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Relative residuals, and their precisions."""
    mean = np.exp(np.clip(design @ coefficients.T, -300, 300)) * levels.exposure
    return levels.counted / mean - 1.0, 1.0 / (levels.dispersion / mean + spread)


def _linear(response: np.ndarray, within: np.ndarray, design: np.ndarray, spread: float) -> Fit:
    """Fit levels by weighted least squares."""
    weight = 1.0 / (within + spread * within.mean(axis=0))
    coefficients = _solve(weight, design, response)[0]
    return coefficients, *_restricted(weight, design, response - design @ coefficients.T)


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
