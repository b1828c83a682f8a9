"""SCBASSET: chromatin accessibility of single cells, predicted from DNA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyro
import torch
from torch import nn

from pyrocell.data import Accessibility, CellCategory, Cells, DnaSequence, prototype_cells
from pyrocell.distributions import ScaledBernoulli
from pyrocell.errors import SetupError
from pyrocell.infer.effects import lazy_deterministic
from pyrocell.infer.plan import TrainingPlan
from pyrocell.models.base import CellModel
from pyrocell.models.dna import DnaQueries
from pyrocell.nn import DnaTower, indicators

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["SCBASSET"]


class SCBASSET(DnaQueries, CellModel):  # type: ignore[misc]  # verbs over cells, though rows are peaks
    """Convolutional network from DNA to the chance that a peak is seen open in each cell; Bernoulli likelihood.

    The rows that this model reads are peaks. Per peak i and cell n::

        peak_embedding_i = CNN(dna_i)                                     n_bottleneck_layer numbers
        logit_in         = peak_embedding_i . (v_n + u_batch(n)) + b_n
        accessibility_in = sigmoid(logit_in)                              probability that the peak is seen open
        x_in             ~ Bernoulli(accessibility_in)

    There is no latent and no guide: the network, the cell embeddings v, the batch embeddings u and the cell biases b
    (log odds, which take up depth) are point estimates.

    Parameters
    ----------
    adata
        Cells by peaks, as everywhere, with the DNA of each peak in ``varm`` (`pyrocell.data.add_dna_sequence`), set up
        with ``SCBASSET.setup_anndata``.
    n_bottleneck_layer
        Dimensions of the embeddings of peaks and cells.
    n_filters_init
        Filters of the first convolution.
    n_repeat_blocks_tower
        Blocks of the tower, each of which halves the length.
    filters_mult
        Factor by which filters grow from block to block.
    n_filters_pre_bottleneck
        Filters of the last convolution.
    dropout_rate
        Dropout on the embedding of a peak in training.
    l2_reg_cell_embedding
        Weight of the mean square of v, beside the mean loss of an entry of the matrix: a Normal prior on v.

    Raises
    ------
    SetupError
        If the sequences are too short for so many blocks, or an option is impossible.
    DataError
        If the data cannot be used.

    Notes
    -----
    Fields: ``accessibility``, ``dna``, ``batch`` (of the cells).

    Sites, one value for each peak: ``peak_embedding`` (n_bottleneck_layer, no unit), ``accessibility`` (n_cells,
    probability), ``x`` (n_cells, 0 or 1). One for all: ``cell_embedding`` (n_cells, n_bottleneck_layer, no unit),
    ``cell_bias`` (n_cells, log odds). In verbs that all models share, such as ``posterior`` and ``get_elbo``,
    ``indices`` are peaks; in the verbs of this class they are cells.

    When not to use it: without the genome that the peaks were called on; on a few hundred peaks, from which no network
    learns what DNA means; for new cells, which have no embedding.

    Departures from the original: early stopping watches the loss on held-out peaks and keeps the best weights; unknown
    bases are a quarter of each base, not a random one; no activation on the bases themselves; queries read both
    strands, and average the two embeddings.

    References
    ----------
    H. Yuan, D. R. Kelley. scBasset: sequence-based modeling of single-cell ATAC-seq using convolutional neural
    networks. Nature Methods 19, 1088-1096 (2022). https://doi.org/10.1038/s41592-022-01562-8
    """

    accessibility = Accessibility()
    dna = DnaSequence()
    batch = CellCategory(optional=True)

    observed_site = "x"
    feature_field = "accessibility"

    max_epochs_cap = 1000
    default_lr = 0.01
    default_early_stopping = True
    default_plan = TrainingPlan(eps=1e-7, betas=(0.95, 0.9995), weight_decay=0.0)

    def __init__(
        self,
        adata: AnnData,
        n_bottleneck_layer: int = 32,
        *,
        n_filters_init: int = 288,
        n_repeat_blocks_tower: int = 6,
        filters_mult: float = 1.122,
        n_filters_pre_bottleneck: int = 256,
        dropout_rate: float = 0.2,
        l2_reg_cell_embedding: float = 0.0,
    ) -> None:
        super().__init__(adata)
        if not 0 <= l2_reg_cell_embedding < float("inf"):
            raise SetupError(f"l2_reg_cell_embedding is {l2_reg_cell_embedding}; expected at least 0.")
        self.l2 = l2_reg_cell_embedding
        n_cells, n_batch = self.data.size("accessibility"), self.data.size("batch")
        try:
            self.tower = DnaTower(
                self.data.record("dna")["length"],
                n_bottleneck_layer,
                n_filters=n_filters_init,
                n_blocks=n_repeat_blocks_tower,
                growth=filters_mult,
                n_last=n_filters_pre_bottleneck,
                dropout=dropout_rate,
            )
        except ValueError as error:
            raise SetupError(
                f"{error}: lower n_repeat_blocks_tower, or add longer sequences (seq_len)."
            ) from error
        self.cell_embedding = nn.Parameter(torch.randn(n_cells, n_bottleneck_layer) / n_bottleneck_layer**0.5)
        self.cell_bias = nn.Parameter(self._log_odds())
        self.batch_embedding = nn.Parameter(torch.zeros(n_batch, n_bottleneck_layer)) if n_batch > 1 else None
        self.own_batch = self._own_batch()

    def _own_batch(self) -> torch.Tensor:
        """Return the batch of each cell, whichever batch is asked for; a model that is loaded has it in its file."""
        peaks = (
            prototype_cells(self.data, 1) if self.dataset is None else self.dataset.cells(np.zeros(1, int))
        )
        return peaks.batch

    def _log_odds(self) -> torch.Tensor:
        """Return the log odds of an open peak in each cell, to start from; 0 where there are no data to count."""
        n_open, n_peaks = torch.zeros(self.data.size("accessibility")), 0
        for peaks in () if self.dataset is None else self.dataset.minibatches(None, 512):
            n_open, n_peaks = n_open + peaks.accessibility.sum(0), n_peaks + len(peaks)
        return torch.log((n_open + 0.5) / (n_peaks - n_open + 0.5))

    def model(self, peaks: Cells) -> None:
        """Generate the cells in which each peak is seen open from its DNA."""
        lazy_deterministic("cell_embedding", self._embeddings, event_dim=2)
        lazy_deterministic("cell_bias", lambda: self.cell_bias, event_dim=1)
        if self.l2:  # a weight in the mean over entries, where the bound is a sum over cells and peaks
            weight = self.l2 * len(self.cell_bias) * peaks.n_total
            pyro.factor("cell_embedding_prior", -weight * self.cell_embedding.square().mean())
        with self.plate(peaks):
            embedding = pyro.deterministic("peak_embedding", self.tower(peaks.dna), event_dim=1)
            logits = self._logits(embedding, peaks.batch, self.cell_bias)
            lazy_deterministic("accessibility", logits.sigmoid, event_dim=1)
            pyro.sample("x", ScaledBernoulli(logits).to_event(1), obs=peaks.accessibility)

    def _responses(self, batch: torch.Tensor) -> torch.Tensor:
        """Return what the log odds of a cell answer with, its embedding and its batch's, shape (n_cells, L)."""
        embeddings = self._embeddings()
        return embeddings if self.batch_embedding is None else embeddings + self.batch_embedding[batch]

    def _embeddings(self) -> torch.Tensor:
        """Return v: of mean zero in each batch, for what the cells of a batch share is the batch's."""
        if self.batch_embedding is None:
            return self.cell_embedding
        is_of = indicators(self.own_batch, len(self.batch_embedding)).to(self.cell_embedding)
        means = (is_of.T @ self.cell_embedding) / is_of.sum(0).unsqueeze(1)
        return self.cell_embedding - means[self.own_batch]

    def _logits(self, embedding: torch.Tensor, batch: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return log odds of peaks in cells, in float32 also where the tower is asked for less."""
        responses = self._responses(batch)
        with torch.autocast(embedding.device.type, enabled=False):
            return torch.addmm(bias, embedding.float(), responses.T)
