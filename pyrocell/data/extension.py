"""What a query may differ in from the reference that it is mapped onto: further categories, absent features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from pyrocell.data.matrices import Entries, MatrixReader
from pyrocell.errors import DataError, PyrocellWarning, list_some

__all__ = [
    "MAX_ABSENT",
    "WARN_ABSENT",
    "absent_features",
    "joined_levels",
    "matched_columns",
    "with_empty_columns",
]

WARN_ABSENT = 0.2
"""Fraction of the reference's features that a query may lack before there is a warning."""
MAX_ABSENT = 0.5
"""Fraction of the reference's features that a query may lack before it is refused."""


def absent_features(there: pd.Index, wanted: Sequence[str], what: str = "features") -> list[str]:
    """Return the features of the reference that a query lacks, in the reference's order.

    Parameters
    ----------
    there
        Names of the query's features.
    wanted
        Names of the reference's features.
    what
        What messages call them.

    Raises
    ------
    DataError
        If more than `MAX_ABSENT` of them are absent.

    Warns
    -----
    PyrocellWarning
        If more than `WARN_ABSENT` of them are absent.
    """
    has = set(there.astype(str))
    absent = [name for name in wanted if name not in has]
    fraction = len(absent) / max(1, len(wanted))
    said = (
        f"The query lacks {len(absent)} of the {len(wanted)} {what} of the reference ({fraction:.0%}): "
        f"{list_some(absent)}."
    )
    if fraction > MAX_ABSENT:
        raise DataError(
            f"{said} At most {MAX_ABSENT:.0%} may be absent. Are the names of the same kind (symbols, Ensembl)? The "
            f"query has {list_some(there)}. If they are, train a reference on the {what} that both have."
        )
    if fraction > WARN_ABSENT:
        warnings.warn(
            f"{said} Absent ones are taken for zeros, which moves cells: compare with a reference trained on the "
            f"{what} that both have.",
            PyrocellWarning,
            stacklevel=2,
        )
    return absent


def joined_levels(
    known: Sequence[str], names: Sequence[str], codes: np.ndarray
) -> tuple[list[str], np.ndarray]:
    """Put new categories after the known ones; return all of them, and the codes in this order.

    Parameters
    ----------
    known
        Categories of the reference.
    names, codes
        Categories of the query, and the code of each cell among these.
    """
    has = set(known)
    joined = [*known, *(name for name in names if name not in has)]
    place = {name: code for code, name in enumerate(joined)}
    return joined, np.array([place[name] for name in names], dtype=np.int64)[codes]


def matched_columns(argument: str, keys: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Match columns of other data with those that a model was made with.

    Columns of the same names are matched by name, in whatever order; columns of other names by their place.

    Parameters
    ----------
    argument
        Argument of the set-up, for messages.
    keys
        Columns of the other data.
    wanted
        Columns of the model.

    Returns
    -------
    list of int
        For each column of the model, the position of the other data's.

    Raises
    ------
    DataError
        If their number differs, or some names agree and others do not: places would then contradict names.
    """
    if set(keys) == set(wanted):
        return [list(keys).index(name) for name in wanted]
    if len(keys) != len(wanted) or set(keys) & set(wanted):
        raise DataError(
            f"{argument} names the columns {list_some(keys) or 'none'}; the model was made with "
            f"{list_some(wanted) or 'none'}. Give as many: either of the same names, or all of other names, in the "
            "model's order."
        )
    return list(range(len(wanted)))


def with_empty_columns(matrix: MatrixReader, present: np.ndarray) -> MatrixReader:
    """See a matrix with further columns that are empty.

    Parameters
    ----------
    matrix
        The columns that are there, in the order wanted.
    present
        Which of the columns wanted these are, bool, shape (n_cols,).
    """
    return _WithEmptyColumns(matrix, present)


class _WithEmptyColumns(MatrixReader):
    """Columns of another matrix with empty ones between them."""

    def __init__(self, matrix: MatrixReader, present: np.ndarray) -> None:
        self._matrix, self._place = matrix, np.flatnonzero(present)
        self.n_rows, self.n_cols = matrix.n_rows, len(present)

    def entries(self, rows: np.ndarray) -> Entries:
        found = self._matrix.entries(rows)
        return Entries(found.rows, self._place[found.cols], found.values)
