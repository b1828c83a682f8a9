"""Marker genes of cell types: the table that a user gives, checked, and what the counts say of it before any fit."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from pyrocell.data import Dataset
from pyrocell.errors import DataError, PyrocellWarning, SetupError, list_some

__all__ = ["MarkerCounts", "checked_markers"]

_EXPECTED = "expected a DataFrame of genes by cell types with 1 where a gene is a marker of a type, else 0"
_CELLS_AT_ONCE = 4096
_MOST = 100_000  # a histogram up to any count would not fit


def checked_markers(markers: object, reserved: str) -> pd.DataFrame:
    """Return a marker table as booleans, genes by types, named by text.

    Parameters
    ----------
    markers
        What the user gave.
    reserved
        Name that no type may have.

    Raises
    ------
    SetupError
        If it is no such table; the message names the genes or types at fault.
    """
    if not isinstance(markers, pd.DataFrame):
        raise SetupError(f"cell_type_markers is a {type(markers).__name__}; {_EXPECTED}.")
    values = markers.to_numpy()
    if markers.empty or not np.isin(values, [0, 1]).all():
        wrong = (
            list_some(pd.unique(values[~np.isin(values, [0, 1])]).tolist()) or f"the shape {markers.shape}"
        )
        raise SetupError(f"cell_type_markers has {wrong}; {_EXPECTED}.")
    table = pd.DataFrame(values.astype(bool), markers.index.astype(str), markers.columns.astype(str))
    for what, names in (("gene", table.index), ("cell type", table.columns)):
        if not names.is_unique:
            again = list_some(names[names.duplicated()].unique())
            raise SetupError(f"cell_type_markers names a {what} more than once: {again}. Give each one line.")
    if reserved in table:
        raise SetupError(
            f"cell_type_markers has a type {reserved!r}, the name of cells of no type. Drop or rename that column."
        )
    without = table.columns[~table.any()]
    if len(without):
        raise SetupError(
            f"cell_type_markers has no marker of the types {list_some(without)}; expected at least one, better three. "
            "Drop these columns; if genes are the columns of your table, give its .T. For cells that are of none of "
            "the types, say unassigned=True."
        )
    twins = table.columns[table.T.duplicated(keep=False)]
    if len(twins):
        raise SetupError(
            f"cell_type_markers gives the types {list_some(twins)} the same markers, so that nothing tells them apart. "
            "Give each a marker of its own, or join them in one column."
        )
    return table


@dataclass(frozen=True)
class MarkerCounts:
    """What the counts say of each gene before any fit.

    Parameters
    ----------
    rate
        Count of each gene per unit of cell size, shape (n_genes,).
    largest
        The largest count of a gene in a cell, the highest 0.1 % of those above zero left aside.
    """

    rate: torch.Tensor
    largest: float

    @classmethod
    def of(cls, dataset: Dataset | None, markers: pd.DataFrame) -> MarkerCounts:
        """Look at all cells once; without data, only shapes are right (a model about to be loaded)."""
        if dataset is None:
            return cls(torch.ones(len(markers)), 10.0)
        totals, size, found = torch.zeros(len(markers), dtype=torch.float64), 0.0, []
        for cells in dataset.minibatches(None, _CELLS_AT_ONCE):
            assert cells.size_factor is not None  # a total where the user gave none
            totals += cells.counts.sum(0, dtype=torch.float64)
            size += float(cells.size_factor.sum(dtype=torch.float64))
            found.append(np.bincount(cells.counts.flatten().clamp(max=_MOST).long().numpy()))
        _check_counted(totals.numpy() > 0, markers)
        # Half a count for a gene that was never seen: its rate is low, and known to be no more than that.
        rate = (totals + 0.5) / size
        return cls(rate.float(), _high_quantile(found))


def _high_quantile(histograms: list[np.ndarray]) -> float:
    """Return the 99.9 % quantile of the counts above zero, at least 2."""
    n = np.zeros(max(map(len, histograms)), dtype=np.int64)
    for histogram in histograms:
        n[: len(histogram)] += histogram
    n[0] = 0
    return max(2.0, float(np.searchsorted(np.cumsum(n), 0.999 * n.sum())))


def _check_counted(seen: np.ndarray, markers: pd.DataFrame) -> None:
    """Refuse types none of whose markers was counted in any cell, and warn of single markers."""
    never = markers.index[~seen]
    blind = markers.columns[~markers[seen].any()]
    if len(blind):
        raise DataError(
            f"No marker of {list_some(blind)} has a count in any cell, so nothing tells cells of these types: "
            f"{list_some(never)}. Give them markers that are expressed, or drop the types."
        )
    if len(never):
        warnings.warn(
            f"{len(never)} of {len(markers)} markers have no count in any cell: {list_some(never)}. They tell little.",
            PyrocellWarning,
            stacklevel=2,
        )
