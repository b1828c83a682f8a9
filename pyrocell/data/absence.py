"""Cells that lack a modality: said explicitly, never inferred from zeros."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import pandas as pd

from pyrocell.data.base import Argument, Setup
from pyrocell.data.slots import Slots
from pyrocell.errors import DataError, list_some

__all__ = ["MayBeAbsent", "mask_arguments", "measured_cells", "require_measured"]


class MayBeAbsent(Protocol):
    """Field of counts that cells may lack, if the model can do without."""

    name: str
    absent_ok: bool


def mask_arguments(field: MayBeAbsent) -> list[Argument]:
    """Return the argument that says which cells were measured, where the model can do with cells that were not."""
    doc = (
        f"Column of ``adata.obs`` with a boolean for each cell: True where its {field.name} were measured. Left out: "
        "everywhere. Zeros are measurements, never taken for absence."
    )
    return [Argument(_argument(field), "str | None", doc)] if field.absent_ok else []


def measured_cells(field: MayBeAbsent, slots: Slots, setup: Setup) -> np.ndarray | None:
    """Return in which cells a field was measured, bool, shape (n_cells,); None for all.

    Raises
    ------
    DataError
        If cells lack the field and the model cannot do without.
    """
    measured = slots.present
    key = setup[_argument(field)] if field.absent_ok else None
    if key is not None:
        said = _booleans(
            slots.column(key, _argument(field)), f"{_argument(field)}: {slots.column_place(key)}"
        )
        measured = said if measured is None else measured & said
    if measured is None or measured.all():
        return None
    if not field.absent_ok:
        absent = slots.cell_names[~measured]
        raise DataError(
            f"{len(absent)} cells have no {slots.modality!r}: {list_some(absent)}. This model needs the {field.name} "
            f"of every cell: take the cells that have them, mdata[{slots.spelled}.obs_names].copy()."
        )
    return measured


def require_measured(field: MayBeAbsent, totals: np.ndarray) -> None:
    """Raise a DataError if every total is NaN: nothing can be learned of what no cell has."""
    if np.isnan(totals).all():
        raise DataError(
            f"The {field.name} were measured in no cell. In {_argument(field)}, True means measured; turn it round "
            "(~) if it was meant otherwise."
        )


def _argument(field: MayBeAbsent) -> str:
    return f"{field.name}_mask_key"


def _booleans(column: pd.Series, where: str) -> np.ndarray:
    """Read a column of true and false.

    Raises a DataError if it holds anything else, or misses values.
    """
    if column.isna().any() or not set(column.unique()) <= {True, False}:
        raise DataError(
            f"{where} holds {list_some(column.unique())}; expected True where a cell was measured, False where not."
        )
    return column.to_numpy(dtype=bool)
