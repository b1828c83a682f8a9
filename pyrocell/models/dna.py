"""Verbs of models that predict, from the DNA of regions, where they are open: each cell is a response to DNA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from pyrocell.models.asking import Question, chosen_cells, chosen_features
from pyrocell.models.insertion import backgrounds, motif_effects, mutation_effects, wanted_motifs
from pyrocell.models.queries import Indices, Names, Queries

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["DnaQueries"]


class DnaQueries(Queries):
    """Mix-in of models whose rows are regions with DNA, and whose columns are cells.

    The model has ``tower``, which embeds DNA, ``cell_bias``, ``own_batch``, ``_embeddings``, ``_responses`` and
    ``_logits``.
    """

    def get_latent_representation(  # type: ignore[override]
        self, *, indices: Indices = None
    ) -> np.ndarray:
        """Return the embedding v of each cell, without that of its batch.

        Parameters
        ----------
        indices
            Cells wanted, as positions or a mask; by default all, in the order of the data that the model was made with.

        Returns
        -------
        ndarray
            Shape ``(n_cells, n_bottleneck_layer)``.
        """
        return self._of_cells(self._embeddings(), indices)

    def get_cell_bias(self, *, indices: Indices = None) -> np.ndarray:
        """Return the bias of each cell: the log odds that go with its depth.

        Parameters
        ----------
        indices
            As in `get_latent_representation`.

        Returns
        -------
        ndarray
            Shape ``(n_cells,)``.
        """
        return self._of_cells(self.cell_bias, indices)

    def _of_cells(self, values: torch.Tensor, indices: Indices) -> np.ndarray:
        self.require_trained()
        found: np.ndarray = values.detach().cpu().numpy()
        return found[chosen_cells(indices, len(found))]

    def get_normalized_accessibility(
        self,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        transform_batch: str | None = None,
        region_list: Names = None,
        normalize_cells: bool = False,
        return_numpy: bool = False,
        batch_size: int | None = None,
    ) -> pd.DataFrame | np.ndarray:
        """Return the probability that each peak is open in each cell.

        Parameters
        ----------
        adata
            Data with other peaks of the same cells; by default the model's own.
        indices
            Cells wanted, as positions or a mask.
        transform_batch
            As if all cells were of this batch; by default each cell's own.
        region_list
            Peaks wanted, by name.
        normalize_cells
            Use each cell's own bias: the probability that the peak is *seen* open. Else the mean bias of all cells, as
            if all were equally deep.
        return_numpy
            Return an array instead of a table.
        batch_size
            Peaks worked on at once.

        Returns
        -------
        DataFrame or ndarray
            Cells by peaks.

        Raises
        ------
        QueryError
            If a peak, batch or cell does not exist.
        """
        peaks = self.require_data(adata).obs_names
        rows = None if region_list is None else chosen_features(region_list, list(peaks))
        cells = chosen_cells(indices, self.data.size("accessibility"))
        given = None if transform_batch is None else {"batch": transform_batch}
        question = Question(self, adata, rows, given=given, batch_size=batch_size)
        bias = self.cell_bias if normalize_cells else self.cell_bias.mean().expand_as(self.cell_bias)
        result = np.zeros((len(cells), len(question.rows)), dtype=np.float32)
        with self.asking():
            for place, block in question.blocks():
                batch = question.circumstances[0](block).batch
                logits = self._logits(self.tower(block.dna), batch, bias)
                result[:, place] = logits.sigmoid().T.cpu().numpy()[cells]
        names = np.array(self.data.names("accessibility"))[cells]
        return result if return_numpy else pd.DataFrame(result, index=names, columns=peaks[question.rows])

    def get_tf_activity(
        self,
        motifs: str | Path | Mapping[str, Any],
        tf: str | Sequence[str] | None = None,
        *,
        adata: AnnData | None = None,
        background: str | Path | None = None,
        n_background: int = 1000,
        sample_sites: bool = False,
        standardize: bool = True,
        seed: int | None = None,
    ) -> pd.DataFrame:
        """Say how much a motif opens chromatin in each cell.

        The motif is put into the middle of background sequences. The score of a cell is the mean change of its logit,
        in its own batch.

        Parameters
        ----------
        motifs
            MEME or FASTA file of motifs, or a mapping from names to motifs: see `pyrocell.data.read_motifs`.
        tf
            Names of the motifs wanted; by default all.
        adata
            Data whose peaks make the background; by default the model's own.
        background
            FASTA file of background sequences, at least as long as the model's (their middle is taken). By default,
            peaks drawn at random, shuffled such that pairs of neighbouring bases stay as frequent.
        n_background
            Number of background sequences to draw; those of a file are all taken.
        sample_sites
            Insert a site drawn from the motif into each sequence, instead of the likeliest one into all.
        standardize
            Bring the scores of each motif to mean 0 and standard deviation 1 over cells; else they are log odds.
        seed
            Seed of the backgrounds and sites; by default the model's.

        Returns
        -------
        DataFrame
            Cells by motifs.

        Raises
        ------
        QueryError
            If a motif does not exist, or is longer than the sequences of the model.
        DataError
            If a file is damaged, or background sequences are too short; the message names them.
        """
        self.require_trained()
        rng = np.random.default_rng(self.stream.seed if seed is None else seed)
        known = wanted_motifs(motifs, tf, self.data.record("dna")["length"])
        sequences = backgrounds(self, adata, background, n_background, rng)
        sites_rng = rng if sample_sites else None
        with self.asking():
            effects = motif_effects(self, known, sequences, rng=sites_rng)
            scores = (self._responses(self.own_batch) @ effects.T).cpu().numpy()
        if standardize:
            spread = scores.std(0)
            scores = (scores - scores.mean(0)) / np.where(spread > 0, spread, 1)
        return pd.DataFrame(scores, index=self.data.names("accessibility"), columns=list(known))

    def get_mutation_effects(
        self, region: str, *, adata: AnnData | None = None, indices: Indices = None
    ) -> pd.DataFrame:
        """Say what each change of one base of a peak would do to its accessibility (in-silico mutagenesis).

        Parameters
        ----------
        region
            Name of the peak.
        adata
            Data that have it; by default the model's own.
        indices
            Cells to average over, as positions or a mask, such as those of one type; by default all.

        Returns
        -------
        DataFrame
            Places of the sequence by the bases A, C, G, T: changes of the mean log odds, 0 for the base that is there.

        Raises
        ------
        QueryError
            If the peak or a cell does not exist.
        """
        self.require_trained()
        dataset = self.require_data(adata)
        [row] = chosen_features([region], list(dataset.obs_names))
        cells = chosen_cells(indices, self.data.size("accessibility"))
        with self.asking():
            sequence = dataset.cells(np.array([row])).dna[0].numpy()
            effects = mutation_effects(self, sequence, self._responses(self.own_batch)[cells].mean(0))
        return pd.DataFrame(effects, columns=list("ACGT"))
