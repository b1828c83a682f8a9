"""Verbs that say how well a fitted model explains the data, and what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyrocell.infer.criticism import PredictiveAccumulator, PredictiveCheck
from pyrocell.infer.draws import SiteDraws
from pyrocell.infer.elbo import ElboTerms
from pyrocell.infer.likelihood import log_marginal
from pyrocell.models.asking import Question
from pyrocell.models.chosen import chosen_features, measured_in
from pyrocell.models.queries import Indices, Names, Queries

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Assessments"]

Block = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


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
            Features wanted, of whatever kind.

        Returns
        -------
        ndarray
            Counts, shape ``(n_cells, n_features)``, or ``(n_samples, n_cells, n_features)`` for more than one draw. A
            model with several observed sites gives their features side by side, named ``observed_names``.
        """
        question = Question(self, adata, indices, batch_size=batch_size)
        names, sites = self.observed_names, list(self.observed_sites)
        wanted = range(len(names)) if gene_list is None else chosen_features(gene_list, names)
        result = np.zeros((n_samples, len(question.rows), len(wanted)), dtype=np.float32)
        with self.asking():
            for place, which, _, [trace] in question.traces(sites, n_samples):
                drawn = torch.cat([trace[site].predict() for site in sites], dim=-1)
                result[which, place] = drawn[..., list(wanted)].cpu().numpy()
        return result[0] if n_samples == 1 else result

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
            Numbers by feature, a summary, and what `pyrocell.plotting.predictive_check` draws. A model with several
            observed sites has all features in it, and each kind by itself in ``parts``.
        """
        question = Question(self, adata, indices, batch_size=batch_size)
        parts = {
            field: PredictiveAccumulator(self.data.names(field)) for field in self.observed_sites.values()
        }
        whole = PredictiveAccumulator(self.observed_names)
        with self.asking():
            for cells, trace in question.draws(list(self.observed_sites), n_samples):
                blocks = [
                    (trace[site].value[0], trace[site].predict(), measured_in(cells, field))
                    for site, field in self.observed_sites.items()
                ]
                for part, block in zip(parts.values(), blocks, strict=True):
                    part.update(*block)
                if len(parts) > 1:
                    whole.update(*_side_by_side(blocks))
        results = {field: part.result() for field, part in parts.items()}
        return results[self.feature_field] if len(parts) == 1 else replace(whole.result(), parts=results)

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
            ``dropout`` (probability of a structural zero). Those of a second observed site have its field in front
            (``proteins_mean``), and all its features.
        """
        question = Question(self, adata, indices, features=gene_list, batch_size=batch_size)
        found: dict[str, np.ndarray] = {}
        for site, field in self.observed_sites.items():
            if found:
                question.over(field)
            with self.asking():
                table = question.arrays(site, _likelihood_parameters, n_samples=n_samples)
            found |= {f"{field}_{name}" if found else name: value for name, value in table.items()}
        return found

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


def _side_by_side(blocks: list[Block]) -> Iterator[torch.Tensor]:
    """Join observed values, draws, and what was measured, over the features of all sites."""
    complete = [
        (value, drawn, torch.ones_like(value, dtype=torch.bool) if measured is None else measured)
        for value, drawn, measured in blocks
    ]
    return (torch.cat(tensors, dim=-1) for tensors in zip(*complete, strict=True))


def _negative_elbo(terms: ElboTerms) -> torch.Tensor:
    return terms.reconstruction + terms.kl_local + terms.kl_global


def _likelihood_parameters(draws: SiteDraws) -> dict[str, torch.Tensor]:
    shape = draws.fn.batch_shape + draws.fn.event_shape
    return {
        "dropout" if name == "zi_probs" else name: value.expand(shape)
        for name, value in draws.parameters.items()
    }
