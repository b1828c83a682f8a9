"""Verbs that say how far to trust a velocity: by its spread over draws, and by shuffling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from pyrocell.data import Cells
from pyrocell.data.velocity import neighbor_graph
from pyrocell.errors import QueryError, list_some
from pyrocell.models.asking import Question
from pyrocell.models.directions import direction_table, expected_ways, spread_of_directions, two_sample_t
from pyrocell.models.queries import Indices, Names
from pyrocell.models.roles import needs
from pyrocell.models.velocities import Velocities, check_choice, columns_of

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["VelocityChecks"]

Kind = Literal["intrinsic", "extrinsic"]

_CELLS_OF_A_LABEL = 200


class VelocityChecks(Velocities):
    """Mix-in of `CellModel`: checks of velocities; arguments as in `Velocities`."""

    @needs("velocity_site")
    def get_directional_uncertainty(
        self,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        gene_list: Names = None,
        kind: Kind = "intrinsic",
        neighbors_key: str | None = None,
        n_samples: int = 50,
        batch_size: int | None = None,
    ) -> tuple[pd.DataFrame, np.ndarray]:
        """Say how much the direction that each cell goes in varies over posterior draws.

        Each draw, centred over genes, is compared with the mean over the draws by the cosine of the angle between them.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        gene_list
            Genes that span the space.
        kind
            ``"intrinsic"``: the direction of the velocity itself. ``"extrinsic"``: the way that the cell is expected to
            go, when it moves to its neighbours with probabilities that are a softmax of the cosine between the velocity
            and the way there, less the way to their mean. It is large where neighbours lie in no direction that the
            velocity tells apart.
        neighbors_key
            For ``"extrinsic"``: graph of neighbours, the ``key_added`` of ``scanpy.pp.neighbors``. Neighbours may be
            cells that were not asked for.
        n_samples
            Draws of each cell.

        Returns
        -------
        tuple
            A table with a row for each cell: ``directional_variance`` and ``directional_difference`` (95 % minus 5 %
            quantile) of the angle in radians, ``directional_cosine_sim_variance``, ``_difference`` and ``_mean``; and
            the cosines, an array ``(n_samples, n_cells)``.

        Raises
        ------
        QueryError
            If an option is impossible, or a cell has no neighbour.
        SetupError
            If the graph of neighbours is not there.
        """
        check_choice("kind", kind, get_args(Kind))
        if n_samples < 2:
            raise QueryError(f"n_samples is {n_samples}; expected at least 2 draws to compare.")
        question = Question(self, adata, indices, features=gene_list, batch_size=batch_size)
        near = _neighbors(question, neighbors_key) if kind == "extrinsic" else None
        with self.asking():
            cosines = [
                spread_of_directions(
                    draws if near is None else expected_ways(draws, *self._ways(question, cells, near))
                )
                for cells, draws in self._velocity_draws(question, n_samples)
            ]
        cosine = torch.cat(cosines, dim=1).cpu().numpy()
        return direction_table(cosine, question.dataset.obs_names[question.rows]), cosine

    def _velocity_draws(self, question: Question, n_samples: int) -> Iterator[tuple[Cells, torch.Tensor]]:
        """Yield cells and draws of their velocities in the unit of the layer, shape (n_samples, n_cells, n_genes)."""
        site, unit = str(self.velocity_site), self._unit(question)
        for cells, trace in question.draws([site], n_samples):
            yield cells, columns_of(trace[site].value, question) * unit

    def _unit(self, question: Question) -> torch.Tensor:
        """Return what the scaled values of the genes asked for are multiplied by, to be in the unit of the layer."""
        return torch.as_tensor(self._scale_of("spliced", question)[1], device=self.device)

    def _ways(
        self, question: Question, cells: Cells, near: sparse.csr_matrix
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ways from cells to their neighbours, and which of them there are; see `expected_ways`."""
        rows = cells.rows.cpu().numpy()
        padded = _padded(near, rows)
        there, which = np.unique(padded, return_inverse=True)
        others = columns_of(question.dataset.cells(there).to(self.device).spliced, question)
        others = others[torch.from_numpy(which.reshape(padded.shape)).to(self.device)]
        ways = (others - columns_of(cells.spliced, question).unsqueeze(1)) * self._unit(question)
        return ways, torch.from_numpy(padded != rows[:, None]).to(self.device)

    @needs("velocity_site")
    def get_permutation_scores(
        self, labels_key: str, adata: AnnData | None = None, *, n_samples: int = 10
    ) -> pd.DataFrame:
        """Say for each gene how much worse cells are fitted when its values are shuffled within a cell type.

        Spliced and unspliced RNA are shuffled independently of each other. The score is the t statistic of the absolute
        errors of shuffled against true data. A gene with no dynamics within the type has a score around 0; a gene whose
        largest score is low should not be trusted.

        Parameters
        ----------
        labels_key
            Column of ``adata.obs`` with cell types; at most 200 cells of each are looked at.
        adata
            Which cells.
        n_samples
            Draws that a fit is averaged over.

        Returns
        -------
        DataFrame
            Genes by cell types.
        """
        question = Question(self, adata, None)
        if labels_key not in question.dataset.obs:
            raise QueryError(
                f"adata.obs has no column {labels_key!r}; it has {list_some(question.dataset.obs.columns, 20)}."
            )
        labels, scores = question.dataset.obs[labels_key].astype(str).to_numpy(), {}
        rng = np.random.default_rng(self.stream.seed)
        for label in sorted(set(labels)):
            rows = np.flatnonzero(labels == label)
            rows = np.sort(rng.permutation(rows)[:_CELLS_OF_A_LABEL])
            if len(rows) < 2:
                raise QueryError(f"{label!r} has one cell only, which cannot be shuffled; leave it out.")
            cells = question.dataset.cells(rows).to(self.device)
            shuffled = {name: _shuffled(getattr(cells, name), rng) for name in ("spliced", "unspliced")}
            errors = [self._errors(one, n_samples) for one in (cells.replace(**shuffled), cells)]
            scores[label] = two_sample_t(*errors)
        return pd.DataFrame(scores, index=pd.Index(question.feature_names))

    def _errors(self, cells: Cells, n_samples: int) -> np.ndarray:
        """Return the absolute errors of both fits, on the scale from 0 to 1, shape (n_cells, n_genes)."""
        with self.asking():
            [trace] = self.drawer().block(cells, ["fit_spliced", "fit_unspliced"], n_samples=n_samples)
        parts = [
            (trace[f"fit_{name}"].value.mean(0) - getattr(cells, name)).abs()
            for name in ("spliced", "unspliced")
        ]
        return (parts[0] + parts[1]).cpu().numpy()


def _neighbors(question: Question, neighbors_key: str | None) -> sparse.csr_matrix:
    """Return the graph of neighbours of all cells, after a look at those that were asked for."""
    near = neighbor_graph(question.dataset.adata, neighbors_key)
    alone = question.rows[
        np.diff(near.indptr)[question.rows] < 2
    ]  # with one neighbour every way is the same: none
    if len(alone):
        raise QueryError(
            f"{len(alone)} cells have fewer than two neighbours to choose from: "
            f"{list_some(question.dataset.obs_names[alone])}. Leave them out, or ask for kind='intrinsic'."
        )
    return near


def _padded(near: sparse.csr_matrix, rows: np.ndarray) -> np.ndarray:
    """Return the neighbours of each cell; one with fewer of them than others gets itself in their place."""
    of_cell = [near.indices[near.indptr[row] : near.indptr[row + 1]] for row in rows]
    size = max(map(len, of_cell))
    padded = [
        np.pad(n, (0, size - len(n)), constant_values=row) for n, row in zip(of_cell, rows, strict=True)
    ]
    return np.stack(padded)


def _shuffled(values: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Shuffle each gene over the cells, independently of the others."""
    return torch.from_numpy(rng.permuted(values.cpu().numpy(), axis=0)).to(values.device)
