"""Draws of one site for a population of cells: what the differential engine asks of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import sparse

from pyrocell.data import Cells
from pyrocell.distributions import NonZeros
from pyrocell.infer.comparison import Comparison
from pyrocell.infer.likelihood import log_importance, log_marginal
from pyrocell.infer.raw_summary import RawSummary, summarise_comparisons
from pyrocell.infer.scale_sampler import PopulationDraws
from pyrocell.models.asking import Question
from pyrocell.models.chosen import measured_in

if TYPE_CHECKING:
    from pyrocell.models.queries import Queries

__all__ = ["PopulationSampler", "raw_summaries"]

_N_ANCHORS = 128
_N_EVIDENCE_DRAWS = 100


class PopulationSampler:
    """One posterior draw of a site over features for each row asked for.

    Parameters
    ----------
    question
        The data.
    model
        The model asked.
    site
        A site over features.
    """

    def __init__(self, question: Question, model: Queries, site: str) -> None:
        self.question, self.model, self.site = question, model, site
        self.feature_names = question.feature_names

    def draw(
        self,
        rows: np.ndarray,
        *,
        given: Mapping[str, object] | None,
        seed: int,
        weights_from: np.ndarray | None = None,
    ) -> PopulationDraws:
        """Draw; see `pyrocell.infer.scale_sampler.ScaleSampler`."""
        question = self.question.about(rows, given)
        question.require_one_circumstance()
        latents: dict[str, list[torch.Tensor]] = {}
        values: torch.Tensor | None = None
        with self.model.asking(seed):
            wanted = [] if weights_from is None else self._latent_sites(rows)
            for place, _, _, traces in question.traces([self.site, *wanted], 1):
                part = traces[0][self.site].value[0]
                values = part.new_empty((len(rows), part.shape[-1])) if values is None else values
                values[place] = part
                for name in wanted:
                    latents.setdefault(name, []).append(traces[0][name].value[0])
            assert values is not None
            if weights_from is None:
                return PopulationDraws(values)
            joined = {name: torch.cat(parts) for name, parts in latents.items()}
            return PopulationDraws(values, self._log_weights(joined, weights_from, seed))

    def _latent_sites(self, rows: np.ndarray) -> list[str]:
        cells = next(self.question.about(rows[:1]).blocks())[1]
        return list(self.model.drawer().guide_latents(cells))

    def _log_weights(self, latents: dict[str, torch.Tensor], cells: np.ndarray, seed: int) -> torch.Tensor:
        drawer = self.model.drawer()
        chosen = np.random.default_rng(seed).permutation(cells)[:_N_ANCHORS]

        def anchors() -> Iterator[tuple[Cells, torch.Tensor]]:
            for _, cell in self.question.about(chosen).blocks(1):
                yield cell, log_marginal(drawer, cell, n_samples=_N_EVIDENCE_DRAWS)

        population = (block for _, block in self.question.about(cells).blocks(128))
        return log_importance(drawer, latents, anchors(), population)


def raw_summaries(
    question: Question, comparisons: Sequence[Comparison]
) -> list[tuple[RawSummary, RawSummary]]:
    """Sum the raw values of both sides of every comparison, over the cells in which each feature was measured."""
    raw = summarise_comparisons(_blocks(question), comparisons)
    if measured_in(next(question.blocks(1))[1], question.field) is None:
        return raw
    measured = summarise_comparisons(_blocks(question, mask=True), comparisons)
    return [
        (replace(one, n=n_one.total), replace(two, n=n_two.total))
        for (one, two), (n_one, n_two) in zip(raw, measured, strict=True)
    ]


def _blocks(question: Question, *, mask: bool = False) -> Iterator[tuple[np.ndarray, Any, np.ndarray | None]]:
    """Yield rows, sparse values (or what was measured of them) and library sizes of the cells in blocks."""
    field = question.field
    library = None if mask else getattr(question.model.fields.get(field), "library", None)
    for _, cells in question.blocks():
        found: Any = measured_in(cells, field) if mask else getattr(cells, field)
        values = found.cpu()
        seen = NonZeros.of(values)
        columns = (seen.values.numpy(), (seen.rows.numpy(), seen.cols.numpy()))
        counts = sparse.csr_matrix(columns, shape=tuple(values.shape))
        size = None if library is None else getattr(cells, library).squeeze(-1).cpu().numpy()
        yield cells.rows.cpu().numpy(), counts, size
