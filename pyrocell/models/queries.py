"""Verbs that ask a fitted model about cells; each names a site and leaves the work to the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from pyrocell.data.filling import Filled, FilledTable, Out
from pyrocell.errors import QueryError
from pyrocell.infer.draws import SiteDraws
from pyrocell.infer.streams import seeded
from pyrocell.models.asking import Question
from pyrocell.models.chosen import is_latent_size
from pyrocell.models.core import ModelCore
from pyrocell.models.roles import needs

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Queries"]

Indices = Sequence[int] | np.ndarray | None
Names = Sequence[str] | None


class Queries(ModelCore):
    """Mix-in of `CellModel`: latents, expression, likelihoods, predictions.

    In every verb, ``adata`` is data to ask about (default: the model's own), aligned to the model by feature name;
    ``indices`` are the cells wanted, as positions or a boolean mask, and results keep their order; ``batch_size`` is
    the number of cells worked on at once (default: chosen to fit the processor's cache). Draws come from the model's
    seed, so that the same question has the same answer. Verbs with ``out`` write their answer there, a block of cells
    at a time, with the same values; what was written to is returned.
    """

    @contextmanager
    def asking(self, seed: int | None = None) -> Iterator[None]:
        """Enter the state in which questions are answered: trained, evaluating, seeded, nothing of it left after."""
        self.require_trained()
        self.module.eval()
        with self.running(), seeded(self.stream.seed if seed is None else seed), torch.no_grad():
            yield

    def posterior(
        self,
        site: str,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        given: Mapping[str, Any] | None = None,
        features: Names = None,
        n_samples: int = 1,
        return_mean: bool = True,
        batch_size: int | None = None,
        seed: int | None = None,
        out: Out = None,
    ) -> Filled:
        """Draw any named site of the model, for cells as they are or as they would be.

        Parameters
        ----------
        site
            Name of a sample or deterministic site, such as ``"z"`` or ``"rho"``.
        adata, indices, batch_size
            Which cells, and how many at once.
        given
            Fields to set in the model, such as ``{"batch": "lane1"}``. A list of values means the average over them.
            The guide still sees each cell as it was measured.
        features
            Names of the features wanted, for sites over features; only these are computed.
        n_samples
            Number of draws of each cell.
        return_mean
            Whether to average over the draws.
        seed
            Seed of the draws instead of the model's.
        out
            Where the values go: an array, the path of a zarr array, or a `pyrocell.data.Layer` or ``Obsm``.

        Returns
        -------
        ndarray
            Shape ``(n_cells, ...)`` if averaged or drawn once, else ``(n_samples, n_cells, ...)``. A site with one
            value for all cells has no cell dimension. With ``out``, what was written to.

        Raises
        ------
        NotTrainedError, QueryError
            If the model is not trained; if a site, feature, category or cell does not exist.
        """
        question = Question(self, adata, indices, given=given, batch_size=batch_size)
        question.over(self._field_of(site, features), features)
        with self.asking(seed):
            return question.values(site, n_samples, return_mean=return_mean, out=out)

    def _field_of(self, site: str, features: Names) -> str:
        """Return the field that a site is over, by its role or else by the names of the features wanted."""
        known = {**self.expression_sites, **self.observed_sites}
        if site not in known and features is not None:
            for field in self.observed_sites.values():
                if set(features) <= set(self.data.names(field)):
                    return field
        return known.get(site, self.feature_field)

    @needs("latent_site")
    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        give_mean: bool = True,
        return_dist: bool = False,
        n_samples: int = 5000,
        batch_size: int | None = None,
        out: Out = None,
    ) -> Filled | tuple[np.ndarray, np.ndarray]:
        """Return the latent of each cell.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        give_mean
            The posterior mean if true, else one draw.
        return_dist
            Return mean and variance of the Gaussian posterior instead.
        n_samples
            Draws that the mean is taken over where it has no closed form (a logistic-normal latent).
        out
            Where the latent goes: an array, the path of a zarr array, or a `pyrocell.data.Obsm`. Not with
            ``return_dist``.

        Returns
        -------
        ndarray or tuple of ndarray
            Shape ``(n_cells, n_latent)``, or mean and variance of that shape each. With ``out``, what was written to.
        """
        question, site = Question(self, adata, indices, batch_size=batch_size), str(self.latent_site)
        if return_dist:
            if out is not None:
                raise QueryError(
                    "return_dist=True gives two arrays, which out cannot take; leave one of them out."
                )
            with self.asking():
                moments = question.latent_moments(site)
            if moments is None:
                raise QueryError(
                    f"The posterior of {site!r} is no Gaussian; draw it with posterior({site!r}, n_samples=...)."
                )
            return moments
        with self.asking():
            mean = question.latent_mean(site, out) if give_mean else None
            n_draws = n_samples if give_mean else 1
            return question.values(site, n_draws, out=out) if mean is None else mean

    @needs("expression_site")
    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        transform_batch: str | Sequence[str] | None = None,
        gene_list: Names = None,
        library_size: float | Literal["latent"] = 1.0,
        n_samples: int = 1,
        return_mean: bool = True,
        return_numpy: bool = False,
        batch_size: int | None = None,
        out: Out = None,
    ) -> FilledTable:
        """Return the denoised expression of each cell.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        transform_batch
            Decode as if from this batch, or as the average over several; by default each cell's own.
        gene_list
            Genes wanted; only these are computed.
        library_size
            Multiply by this number of counts: 1 gives fractions, 1e4 counts in ten thousand; ``"latent"`` takes each
            cell's own size, which gives expected counts.
        n_samples
            Posterior draws of each cell.
        return_mean
            Whether to average over the draws.
        return_numpy
            Return an array instead of a table.
        out
            Where the values go: an array, the path of a zarr array, or a `pyrocell.data.Layer` or ``Obsm``.

        Returns
        -------
        DataFrame or ndarray
            Cells by genes, with names; an array ``(n_samples, n_cells, n_genes)`` if not averaged. With ``out``, what
            was written to.
        """
        given = None if transform_batch is None else {"batch": transform_batch}
        question = Question(self, adata, indices, given=given, features=gene_list, batch_size=batch_size)
        latent_size = is_latent_size(library_size)
        if self.expression_effect == "difference" and library_size != 1:
            raise QueryError(
                "The values of this model are no fractions of a library; leave library_size out."
            )
        with self.asking():
            values = question.array(
                str(self.expression_site),
                lambda draws: draws.value,
                n_samples=n_samples,
                return_mean=return_mean,
                scale=self._library_of if latent_size else None,
                beside=[self.library_site] if latent_size and self.library_site else [],
                finish=None if latent_size else lambda found, _: found * np.float32(library_size),
                out=out,
            )
        return question.answer(values, out, return_numpy=return_numpy)

    def _library_of(self, cells: Any, trace: Mapping[str, SiteDraws]) -> torch.Tensor:
        """Return the size of each cell in counts, shape ``(..., B, 1)``."""
        if self.library_site is not None:
            return trace[self.library_site].value
        size: torch.Tensor = getattr(cells, self.fields[self.feature_field].library)
        return size

    @property
    def observed_names(self) -> list[str]:
        """Names of the features of all observed sites, one site after the other."""
        return [name for field in self.observed_sites.values() for name in self.data.names(field)]

    @needs("library_site")
    def get_latent_library_size(
        self, adata: AnnData | None = None, *, indices: Indices = None, batch_size: int | None = None
    ) -> np.ndarray:
        """Return the expected size of each cell in counts, shape ``(n_cells, 1)``.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.

        Returns
        -------
        ndarray
            Posterior mean of the size where it is latent, else the size that the model uses.
        """
        question = Question(self, adata, indices, batch_size=batch_size)
        with self.asking():
            moments = question.latent_moments("library")
            if moments is not None:  # log-normal
                return np.exp(moments[0] + moments[1] / 2)
            return question.values(str(self.library_site))
