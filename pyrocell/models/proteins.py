"""Verbs of models that tell the background of proteins from their signal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from pyro.distributions import Gamma, Normal
from torch.nn import functional

from pyrocell.data.filling import FilledTable, Out
from pyrocell.infer.draws import SiteDraws
from pyrocell.infer.effects import lazy_deterministic
from pyrocell.models.asking import Question
from pyrocell.models.queries import Indices, Names, Queries
from pyrocell.models.roles import needs

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

__all__ = ["JointExpression", "ProteinQueries", "name_proteins"]


class ProteinQueries(Queries):
    """Mix-in of `CellModel`: signal and background of proteins; arguments as in `Queries`."""

    @needs("protein_site")
    def get_protein_expression(
        self,
        adata: AnnData | MuData | None = None,
        *,
        indices: Indices = None,
        transform_batch: str | Sequence[str] | None = None,
        protein_list: Names = None,
        n_samples: int = 1,
        include_background: bool = False,
        scale_protein: bool = False,
        sample_protein_mixing: bool = False,
        return_mean: bool = True,
        batch_size: int | None = None,
        out: Out = None,
    ) -> FilledTable:
        """Return the denoised proteins of each cell, in counts, without the efficiency of the batch.

        Proteins that were not measured in a cell are predicted from what was.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        transform_batch
            Decode as if from this batch, or as the average over several; by default each cell's own.
        protein_list
            Proteins wanted.
        n_samples
            Posterior draws of each cell.
        include_background
            Add the background to the signal.
        scale_protein
            Divide by the sum over all proteins of the cell.
        sample_protein_mixing
            Let each draw be either background or signal, at random, instead of weighing both by their probability.
        return_mean
            Whether to average over the draws.
        out
            Where the values go: an array, the path of a zarr array, or a `pyrocell.data.Obsm`.

        Returns
        -------
        DataFrame or ndarray
            Cells by proteins, with names; an array ``(n_samples, n_cells, n_proteins)`` if not averaged. With ``out``,
            what was written to.
        """
        site = str(self.protein_site)
        site += "_total" * include_background + "_sampled" * sample_protein_mixing

        def values(draws: SiteDraws) -> torch.Tensor:
            # A draw in which every protein is background has no shares: zeros.
            return functional.normalize(draws.value, p=1, dim=-1) if scale_protein else draws.value

        question = self._protein_question(adata, indices, transform_batch, protein_list, batch_size)
        with self.asking():
            found = question.array(site, values, n_samples=n_samples, return_mean=return_mean, out=out)
        return question.answer(found, out)

    @needs("foreground_site")
    def get_protein_foreground_probability(
        self,
        adata: AnnData | MuData | None = None,
        *,
        indices: Indices = None,
        transform_batch: str | Sequence[str] | None = None,
        protein_list: Names = None,
        n_samples: int = 1,
        batch_size: int | None = None,
        out: Out = None,
    ) -> FilledTable:
        """Return the probability that a protein is more than background in a cell, given the cell's latent.

        It does not look at the one count in question, but at what the whole cell says.

        Parameters
        ----------
        adata, indices, transform_batch, protein_list, n_samples, batch_size, out
            As in ``get_protein_expression``.

        Returns
        -------
        DataFrame
            Cells by proteins. With ``out``, what was written to.
        """
        question = self._protein_question(adata, indices, transform_batch, protein_list, batch_size)
        return self._protein_table(question, str(self.foreground_site), n_samples, out)

    @needs("background_site")
    def get_protein_background_mean(
        self,
        adata: AnnData | MuData | None = None,
        *,
        indices: Indices = None,
        transform_batch: str | Sequence[str] | None = None,
        protein_list: Names = None,
        n_samples: int = 1,
        batch_size: int | None = None,
        out: Out = None,
    ) -> FilledTable:
        """Return the expected background of each protein in each cell, in counts.

        Parameters
        ----------
        adata, indices, transform_batch, protein_list, n_samples, batch_size, out
            As in ``get_protein_expression``.

        Returns
        -------
        DataFrame
            Cells by proteins. With ``out``, what was written to.
        """
        question = self._protein_question(adata, indices, transform_batch, protein_list, batch_size)
        return self._protein_table(question, str(self.background_site), n_samples, out)

    def _protein_question(
        self,
        adata: AnnData | MuData | None,
        indices: Indices,
        transform_batch: str | Sequence[str] | None,
        protein_list: Names,
        batch_size: int | None,
    ) -> Question:
        given = None if transform_batch is None else {"batch": transform_batch}
        question = Question(self, adata, indices, given=given, batch_size=batch_size)
        question.over(self.expression_sites[str(self.protein_site)], protein_list)
        return question

    def _protein_table(self, question: Question, site: str, n_samples: int, out: Out) -> FilledTable:
        with self.asking():
            return question.answer(question.values(site, n_samples, out=out), out)


class JointExpression(ProteinQueries):
    """Mix-in of models of RNA and proteins, put before `CellModel`: both kinds of expression in one answer."""

    def get_normalized_expression(  # type: ignore[override]
        self,
        adata: AnnData | MuData | None = None,
        *,
        indices: Indices = None,
        transform_batch: str | Sequence[str] | None = None,
        gene_list: Names = None,
        protein_list: Names = None,
        library_size: float | Literal["latent"] = 1.0,
        n_samples: int = 1,
        include_protein_background: bool = False,
        return_mean: bool = True,
        return_numpy: bool = False,
        batch_size: int | None = None,
    ) -> tuple[Any, Any]:
        """Return the denoised expression of genes, and that of proteins; a draw of a cell is one of both.

        Both are returned in memory. ``posterior("rho", out=...)`` and ``get_protein_expression(out=...)`` write the
        same values elsewhere.

        Parameters
        ----------
        adata, indices, transform_batch, gene_list, library_size, n_samples, return_mean, return_numpy, batch_size
            As for a model of RNA alone (``SCVI.get_normalized_expression``).
        protein_list
            Proteins wanted.
        include_protein_background
            Add the background to the proteins; ``get_protein_expression`` has further options.

        Returns
        -------
        tuple of DataFrame or ndarray
            Cells by genes (fractions, or times ``library_size``) and cells by proteins (counts).
        """
        shared: dict[str, Any] = {
            "indices": indices,
            "transform_batch": transform_batch,
            "n_samples": n_samples,
            "return_mean": return_mean,
            "batch_size": batch_size,
        }
        rna = super().get_normalized_expression(
            adata, gene_list=gene_list, library_size=library_size, return_numpy=return_numpy, **shared
        )
        proteins = self.get_protein_expression(
            adata, protein_list=protein_list, include_background=include_protein_background, **shared
        )
        return rna, proteins.to_numpy() if return_numpy and isinstance(proteins, pd.DataFrame) else proteins


def name_proteins(
    background: Callable[[], tuple[torch.Tensor, torch.Tensor]],
    log_fold: torch.Tensor,
    logits: torch.Tensor,
    log_phi: torch.Tensor,
) -> None:
    """Name, within the plate of cells, everything that can be asked of proteins; nothing is computed in training.

    Parameters
    ----------
    background
        Gives mean and standard deviation of the log background of each cell, in log counts.
    log_fold
        Log of foreground over background.
    logits
        Logit of the probability of background.
    log_phi
        Log of the inverse dispersion.
    """

    def beta() -> torch.Tensor:
        return Normal(*background()).sample().exp()

    def protein(*, total: bool, sampled: bool) -> torch.Tensor:
        level, is_background = beta(), logits.sigmoid()
        is_background = is_background.bernoulli() if sampled else is_background
        signal = (1 - is_background) * level * log_fold.exp()
        return signal + is_background * level if total else signal

    def noisy() -> torch.Tensor:
        phi = log_phi.exp()
        return (1 - logits.sigmoid().bernoulli()) * Gamma(phi, phi / (beta() * log_fold.exp())).sample()

    lazy_deterministic("background", beta, event_dim=1)
    lazy_deterministic("foreground_probability", (-logits).sigmoid, event_dim=1)
    for total, sampled in ((False, False), (False, True), (True, False), (True, True)):
        name = "protein" + "_total" * total + "_sampled" * sampled
        lazy_deterministic(name, partial(protein, total=total, sampled=sampled), event_dim=1)
    lazy_deterministic("protein_noisy", noisy, event_dim=1)
