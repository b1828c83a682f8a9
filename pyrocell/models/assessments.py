"""Verbs that say how well a fitted model explains the data, and what it predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyrocell.infer.criticism import PredictiveCheck, check_predictions
from pyrocell.infer.draws import SiteDraws
from pyrocell.infer.elbo import ElboTerms
from pyrocell.infer.likelihood import log_marginal
from pyrocell.models.asking import Question
from pyrocell.models.queries import Indices, Names, Queries

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Assessments"]


class Assessments(Queries):
    """Mix-in of `CellModel`: likelihoods and predictions; arguments as in `Queries`."""

    def posterior_predictive_sample(
        self,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        n_samples: int = 1,
        gene_list: Names = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Draw new data for each cell from the fitted model.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        n_samples
            Number of draws.
        gene_list
            Features wanted.

        Returns
        -------
        ndarray
            Counts, shape ``(n_cells, n_features)``, or ``(n_samples, n_cells, n_features)`` for more than one draw.
        """
        question = Question(self, adata, indices, features=gene_list, batch_size=batch_size)
        with self.asking():
            return question.array(
                self.observed_site, lambda draws: draws.predict(), n_samples=n_samples, return_mean=False
            )

    def posterior_predictive_check(
        self,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        n_samples: int = 25,
        batch_size: int | None = None,
    ) -> PredictiveCheck:
        """Compare the data with what the fitted model predicts: mean, variance, zero fraction, calibration.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        n_samples
            Predictive draws of each cell.

        Returns
        -------
        PredictiveCheck
            Numbers by feature, a summary, and what `pyrocell.plotting.predictive_check` draws.
        """
        question = Question(self, adata, indices, batch_size=batch_size)
        with self.asking():
            blocks = (
                (draws.value[0], draws.predict()) for draws in question.draws(self.observed_site, n_samples)
            )
            return check_predictions(blocks, feature_names=question.feature_names)

    def get_likelihood_parameters(
        self,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        gene_list: Names = None,
        n_samples: int = 1,
        batch_size: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Return the parameters of the likelihood of each cell and feature, averaged over posterior draws.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        gene_list
            Features wanted.
        n_samples
            Posterior draws of each cell.

        Returns
        -------
        dict of ndarray
            Each ``(n_cells, n_features)``: ``mean`` and, as the likelihood has them, ``theta`` (inverse dispersion) and
            ``dropout`` (probability of a structural zero).
        """
        question = Question(self, adata, indices, features=gene_list, batch_size=batch_size)
        with self.asking():
            return question.arrays(self.observed_site, _likelihood_parameters, n_samples=n_samples)

    def get_elbo(
        self,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        return_mean: bool = True,
        batch_size: int | None = None,
    ) -> float | np.ndarray:
        """Return the evidence lower bound (higher is better), in nats per cell, with KL weight 1.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        return_mean
            The mean over cells, else one number a cell (global terms divided evenly).

        Returns
        -------
        float or ndarray
        """
        values = self._per_cell(adata, indices, batch_size, _negative_elbo)
        return float(-values.mean()) if return_mean else -values

    def get_reconstruction_error(
        self,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        return_mean: bool = True,
        batch_size: int | None = None,
    ) -> float | np.ndarray:
        """Return the expected negative log-likelihood (lower is better), in nats per cell.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        return_mean
            The mean over cells, else one number a cell.

        Returns
        -------
        float or ndarray
        """
        values = self._per_cell(adata, indices, batch_size, lambda terms: terms.reconstruction)
        return float(values.mean()) if return_mean else values

    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        n_samples: int = 1000,
        return_mean: bool = True,
        batch_size: int | None = None,
    ) -> float | np.ndarray:
        """Return the log marginal likelihood by importance sampling (higher is better), in nats per cell.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        n_samples
            Draws of each cell; the estimate grows towards the truth with more.
        return_mean
            The mean over cells, else one number a cell.

        Returns
        -------
        float or ndarray
        """
        question = Question(self, adata, indices, batch_size=batch_size)
        with self.asking():
            drawer, size = self.drawer(), question.block_size(20)
            values = [
                log_marginal(drawer, cells, n_samples=n_samples, n_per_pass=20).numpy()
                for _, cells in question.blocks(size)
            ]
        return float(np.concatenate(values).mean()) if return_mean else np.concatenate(values)

    def _per_cell(
        self,
        adata: AnnData | None,
        indices: Indices,
        batch_size: int | None,
        term: Callable[[Any], torch.Tensor],
    ) -> np.ndarray:
        question = Question(self, adata, indices, batch_size=batch_size)
        with self.asking():
            elbo = self.elbo()
            return np.concatenate([term(elbo(cells)).cpu().numpy() for _, cells in question.blocks()])


def _negative_elbo(terms: ElboTerms) -> torch.Tensor:
    return terms.reconstruction + terms.kl_local + terms.kl_global


def _likelihood_parameters(draws: SiteDraws) -> dict[str, torch.Tensor]:
    fn = draws.fn
    table = getattr(fn, "parameters_table", None)  # count distributions name theirs
    table = {"mean": fn.mean, "variance": fn.variance} if table is None else table
    shape = fn.batch_shape + fn.event_shape
    return {"dropout" if name == "zi_probs" else name: value.expand(shape) for name, value in table.items()}
