"""Checks before training: each message names the offenders (up to five) and the remedy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pyrocell.data.matrices import Entries, MatrixReader
from pyrocell.data.slots import what_there_is
from pyrocell.errors import DataError, PyrocellWarning, SetupError, list_some

__all__ = [
    "CountFaults",
    "category_levels",
    "check_cell_names",
    "check_counts",
    "check_keys",
    "check_names",
    "chosen_features",
    "constant_columns",
    "numbers",
    "size_factors",
    "warn_confounded",
]

# log1p of counts per 10,000 cannot exceed log(10,001) = 9.2; other targets rarely exceed log(1e6) = 13.8.
_LOG_CEILING = 14.0
_SHOWN = 5
_IF_MISSING = "Remove these cells or features, or set the values to 0 if they mean that nothing was counted."


def check_names(names: pd.Index, what: str, remedy: str) -> None:
    """Raise a DataError if names repeat.

    Parameters
    ----------
    names
        Names that must be unique.
    what
        What is named, such as "feature".
    remedy
        What to do about it.
    """
    if not names.is_unique:
        repeated = names[names.duplicated()].unique()
        raise DataError(
            f"{len(repeated)} {what} names occur more than once: {list_some(repeated)}. Names must be unique, "
            f"because data are aligned by name: {remedy}"
        )


def chosen_features(wanted: list[str], there: list[str], data: str = "adata") -> list[str]:
    """Return the features that a model asks for; raise a DataError that names those which ``data`` lack.

    Parameters
    ----------
    wanted, there
        Names asked for, and names of the data.
    data
        What messages call the data.
    """
    missing = sorted(set(wanted) - set(there), key=wanted.index)
    if not missing:
        return wanted
    kind = " None of them is there: are the names of another kind (symbols, Ensembl)?"
    raise DataError(
        f"{len(missing)} of the {len(wanted)} features that the model is to read are not in {data}.var_names: "
        f"{list_some(missing)}.{kind if len(missing) == len(wanted) else ''} Leave them out, or give data that have "
        f"them. For {missing[0]!r}:{what_there_is(missing[0], there)}"
    )


def check_cell_names(names: pd.Index, data: str = "adata") -> None:
    """Raise a DataError if cell names repeat; ``data`` is what messages call the data."""
    check_names(names, "cell", f"call {data}.obs_names_make_unique().")


class _Faults:
    """Faulty entries of one kind: how many, and where the first few are."""

    def __init__(self) -> None:
        self.n = 0
        self.first: list[tuple[int, int, float]] = []

    def add(self, faulty: np.ndarray, entries: Entries, first_row: int) -> None:
        where = np.flatnonzero(faulty)
        self.n += len(where)
        for i in where[: _SHOWN - len(self.first)]:
            self.first.append((first_row + entries.rows[i], entries.cols[i], entries.values[i]))

    def spell(self, cells: pd.Index, features: Sequence[str]) -> str:
        shown = ", ".join(f"{v:g} (cell {cells[r]!r}, feature {features[c]!r})" for r, c, v in self.first)
        hidden = self.n - len(self.first)
        return f"{shown} and {hidden} more" if hidden else shown


class CountFaults:
    """Everything that can be wrong with counts, gathered over one pass."""

    def __init__(self) -> None:
        self.not_finite, self.negative, self.not_whole = _Faults(), _Faults(), _Faults()
        self.largest = 0.0

    def look(self, entries: Entries, first_row: int) -> None:
        """Look at the entries of a block of rows, the first of which is ``first_row``."""
        values = entries.values
        if len(values) == 0:
            return
        finite = np.isfinite(values)
        if not finite.all():
            self.not_finite.add(~finite, entries, first_row)
            values = np.where(finite, values, 0)
        if values.min() < 0:
            self.negative.add(values < 0, entries, first_row)
        fraction = values != np.rint(values)
        if fraction.any():
            self.not_whole.add(fraction, entries, first_row)
        self.largest = max(self.largest, float(values.max()))

    def refuse(
        self,
        cells: pd.Index,
        features: Sequence[str],
        *,
        allow_noninteger: bool,
        where: str,
        there: Mapping[str, Any],
    ) -> None:
        """Raise a DataError if anything was found; parameters as for `check_counts`."""
        if self.not_finite.n:
            remedy = there.get("if_missing", _IF_MISSING)
            raise DataError(
                f"{where} has {self.not_finite.n} values that are NaN or infinite: "
                f"{self.not_finite.spell(cells, features)}. {remedy}"
            )
        if self.negative.n:
            scaled = " The data look scaled or batch-corrected." if self.not_whole.n else ""
            raise DataError(
                f"{where} has {self.negative.n} negative values: {self.negative.spell(cells, features)}. Counts are "
                f"0, 1, 2, ...{scaled} {_where_counts_are(there)}"
            )
        if self.not_whole.n and not allow_noninteger:
            looks = "looks log-normalised: it has" if self.largest < _LOG_CEILING else "has"
            raise DataError(
                f"{where} {looks} {self.not_whole.n} values that are not whole, up to {self.largest:g}: "
                f"{self.not_whole.spell(cells, features)}. This model needs raw counts. {_where_counts_are(there)} If "
                "these values are meant, set up with allow_noninteger=True."
            )


def check_counts(
    matrix: MatrixReader,
    cells: pd.Index,
    features: Sequence[str],
    *,
    allow_noninteger: bool,
    where: str,
    there: Mapping[str, Any],
    measured: np.ndarray | None = None,
) -> np.ndarray:
    """Check counts in one pass of bounded memory.

    Parameters
    ----------
    matrix
        The counts.
    cells, features
        Names of its rows and columns.
    allow_noninteger
        Accept values that are not whole.
    where
        Name of the matrix in messages.
    there
        ``layers`` (their names) and ``raw`` (whether there is one), for the remedy; ``if_missing``: what to do about
        NaN.
    measured
        Cells that were measured, bool, shape (n_cells,); by default all. The others may be empty.

    Returns
    -------
    ndarray
        Total count of each cell, float64, shape (n_cells,); NaN where not measured.

    Raises
    ------
    DataError
        If counts are NaN, infinite, negative, or not whole, or if a cell has none.
    """
    if matrix.n_rows == 0 or matrix.n_cols == 0:
        raise DataError(
            f"{where} has {matrix.n_rows} cells and {matrix.n_cols} features: nothing to learn from."
        )
    faults, totals = CountFaults(), np.zeros(matrix.n_rows)
    for start, n_rows, entries in matrix.blocks():
        if measured is not None:
            entries = entries.only(measured[start + entries.rows])
        faults.look(entries, start)
        totals[start : start + n_rows] = entries.totals(n_rows)
    faults.refuse(cells, features, allow_noninteger=allow_noninteger, where=where, there=there)
    if measured is not None:
        totals[~measured] = np.nan
    _refuse_empty_cells(totals, cells, len(features), where)
    return totals


def _where_counts_are(there: Mapping[str, Any]) -> str:
    advice = []
    if there["layers"]:
        advice.append(
            f"If a layer holds the raw counts, set up with {there.get('argument', 'layer')}= (there are: "
            f"{list_some(there['layers'])})."
        )
    if there["raw"]:
        data = there.get("data", "adata")
        advice.append(f"If {data}.raw holds them, take {data}.raw.to_adata().")
    if not advice:
        advice.append("Read the raw counts again, and keep them in a layer before normalising.")
    return " ".join(advice)


def _refuse_empty_cells(totals: np.ndarray, cells: pd.Index, n_features: int, where: str) -> None:
    empty = totals <= 0
    if empty.any():
        raise DataError(
            f"{empty.sum()} cells have no counts over the {n_features} features of {where}: {list_some(cells[empty])}. "
            "Remove them, for example with scanpy.pp.filter_cells(adata, min_counts=1) after selecting features."
        )


def _level_name(value: object) -> str:
    # A whole column of integers becomes float as soon as it has held one missing value.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def category_levels(column: pd.Series, where: str) -> tuple[list[str], np.ndarray]:
    """Read a column of categories: strings, whole numbers, booleans or a pandas categorical.

    Parameters
    ----------
    column
        One value per cell.
    where
        Name of the column in messages.

    Returns
    -------
    list of str, ndarray
        Names of the categories that occur, in pandas' order if it has one, else sorted; and the position of each cell's
        category in that list, int64.

    Raises
    ------
    DataError
        If values are missing, or two categories have the same name as text.
    """
    missing, place = column.isna().to_numpy(), where.partition(": ")[2] or where
    if missing.any():
        raise DataError(
            f"{where} is missing (NaN) for {missing.sum()} cells: {list_some(column.index[missing])}. Remove the "
            f"cells, or give them a category: {place} = {place}.astype(str)."
        )
    values = _as_categorical(column).remove_unused_categories()
    names = [_level_name(value) for value in values.categories]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DataError(
            f"{where} has different categories with the same name as text: {list_some(twice)}. Make them one with "
            f"{place}.astype(str)."
        )
    return names, np.asarray(values.codes, dtype=np.int64)


def _as_categorical(column: pd.Series) -> pd.Categorical:
    if isinstance(column.dtype, pd.CategoricalDtype):
        return pd.Categorical(column)
    levels = list(column.unique())
    try:
        levels = sorted(levels)
    except TypeError:  # text and numbers mixed
        levels = sorted(levels, key=str)
    return pd.Categorical(column, categories=levels)


def numbers(column: pd.Series, where: str) -> np.ndarray:
    """Read a column of numbers as float64, shape (n_cells,).

    Parameters
    ----------
    column
        One value per cell.
    where
        Name of the column in messages.

    Raises
    ------
    DataError
        If the column is not numeric, or has NaN or infinite values.
    """
    if not pd.api.types.is_numeric_dtype(column.dtype):
        raise DataError(
            f"{where} is not numeric but {column.dtype}, with values such as {list_some(column.unique())}. Convert "
            "it with pandas.to_numeric, or, if it holds categories, declare it as a categorical covariate."
        )
    values: np.ndarray = column.to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = ~np.isfinite(values)
    if wrong.any():
        raise DataError(
            f"{where} is NaN or infinite for {wrong.sum()} cells: {list_some(column.index[wrong])}. Fill in the "
            "values or remove the cells."
        )
    return values


def size_factors(column: pd.Series, where: str) -> np.ndarray:
    """Read size factors: positive numbers, float64, shape (n_cells,).

    Raises a DataError that names the cells where they are missing, infinite, zero or negative.
    """
    values = numbers(column, where)
    wrong = values <= 0
    if wrong.any():
        raise DataError(
            f"{where} is not positive for {wrong.sum()} cells: "
            f"{list_some(column.index[wrong])}. Size factors are above 0; recompute them, or remove the cells."
        )
    return values


def constant_columns(values: np.ndarray, keys: Sequence[str]) -> list[str]:
    """Return the keys of the columns of ``values`` that have a single value."""
    return [
        key for key, column in zip(keys, values.T, strict=True) if np.ptp(column) == 0 or column.std() == 0
    ]


def check_keys(keys: object, argument: str) -> list[str]:
    """Return a list of distinct column names; one name alone counts as a list of one.

    Raises a SetupError if a name occurs twice or the argument is something else.
    """
    if keys is None:
        return []
    listed = [keys] if isinstance(keys, str) else list(keys) if isinstance(keys, list | tuple) else None
    if listed is None or not all(isinstance(key, str) for key in listed):
        raise SetupError(f"{argument} is {keys!r}; expected a list of names of columns of adata.obs.")
    if len(set(listed)) < len(listed):
        raise SetupError(f"{argument} names a column twice: {listed!r}; name each once.")
    return listed


def warn_confounded(
    batch_key: str, batch: np.ndarray, *, codes: Mapping[str, np.ndarray], numbers: Mapping[str, np.ndarray]
) -> None:
    """Warn of covariates whose effect cannot be told apart from that of the batch, naming both.

    Parameters
    ----------
    batch_key
        Name of the batch column.
    batch
        Batch of each cell, int64, shape (n_cells,).
    codes
        Categorical covariates by name, int64, each shape (n_cells,).
    numbers
        Continuous covariates by name, each shape (n_cells,).
    """
    if batch.max(initial=0) == 0:
        return
    for key, levels in codes.items():
        if levels.max(initial=0) > 0 and (how := _nesting(batch, levels)):
            _warn(key, batch_key, how)
    for key, values in numbers.items():
        by_batch = pd.Series(values).groupby(batch)
        if (by_batch.max() == by_batch.min()).all():
            _warn(key, batch_key, "it has one value in each batch")


def _nesting(batch: np.ndarray, levels: np.ndarray) -> str:
    pairs = pd.DataFrame({"batch": batch, "level": levels}).drop_duplicates()
    if pairs["batch"].is_unique:
        return "it has one value in each batch"
    return "each of its values occurs in one batch only" if pairs["level"].is_unique else ""


def _warn(key: str, batch_key: str, how: str) -> None:
    warnings.warn(
        f"The covariate {key!r} is confounded with the batch {batch_key!r}: {how}, so their effects cannot be told "
        f"apart. Leave {key!r} out: the batch stands for it already. If {key!r} is what you study, correcting for "
        f"{batch_key!r} removes it.",
        PyrocellWarning,
        stacklevel=2,
    )
