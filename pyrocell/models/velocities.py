"""Verbs of models of RNA velocity: where each gene of each cell is going, since when, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch

from pyrocell.data import Cells
from pyrocell.data.filling import Filled, FilledTable, Out
from pyrocell.errors import QueryError
from pyrocell.infer.effects import AtMean
from pyrocell.models.asking import Finish, Question
from pyrocell.models.kinetic_sites import STATES
from pyrocell.models.queries import Indices, Names, Queries
from pyrocell.models.roles import needs

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Velocities", "check_choice", "columns_of"]

Statistic = Literal["mean", "max"]
Mode = Literal["spliced", "unspliced"]


class Velocities(Queries):
    """Mix-in of `CellModel`: velocity, time and states of genes; arguments as in `Queries`.

    In every verb here, ``n_samples`` is the number of posterior draws to average over; without it, the posterior means
    of the latent and of the states are taken, which has no noise.
    """

    @needs("velocity_site")
    def get_velocity(
        self,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        gene_list: Names = None,
        velo_statistic: Statistic = "mean",
        velo_mode: Mode = "spliced",
        clip: bool = True,
        n_samples: int | None = None,
        return_mean: bool = True,
        return_numpy: bool = False,
        batch_size: int | None = None,
        out: Out = None,
    ) -> FilledTable:
        """Return the velocity of each gene in each cell: change of the layer's values per unit of time.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        gene_list
            Genes wanted.
        velo_statistic
            ``"mean"`` over the four states, or ``"max"`` for that of the likeliest state.
        velo_mode
            Velocity of ``"spliced"`` or of ``"unspliced"`` RNA.
        clip
            Let no velocity take more in one unit of time than the cell has.
        n_samples, return_mean
            Draws, and whether to average over them.
        return_numpy
            Return an array instead of a table.
        out
            Where the values go: an array, the path of a zarr array, or a `pyrocell.data.Layer` or ``Obsm``.

        Returns
        -------
        DataFrame or ndarray
            Cells by genes; an array ``(n_samples, n_cells, n_genes)`` if not averaged. With ``out``, what was
            written to.
        """
        check_choice("velo_mode", velo_mode, ("spliced", "unspliced"))
        name = str(self.velocity_site) + ("" if velo_mode == "spliced" else "_unspliced")
        question = Question(self, adata, indices, features=gene_list, batch_size=batch_size)
        low, span = self._scale_of(velo_mode, question)

        def finish(found: np.ndarray, cells: Cells) -> np.ndarray:
            found = found * span
            if not clip:
                return found
            there = columns_of(getattr(cells, velo_mode), question).cpu().numpy() * span + low
            return np.maximum(found, -there)

        values = self._kinetic(
            question, name, velo_statistic, n_samples, return_mean=return_mean, finish=finish, out=out
        )
        return question.answer(values, out, return_numpy=return_numpy)

    @needs("velocity_site")
    def get_latent_time(
        self,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        gene_list: Names = None,
        time_statistic: Statistic = "mean",
        off_time: Literal["start", "end"] = "start",
        n_samples: int | None = None,
        return_mean: bool = True,
        return_numpy: bool = False,
        batch_size: int | None = None,
        out: Out = None,
    ) -> FilledTable:
        """Return the time of each gene in each cell, from 0 to ``t_max``; each gene has a clock of its own.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        gene_list
            Genes wanted.
        time_statistic
            ``"mean"`` over the four states, or ``"max"`` for that of the likeliest state.
        off_time
            Whether a gene that is steadily off counts as not begun (``"start"``, time 0) or as over (``"end"``,
            ``t_max``): the abundances alone do not tell.
        n_samples, return_mean
            Draws, and whether to average over them.
        return_numpy
            Return an array instead of a table.
        out
            Where the values go: an array, the path of a zarr array, or a `pyrocell.data.Layer` or ``Obsm``.

        Returns
        -------
        DataFrame or ndarray
            Cells by genes; an array ``(n_samples, n_cells, n_genes)`` if not averaged. With ``out``, what was
            written to.
        """
        check_choice("off_time", off_time, ("start", "end"))
        question = Question(self, adata, indices, features=gene_list, batch_size=batch_size)
        name = "latent_time" if off_time == "start" else "latent_time_end"
        values = self._kinetic(question, name, time_statistic, n_samples, return_mean=return_mean, out=out)
        return question.answer(values, out, return_numpy=return_numpy)

    @needs("velocity_site")
    def get_expression_fit(
        self,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        gene_list: Names = None,
        n_samples: int | None = None,
        return_numpy: bool = False,
        batch_size: int | None = None,
    ) -> tuple[pd.DataFrame, pd.DataFrame] | tuple[np.ndarray, np.ndarray]:
        """Return spliced and unspliced RNA as fitted, in the units of the layers; arguments as of `get_velocity`."""
        question = Question(self, adata, indices, features=gene_list, batch_size=batch_size)
        found = []
        for mode in ("spliced", "unspliced"):
            low, span = self._scale_of(mode, question)
            fit = self._kinetic(question, f"fit_{mode}", "mean", n_samples) * span + low
            found.append(fit if return_numpy else question.table(fit))
        return found[0], found[1]

    @needs("velocity_site")
    def get_state_assignment(
        self,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        gene_list: Names = None,
        hard_assignment: bool = False,
        n_samples: int | None = None,
        batch_size: int | None = None,
    ) -> tuple[np.ndarray | pd.DataFrame, list[str]]:
        """Return the probability of each state of each gene in each cell.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        gene_list
            Genes wanted.
        hard_assignment
            Return the likeliest state instead.
        n_samples
            Draws to average over.

        Returns
        -------
        tuple
            Probabilities, an array ``(n_cells, n_genes, 4)``, or a table of the likeliest state, as its position; and
            the names of the states in order.
        """
        question = Question(self, adata, indices, features=gene_list, batch_size=batch_size)
        chosen, question.features = question.features, None  # the last dimension is that of the states
        with self._decoded(n_samples):
            values = question.values("pi", n_samples or 1)
        values = values if chosen is None else values[:, chosen]
        return (question.table(values.argmax(-1)) if hard_assignment else values), list(STATES)

    @needs("velocity_site")
    def get_rates(self) -> pd.DataFrame:
        """Return the rates of each gene, for abundances on a scale from 0 to 1, per unit of time.

        Returns
        -------
        DataFrame
            Genes in rows; ``alpha`` (transcription), ``beta`` (splicing), ``gamma`` (degradation), ``switch_time``;
            with time-dependent transcription also ``alpha_start`` and ``kappa``. Only ratios of rates, and times
            relative to each other, are identified.
        """
        self.require_trained()
        with torch.no_grad():
            rates: Any = self.rates
            found = {**rates._asdict(), "switch_time": self.switch_time}
            columns = {name: value.cpu().numpy() for name, value in found.items() if value is not None}
        return pd.DataFrame(columns, index=pd.Index(self.data.names(self.feature_field)))

    @needs("velocity_site")
    def add_velocity_layers(
        self, adata: AnnData | None = None, *, n_samples: int | None = None, batch_size: int | None = None
    ) -> None:
        """Write velocities, times and rates into the data, under the names and in the units that scvelo's plots expect.

        Layers ``velocity``, ``velocity_u`` and ``fit_t``; columns ``fit_alpha``, ``fit_beta``, ``fit_gamma``,
        ``fit_t_`` (switch time), ``fit_scaling``, ``fit_u0``, ``fit_s0`` and ``velocity_genes`` of ``adata.var``. After
        it, ``scvelo.tl.velocity_graph(adata)`` and ``scvelo.pl.velocity_embedding_stream(adata)`` work as they do on
        scvelo's own velocities.

        Parameters
        ----------
        adata
            The data to write into, with the genes of the model and no others; by default the model's own.
        n_samples, batch_size
            Draws to average over, and cells worked on at once.
        """
        data = self.require_data(adata).adata
        names = self.data.names(self.feature_field)
        if not hasattr(data, "var_names") or list(data.var_names) != names:
            raise QueryError(
                f"The data must be an AnnData with the {len(names)} genes of the model, in their order; take "
                "adata[:, genes].copy()."
            )
        options: Any = {"n_samples": n_samples, "batch_size": batch_size, "return_numpy": True}
        data.layers["velocity"] = self.get_velocity(data, **options)
        data.layers["velocity_u"] = self.get_velocity(data, velo_mode="unspliced", **options)
        data.layers["fit_t"] = self.get_latent_time(data, **options)
        rates, question = self.get_rates(), Question(self, data, None)
        (low_s, span_s), (low_u, span_u) = (self._scale_of(m, question) for m in ("spliced", "unspliced"))
        data.var["fit_alpha"] = rates["alpha"].to_numpy() * span_s
        # scvelo multiplies fit_beta by fit_scaling before it solves the equations.
        data.var["fit_beta"] = rates["beta"].to_numpy() * span_s / span_u
        data.var["fit_gamma"], data.var["fit_t_"] = rates["gamma"], rates["switch_time"]
        data.var["fit_scaling"] = span_u / span_s
        data.var["fit_u0"], data.var["fit_s0"] = low_u, low_s
        data.var["velocity_genes"] = True

    @contextmanager
    def _decoded(self, n_samples: int | None) -> Iterator[None]:
        """Answer from draws, or from the posterior means of the latents."""
        with self.asking(), AtMean() if n_samples is None else nullcontext():
            yield

    def _kinetic(
        self,
        question: Question,
        name: str,
        statistic: Statistic,
        n_samples: int | None,
        *,
        return_mean: bool = True,
        finish: Finish | None = None,
        out: Out = None,
    ) -> Filled:
        check_choice("The statistic", statistic, ("mean", "max"))
        site = name if statistic == "mean" else f"{name}_max"
        with self._decoded(n_samples):
            n = 1 if n_samples is None else n_samples
            return question.values(site, n, return_mean=return_mean, finish=finish, out=out)

    def _scale_of(self, field: str, question: Question) -> tuple[np.ndarray, np.ndarray]:
        """Return smallest value and range of the genes asked for, in the units of the layer."""
        record = self.data.record(field)
        low, span = (np.asarray(record[key], dtype=np.float32) for key in ("low", "range"))
        return (low, span) if question.features is None else (low[question.features], span[question.features])


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise QueryError(f"{name} is {value!r}; expected {' or '.join(map(repr, choices))}.")


def columns_of(values: torch.Tensor, question: Question) -> torch.Tensor:
    """Return the features asked for, of values over all of them."""
    return values if question.features is None else values[..., question.features]
