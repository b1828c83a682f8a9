"""Numbers about directions and errors that the verbs of velocity models report."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

__all__ = ["direction_table", "spread_of_directions", "two_sample_t"]


def spread_of_directions(draws: torch.Tensor) -> torch.Tensor:
    """Return the cosine of each draw with the mean over the draws, both centred over the features.

    Parameters
    ----------
    draws
        Shape (n_samples, n_cells, n_features).

    Returns
    -------
    Tensor
        Shape (n_samples, n_cells).
    """
    mean = draws.mean(0, keepdim=True)
    draws, mean = (part - part.mean(-1, keepdim=True) for part in (draws, mean))
    return torch.nn.functional.cosine_similarity(draws, mean, dim=-1)


def direction_table(cosine: np.ndarray, cells: pd.Index) -> pd.DataFrame:
    """Sum up the cosines of each cell.

    Parameters
    ----------
    cosine
        Shape (n_samples, n_cells).
    cells
        Names of the cells.
    """
    columns = {}
    for name, values in (("", np.arccos(cosine.clip(-1, 1))), ("_cosine_sim", cosine)):
        low, high = np.quantile(values, [0.05, 0.95], axis=0)
        columns[f"directional{name}_variance"] = values.var(0)
        columns[f"directional{name}_difference"] = high - low
    columns["directional_cosine_sim_mean"] = cosine.mean(0)
    return pd.DataFrame(columns, index=cells)


def two_sample_t(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Return the t statistic (equal variances) of the first rows against the second, for each column."""
    n, m = len(one), len(two)
    pooled = ((n - 1) * one.var(0, ddof=1) + (m - 1) * two.var(0, ddof=1)) / (n + m - 2)
    difference: np.ndarray = one.mean(0) - two.mean(0)
    return difference / np.sqrt(np.maximum(pooled, 1e-20) * (1 / n + 1 / m))
