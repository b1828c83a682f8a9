"""Tangram: single cells mapped onto the spots of a tissue."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import pyro
import torch
from torch import Tensor, nn

from pyrocell import settings
from pyrocell.data import Category, Cells, Counts, Dataset
from pyrocell.data.spots import FEWEST_GENES, Density, shared_genes, spot_density, spot_values
from pyrocell.errors import DataError, SetupError
from pyrocell.infer.effects import lazy_deterministic
from pyrocell.infer.plan import TrainingPlan
from pyrocell.models.base import CellModel
from pyrocell.models.terms import TangramWeights
from pyrocell.nn.assignment import assign, cosine_similarity, density_divergence

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Tangram"]

_CELLS_AT_ONCE = 512
_START_SD = 0.01


class Tangram(CellModel):
    """Soft assignment of cells to spots that makes their genes alike; a loss without a likelihood.

    With cells i, spots v and shared genes g, expression a of a cell and y of a spot::

        mapping_i = softmax(U_i)                         shares of the spots in cell i
        weight_i  = sigmoid(w_i)                         whether the cell is used ("constrained"), else 1
        yhat_vg   = sum_i mapping_iv weight_i a_ig       expression that the cells bring to the spot
        dhat_v    = sum_i mapping_iv weight_i / sum_i weight_i
        loss      = - lambda_g1 mean_g cos(y_g, yhat_g) - lambda_g2 mean_v cos(y_v, yhat_v)
                    + lambda_d KL(d || dhat) + lambda_r H(mapping)
                    + lambda_count |sum_i weight_i - target_count| + lambda_f_reg sum_i weight_i (1 - weight_i)

    U and w are point estimates. With "clusters" all cells of a label have one U.

    Parameters
    ----------
    adata
        Single cells, set up with ``Tangram.setup_anndata``; genes that the spots lack can be projected afterwards.
    spatial
        Table of spots by genes, such as ``adata_of_spots.to_df()``: counts, or normalised values of at least 0.
    mode
        ``"cells"``; ``"constrained"`` also learns which cells to use; ``"clusters"`` maps the labels.
    genes
        Genes to learn from; by default all that are shared. Genes that are zero everywhere on one side are left out.
    density
        Share of the cells expected in each spot: ``"rna_count_based"`` (its share of all counts in ``spatial``),
        ``"uniform"``, shares that sum to one, or None for no such term.
    target_count
        Cells to be used; needed, and only used, with ``"constrained"``.
    normalize_cells
        Whether a cell's counts are scaled to the mean total count over the shared genes, so that cells count alike.
    scale_clusters
        Whether a label brings the sum of its cells, not their mean. The mean is over the cells of the model, also where
        other cells are projected afterwards.
    weights
        Weights of the terms, a `TangramWeights`.
    block_size
        Cells (or labels) worked on at once; by default what fits into the processor's cache. Memory beyond the
        mapping's logits, their gradient and Adam's moments grows with it; results do not depend on it.

    Raises
    ------
    SetupError
        If an option is impossible.
    DataError
        If fewer than ten genes are shared, spots have no counts, or the density is none.

    Notes
    -----
    Fields: ``counts``, ``label``.

    Sites: ``mapping`` (n_spots, shares that sum to one), ``weight`` (no dimension, how much the cell counts), ``scale``
    (1, what its counts are multiplied by). The terms of the loss are factors over all cells: ``gene_similarity``,
    ``spot_similarity``, ``density``, ``entropy``, ``cell_count``, ``filter_certainty``. There is no likelihood, hence
    no bound and no predictive check; ``elbo_train`` in the history is the loss.

    When not to use it: for uncertainty (it has none), for absolute cell numbers, where the cells of the tissue are not
    among the single cells, or with some tens of genes.

    Departures from the original: cells are scaled to one depth; ``lambda_g2`` alone weighs the similarity of spots;
    mapping and filter start (nearly) alike for all cells.

    References
    ----------
    T. Biancalani, G. Scalia, L. Buffoni, et al. Deep learning and alignment of spatially resolved single-cell
    transcriptomes with Tangram. Nature Methods 18, 1352-1362 (2021). https://doi.org/10.1038/s41592-021-01264-7
    """

    counts = Counts()
    label = Category(optional=True)

    observed_sites = {}  # noqa: RUF012
    mapping_site = "mapping"
    weight_site = "weight"
    scale_site = "scale"
    full_batch = True
    max_epochs_cap = 1000
    default_lr = 0.1
    # Gradients of the logits go with 1 / (cells x spots): the usual 1e-8 is above those of 20,000 x 3,000.
    default_plan = TrainingPlan(eps=1e-14, weight_decay=0.0)

    def __init__(
        self,
        adata: AnnData,
        spatial: pd.DataFrame,
        *,
        mode: Literal["cells", "constrained", "clusters"] = "cells",
        genes: Sequence[str] | None = None,
        density: Density | None = "rna_count_based",
        target_count: float | None = None,
        normalize_cells: bool = True,
        scale_clusters: bool = True,
        weights: TangramWeights | None = None,
        block_size: int | None = None,
    ) -> None:
        super().__init__(adata)
        n_cells, n_labels = self.data.n_cells, self.data.size("label")
        _check_options(mode, target_count, block_size, has_label=self.data.has("label"), n_cells=n_cells)
        self.mode, self.target_count, self.block_size = mode, target_count, block_size
        self.normalize_cells, self.scale_clusters = normalize_cells, scale_clusters
        self.weights = TangramWeights(**weights) if isinstance(weights, dict) else weights or TangramWeights()
        genes = self._choose_genes(spatial, genes)
        self.place_names = [str(name) for name in spatial.index]
        self.spatial = torch.from_numpy(spot_values(spatial, genes))
        self.target_density = None if density is None else torch.from_numpy(spot_density(density, spatial))
        # Of saved models, these three come with the parameters.
        self.mean_library = torch.ones(())
        self.label_sizes, self.label_means = torch.ones(n_labels), torch.ones(n_labels, len(genes))
        if self.dataset is not None:
            self._summarise(self.dataset)
        if target_count is not None:
            # All start alike: from random ones, the penalty on undecided cells would decide by chance.
            self.filter_logits = nn.Parameter(torch.full((n_cells,), target_count / n_cells).logit(eps=0.01))
        # All spots nearly alike: more noise would stay in the map of a short training.
        n_rows = n_labels if mode == "clusters" else n_cells
        self.mapping_logits = nn.Parameter(_START_SD * torch.randn(n_rows, len(spatial)))
        self.cell_parameters = () if mode == "clusters" else ("mapping_logits",)

    def model(self, cells: Cells) -> None:
        """Bring the expression of the cells to the spots, and compare."""
        with self.plate(cells):
            lazy_deterministic(
                "mapping", lambda: self.mapping_logits[self._rows(cells)].softmax(-1), event_dim=1
            )
            lazy_deterministic("weight", lambda: self._weights(cells), event_dim=0)
            lazy_deterministic("scale", lambda: self._scale(cells), event_dim=1)
        for name, term in self._terms(cells):
            # The objective divides what lies outside the plate by the number of cells: this loss is none per cell.
            pyro.factor(name, -cells.n_total * term)

    def guide(self, cells: Cells) -> None:
        """Do nothing: the mapping is a point estimate."""

    def _terms(self, cells: Cells) -> Iterator[tuple[str, Tensor]]:
        """Yield the terms of the loss that have a weight."""
        expression, mass, entropy = self._hand_out(cells)
        weights = self.weights
        if weights.lambda_g1:
            yield (
                "gene_similarity",
                -weights.lambda_g1 * cosine_similarity(self.spatial, expression, 0).mean(),
            )
        if weights.lambda_g2:
            yield (
                "spot_similarity",
                -weights.lambda_g2 * cosine_similarity(self.spatial, expression, 1).mean(),
            )
        if weights.lambda_d and self.target_density is not None:
            found = mass / mass.sum()
            yield "density", weights.lambda_d * density_divergence(self.target_density, found)
        if weights.lambda_r:
            yield "entropy", weights.lambda_r * entropy
        if self.target_count is not None:  # "constrained"
            used = self._weights(cells)
            yield "cell_count", weights.lambda_count * (used.sum() - self.target_count).abs()
            yield "filter_certainty", weights.lambda_f_reg * (used * (1 - used)).sum()

    def _hand_out(self, cells: Cells) -> tuple[Tensor, Tensor, Tensor]:
        """Return expression and mass that reach each spot, and the entropy of the mapping."""
        hand_out = partial(assign, block_size=self.block_size, with_entropy=self.weights.lambda_r > 0)
        if self.mode == "clusters":
            sizes = self.label_sizes if self.scale_clusters else torch.ones_like(self.label_sizes)
            return hand_out(self.mapping_logits, self.label_means, weights=sizes)
        scale = self._scale(cells) if self.normalize_cells else None
        rows = None if _is_in_order(cells.rows, len(self.mapping_logits)) else cells.rows
        return hand_out(
            self.mapping_logits, cells.counts, weights=self._weights(cells), scale=scale, rows=rows
        )

    def _rows(self, cells: Cells) -> Tensor:
        """Return the row of the mapping for each cell."""
        return cells.label if self.mode == "clusters" else cells.rows

    def _weights(self, cells: Cells) -> Tensor:
        """Return how much each cell counts."""
        if self.mode == "constrained":
            return self.filter_logits[cells.rows].sigmoid()
        if self.mode == "clusters" and not self.scale_clusters:
            return 1 / self.label_sizes[cells.label]
        return torch.ones(len(cells), device=cells.rows.device)

    def _scale(self, cells: Cells) -> Tensor:
        """Return what the counts of each cell are multiplied by."""
        return self.mean_library / cells.library if self.normalize_cells else torch.ones_like(cells.library)

    def get_mapper_matrix(self) -> pd.DataFrame:
        """Return the share of each spot in each cell, or in each label with "clusters"; rows sum to one.

        Returns
        -------
        DataFrame
            Cells (or labels) by spots.
        """
        with self.asking():
            shares = self.mapping_logits.softmax(1).cpu().numpy()
        names = self.data.names("label") if self.mode == "clusters" else self.cell_names
        return pd.DataFrame(shares, index=names, columns=self.place_names, copy=False)

    def _choose_genes(self, spatial: pd.DataFrame, wanted: Sequence[str] | None) -> list[str]:
        """Read the shared genes alone, without those that are zero everywhere on one side."""
        if self.dataset is None:  # they were chosen when the saved model was made
            return self.data.names("counts")
        shared = shared_genes(spatial, self.data.names("counts"), wanted)
        self.restrict_features("counts", shared)
        blocks = self.dataset.minibatches(None, _CELLS_AT_ONCE)
        in_cells = np.sum([cells.counts.sum(0).numpy() for cells in blocks], axis=0) > 0
        seen = in_cells & (spot_values(spatial, shared).sum(0) > 0)
        genes = [name for name, is_seen in zip(shared, seen, strict=True) if is_seen]
        if len(genes) < FEWEST_GENES:
            raise DataError(
                f"Of {len(shared)} shared genes {len(genes)} are seen on both sides, in some cell and in some spot; "
                f"expected at least {FEWEST_GENES}. Give genes that are expressed."
            )
        self.restrict_features("counts", genes)
        settings.logger.info(
            "%d genes are shared, %d of them are seen on both sides", len(shared), len(genes)
        )
        return genes

    def _summarise(self, dataset: Dataset) -> None:
        """Find the mean total count of the cells, and of each label the number and the mean of its cells."""
        libraries = [cells.library for cells in dataset.minibatches(None, _CELLS_AT_ONCE)]
        self.mean_library = torch.cat(libraries).mean()
        self.label_sizes = torch.zeros_like(self.label_sizes)
        sums = torch.zeros_like(self.label_means)
        for cells in dataset.minibatches(None, _CELLS_AT_ONCE):
            self.label_sizes += torch.bincount(cells.label, minlength=len(sums))
            sums.index_add_(0, cells.label, cells.counts * self._scale(cells))
        self.label_means = sums / self.label_sizes[:, None]


def _is_in_order(rows: Tensor, n_rows: int) -> bool:
    """Whether these are all rows as they lie, so that none needs to be looked up; not asked where it means a wait."""
    return rows.device.type == "cpu" and len(rows) == n_rows and torch.equal(rows, torch.arange(n_rows))


def _check_options(
    mode: str, target_count: float | None, block_size: int | None, *, has_label: bool, n_cells: int
) -> None:
    if mode not in ("cells", "constrained", "clusters"):
        raise SetupError(f"mode is {mode!r}; expected 'cells', 'constrained' or 'clusters'.")
    if mode == "clusters" and not has_label:
        raise SetupError("mode='clusters' maps labels, and there are none; set up with labels_key=.")
    if (target_count is not None) != (mode == "constrained"):
        raise SetupError(
            f"target_count is {target_count} with mode={mode!r}; the number of cells to use goes with "
            "mode='constrained', and with no other."
        )
    if target_count is not None and not 0 < target_count <= n_cells:
        raise SetupError(f"target_count is {target_count}; expected a number of cells, up to {n_cells}.")
    if block_size is not None and block_size < 1:
        raise SetupError(f"block_size is {block_size}; expected at least 1, or None.")
