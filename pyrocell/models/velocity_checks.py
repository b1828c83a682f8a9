"""Verbs that say how far to trust a velocity: by its spread over draws, and by shuffling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from pyrocell.data import Cells
from pyrocell.errors import QueryError, list_some
from pyrocell.models.asking import Question
from pyrocell.models.directions import direction_table, spread_of_directions, two_sample_t
from pyrocell.models.queries import Indices, Names
from pyrocell.models.roles import needs
from pyrocell.models.velocities import Velocities, columns_of

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["VelocityChecks"]

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
        n_samples: int = 50,
        batch_size: int | None = None,
    ) -> tuple[pd.DataFrame, np.ndarray]:
        """Say how much the direction of each cell's velocity varies over posterior draws.

        Each draw, centred over genes, is compared with the mean over the draws by the cosine of the angle between them.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        gene_list
            Genes that span the space.
        n_samples
            Draws of each cell.

        Returns
        -------
        tuple
            A table with a row for each cell: ``directional_variance`` and ``directional_difference`` (95 % minus 5 %
            quantile) of the angle in radians, ``directional_cosine_sim_variance``, ``_difference`` and ``_mean``; and
            the cosines, an array ``(n_samples, n_cells)``.
        """
        if n_samples < 2:
            raise QueryError(f"n_samples is {n_samples}; expected at least 2 draws to compare.")
        question = Question(self, adata, indices, features=gene_list, batch_size=batch_size)
        _, span = self._scale_of("spliced", question)
        unit = torch.as_tensor(span, device=self.device)
        site = str(self.velocity_site)
        with self.asking():
            cosines = [
                spread_of_directions(columns_of(trace[site].value, question) * unit)
                for _, trace in question.draws([site], n_samples)
            ]
        cosine = torch.cat(cosines, dim=1).cpu().numpy()
        return direction_table(cosine, question.dataset.obs_names[question.rows]), cosine

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


def _shuffled(values: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Shuffle each gene over the cells, independently of the others."""
    return torch.from_numpy(rng.permuted(values.cpu().numpy(), axis=0)).to(values.device)
