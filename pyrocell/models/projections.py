"""Verbs of models that map cells onto places: what the cells bring there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from pyrocell.data import Cells, Dataset
from pyrocell.data.preflight import category_levels
from pyrocell.data.slots import what_there_is
from pyrocell.errors import QueryError, list_some
from pyrocell.models.asking import Question, chosen_features
from pyrocell.models.queries import Queries
from pyrocell.models.roles import needs

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Projections"]

_CELLS_AT_ONCE = 512

Labels = str | Sequence[object] | pd.Series | None


class Projections(Queries):
    """Mix-in of `CellModel`: genes and labels of cells, summed over the places that the cells are mapped to."""

    place_names: list[str]
    """Names of the places."""

    @needs("mapping_site")
    def project_genes(
        self,
        adata: AnnData | None = None,
        *,
        gene_list: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """Bring genes of the cells to the places, also genes that were not measured there.

        Parameters
        ----------
        adata
            The cells, by default those of the model; they may have other genes besides.
        gene_list
            Genes wanted; by default all that the cells have.

        Returns
        -------
        DataFrame
            Places by genes: the sum of the (scaled) counts that the cells bring.
        """
        self.require_trained()
        dataset = self.require_data(adata)
        names = dataset.features(self.feature_field)
        names = names if gene_list is None else [names[i] for i in chosen_features(gene_list, names)]
        field = self.fields[self.feature_field]
        others = self._seen_through_schema(dataset.adata, check=False, schema=self.data.over(field, names))

        def genes_of(cells: Cells) -> torch.Tensor:
            return getattr(others.cells(cells.rows.cpu().numpy()).to(self.device), field.name)

        values = self._projected(dataset, genes_of, len(names), scaled=True)
        return pd.DataFrame(values, index=self.place_names, columns=names)

    @needs("mapping_site")
    def project_cell_annotations(
        self, labels: Labels = None, adata: AnnData | None = None, *, normalize: bool = False
    ) -> pd.DataFrame:
        """Bring labels of the cells to the places.

        Parameters
        ----------
        labels
            Column of ``adata.obs``, or a label for each cell; by default the labels of the set-up.
        adata
            The cells, by default those of the model.
        normalize
            Divide each place's scores by their sum: shares of the labels among the cells there.

        Returns
        -------
        DataFrame
            Places by labels: how many cells of each label are mapped there.
        """
        self.require_trained()
        dataset = self.require_data(adata)
        names, codes = self._codes_of(labels, dataset)
        marks = torch.eye(len(names))

        def mark_of(cells: Cells) -> torch.Tensor:
            return marks[codes[cells.rows.cpu().numpy()]].to(self.device)

        scores = self._projected(dataset, mark_of, len(names), scaled=False)
        if normalize:
            scores /= scores.sum(1, keepdims=True)
        return pd.DataFrame(scores, index=self.place_names, columns=names)

    def _codes_of(self, labels: Labels, dataset: Dataset) -> tuple[list[str], np.ndarray]:
        """Return the names of the labels, and the position of each cell's in them."""
        key = self.data.setup.get("labels_key") if labels is None else labels
        if key is None:
            raise QueryError("No labels were given; name a column of adata.obs, or set up with labels_key=.")
        if not isinstance(key, str):
            where, values = "labels", key
        elif key in dataset.obs:
            where, values = f"labels={key!r}", dataset.obs[key]
        else:
            raise QueryError(
                f"labels={key!r}: adata.obs has no such column.{what_there_is(key, dataset.obs)}"
            )
        return category_levels(_label_of_each_cell(values, dataset.obs_names), where)

    def _projected(
        self, dataset: Dataset, values: Callable[[Cells], torch.Tensor], n_values: int, *, scaled: bool
    ) -> np.ndarray:
        """Sum what the cells bring to each place, shape (n_places, n_values)."""
        question = Question(self, dataset.adata, None, batch_size=_CELLS_AT_ONCE)
        factors = [
            site for site in (self.weight_site, self.scale_site if scaled else None) if site is not None
        ]
        total = torch.zeros(len(self.place_names), n_values, device=self.device)
        with self.asking():
            for cells, trace in question.draws([str(self.mapping_site), *factors], 1):
                brought = values(cells)
                for site in factors:
                    brought = brought * trace[site].value[0].reshape(len(cells), 1)
                total.addmm_(trace[str(self.mapping_site)].value[0].T, brought)
        return total.cpu().numpy()


def _label_of_each_cell(values: Sequence[object] | pd.Series, cell_names: pd.Index) -> pd.Series:
    """Return labels in the order of the cells: a Series goes by the names of the cells, all else by position."""
    if isinstance(values, pd.Series) and not isinstance(values.index, pd.RangeIndex):
        if missing := set(cell_names) - set(values.index):
            raise QueryError(
                f"labels lacks {len(missing)} of {len(cell_names)} cells by name: {list_some(sorted(missing))}. Give a "
                "label for each cell, or labels.to_numpy() if they are in the order of the cells."
            )
        return values.loc[cell_names]
    if len(values) != len(cell_names):
        raise QueryError(
            f"labels has {len(values)} entries; expected one for each of {len(cell_names)} cells."
        )
    return pd.Series(np.asarray(values, dtype=object), index=cell_names)
