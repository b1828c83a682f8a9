"""Effects of many features judged together: a prior learned from all of them, and what it makes of each."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
from scipy.special import ndtr

__all__ = [
    "CountEvidence",
    "EffectPosterior",
    "Evidence",
    "NormalEvidence",
    "common_centre",
    "shrunken_effects",
]

LN2 = float(np.log(2.0))

_STEPS = 12.0 * np.sinh(np.linspace(-2.5, 2.5, 81)) / np.sinh(2.5)
"""Edges of the bins around an estimate, in standard errors: fine in the middle, out to 12."""
_NEAR_ZERO = np.geomspace(1e-3, 30.0, 24)
"""Edges on both sides of zero, in standard errors."""
_RATIO = 1.6
"""Of the scale of a component of the prior to that of the next narrower one."""
_NULL_COUNTS = 10.0
"""Features' worth of prior belief in no effect (Stephens 2017), or a tenth of the features if that is fewer."""
_BLOCK = 512
_BIWEIGHT = 4.685
"""Spreads at which an estimate no longer counts: 95 % of the efficiency of a mean where all are Normal."""


class Evidence(Protocol):
    """What the data say of the effect of each feature: an estimate with its error, and a likelihood."""

    @property
    def centre(self) -> np.ndarray:
        """Estimate, shape ``(n_features,)``."""

    @property
    def error(self) -> np.ndarray:
        """Standard error, shape ``(n_features,)``."""

    def log_likelihood(self, effect: np.ndarray, rows: slice) -> np.ndarray:
        """Log likelihood of effects, shape ``(n_rows, n_values)``, up to a constant for each feature."""

    def moved(self, by: float) -> Evidence:
        """Return the same with a constant taken off every estimate."""

    def among(self, chosen: np.ndarray) -> Evidence:
        """Return the same of some features."""


@dataclass(frozen=True)
class CountEvidence:
    """Two effective counts with their exposures: a gamma posterior for each level, and their ratio.

    Parameters
    ----------
    counted1, counted2
        Effective counts, positive, shape ``(n_features,)``.
    exposure1, exposure2
        Count over level, shape ``(n_features,)``.
    """

    counted1: np.ndarray
    counted2: np.ndarray
    exposure1: np.ndarray
    exposure2: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        """Log2 ratio of the two levels."""
        return (np.log2(self.counted1) - np.log2(self.exposure1)) - (
            np.log2(self.counted2) - np.log2(self.exposure2)
        )

    @property
    def error(self) -> np.ndarray:
        """Standard error of the log2 ratio, from the curvature of the likelihood."""
        return np.sqrt(1.0 / self.counted1 + 1.0 / self.counted2) / LN2

    def log_likelihood(self, effect: np.ndarray, rows: slice) -> np.ndarray:
        """Profile log likelihood of the log2 ratio: the level of the second side is maximised over."""
        first, second = self.counted1[rows, None], self.counted2[rows, None]
        departure = LN2 * (effect - self.centre[rows, None])
        share = first / (first + second)
        # log(share * exp(d) + 1 - share), without overflow
        joint = np.logaddexp(departure + np.log(share), np.log1p(-share))
        return np.asarray(first * departure - (first + second) * joint)

    def moved(self, by: float) -> CountEvidence:
        """Return the same with a constant taken off every estimate."""
        return replace(self, exposure1=self.exposure1 * 2.0**by)

    def among(self, chosen: np.ndarray) -> CountEvidence:
        """Return the same of some features."""
        return CountEvidence(*(getattr(self, field.name)[chosen] for field in fields(self)))


@dataclass(frozen=True)
class NormalEvidence:
    """An estimate with a Normal error.

    Parameters
    ----------
    centre, error
        Estimate and standard error, shape ``(n_features,)``.
    """

    centre: np.ndarray
    error: np.ndarray

    def log_likelihood(self, effect: np.ndarray, rows: slice) -> np.ndarray:
        """Log density of the error."""
        return np.asarray(-0.5 * ((effect - self.centre[rows, None]) / self.error[rows, None]) ** 2)

    def moved(self, by: float) -> NormalEvidence:
        """Return the same with a constant taken off every estimate."""
        return replace(self, centre=self.centre - by)

    def among(self, chosen: np.ndarray) -> NormalEvidence:
        """Return the same of some features."""
        return NormalEvidence(self.centre[chosen], self.error[chosen])


