"""From probabilities and draws to calls, intervals and thresholds."""

from __future__ import annotations

import numpy as np

from pyrocell.errors import QueryError

__all__ = [
    "LEAST_PROBABILITY",
    "bayes_factor",
    "check_targets",
    "expected_fdr_calls",
    "highest_density_interval",
    "learned_delta",
    "least_effect",
]

EPSILON = 1e-8
"""Keeps Bayes factors finite."""

LEAST_PROBABILITY = 0.5
"""Probability of an effect on a mean below which it is never called, however sure the others are."""


def bayes_factor(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Natural log of the ratio of two probabilities, kept finite by 1e-8.

    Parameters
    ----------
    first, second
        Probabilities of the same shape.

    Returns
    -------
    ndarray
        Same shape.
    """
    return np.log(first + EPSILON) - np.log(second + EPSILON)


def check_targets(delta: float | None, fdr_target: float) -> None:
    """Raise on a smallest effect or an error rate out of range.

    Parameters
    ----------
    delta
        Smallest effect of interest, or None.
    fdr_target
        Expected proportion of false calls.
    """
    if delta is not None and not 0 <= delta < float("inf"):
        raise QueryError(f"delta is {delta!r}; expected a number of at least 0, or None to learn it.")
    if not 0 < fdr_target < 1:
        raise QueryError(
            f"fdr_target is {fdr_target!r}; expected a proportion between 0 and 1, such as 0.05."
        )


def expected_fdr_calls(probability: np.ndarray, target: float) -> np.ndarray:
    """Call the most features whose posterior expected false discovery proportion is within the target.

    Parameters
    ----------
    probability
        Probability of an effect of each feature, shape ``(n_features,)``.
    target
        Largest expected proportion of false calls.

    Returns
    -------
    ndarray
        Boolean, shape ``(n_features,)``.
    """
    order = np.argsort(-probability, kind="stable")
    expected = np.cumsum(1.0 - probability[order]) / np.arange(1, len(order) + 1)
    called = np.zeros(len(order), dtype=bool)
    called[order[: int(np.sum(expected <= target))]] = True
    return called


def highest_density_interval(draws: np.ndarray, mass: float) -> tuple[np.ndarray, np.ndarray]:
    """Find the narrowest window that holds a share of the draws, for each feature.

    Parameters
    ----------
    draws
        Shape ``(n_features, n_draws)``.
    mass
        Share of the draws inside, between 0 and 1.

    Returns
    -------
    low, high
        Ends of the window, shape ``(n_features,)`` each.
    """
    ordered = np.sort(draws, axis=1)
    inside = max(1, int(np.ceil(mass * ordered.shape[1])))
    widths = ordered[:, inside - 1 :] - ordered[:, : ordered.shape[1] - inside + 1]
    start = np.argmin(widths, axis=1)
    every = np.arange(len(ordered))
    return ordered[every, start], ordered[every, start + inside - 1]


def least_effect(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the size of the smallest effect in an interval: 0 where it holds zero, or is missing.

    Parameters
    ----------
    low, high
        Ends of the intervals.
    """
    return np.nan_to_num(np.maximum(np.maximum(low, -high), 0.0))


def learned_delta(effects: np.ndarray) -> float:
    """Learn the smallest effect of interest from a mixture of three Gaussians over the features' mean effects.

    Parameters
    ----------
    effects
        Mean effect of each feature, shape ``(n_features,)``.

    Returns
    -------
    float
        ``max(0.1, 0.6 * (|lowest mean| + |highest mean|) / 2)``.
    """
    means = _three_gaussians(np.asarray(effects, dtype=np.float64))
    return float(max(0.1, 0.6 * 0.5 * (abs(means.min()) + abs(means.max()))))


def _three_gaussians(x: np.ndarray, n_steps: int = 100) -> np.ndarray:
    """Means of a three-component mixture, by expectation-maximisation from the low, middle and high quantiles."""
    mean = np.quantile(x, [0.05, 0.5, 0.95])
    floor = 1e-6 + 1e-4 * x.var()
    variance = np.full(3, x.var() / 3 + floor)
    share = np.full(3, 1 / 3)
    for _ in range(n_steps):
        log_density = np.log(share) - 0.5 * np.log(variance) - 0.5 * (x[:, None] - mean) ** 2 / variance
        belongs = np.exp(log_density - log_density.max(axis=1, keepdims=True))
        belongs /= belongs.sum(axis=1, keepdims=True)
        weight = belongs.sum(axis=0) + 1e-10
        before, mean = mean, belongs.T @ x / weight
        variance = (belongs * (x[:, None] - mean) ** 2).sum(axis=0) / weight + floor
        share = weight / weight.sum()
        if np.abs(mean - before).max() < 1e-4:
            break
    return mean
