"""Data seen the other way round, for models whose rows are features and whose columns are cells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from pyrocell.data.base import Field
from pyrocell.data.matrices import MatrixReader, by_column
from pyrocell.data.slots import Slots
from pyrocell.errors import DataError, list_some

__all__ = ["TurnedSlots", "as_read", "rows_are_features"]


def rows_are_features(fields: Mapping[str, Field]) -> bool:
    """Whether a model with these fields reads features row by row, each with its value in every cell."""
    return any(field.by_feature for field in fields.values())


def as_read(slots: Slots, fields: Mapping[str, Field]) -> Slots:
    """Return data as the fields of a model read them: turned round, where their rows are features."""
    if not rows_are_features(fields):
        return slots
    with_features = next(name for name, field in fields.items() if field.has_features)
    return TurnedSlots(slots.of(with_features))


class TurnedSlots(Slots):
    """Data with features in rows and cells in columns; the AnnData itself has them as everybody does.

    Parameters
    ----------
    by_cell
        The same data, cells in rows.
    """

    words = ("feature", "cell")
    names_in = ("var_names", "obs_names")

    def __init__(self, by_cell: Slots) -> None:
        super().__init__(by_cell.adata)
        if by_cell.present is not None:
            absent = by_cell.cell_names[~by_cell.present]
            raise DataError(
                f"{len(absent)} cells have no {by_cell.modality!r}: {list_some(absent)}. This model needs the values "
                f"of every cell: take the cells that have them, mdata[{by_cell.spelled}.obs_names].copy()."
            )
        self.by_cell = by_cell
        self.spelled, self.modality = by_cell.spelled, by_cell.modality

    @property
    def cell_names(self) -> pd.Index:
        """Names of the rows, which are features."""
        return self.by_cell.feature_names

    @property
    def feature_names(self) -> pd.Index:
        """Names of the columns, which are cells."""
        return self.by_cell.cell_names

    @property
    def obs(self) -> pd.DataFrame:
        """All columns about the rows: ``adata.var``."""
        return self.adata.var

    def varm(self, key: str, argument: str) -> Any:
        """Return an entry of ``adata.varm``; ``argument`` of the set-up named it."""
        return self._entry("varm", key, argument)

    def has_matrix(self, layer: str | None, argument: str) -> None:
        """Raise a SetupError if there is no such matrix."""
        self.by_cell.has_matrix(layer, argument)

    def matrix(self, layer: str | None, columns: np.ndarray | None = None) -> MatrixReader:
        """Open ``adata.X`` or a layer for reading by feature, with the cells asked for."""
        return by_column(self.by_cell.matrix(layer), columns)
