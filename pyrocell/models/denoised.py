"""Denoised values with the noise between cells, and how they correlate."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import rankdata

from pyrocell.infer.draws import SiteDraws

__all__ = ["correlation", "denoised_rows", "some_rows"]


def some_rows(rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Choose at most ``n`` rows at random, in order."""
    return rows if len(rows) <= n else np.sort(np.random.default_rng(seed).choice(rows, n, replace=False))


def denoised_rows(draws: SiteDraws, size: float | None) -> np.ndarray:
    """Draw denoised values from a gamma with the profile's mean and the likelihood's dispersion, as rows.

    Without a size, the draws themselves are denoised values.
    """
    if size is None:
        return draws.value.flatten(0, -2).cpu().numpy()
    parameters = draws.parameters
    mean = size * parameters["mean"] / parameters["mean"].sum(-1, keepdim=True)
    if "theta" in parameters:
        theta = parameters["theta"]
        mean = torch.distributions.Gamma(theta, theta / mean.clamp_min(1e-30), validate_args=False).sample()
    return mean.flatten(0, -2).cpu().numpy()


def correlation(rows: np.ndarray, kind: str) -> np.ndarray:
    """Correlate columns, ``"spearman"`` or ``"pearson"``."""
    values = rankdata(rows, axis=0) if kind == "spearman" else rows
    return np.atleast_2d(np.corrcoef(values, rowvar=False))
