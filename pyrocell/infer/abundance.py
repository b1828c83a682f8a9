"""Differential abundance: where in latent space the cells of one set of samples are denser than those of another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from pyrocell.errors import DataError, QueryError, list_some

__all__ = ["abundance_scores", "sample_log_densities"]

STUDENT_DOF = 3.0
"""Degrees of freedom of the smoothing kernel."""

BLOCK_ENTRIES = 4_000_000
"""Pairs of cells (times latent dimensions, for Student-t) that are held at a time."""


def sample_log_densities(
    means: torch.Tensor | np.ndarray,
    variances: torch.Tensor | np.ndarray,
    sample_codes: np.ndarray,
    *,
    n_samples: int | None = None,
    at: torch.Tensor | np.ndarray | None = None,
    kernel: Literal["normal", "student"] = "normal",
) -> np.ndarray:
    r"""Log density of every sample's aggregated posterior at the latent position of every cell.

    The density of sample s is the average of the posteriors of its cells,
    :math:`q_s(h) = n_s^{-1} \sum_{n \in s} q(h \mid x_n)`. At its own position, a cell is left out of the density of
    its sample, which would otherwise be dense wherever it has a cell (unless it is the only one of the sample).

    Parameters
    ----------
    means, variances
        Posterior mean and variance of each cell, shape ``(n_cells, n_latent)`` each.
    sample_codes
        Sample of each cell, 0 to ``n_samples - 1``, shape ``(n_cells,)``; -1 for cells that belong to no sample.
    n_samples
        Number of samples; None for the largest code plus one.
    at
        Positions, shape ``(n_positions, n_latent)``, of which no cell is left out; None for the cells' own posterior
        means.
    kernel
        ``"normal"``, the posterior itself, or ``"student"``, which puts a Student-t of 3 degrees of freedom with the
        same location and scale in every latent dimension: smoother where cells are few.

    Returns
    -------
    ndarray
        Shape ``(n_positions, n_samples)``, natural logs, float64.

    Raises
    ------
    DataError
        Shapes do not fit, or a variance is not positive.
    QueryError
        A sample has no cells, or the kernel does not exist.
    """
    if kernel not in ("normal", "student"):
        raise QueryError(f"kernel is {kernel!r}; expected 'normal' or 'student'.")
    centres, spreads = _float64(means), _float64(variances)
    _check_shapes(centres, spreads, sample_codes)
    positions = centres if at is None else _float64(at).to(centres.device)
    n_samples = int(sample_codes.max()) + 1 if n_samples is None else n_samples
    columns = []
    for members in _members(sample_codes, n_samples):
        rows = torch.as_tensor(members, device=centres.device)
        own = rows if at is None and len(rows) > 1 else None
        columns.append(_log_mixture(positions, centres[rows], spreads[rows], kernel, own=own))
    return torch.stack(columns, dim=1).cpu().numpy()


def _float64(table: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Turn into float64, where the table is if the device has float64."""
    tensor = torch.as_tensor(table).detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _check_shapes(centres: torch.Tensor, spreads: torch.Tensor, sample_codes: np.ndarray) -> None:
    """Raise unless there is one mean, one positive variance and one sample for each cell."""
    if centres.ndim != 2 or centres.shape != spreads.shape or len(sample_codes) != len(centres):
        raise DataError(
            f"Means have shape {tuple(centres.shape)}, variances {tuple(spreads.shape)}, sample codes "
            f"({len(sample_codes)},); expected (n_cells, n_latent) twice and (n_cells,). Pass the same cells to all."
        )
    if not bool((spreads > 0).all()):
        raise DataError("Some variances are not positive; expected variances (not logs) above zero.")


def _members(sample_codes: np.ndarray, n_samples: int) -> list[np.ndarray]:
    """Rows of the cells of each sample."""
    members = [np.flatnonzero(sample_codes == sample) for sample in range(n_samples)]
    empty = [sample for sample, rows in enumerate(members) if len(rows) == 0]
    if empty:
        raise QueryError(
            f"Samples {list_some(empty)} have no cells; expected at least one in each. Drop them."
        )
    return members