@dataclass(frozen=True)
class EffectPosterior:
    """Posterior of the effect of each feature, shape ``(n_features,)`` each.

    Parameters
    ----------
    mean, std
        Mean and standard deviation.
    low, high
        Ends of the equal-tailed credible interval.
    above, below
        Probability of an effect of more than delta up, and down; zero is neither.
    positive, negative
        Probability of an effect above zero, and below.
    null
        Probability of no effect at all.
    """

    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray
    above: np.ndarray
    below: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    null: np.ndarray

    @property
    def lfsr(self) -> np.ndarray:
        """Local false sign rate: the probability that the likelier sign is wrong, or that there is no effect."""
        return np.asarray(self.null + np.minimum(self.positive, self.negative))


def shrunken_effects(evidence: Evidence, *, delta: float, mass: float) -> EffectPosterior:
    """Learn how effects are spread over features, and combine that with the evidence for each (Stephens 2017).

    The prior is a point at zero and Normals around zero, of scales from a tenth of the smallest standard error to twice
    the largest estimate; their weights maximise the marginal likelihood of all features. The likelihood may have any
    shape: everything is summed over bins around zero and around the estimate.

    Parameters
    ----------
    evidence
        Likelihood of the effect of each feature.
    delta
        Smallest effect of interest.
    mass
        Of the credible interval.

    Returns
    -------
    EffectPosterior
    """
    scales = _scales(evidence)
    n_features = len(evidence.centre)
    blocks = [slice(start, min(start + _BLOCK, n_features)) for start in range(0, n_features, _BLOCK)]
    marginal = np.concatenate([_Bins.of(evidence, rows, delta).marginals(scales) for rows in blocks])
    weights = _mixture_weights(marginal)
    parts = [_Bins.of(evidence, rows, delta).posterior(scales, weights, delta, mass) for rows in blocks]
    return EffectPosterior(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _scales(evidence: Evidence) -> np.ndarray:
    """Scales of the components of the prior, narrowest first."""
    low = 0.1 * float(np.min(evidence.error))
    beyond = np.maximum(evidence.centre**2 - evidence.error**2, 0.0)
    high = max(2.0 * float(np.sqrt(beyond.max())), 8.0 * low)
    return low * _RATIO ** np.arange(np.ceil(np.log(high / low) / np.log(_RATIO)) + 1)


@dataclass(frozen=True)
class _Bins:
    """Likelihood of some features over bins of the effect; the outermost bins are open.

    ``edges`` has shape ``(n_rows, n_bins - 1)``, ``likelihood`` and ``middle`` ``(n_rows, n_bins)``; ``at_zero``, of
    shape ``(n_rows,)``, is the likelihood of no effect. Likelihoods are relative to the largest of the row.
    """

    edges: np.ndarray
    middle: np.ndarray
    likelihood: np.ndarray
    at_zero: np.ndarray

    @classmethod
    def of(cls, evidence: Evidence, rows: slice, delta: float) -> _Bins:
        centre, error = evidence.centre[rows, None], evidence.error[rows, None]
        fixed = np.broadcast_to(np.unique([0.0, delta, -delta]), (len(centre), 1 if delta == 0 else 3))
        edges = np.concatenate(
            [centre + error * _STEPS, error * _NEAR_ZERO, -error * _NEAR_ZERO, fixed], axis=1
        )
        edges.sort(axis=1)
        inner = 0.5 * (edges[:, 1:] + edges[:, :-1])
        middle = np.concatenate([edges[:, :1], inner, edges[:, -1:]], axis=1)
        every = np.concatenate([middle, np.zeros_like(centre)], axis=1)
        log_likelihood = evidence.log_likelihood(every, rows)
        likelihood = np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
        return cls(edges, middle, likelihood[:, :-1], likelihood[:, -1])

    def masses(self, scale: float) -> np.ndarray:
        """Mass of a Normal around zero in each bin, shape ``(n_rows, n_bins)``."""
        # the lower tail on both sides of zero: differences of numbers near one would lose digits
        lower = ndtr(-np.abs(self.edges) / scale)
        inner = np.where(
            self.edges[:, 1:] <= 0,
            lower[:, 1:] - lower[:, :-1],
            lower[:, :-1] - lower[:, 1:],
        )
        # zero lies within the edges: both outer bins are tails
        return np.concatenate([lower[:, :1], inner, lower[:, -1:]], axis=1)

    def marginals(self, scales: np.ndarray) -> np.ndarray:
        """Likelihood under no effect and under each component, shape ``(n_rows, 1 + n_scales)``."""
        columns = [(self.likelihood * self.masses(scale)).sum(1) for scale in scales]
        return np.stack([self.at_zero, *columns], axis=1)

    def posterior(
        self, scales: np.ndarray, weights: np.ndarray, delta: float, mass: float
    ) -> tuple[np.ndarray, ...]:
        """Summaries in the order of `EffectPosterior`."""
        prior = sum(
            (weight * self.masses(scale) for weight, scale in zip(weights[1:], scales, strict=True)),
            np.zeros_like(self.middle),
        )
        bins, null = prior * self.likelihood, weights[0] * self.at_zero
        total = bins.sum(1) + null
        bins, null = bins / total[:, None], null / total
        mean = (bins * self.middle).sum(1)
        std = np.sqrt(np.maximum((bins * self.middle**2).sum(1) - mean**2, 0.0))
        low, high = (self._quantile(bins, null, level) for level in (0.5 - mass / 2, 0.5 + mass / 2))
        above, below = ((bins * (sign * self.middle > delta)).sum(1) for sign in (1, -1))
        positive, negative = ((bins * (sign * self.middle > 0)).sum(1) for sign in (1, -1))
        return mean, std, low, high, above, below, positive, negative, null

    def _quantile(self, bins: np.ndarray, null: np.ndarray, level: float) -> np.ndarray:
        """Effect below which a share of the posterior lies, linear within bins; zero where the point holds it."""
        reached = np.cumsum(bins, axis=1)[:, :-1]
        with_null = reached + np.where(self.edges > 0, null[:, None], 0.0)
        found = np.array(
            [np.interp(level, row, edges) for row, edges in zip(with_null, self.edges, strict=True)]
        )
        before = (bins * (self.middle < 0)).sum(1)
        return np.where((before <= level) & (level <= before + null), 0.0, found)


def _mixture_weights(marginal: np.ndarray, n_steps: int = 2000) -> np.ndarray:
    """Weights of the components by expectation-maximisation, with a prior that favours the first, no effect."""
    n_features, n_components = marginal.shape
    prior = np.zeros(n_components)
    prior[0] = min(_NULL_COUNTS, 0.1 * n_features)
    weights = np.full(n_components, 0.5 / (n_components - 1))
    weights[0] = 0.5
    marginal = marginal / marginal.max(axis=1, keepdims=True)
    for _ in range(n_steps):
        belongs = marginal * weights
        belongs /= belongs.sum(axis=1, keepdims=True)
        before, weights = weights, belongs.sum(axis=0) + prior
        weights = weights / weights.sum()
        if np.abs(weights - before).max() < 1e-6:
            break
    return weights


# ------------------------------------------------------------------------------------------------ centre


def common_centre(centre: np.ndarray, error: np.ndarray) -> float:
    """Where most effects lie: a mean of estimates weighted by precision, from which far ones are left out.

    Tukey's biweight of the estimates, each over its error and the robust spread of the true effects together.

    Parameters
    ----------
    centre, error
        Estimates and standard errors, shape ``(n_features,)``.

    Returns
    -------
    float
    """
    found = float(np.median(centre))
    spread = (1.4826 * np.median(np.abs(centre - found))) ** 2 - np.median(error) ** 2
    variance = error**2 + max(0.0, float(spread))
    for _ in range(100):
        distance = (centre - found) / (_BIWEIGHT * np.sqrt(variance))
        weight = np.where(np.abs(distance) < 1, (1 - distance**2) ** 2, 0.0) / variance
        before, found = found, float((weight * centre).sum() / weight.sum())
        if abs(found - before) < 1e-8:
            break
    return found
