"""The one place that knows where things lie in an AnnData, and in a MuData."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyrocell.data.matrices import MatrixReader, open_matrix, with_absent
from pyrocell.errors import DataError, SetupError, list_some

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

__all__ = ["Slots", "is_mudata", "open_slots", "what_there_is"]


def what_there_is(wanted: object, there: Iterable[object]) -> str:
    """Spell out close matches of ``wanted`` and what else there is, for error messages."""
    names = [str(name) for name in there]
    close = get_close_matches(str(wanted), names, n=3)
    close += [name for name in names if name.lower() == str(wanted).lower() and name not in close]
    guess = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"{guess} Available: {list_some(names, 20) or 'none'}."


def is_mudata(data: object) -> bool:
    """Return whether the data are a MuData, without importing the package."""
    return isinstance(getattr(data, "mod", None), Mapping)


def open_slots(data: AnnData | MuData, modalities: Mapping[str, str] | None = None) -> Slots:
    """Return data as fields see them.

    Parameters
    ----------
    data
        AnnData or MuData, in memory, backed, or a view.
    modalities
        For a MuData, the modality of each field that has features.

    Raises
    ------
    SetupError
        If the data are something else, or have no such modality.
    DataError
        If cells of a modality are unknown to the MuData, or their names repeat.
    """
    if is_mudata(data):
        return _MuSlots(data, modalities or {})
    if modalities is not None and hasattr(data, "obs"):
        raise SetupError(
            f"Got a {type(data).__name__} where a MuData with the modalities {list_some(modalities.values())} was set "
            "up; give such a MuData, or set up the data with setup_anndata of the model's class."
        )
    return Slots(data)


class Slots:
    """Data as one field sees them; everything here only reads.

    Parameters
    ----------
    adata
        Cells in rows, features in columns; in memory, backed, or a view.

    Attributes
    ----------
    spelled : str
        What messages call the data.
    modality : str or None
        Name of the modality, where the data are part of a MuData.
    present : ndarray or None
        Which cells the modality has, bool, shape (n_cells,); None if it has them all.
    """

    spelled: str = "adata"
    words: tuple[str, str] = ("cell", "feature")
    """What a row and a column are, in messages."""
    names_in: tuple[str, str] = ("obs_names", "var_names")
    """Attributes of the AnnData with the names of rows and of columns."""
    modality: str | None = None
    present: np.ndarray | None = None

    def __init__(self, adata: AnnData) -> None:
        if is_mudata(adata):
            raise SetupError(
                f"Got a {type(adata).__name__} with the modalities {list_some(adata.mod, 20)}; expected an AnnData. "
                "Give one of them, .mod[name], or set up the whole with setup_mudata."
            )
        for attribute in ("obs", "var", "layers", "uns", "n_obs"):
            if not hasattr(adata, attribute):
                raise SetupError(f"Got a {type(adata).__name__}; expected an AnnData with cells in rows.")
        self.adata = adata

    def of(self, field: str) -> Slots:
        """Return the data as the field of this name sees them: those of its modality."""
        return self

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.cell_names)

    @property
    def cell_names(self) -> pd.Index:
        """Names of the cells."""
        return self.adata.obs_names

    @property
    def feature_names(self) -> pd.Index:
        """Names of the features."""
        return self.adata.var_names

    @property
    def obs(self) -> pd.DataFrame:
        """All columns about cells, one row for each cell."""
        return self.adata.obs

    def has_column(self, key: str) -> bool:
        """Return whether there is such a column about cells."""
        return key in self.adata.obs.columns

    def column(self, key: str, argument: str) -> pd.Series:
        """Return a column of ``adata.obs``; ``argument`` of the set-up named it."""
        if not isinstance(key, str):
            raise SetupError(f"{argument} is {key!r}; expected the name of a column of {self.spelled}.obs.")
        if key not in self.adata.obs.columns:
            hint = what_there_is(key, self.adata.obs.columns)
            raise SetupError(f"{argument}={key!r}: {self.spelled}.obs has no such column.{hint}")
        return _only_column(self.adata.obs, key, f"{argument}={key!r}: {self.spelled}.obs")

    def column_place(self, key: str) -> str:
        """Name a column in messages."""
        return f"{self.spelled}.obs[{key!r}]"

    def obsm(self, key: str, argument: str) -> Any:
        """Return an entry of ``adata.obsm``; ``argument`` of the set-up named it."""
        return self._entry("obsm", key, argument)

    def uns(self, key: str, argument: str) -> Any:
        """Return an entry of ``adata.uns``; ``argument`` of the set-up named it."""
        return self._entry("uns", key, argument)

    def _entry(self, kind: str, key: str, argument: str) -> Any:
        entries = getattr(self.adata, kind)
        if not isinstance(key, str):
            raise SetupError(
                f"{argument} is {key!r}; expected the name of an entry of {self.spelled}.{kind}."
            )
        if key not in entries:
            hint = what_there_is(key, entries.keys())
            raise SetupError(f"{argument}={key!r}: {self.spelled}.{kind} has no such entry.{hint}")
        return entries[key]

    def has_matrix(self, layer: str | None, argument: str) -> None:
        """Raise a SetupError if there is no such matrix."""
        layers = [name for name in self.adata.layers if name is not None]
        if layer is None and _behind_view(self.adata)[0].X is None:
            hint = f"give {argument}=, one of: {list_some(layers, 20) or 'there are no layers either'}"
            raise SetupError(f"{self.spelled}.X is empty; {hint}.")
        if layer is not None and layer not in layers:
            hint = what_there_is(layer, layers)
            raise SetupError(f"{argument}={layer!r}: {self.spelled}.layers has no such layer.{hint}")

    def matrix(self, layer: str | None, columns: np.ndarray | None = None) -> MatrixReader:
        """Open ``adata.X`` or a layer for reading, with the columns asked for."""
        parent, rows, cols = _behind_view(self.adata)
        if cols is not None and columns is not None:
            columns = cols[columns]
        chosen = cols if columns is None else columns
        return self._open(_matrix(parent, layer), rows, chosen, self.where(layer))

    def _open(
        self, matrix: Any, rows: np.ndarray | None, columns: np.ndarray | None, where: str
    ) -> MatrixReader:
        return open_matrix(matrix, rows, columns, where=where)

    def where(self, layer: str | None) -> str:
        """Name a matrix in messages."""
        return f"{self.spelled}.X" if layer is None else f"{self.spelled}.layers[{layer!r}]"

    def describe(self) -> Mapping[str, Any]:
        """Return what helps to explain a fault: the layers, whether there is ``raw``, what things are called."""
        return {
            "layers": [name for name in self.adata.layers if name is not None],
            "raw": self.adata.raw is not None,
            "data": self.spelled,
            "words": self.words,
        }


class _MuSlots(Slots):
    """A MuData: all its cells, and the columns about them; each field with features sees its own modality."""

    spelled = "mdata"

    def __init__(self, mdata: MuData, modalities: Mapping[str, str]) -> None:
        if getattr(mdata, "axis", 0) != 0:
            raise SetupError(
                f"The modalities of this MuData share axis {mdata.axis}; expected axis 0, modalities that share cells."
            )
        self.adata = mdata
        self._of: dict[str, _ModalitySlots] = {}
        parts: dict[str, _ModalitySlots] = {}
        for field, name in modalities.items():
            if name not in parts:
                parts[name] = _ModalitySlots(self, name)
            self._of[field] = parts[name]

    def of(self, field: str) -> Slots:
        return self._of.get(field, self)

    def _parts(self) -> dict[str, _ModalitySlots]:
        """Return the modalities in use, by name; their order in the set-up does not matter."""
        return {str(part.modality): part for _, part in sorted(self._of.items())}

    @property
    def feature_names(self) -> pd.Index:
        """Refuse: features belong to a modality."""
        raise SetupError(
            "A field with features was given no modality of the MuData; name it in modalities= of setup_mudata."
        )

    @property
    def obs(self) -> pd.DataFrame:
        """Columns about the cells as they are now: clusters may be made after the model."""
        own, further = self.adata.obs, {}
        for part in self._parts().values():
            for name in part.adata.obs:
                shared = name in own or len(self._having(name)) > 1
                further[f"{part.modality}:{name}" if shared else name] = part.aligned(name)
        new = {name: column for name, column in further.items() if name not in own}
        return pd.concat([own, pd.DataFrame(new, index=own.index)], axis=1) if new else own

    def has_column(self, key: str) -> bool:
        return isinstance(key, str) and (
            super().has_column(key) or self._home(key)[0] is not None or bool(self._having(key))
        )

    def column(self, key: str, argument: str) -> pd.Series:
        if not isinstance(key, str):
            raise SetupError(f"{argument} is {key!r}; expected the name of a column of mdata.obs.")
        if key in self.adata.obs.columns:
            return _only_column(self.adata.obs, key, f"{argument}={key!r}: mdata.obs")
        part, name = self._home(key)
        homes = [part] if part else self._having(name)
        if not homes:
            there = [
                *self.adata.obs.columns,
                *(c for p in self._parts().values() for c in p.adata.obs.columns),
            ]
            hint = what_there_is(key, there)
            raise SetupError(
                f"{argument}={key!r}: neither mdata.obs nor the obs of a modality in use has such a column.{hint}"
            )
        if len(homes) > 1:
            places = " and ".join(f"{p.spelled}.obs" for p in homes)
            names = " or ".join(repr(f"{p.modality}:{key}") for p in homes)
            raise SetupError(
                f"{argument}={key!r} is a column of {places}; write {names}, or put it into mdata.obs."
            )
        return homes[0].column_of_all(name, argument)

    def column_place(self, key: str) -> str:
        part, name = self._home(key)
        if key in self.adata.obs.columns or (part is None and name == key and not self._having(key)):
            return f"mdata.obs[{key!r}]"
        return f"{(part or self._having(key)[0]).spelled}.obs[{name!r}]"

    def _having(self, key: str) -> list[_ModalitySlots]:
        return [part for part in self._parts().values() if key in part.adata.obs.columns]

    def _home(self, key: str) -> tuple[_ModalitySlots | None, str]:
        """Read ``"rna:lane"`` as the column ``lane`` of the modality ``rna``."""
        modality, colon, name = key.partition(":")
        if colon and modality in self.adata.mod and name in self.adata.mod[modality].obs.columns:
            return self._parts().get(modality) or _ModalitySlots(self, modality), name
        return None, key

    def has_matrix(self, layer: str | None, argument: str) -> None:
        _ = self.feature_names

    def matrix(self, layer: str | None, columns: np.ndarray | None = None) -> MatrixReader:
        _ = self.feature_names
        return super().matrix(layer, columns)


class _ModalitySlots(Slots):
    """One modality, seen through all cells of its MuData, in their order."""

    def __init__(self, whole: _MuSlots, name: str) -> None:
        there = whole.adata.mod
        if name not in there:
            raise SetupError(f"The MuData has no modality {name!r}.{what_there_is(name, there)}")
        super().__init__(there[name])
        self._whole, self.modality = whole, name
        self.spelled = f"mdata.mod[{name!r}]"
        self._position = self._match()
        present = self._position >= 0
        self.present = None if present.all() else present

    def _match(self) -> np.ndarray:
        """Return the row of each cell of the MuData in the modality, -1 where it has none."""
        own, all_names = self.adata.obs_names, self._whole.cell_names
        if not own.is_unique:
            raise DataError(
                f"Cell names of {self.spelled} occur more than once: {list_some(own[own.duplicated()].unique())}. "
                f"Cells are matched by name: call {self.spelled}.obs_names_make_unique(), then mdata.update()."
            )
        unknown = own.difference(all_names)
        if len(unknown):
            raise DataError(
                f"{self.spelled} has {len(unknown)} cells that mdata.obs_names lacks: {list_some(unknown)}. The MuData "
                "does not know of a change in this modality: call mdata.update()."
            )
        return np.asarray(own.get_indexer(all_names), dtype=np.int64)

    @property
    def cell_names(self) -> pd.Index:
        return self._whole.cell_names

    @property
    def obs(self) -> pd.DataFrame:
        return self._whole.obs

    def has_column(self, key: str) -> bool:
        return self._whole.has_column(key)

    def column(self, key: str, argument: str) -> pd.Series:
        return self._whole.column(key, argument)

    def column_place(self, key: str) -> str:
        return self._whole.column_place(key)

    def aligned(self, name: str) -> pd.Series:
        """Return a column of the modality for all cells, missing where the modality has no such cell."""
        column = _only_column(self.adata.obs, name, f"{self.spelled}.obs")
        return column.reindex(self.cell_names)

    def column_of_all(self, name: str, argument: str) -> pd.Series:
        """Return a column of the modality, refusing one that says nothing of some cells."""
        if self.present is not None:
            absent = self.cell_names[~self.present]
            raise DataError(
                f"{argument}: {self.spelled}.obs[{name!r}] says nothing of {len(absent)} cells that {self.modality!r} "
                f"lacks: {list_some(absent)}. Put a column for all cells into mdata.obs."
            )
        return self.aligned(name)

    def _open(
        self, matrix: Any, rows: np.ndarray | None, columns: np.ndarray | None, where: str
    ) -> MatrixReader:
        position = self._position
        if self.present is not None:
            return with_absent(open_matrix(matrix, rows, columns, where=where), position)
        if not np.array_equal(position, np.arange(len(position))):
            rows = position if rows is None else rows[position]
        return open_matrix(matrix, rows, columns, where=where)


def _only_column(obs: pd.DataFrame, key: str, where: str) -> pd.Series:
    column: Any = obs[key]
    if isinstance(column, pd.DataFrame):
        raise SetupError(f"{where} has {column.shape[1]} columns of this name; keep one.")
    return column


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
