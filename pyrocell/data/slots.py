"""The one place that knows where things lie in an AnnData."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyrocell.data.matrices import MatrixReader, open_matrix
from pyrocell.errors import SetupError, list_some

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Slots", "what_there_is"]


def what_there_is(wanted: object, there: Iterable[object]) -> str:
    """Spell out close matches of ``wanted`` and what else there is, for error messages."""
    names = [str(name) for name in there]
    close = get_close_matches(str(wanted), names, n=3)
    close += [name for name in names if name.lower() == str(wanted).lower() and name not in close]
    guess = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"{guess} Available: {list_some(names, 20) or 'none'}."


class Slots:
    """An AnnData as the fields see it; everything here only reads.

    Parameters
    ----------
    adata
        Cells in rows, features in columns; in memory, backed, or a view.
    """

    def __init__(self, adata: AnnData) -> None:
        modalities = getattr(adata, "mod", None)
        if isinstance(modalities, Mapping):
            raise SetupError(
                f"Got a {type(adata).__name__} with the modalities {list_some(modalities, 20)}; expected an AnnData. "
                "Give one of them: .mod[name]."
            )
        for attribute in ("obs", "var", "layers", "uns", "n_obs"):
            if not hasattr(adata, attribute):
                raise SetupError(f"Got a {type(adata).__name__}; expected an AnnData with cells in rows.")
        self.adata = adata

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.adata.n_obs)

    @property
    def cell_names(self) -> pd.Index:
        """Names of the cells."""
        return self.adata.obs_names

    @property
    def feature_names(self) -> pd.Index:
        """Names of the features."""
        return self.adata.var_names

    def column(self, key: str, argument: str) -> pd.Series:
        """Return a column of ``adata.obs``; ``argument`` of the set-up named it."""
        if not isinstance(key, str):
            raise SetupError(f"{argument} is {key!r}; expected the name of a column of adata.obs.")
        if key not in self.adata.obs.columns:
            hint = what_there_is(key, self.adata.obs.columns)
            raise SetupError(f"{argument}={key!r}: adata.obs has no such column.{hint}")
        column = self.adata.obs[key]
        if isinstance(column, pd.DataFrame):
            raise SetupError(
                f"{argument}={key!r}: adata.obs has {column.shape[1]} columns of this name; keep one."
            )
        return column

    def obsm(self, key: str, argument: str) -> Any:
        """Return an entry of ``adata.obsm``; ``argument`` of the set-up named it."""
        if key not in self.adata.obsm:
            hint = what_there_is(key, self.adata.obsm.keys())
            raise SetupError(f"{argument}={key!r}: adata.obsm has no such entry.{hint}")
        return self.adata.obsm[key]

    def has_matrix(self, layer: str | None, argument: str) -> None:
        """Raise a SetupError if there is no such matrix."""
        layers = [name for name in self.adata.layers if name is not None]
        if layer is None and _behind_view(self.adata)[0].X is None:
            hint = f"give {argument}=, one of: {list_some(layers, 20) or 'there are no layers either'}"
            raise SetupError(f"adata.X is empty; {hint}.")
        if layer is not None and layer not in layers:
            hint = what_there_is(layer, layers)
            raise SetupError(f"{argument}={layer!r}: adata.layers has no such layer.{hint}")

    def matrix(self, layer: str | None, columns: np.ndarray | None = None) -> MatrixReader:
        """Open ``adata.X`` or a layer for reading, with the columns asked for."""
        parent, rows, cols = _behind_view(self.adata)
        if cols is not None and columns is not None:
            columns = cols[columns]
        chosen = cols if columns is None else columns
        return open_matrix(_matrix(parent, layer), rows, chosen, where=self.where(layer))

    def where(self, layer: str | None) -> str:
        """Name a matrix in messages."""
        return "adata.X" if layer is None else f"adata.layers[{layer!r}]"

    def describe(self) -> Mapping[str, Any]:
        """Return what helps to explain a fault: the layers, whether there is ``raw``."""
        return {
            "layers": [name for name in self.adata.layers if name is not None],
            "raw": self.adata.raw is not None,
        }


def _matrix(adata: AnnData, layer: str | None) -> Any:
    return adata.X if layer is None else adata.layers[layer]


def _behind_view(adata: AnnData) -> tuple[AnnData, np.ndarray | None, np.ndarray | None]:
    """Return the AnnData behind a view, with the rows and columns that the view shows.

    Reading ``X`` of a view copies it, and a backed one would be loaded. AnnData has no public way to see what is behind
    a view; should these attributes go, the copy is what remains.
    """
    parent = getattr(adata, "_adata_ref", None) if adata.is_view else None
    rows, cols = getattr(adata, "_oidx", None), getattr(adata, "_vidx", None)
    if parent is None or rows is None or cols is None:
        return adata, None, None
    return parent, _positions(rows, parent.n_obs), _positions(cols, parent.n_vars)


def _positions(index: Any, n: int) -> np.ndarray | None:
    chosen = np.arange(n)[index]
    return None if np.array_equal(chosen, np.arange(n)) else chosen