def _log_mixture(
    positions: torch.Tensor,
    centres: torch.Tensor,
    spreads: torch.Tensor,
    kernel: str,
    *,
    own: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log of the average kernel over the components, in blocks of positions and components.

    With ``own``, the position of each component, a component does not count at its position.
    """
    n_latent = centres.shape[1] if kernel == "student" else 1
    width = min(len(centres), max(1, BLOCK_ENTRIES // (n_latent * 64)))
    height = max(1, BLOCK_ENTRIES // (n_latent * width))
    result = positions.new_full((len(positions),), -math.inf)
    for top in range(0, len(positions), height):
        block = positions[top : top + height]
        for left in range(0, len(centres), width):
            log_kernel = _KERNELS[kernel](block, centres[left : left + width], spreads[left : left + width])
            if own is not None:
                _leave_out(log_kernel, own[left : left + width] - top)
            part = torch.logsumexp(log_kernel, dim=1)
            result[top : top + height] = torch.logaddexp(result[top : top + height], part)
    n_components = torch.full_like(result, len(centres))
    if own is not None:
        n_components[own] -= 1
    return result - n_components.log()


def _leave_out(log_kernel: torch.Tensor, places: torch.Tensor) -> None:
    """Take each component off at its own place in a block of positions, if it is there."""
    inside = torch.nonzero((places >= 0) & (places < len(log_kernel)))[:, 0]
    log_kernel[places[inside], inside] = -math.inf


def _log_normal(positions: torch.Tensor, centres: torch.Tensor, spreads: torch.Tensor) -> torch.Tensor:
    """Log Normal density of every position under every component, as two matrix products."""
    origin = centres.mean(0)  # far from zero the expanded square would lose digits
    x, mean, precision = positions - origin, centres - origin, 1.0 / spreads
    constant = (mean**2 * precision + torch.log(2 * math.pi * spreads)).sum(1)
    return -0.5 * (x**2 @ precision.T - 2.0 * (x @ (mean * precision).T) + constant)


def _log_student(positions: torch.Tensor, centres: torch.Tensor, spreads: torch.Tensor) -> torch.Tensor:
    """Log density of independent Student-t variables, scale the square root of the variance."""
    dof = STUDENT_DOF
    constant = math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2) - 0.5 * math.log(dof * math.pi)
    square = (positions[:, None, :] - centres) ** 2 / spreads
    per_dimension = -0.5 * (dof + 1) * torch.log1p(square / dof) - 0.5 * torch.log(spreads)
    return per_dimension.sum(-1) + constant * centres.shape[1]


_KERNELS = {"normal": _log_normal, "student": _log_student}


def abundance_scores(
    log_densities: np.ndarray, samples1: Sequence[int] | np.ndarray, samples2: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Log ratio of the average densities of two sets of samples, at every position.

    Parameters
    ----------
    log_densities
        From :func:`sample_log_densities`, shape ``(n_positions, n_samples)``.
    samples1, samples2
        Columns of the two sets. Each sample counts equally, whatever its number of cells.

    Returns
    -------
    ndarray
        Shape ``(n_positions,)``, natural log; positive where the first set is denser.

    Raises
    ------
    QueryError
        A set is empty, or names a sample that does not exist.
    """
    first, second = (_log_average(log_densities, samples) for samples in (samples1, samples2))
    return first - second


def _log_average(log_densities: np.ndarray, samples: Sequence[int] | np.ndarray) -> np.ndarray:
    """Log of the average density over some samples."""
    columns = np.asarray(samples, dtype=np.int64)
    unknown = [int(column) for column in columns if not 0 <= column < log_densities.shape[1]]
    if len(columns) == 0 or unknown:
        raise QueryError(
            f"A set of samples is {list_some(columns.tolist()) or 'empty'}; expected at least one of "
            f"0 to {log_densities.shape[1] - 1}. Check the groups of samples."
        )
    return np.logaddexp.reduce(log_densities[:, columns], axis=1) - math.log(len(columns))
