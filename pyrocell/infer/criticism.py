"""Posterior predictive checks: whether data simulated from a fitted model look like the measured data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrocell.errors import QueryError

__all__ = ["PredictiveAccumulator", "PredictiveCheck", "check_predictions"]

_N_BINS = 20
_STATISTICS = ("mean", "variance", "zero_fraction")
# Central 90 % of the draws.
_LOWER, _UPPER = 0.05, 0.95


@dataclass(frozen=True, repr=False)
class PredictiveCheck:
    """What a model predicts for each feature, beside what was observed.

    Attributes
    ----------
    features
        One row per feature. For each of ``mean``, ``variance`` and ``zero_fraction`` over cells:
        ``observed_*``, ``predicted_*`` (average over draws of the whole data set) and the central 90 %
        interval of the draws, ``predicted_*_lower`` and ``predicted_*_upper``. Then ``coverage_50`` and
        ``coverage_90``, the fraction of cells whose value lies in the central 50 % and 90 % of its predictive
        distribution, and ``ks_pit``.
    summary
        Numbers over all features; see :meth:`PredictiveAccumulator.result`.
    pit
        Histogram of the randomised probability integral transform over all cells and features: ``lower``,
        ``upper``, ``count``, ``density``. A calibrated model has density 1 everywhere; a hump in the middle
        says that predictions are too wide, horns at the ends that they are too narrow, a slope that they are
        off.
    parts
        The same for each kind of features by itself (``"counts"``, ``"proteins"``), of a model that explains several.

    Notes
    -----
    Draws from the posterior of the same cells have seen the values that they are compared with, so that a
    model which learns its data by heart looks calibrated: check held-out cells too.
    """

    features: pd.DataFrame
    summary: pd.Series
    pit: pd.DataFrame
    parts: Mapping[str, PredictiveCheck] = field(default_factory=dict)

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={value:.3g}" for name, value in self.summary.items())
        return f"PredictiveCheck({numbers})"


def check_predictions(
    blocks: Iterable[tuple[Tensor, Tensor]], feature_names: Sequence[str], *, seed: int = 0
) -> PredictiveCheck:
    """Compare observed values with predictive draws, block by block of cells.

    Parameters
    ----------
    blocks
        Pairs of observed values, shape (B, G), and predictive draws of them, shape (M, B, G); M is the same
        in every block. No block is kept.
    feature_names
        Names of the G features.
    seed
        Seed of the numbers that break ties between an observed value and equal draws.

    Returns
    -------
    PredictiveCheck
        The comparison.

    Raises
    ------
    QueryError
        If there are no cells, or shapes do not fit.
    """
    accumulator = PredictiveAccumulator(feature_names, seed=seed)
    for observed, draws in blocks:
        accumulator.update(observed, draws)
    return accumulator.result()


class PredictiveAccumulator:
    """Take in observed values and draws of them one block at a time; memory does not grow with cells.

    Parameters
    ----------
    feature_names
        Names of the G features.
    seed
        Seed of the numbers that break ties between an observed value and equal draws.
    """

    def __init__(self, feature_names: Sequence[str], *, seed: int = 0) -> None:
        self.feature_names = [str(name) for name in feature_names]
        self.n_cells = 0
        self.n_draws = 0
        self._generator = torch.Generator().manual_seed(seed)
        n_features = len(self.feature_names)
        self._observed = np.zeros((3, n_features))
        self._predicted = np.zeros((3, 0, n_features))
        self._n_measured = np.zeros(n_features)
        self._histogram = np.zeros((n_features, _N_BINS), dtype=np.int64)

    def update(self, observed: Tensor, draws: Tensor, measured: Tensor | None = None) -> None:
        """Add a block of cells.

        Parameters
        ----------
        observed
            Measured values, shape (B, G).
        draws
            Draws from the predictive distribution of the same cells, shape (M, B, G).
        measured
            Which values were measured, bool, shape (B, G); the others, and their draws, are left out. By default all.
        """
        self._check(observed, draws)
        if not self.n_cells:
            self.n_draws = draws.shape[0]
            self._predicted = np.zeros((3, self.n_draws, len(self.feature_names)))
        self._observed += _moments(observed, measured)
        self._predicted += _moments(draws, measured)
        self._n_measured += len(observed) if measured is None else measured.sum(0).cpu().numpy()
        self._histogram += self._pit_histogram(observed, draws, measured)
        self.n_cells += observed.shape[0]

    def result(self) -> PredictiveCheck:
        """Summarise the cells taken in so far.

        Returns
        -------
        PredictiveCheck
            Its ``summary`` holds ``n_cells``, ``n_features``, ``n_draws``; ``pearson_*`` and ``spearman_*``
            correlation over features of observed and predicted ``log_mean`` and ``log_variance`` (features
            where both are positive); ``variance_ratio``, the median of predicted over observed variance;
            ``mae_zero_fraction``; ``inside_mean``, ``inside_variance`` and ``inside_zero_fraction``, the
            fraction of features whose observed statistic lies in its predicted 90 % interval; ``coverage_50``
            and ``coverage_90`` over all cells and features; ``ks_pit``, the largest distance between the
            distribution of the probability integral transform and the uniform, at the edges of the histogram.
        """
        if not self.n_cells:
            raise QueryError("a predictive check needs cells, got none: widen the selection of cells.")
        features = self._features()
        histogram = self._histogram.sum(axis=0)
        edges = np.linspace(0, 1, _N_BINS + 1)
        density = histogram / max(histogram.sum(), 1) * _N_BINS
        pit = pd.DataFrame({"lower": edges[:-1], "upper": edges[1:], "count": histogram, "density": density})
        return PredictiveCheck(features, self._summary(features, histogram), pit)

    def _check(self, observed: Tensor, draws: Tensor) -> None:
        if draws.dim() != 3 or draws.shape[1:] != observed.shape:
            raise QueryError(
                f"draws have shape {tuple(draws.shape)}; expected (n_draws, n_cells, n_features) over "
                f"observed values of shape {tuple(observed.shape)}."
            )
        if observed.shape[1] != len(self.feature_names):
            raise QueryError(
                f"{observed.shape[1]} features observed, but {len(self.feature_names)} names given."
            )
        if draws.shape[0] < 1 or (self.n_cells and draws.shape[0] != self.n_draws):
            raise QueryError(
                f"a block has {draws.shape[0]} draws; expected {self.n_draws or 'at least 1'}, "
                "as many in every block."
            )

    def _pit_histogram(self, observed: Tensor, draws: Tensor, measured: Tensor | None) -> np.ndarray:
        """Histogram per feature of the randomised rank of each observed value among its draws, in (0, 1)."""
        less = (draws < observed).sum(0)
        equal = (draws == observed).sum(0)
        uniform = torch.rand(observed.shape, generator=self._generator).to(observed.device)
        # With the observed value counted among its equals, this is uniform for any number of draws.
        pit = (less + uniform * (equal + 1)) / (draws.shape[0] + 1)
        bins = (pit * _N_BINS).long().clamp_(0, _N_BINS - 1)
        offsets = torch.arange(observed.shape[1], device=bins.device) * _N_BINS
        places = bins + offsets
        places = places.flatten() if measured is None else places[measured]
        counts = torch.bincount(places, minlength=observed.shape[1] * _N_BINS)
        return counts.cpu().numpy().reshape(-1, _N_BINS)

    def _features(self) -> pd.DataFrame:
        observed = _statistics(self._observed, self._n_measured)
        predicted = _statistics(self._predicted, self._n_measured)
        columns = {}
        for name, seen, drawn in zip(_STATISTICS, observed, predicted, strict=True):
            columns[f"observed_{name}"] = seen
            columns[f"predicted_{name}"] = drawn.mean(axis=0)
            lower, upper = np.quantile(drawn, [_LOWER, _UPPER], axis=0)
            columns[f"predicted_{name}_lower"], columns[f"predicted_{name}_upper"] = lower, upper
        columns |= _calibration(self._histogram)
        return pd.DataFrame(columns, index=pd.Index(self.feature_names, name="feature"))

    def _summary(self, features: pd.DataFrame, histogram: np.ndarray) -> pd.Series:
        numbers: dict[str, float] = {
            "n_cells": self.n_cells,
            "n_features": len(self.feature_names),
            "n_draws": self.n_draws,
        }
        for name in ("mean", "variance"):
            seen, predicted = features[f"observed_{name}"], features[f"predicted_{name}"]
            positive = (seen > 0) & (predicted > 0)
            logs = np.log(seen[positive]), np.log(predicted[positive])
            numbers[f"pearson_log_{name}"] = _correlation(*logs)
            numbers[f"spearman_log_{name}"] = _correlation(logs[0].rank(), logs[1].rank())
        varying = features[features["observed_variance"] > 0]
        ratio = varying["predicted_variance"] / varying["observed_variance"]
        numbers["variance_ratio"] = float(ratio.median())
        error = features["predicted_zero_fraction"] - features["observed_zero_fraction"]
        numbers["mae_zero_fraction"] = float(error.abs().mean())
        for name in _STATISTICS:
            measured = features.dropna(subset=[f"observed_{name}"])
            bounds = measured[f"predicted_{name}_lower"], measured[f"predicted_{name}_upper"]
            numbers[f"inside_{name}"] = float(measured[f"observed_{name}"].between(*bounds).mean())
        numbers |= {name: float(value[0]) for name, value in _calibration(histogram[None]).items()}
        return pd.Series(numbers, name="predictive check")


def _moments(values: Tensor, measured: Tensor | None) -> np.ndarray:
    """Sum, sum of squares and number of zeros over measured cells of (..., B, G): shape (3, ..., G)."""
    if values.device.type == "mps":  # which has no float64
        values, measured = values.cpu(), None if measured is None else measured.cpu()
    is_zero = values == 0
    if measured is not None:
        values, is_zero = values * measured, is_zero & measured
    total = values.sum(-2, dtype=torch.float64)
    squares = values.square().sum(-2, dtype=torch.float64)
    zeros = is_zero.sum(-2, dtype=torch.float64)
    return torch.stack([total, squares, zeros]).cpu().numpy()


def _statistics(moments: np.ndarray, n_cells: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, population variance and fraction of zeros from their sums; not a number where nothing was measured."""
    mean, square, zeros = moments / np.where(n_cells > 0, n_cells, np.nan)
    return mean, np.maximum(square - mean**2, 0.0), zeros


def _calibration(histogram: np.ndarray) -> dict[str, np.ndarray]:
    """Coverage of central intervals, and distance to the uniform, from histograms of shape (n, bins)."""
    total = histogram.sum(axis=1, keepdims=True)
    cumulative = histogram.cumsum(axis=1) / np.where(
        total > 0, total, np.nan
    )  # measured nowhere: not a number
    edges = np.arange(1, _N_BINS + 1) / _N_BINS

    def coverage(level: float) -> np.ndarray:
        tail = round((1 - level) / 2 * _N_BINS)
        return np.asarray(cumulative[:, -tail - 1] - cumulative[:, tail - 1])

    return {
        "coverage_50": coverage(0.5),
        "coverage_90": coverage(0.9),
        "ks_pit": np.abs(cumulative - edges).max(axis=1),
    }


def _correlation(x: pd.Series, y: pd.Series) -> float:
    # Fewer than two features, or no spread among them, leave a correlation undefined.
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
