"""What the data say of proteins before any fit: which were measured where, and where the background lies."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from pyrocell.data import Dataset
from pyrocell.infer.streams import RandomStream

__all__ = ["BackgroundPrior", "ProteinDesign"]

_FEWEST_PROTEINS = 11
"""Proteins in all from which cells are thought to tell background from signal."""

_FEWEST_MEASURED = 5
_N_CELLS = 100
_CELLS_AT_ONCE = 2048


@dataclass(frozen=True)
class ProteinDesign:
    """Which proteins were measured in which batch, and the panel of each cell.

    Parameters
    ----------
    n_measured
        Cells of each batch in which each protein was measured, int64, shape (n_batch, n_proteins).
    panels
        Panel of each cell, shape (n_cells,), -1 where no protein was measured; empty without data.
    """

    n_measured: torch.Tensor
    panels: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset | None, n_batch: int, n_proteins: int, panel: str) -> ProteinDesign:
        """Look at all cells once; without data, only shapes are right (a model about to be loaded)."""
        n_measured, panels = torch.zeros(n_batch, n_proteins, dtype=torch.int64), [np.empty(0, np.int64)]
        if dataset is not None:
            for cells in dataset.minibatches(None, _CELLS_AT_ONCE):
                n_measured.index_add_(0, cells.batch, cells.proteins_mask.long())
                panels.append(np.where(cells.proteins_mask.any(1), getattr(cells, panel), -1))
        return cls(n_measured, np.concatenate(panels))

    @property
    def is_incomplete(self) -> bool:
        """Whether some protein is absent from some batch that has cells, and there are several batches."""
        return len(self.n_measured) > 1 and bool((self.n_measured == 0).any())


@dataclass(frozen=True)
class BackgroundPrior:
    """Normal prior of the log background of each protein on each panel; two tensors of shape (n_panels, n_proteins)."""

    mean: torch.Tensor
    log_sd: torch.Tensor

    @classmethod
    def flat(cls, n_panels: int, n_proteins: int) -> BackgroundPrior:
        """Wide prior around 20 counts."""
        return cls(torch.full((n_panels, n_proteins), 3.0), torch.zeros(n_panels, n_proteins))

    @classmethod
    def of(
        cls,
        dataset: Dataset | None,
        design: ProteinDesign,
        n_panels: int,
        *,
        empirical: bool | None,
        stream: RandomStream,
    ) -> BackgroundPrior:
        """Choose the prior: read off the cells (None: with more than 10 proteins), or flat, as without data."""
        n_proteins = design.n_measured.shape[1]
        empirical = n_proteins >= _FEWEST_PROTEINS if empirical is None else empirical
        if dataset is None or not empirical:
            return cls.flat(n_panels, n_proteins)
        return cls.empirical(dataset, design, n_panels, stream)

    @classmethod
    def empirical(
        cls, dataset: Dataset, design: ProteinDesign, n_panels: int, stream: RandomStream
    ) -> BackgroundPrior:
        """Read the background off the cells: in each, the lower of two groups of proteins.

        Most proteins of a panel a cell has not, so that its own counts show where its background lies. In each panel,
        a mixture of two Gaussians is fitted to the log1p counts of each of 100 cells; the prior is the average of the
        lower ones, as narrow as that average is certain. A panel that tells nothing takes the average of the others.
        """
        prior = cls.flat(n_panels, design.n_measured.shape[1])
        rng = np.random.default_rng([stream.seed, n_panels])
        known: dict[int, np.ndarray] = {}
        for panel in range(n_panels):
            rows = np.flatnonzero(design.panels == panel)
            cells = dataset.cells(np.sort(rng.choice(rows, _N_CELLS)) if len(rows) else rows)
            pairs = zip(cells.proteins.numpy(), cells.proteins_mask.numpy(), strict=True)
            fits = (_lower_component(np.log1p(counts[mask])) for counts, mask in pairs)
            found = np.array([fit for fit in fits if fit is not None])
            if len(found):
                error = np.sqrt((found[:, 1] ** 2).sum()) / len(found)
                known[panel] = np.array([found[:, 0].mean(), np.log(error)])
        if known:
            starts = np.tile(np.mean(list(known.values()), axis=0), (n_panels, 1))
            starts[list(known)] = list(known.values())
            prior.mean[:], prior.log_sd[:] = torch.from_numpy(starts).float().T[:, :, None]
        return prior


def _lower_component(values: np.ndarray) -> tuple[float, float] | None:
    """Mean and standard deviation of the lower of two Gaussians in the log counts of one cell, if there are two."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture  # slow to import, and only needed here

    if len(values) < _FEWEST_MEASURED or np.ptp(values) == 0:
        return None
    mixture = GaussianMixture(n_components=2, random_state=0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            mixture.fit(values[:, None].astype(np.float64))
    except (ConvergenceWarning, ValueError):
        return None
    lower = int(mixture.means_[:, 0].argmin())
    return float(mixture.means_[lower, 0]), float(np.sqrt(mixture.covariances_[lower, 0, 0]))
