"""Numbers about directions and errors that the verbs of velocity models report."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

__all__ = ["direction_table", "expected_ways", "spread_of_directions", "two_sample_t"]


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


def expected_ways(velocity: torch.Tensor, ways: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """Return where cells are expected to go, if they move to neighbours that lie in the direction of their velocity.

    The probability to move to a neighbour is a softmax of the cosine of the angle between the velocity and the way
    there; the way that cells without any direction would take is subtracted.

    Parameters
    ----------
    velocity
        Shape (n_samples, n_cells, n_features).
    ways
        From each cell to its neighbours, shape (n_cells, n_neighbors, n_features).
    present
        Which of the neighbours there are, shape (n_cells, n_neighbors): at least one for each cell.

    Returns
    -------
    Tensor
        Shape as of the velocity.
    """
    direction, unit = (torch.nn.functional.normalize(part, dim=-1) for part in (velocity, ways))
    cosine = torch.einsum("sng,nkg->snk", direction, unit)
    move = cosine.masked_fill(~present, -torch.inf).softmax(-1)
    there = present.to(ways)
    aimless = there / there.sum(-1, keepdim=True)
    return torch.einsum("snk,nkg->sng", move - aimless, ways)


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
