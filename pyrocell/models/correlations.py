"""The verb that correlates features over denoised cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from pyrocell.errors import QueryError
from pyrocell.models.asking import Question
from pyrocell.models.denoised import correlation, denoised_rows, some_rows
from pyrocell.models.given import as_list
from pyrocell.models.queries import Indices, Queries
from pyrocell.models.roles import needs

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Correlations"]

_MOST_ROWS = 10_000  # of draws that are correlated at once


class Correlations(Queries):
    """Mix-in of `CellModel`: how features go together; arguments as in `Queries`."""

    @needs("expression_site")
    def get_feature_correlation_matrix(
        self,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        transform_batch: str | Sequence[str] | None = None,
        n_samples: int = 10,
        rna_size_factor: float = 1000.0,
        correlation_type: Literal["spearman", "pearson"] = "spearman",
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Correlate features over denoised cells, with the noise between cells that dispersion stands for.

        Each draw of a cell gives a gamma draw with mean ``rna_size_factor * rho`` and shape theta; draws of all cells
        are the rows that are correlated. At most 10,000 rows, of cells chosen at random, so that memory is bounded. A
        model with several observed sites gives all features side by side, drawn from the same latents.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        transform_batch
            Decode as if from this batch; correlations are averaged over several.
        n_samples
            Draws of each cell.
        rna_size_factor
            Size of the cells in counts.
        correlation_type
            ``"spearman"`` or ``"pearson"``.

        Returns
        -------
        DataFrame
            Features by features.
        """
        if correlation_type not in ("spearman", "pearson"):
            raise QueryError(f"correlation_type is {correlation_type!r}; expected 'spearman' or 'pearson'.")
        targets = [transform_batch] if transform_batch is None else as_list("batch", transform_batch)
        sites = [self.denoised_sites.get(field, site) for site, field in self.observed_sites.items()]
        sizes = {site: rna_size_factor if site in self.observed_sites else None for site in sites}
        matrices = []
        for target in targets:
            given = None if target is None else {"batch": target}
            question = Question(self, adata, indices, given=given, batch_size=batch_size)
            with self.asking():
                question.rows = some_rows(question.rows, max(1, _MOST_ROWS // n_samples), self.stream.seed)
                rows = [
                    np.concatenate([denoised_rows(trace[site], sizes[site]) for site in sites], axis=1)
                    for _, trace in question.draws(sites, n_samples)
                ]
            matrices.append(correlation(np.concatenate(rows), correlation_type))
        names = self.observed_names
        return pd.DataFrame(np.mean(matrices, axis=0), index=names, columns=names)
