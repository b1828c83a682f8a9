"""RNAStereoscope: expression profiles of the cell types of a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pandas as pd
import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import nn

from pyrocell.data import Category, Cells, Counts, Dataset
from pyrocell.distributions import NegativeBinomial
from pyrocell.errors import QueryError
from pyrocell.infer.effects import lazy_deterministic
from pyrocell.infer.plan import TrainingPlan
from pyrocell.models.base import CellModel

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["MEAN_FLOOR", "POINTS", "RNAStereoscope", "check_unit", "sums_of_cells"]

MEAN_FLOOR = 1e-30
POINTS = TrainingPlan(eps=1e-8, weight_decay=0.0)
"""How both stages train: no parameter of theirs belongs to a network."""

_LOGITS_LIMIT = 15.0
_CELLS_AT_ONCE = 2048


class RNAStereoscope(CellModel):
    """Expression profile of each cell type of a reference, with a negative binomial likelihood.

    Per cell n of type label_n, and gene g::

        mu_ng ~ library_n * rho[label_n, g]                 rho: share of the type's molecules that are of the gene
        x_ng  ~ NB(mu_ng, theta = mu_ng / exp(logits_g))    so that the variance is mu_ng * (1 + exp(logits_g))

    Such counts add up: those of several cells have the same logits and the sum of their means, whatever the types.

    The first of two stages; the second is `SpatialStereoscope`. Profiles and logits are point estimates.

    Parameters
    ----------
    adata
        Raw counts of single cells, set up with ``RNAStereoscope.setup_anndata``.

    Raises
    ------
    DataError
        If the counts cannot be used, or all cells are of one type.

    Notes
    -----
    Fields: ``counts``, ``label``.

    Sites: ``rho`` (n_genes, fraction of the cell's transcripts), ``mu`` (n_genes, expected counts), ``x`` (n_genes,
    counts).

    When not to use it: where profiles of types are all that is wanted. The mean of the cells is as good then.

    Departures from the original: profiles start at those of the pooled cells, not at random, and each type has one
    pseudo-count, spread like the average cell, so that no gene is impossible in a type of few cells.

    References
    ----------
    A. Andersson, J. Bergenstrahle, M. Asp, L. Bergenstrahle, et al. Single-cell and spatial transcriptomics enables
    probabilistic inference of cell type topography. Communications Biology 3, 565 (2020).
    https://doi.org/10.1038/s42003-020-01247-y
    """

    counts = Counts()
    label = Category(min_levels=2)

    max_epochs_cap = 100
    default_lr = 0.01
    default_train_size = 1.0
    default_plan = POINTS

    def __init__(self, adata: AnnData) -> None:
        super().__init__(adata)
        n_labels, n_genes = self.data.size("label"), self.data.size("counts")
        totals, n_cells = _totals(self.dataset, n_labels, n_genes)
        self.average = totals.sum(0) / totals.sum()
        self.label_library = totals.sum(1) / n_cells
        # A sum of one pseudo-count a type has the same maximum as the factor of the model.
        pooled = (totals + self.average) / (totals.sum(1, keepdim=True) + 1)
        self.log_rho = nn.Parameter(pooled.clamp_min(MEAN_FLOOR).log())
        self.logits = nn.Parameter(torch.zeros(n_genes))

    def model(self, cells: Cells) -> None:
        """Generate counts given the type of each cell."""
        pyro.factor("pseudocount", (self.average * self.log_rho - self.log_rho.exp()).sum())
        with self.plate(cells):
            log_rho = self.log_rho[cells.label]
            lazy_deterministic("rho", log_rho.exp, event_dim=1)
            log_mean = log_rho + cells.library.log()
            lazy_deterministic("mu", log_mean.exp, event_dim=1)
            pyro.sample("x", sums_of_cells(log_mean, self.logits), obs=cells.counts)

    def get_profiles(self, *, unit: Literal["cells", "transcripts"] = "cells") -> pd.DataFrame:
        """Return the profile of each type.

        Parameters
        ----------
        unit
            ``"cells"``: expected counts in an average cell of the type, which has the mean library of these cells;
            ``"transcripts"``: the share of each gene in the counts.

        Returns
        -------
        DataFrame
            Types by genes.
        """
        check_unit(unit)
        self.require_trained()
        rho = self.log_rho.detach().exp()
        values = rho * self.label_library.unsqueeze(1) if unit == "cells" else rho
        return pd.DataFrame(
            values.cpu().numpy(), index=self.data.names("label"), columns=self.data.names("counts")
        )

    def get_logits(self) -> pd.Series:
        """Return the logits of each gene: its counts have a variance of ``1 + exp(logits)`` times their mean."""
        self.require_trained()
        return pd.Series(self.logits.detach().cpu().numpy(), index=self.data.names("counts"), name="logits")


def sums_of_cells(log_mean: torch.Tensor, logits: torch.Tensor) -> TorchDistribution:
    """Give counts of cells taken together: a negative binomial with variance ``1 + exp(logits)`` times the mean.

    Parameters
    ----------
    log_mean
        Log expected counts, shape (..., n_genes).
    logits
        Shape (n_genes,).
    """
    limited = logits.clamp(-_LOGITS_LIMIT, _LOGITS_LIMIT)
    return NegativeBinomial(log_mean=log_mean, log_theta=log_mean - limited).to_event(1)


def check_unit(unit: str) -> None:
    """Raise a QueryError unless the unit is one of the two."""
    if unit not in ("cells", "transcripts"):
        raise QueryError(f"unit is {unit!r}; expected 'cells' or 'transcripts'.")


def _totals(dataset: Dataset | None, n_labels: int, n_genes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Count each type's molecules and cells; ones without data, for a model that is about to be loaded."""
    if dataset is None:
        return torch.ones(n_labels, n_genes), torch.ones(n_labels)
    totals, n_cells = torch.zeros(n_labels, n_genes, dtype=torch.float64), torch.zeros(n_labels)
    for cells in dataset.minibatches(None, _CELLS_AT_ONCE):
        totals.index_add_(0, cells.label, cells.counts.double())
        n_cells += torch.bincount(cells.label, minlength=n_labels)
    return totals.float(), n_cells
