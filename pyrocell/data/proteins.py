"""Proteins measured beside the counts (CITE-seq), with an explicit mask of what was not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrocell.data import preflight
from pyrocell.data.base import NONINTEGER, Argument, Field, Frozen, Reader, Setup, tensor_like
from pyrocell.data.matrices import Entries, MatrixReader, open_matrix
from pyrocell.data.slots import Slots
from pyrocell.errors import DataError, SetupError, list_some

__all__ = ["Proteins"]


class Proteins(Field):
    """Counts of surface proteins: raw, whole, non-negative, each either measured in a cell or not.

    ``cells.proteins`` is float32, shape (n_cells, n_proteins), 0 where not measured; ``cells.proteins_mask`` is bool of
    the same shape, True where measured. A zero is a measurement: absence is said by the mask, or by a cell that the
    modality of a MuData lacks, and never inferred from values. Left out, an optional field has no proteins.

    Parameters
    ----------
    optional
        Whether the user may leave it out.
    doc
        What the documentation of the set-up says about the argument.
    """

    has_features: ClassVar[bool] = True

    def __init__(self, *, optional: bool = False, doc: str | None = None) -> None:
        super().__init__(optional=optional, doc=doc)

    @property
    def mask(self) -> str:
        """Attribute of `Cells` that says what was measured."""
        return f"{self.name}_mask"

    @property
    def _stem(self) -> str:
        return self.name.removesuffix("s")

    def default_argument(self) -> str:
        """Return ``protein_expression_obsm_key``, the name that users know."""
        return f"{self._stem}_expression_obsm_key"

    def arguments(self) -> list[Argument]:
        """Return where values, names and mask are in an AnnData."""
        doc = self.doc or (
            f"Entry of ``adata.obsm`` with the raw counts of the {self.name} in each cell: a DataFrame whose columns "
            "are their names, or an array or sparse matrix."
        )
        mask_doc = (
            f"Entry of ``adata.obsm`` with a boolean for each cell and {self._stem}: True where it was measured. Left "
            "out: everywhere. Zeros are measurements, never taken for absence."
        )
        kind = "str | None" if self.optional else "str"
        return [
            Argument(self.argument, kind, doc, required=not self.optional),
            Argument(
                self._names_key,
                "str | None",
                f"Entry of ``adata.uns`` with the names, if {self._array_only}.",
            ),
            Argument(f"{self._stem}_mask_obsm_key", "str | None", mask_doc),
            NONINTEGER,
        ]

    @property
    def _names_key(self) -> str:
        return f"{self._stem}_names_uns_key"

    @property
    def _array_only(self) -> str:
        return f"the {self.name} are no DataFrame"

    def mudata_arguments(self) -> list[Argument]:
        """Return the layers of the modality with values and mask."""
        doc = f"Layer of the modality with the raw counts of the {self.name}. Left out: its ``X``."
        mask_doc = (
            f"Layer of the modality with a boolean for each cell and {self._stem}: True where it was measured. Left "
            "out: everywhere. Cells that are not in the modality were not measured either way."
        )
        return [
            Argument(f"{self._stem}_layer", "str | None", doc),
            Argument(f"{self._stem}_mask_layer", "str | None", mask_doc),
            NONINTEGER,
        ]

    def check_setup(self, slots: Slots, setup: Setup) -> None:
        """Look for values, names and mask."""
        if self._given(slots, setup):
            self._table(slots, setup)

    def freeze(self, slots: Slots, setup: Setup) -> Frozen:
        """Check every value and name, and record the proteins."""
        if not self._given(slots, setup):
            cells = {self.name: tensor_like("float32", 0), self.mask: tensor_like("bool", 0)}
            return Frozen({"given": False, "names": [], "cells": cells})
        table = self._table(slots, setup)
        n_measured, measured = table.check(slots.cell_names, allow_noninteger=bool(setup["allow_noninteger"]))
        if not measured.any():
            raise DataError(
                f"{table.where}: the mask ({table.mask_where}) says that no {self._stem} was measured in any cell. "
                "True means measured; turn it round (~mask) if it was meant otherwise."
            )
        if not n_measured.all():
            never = [name for name, n in zip(table.names, n_measured, strict=True) if n == 0]
            raise DataError(
                f"{table.where}: {list_some(never)} were measured in no cell, as {table.mask_where} says. Remove these "
                f"{self.name}: nothing can be learned about them."
            )
        shape = len(table.names)
        cells = {
            self.name: tensor_like("float32", shape, fill=1),
            self.mask: tensor_like("bool", shape, fill=1),
        }
        return Frozen({"given": True, "names": table.names, "cells": cells}, measured=measured)

    def extend(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Frozen:
        """Check every value of a query; proteins of the reference that it lacks were not measured in it."""
        if not record["given"]:
            return Frozen(dict(record))
        if self._none_there(slots, setup):
            nothing = np.zeros(slots.n_cells, dtype=bool)
            return Frozen({**record, "absent": list(record["names"])}, measured=nothing)
        there = self._table(slots, setup).names
        absent = {name for name in record["names"] if name not in there}
        if len(absent) == len(record["names"]):
            raise DataError(
                f"The query has none of the {len(absent)} {self.name} of the reference ({list_some(record['names'])}), "
                f"but {list_some(there)}. Are the names of another kind? If none was measured, leave the entry of "
                "obsm out."
            )
        absent |= set(record.get("absent", ()))
        record = {**record, "absent": [name for name in record["names"] if name in absent]}
        table = self._table(slots, setup, record)
        _, measured = table.check(slots.cell_names, allow_noninteger=bool(setup["allow_noninteger"]))
        return Frozen(record, measured=measured)

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Align the proteins by name; more proteins than recorded are ignored."""
        if not record["given"] or self._lacks_all(slots, setup, record):
            return lambda rows: self._read_nothing(rows, len(record["names"]))
        table = self._table(slots, setup, record)

        def read(rows: np.ndarray) -> dict[str, Tensor | None]:
            values, mask = table.read(rows)
            return {self.name: torch.from_numpy(values), self.mask: torch.from_numpy(mask)}

        return read

    def _read_nothing(self, rows: np.ndarray, n_proteins: int) -> dict[str, Tensor | None]:
        shape = (len(rows), n_proteins)
        return {self.name: torch.zeros(shape), self.mask: torch.zeros(shape, dtype=torch.bool)}

    def check_values(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> None:
        """Check every value of the recorded proteins."""
        if record["given"] and not self._lacks_all(slots, setup, record):
            table = self._table(slots, setup, record)
            table.check(slots.cell_names, allow_noninteger=bool(setup["allow_noninteger"]))

    def _none_there(self, slots: Slots, setup: Setup) -> bool:
        """Whether an AnnData lacks the entry altogether: a query in which nothing was measured."""
        return slots.modality is None and setup.get(self.argument) not in slots.adata.obsm

    def _lacks_all(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> bool:
        """Whether nothing was measured, in data of a query that may be without."""
        return list(record.get("absent", ())) == list(record["names"]) and self._none_there(slots, setup)

    def _given(self, slots: Slots, setup: Setup) -> bool:
        return slots.modality is not None or setup.get(self.argument) is not None

    def _table(self, slots: Slots, setup: Setup, record: Mapping[str, Any] | None = None) -> _Table:
        """Open values and mask, with the recorded proteins in their order; by default all."""
        table = (self._from_obsm if slots.modality is None else self._from_modality)(slots, setup)
        preflight.check_names(pd.Index(table.names), self._stem, f"rename or remove those of {table.where}.")
        if not table.names:
            raise DataError(f"{table.where} has no {self.name}.")
        if record is not None:
            self._align(table, record["names"], record.get("absent", ()))
        return table

    def _align(self, table: _Table, wanted: list[str], may_lack: Sequence[str]) -> None:
        there = set(table.names)
        missing = [name for name in wanted if name not in there and name not in may_lack]
        if missing:
            raise DataError(
                f"{len(missing)} of the {len(wanted)} {self.name} of the model are not in {table.where}: "
                f"{list_some(missing)}. It has {list_some(table.names)}. For {self.name} that were not measured, add "
                "columns of zeros and say so in the mask; order, and further ones, do not matter."
            )
        table.align(wanted)

    def _from_obsm(self, slots: Slots, setup: Setup) -> _Table:
        key, mask_argument = setup[self.argument], f"{self._stem}_mask_obsm_key"
        values, where = slots.obsm(key, self.argument), f"{slots.spelled}.obsm[{key!r}]"
        there = {"layers": [], "raw": False, "if_missing": _if_missing(mask_argument)}
        table = _Table(self._names(slots, setup, values, where), where, there)
        table.values = open_matrix(_array(values), where=where)
        if (mask_key := setup[mask_argument]) is not None:
            table.mask_where = f"{slots.spelled}.obsm[{mask_key!r}]"
            table.mask = _open_mask(slots.obsm(mask_key, mask_argument), table)
        return table

    def _names(self, slots: Slots, setup: Setup, values: Any, where: str) -> list[str]:
        """Return the names of the columns of an entry of ``obsm``."""
        if isinstance(values, pd.DataFrame):
            return [str(name) for name in values.columns]
        key = setup[self._names_key]
        if key is None:
            raise SetupError(
                f"{self.argument}: {where} is a {type(values).__name__}, which has no names, and data are aligned by "
                f"name. Give {self._names_key}=, an entry of {slots.spelled}.uns, or make it a DataFrame."
            )
        names = [str(name) for name in np.asarray(slots.uns(key, self._names_key)).ravel()]
        if len(values.shape) != 2 or len(names) != values.shape[1]:
            raise DataError(
                f"{self._names_key}={key!r} has {len(names)} names, but {where} has shape {tuple(values.shape)}; "
                "expected cells in rows and one column for each name."
            )
        return names

    def _from_modality(self, slots: Slots, setup: Setup) -> _Table:
        argument, mask_argument = f"{self._stem}_layer", f"{self._stem}_mask_layer"
        layer = setup[argument]
        slots.has_matrix(layer, argument)
        there = {**slots.describe(), "argument": argument, "if_missing": _if_missing(mask_argument)}
        table = _Table([str(name) for name in slots.feature_names], slots.where(layer), there)
        table.values, table.present = slots.matrix(layer), slots.present
        if (mask_layer := setup[mask_argument]) is not None:
            slots.has_matrix(mask_layer, mask_argument)
            table.mask_where, table.mask = slots.where(mask_layer), slots.matrix(mask_layer)
        return table


def _if_missing(argument: str) -> str:
    return (
        f"If they mean that a protein was not measured, say so by a mask ({argument}=, True where measured); absence "
        "is never inferred from values."
    )


def _array(values: Any) -> Any:
    """Return what a table holds, without its names."""
    return values.to_numpy() if isinstance(values, pd.DataFrame) else values


def _open_mask(mask: Any, table: _Table) -> MatrixReader:
    """Open a mask whose columns lie as those of the values, or are named as they are."""
    columns = None
    if isinstance(mask, pd.DataFrame):
        columns = pd.Index(mask.columns.astype(str)).get_indexer(pd.Index(table.names))
        missing = [name for name, column in zip(table.names, columns, strict=True) if column < 0]
        if missing:
            raise DataError(
                f"{table.mask_where} has no columns {list_some(missing)}, which {table.where} has."
            )
    elif tuple(mask.shape) != (table.values.n_rows, table.values.n_cols):
        raise DataError(
            f"{table.mask_where} has shape {tuple(mask.shape)}, {table.where} has "
            f"{(table.values.n_rows, table.values.n_cols)}; expected the same."
        )
    return open_matrix(_array(mask), None, columns, where=table.mask_where)


class _Table:
    """Values and mask of the proteins of all cells, opened for reading.

    Parameters
    ----------
    names
        Names of the proteins, in order.
    where, there
        Name of the values in messages, and what helps to explain a fault.
    """

    values: MatrixReader
    mask: MatrixReader | None = None
    mask_where: str = "the cells of the modality"
    present: np.ndarray | None = None

    def __init__(self, names: list[str], where: str, there: Mapping[str, Any]) -> None:
        self.names = self._all_names = names
        self.where, self.there = where, there
        self._columns = np.arange(len(names))

    def align(self, wanted: list[str]) -> None:
        """See these proteins, in this order; those that are not there were not measured."""
        self.names = wanted
        self._columns = pd.Index(self._all_names).get_indexer(pd.Index(wanted))

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return values (float32, 0 where not measured) and mask (bool) of some rows."""
        mask, values = self._read_mask(rows), np.zeros((len(rows), self.values.n_cols), dtype=np.float32)
        entries = self.values.entries(rows)
        values[entries.rows, entries.cols] = entries.values
        values = np.where(mask, values, np.float32(0))[:, self._columns]
        mask = mask[:, self._columns]
        values[:, self._columns < 0], mask[:, self._columns < 0] = 0, False
        return values, mask

    def _read_mask(self, rows: np.ndarray) -> np.ndarray:
        """Return what was measured in some rows, of all proteins that are there."""
        shape = (len(rows), self.values.n_cols)
        if self.mask is None:
            mask = np.ones(shape, dtype=bool)
        else:
            mask = np.zeros(shape, dtype=bool)
            entries = self.mask.entries(rows)
            mask[entries.rows, entries.cols] = True
        if self.present is not None:
            mask[~self.present[rows]] = False
        return mask

    def check(self, cells: pd.Index, *, allow_noninteger: bool) -> tuple[np.ndarray, np.ndarray]:
        """Check every value in one pass of bounded memory.

        Returns
        -------
        ndarray, ndarray
            In how many cells each protein was measured, and whether any was in each cell.
        """
        self._check_mask(cells)
        faults, wanted = preflight.CountFaults(), np.zeros(self.values.n_cols, dtype=bool)
        wanted[self._columns[self._columns >= 0]] = True
        n_measured, measured = np.zeros(len(wanted), dtype=np.int64), np.zeros(len(cells), dtype=bool)
        for start, n_rows, entries in self.values.blocks():
            mask = self._read_mask(np.arange(start, start + n_rows)) & wanted
            faults.look(entries.only(mask[entries.rows, entries.cols]), start)
            n_measured += mask.sum(axis=0)
            measured[start : start + n_rows] = mask.any(axis=1)
        faults.refuse(
            cells, self._all_names, allow_noninteger=allow_noninteger, where=self.where, there=self.there
        )
        return np.where(self._columns < 0, 0, n_measured[self._columns]), measured

    def _check_mask(self, cells: pd.Index) -> None:
        for start, _, entries in _blocks(self.mask):
            wrong = np.flatnonzero(entries.values != 1)
            if len(wrong):
                row, col = start + entries.rows[wrong[0]], entries.cols[wrong[0]]
                raise DataError(
                    f"{self.mask_where} has values other than true and false, such as {entries.values[wrong[0]]:g} "
                    f"(cell {cells[row]!r}, {self._all_names[col]!r}); expected True where measured, False where not."
                )


def _blocks(matrix: MatrixReader | None) -> Iterator[tuple[int, int, Entries]]:
    return iter(()) if matrix is None else matrix.blocks()
