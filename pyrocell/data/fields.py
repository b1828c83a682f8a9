"""The field of counts; a model declares its fields as class attributes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pyrocell.data import preflight
from pyrocell.data.absence import mask_arguments, measured_cells, require_measured
from pyrocell.data.base import NONINTEGER, Argument, Field, Frozen, Reader, Setup, tensor_like
from pyrocell.data.extension import absent_features, with_empty_columns
from pyrocell.data.matrices import MatrixReader
from pyrocell.data.slots import Slots, what_there_is
from pyrocell.distributions import NonZeros
from pyrocell.errors import DataError, list_some

__all__ = ["Counts"]


class Counts(Field):
    """Counts of features: raw, whole, non-negative.

    ``cells.counts`` is dense float32, shape (n_cells, n_features), with the index of its non-zeros attached;
    ``cells.library`` (``<name>_library`` for a field of another name) is its row sums, shape (n_cells, 1). With
    ``absent_ok``, ``cells.counts_mask`` (``<name>_mask``) says in which cells they were measured, bool, shape
    (n_cells,); in the others they are 0.

    Parameters
    ----------
    absent_ok
        Whether the model can do with cells that lack these counts: cells that the modality of a MuData does not have,
        or that a column of ``adata.obs`` says were not measured. By default such cells are refused by name.
    argument
        Argument of ``setup_anndata`` that names the layer; by default ``layer``, or ``<name>_layer`` for a field
        that is not called ``counts``.
    doc
        What the documentation of ``setup_anndata`` says about it.
    """

    has_features: ClassVar[bool] = True

    def __init__(
        self, *, absent_ok: bool = False, argument: str | None = None, doc: str | None = None
    ) -> None:
        super().__init__(argument=argument, doc=doc)
        self.absent_ok = absent_ok
        self.features: list[str] | None = None

    def only(self, features: Sequence[str]) -> Counts:
        """Return the field for a model that reads these features alone, in this order."""
        twin = copy.copy(self)
        twin.features = [str(name) for name in features]
        return twin

    def default_argument(self) -> str:
        """Return ``layer``, the name that users know, for the main counts."""
        return "layer" if self.name == "counts" else f"{self.name}_layer"

    @property
    def library(self) -> str:
        """Attribute of `Cells` with the row sums."""
        return "library" if self.name == "counts" else f"{self.name}_library"

    @property
    def mask(self) -> str:
        """Attribute of `Cells` that says in which cells they were measured."""
        return f"{self.name}_mask"

    def arguments(self) -> list[Argument]:
        """Return the layer and the leave for values that are not whole."""
        doc = self.doc or (
            f"Layer of ``adata.layers`` that holds the {self.name if self.name != 'counts' else 'raw counts'}: whole "
            "numbers, neither normalised nor log-transformed. Left out: ``adata.X``."
        )
        return [Argument(self.argument, "str | None", doc), *mask_arguments(self), NONINTEGER]

    def check_setup(self, slots: Slots, setup: Setup) -> None:
        """Look for the layer, and for cells that lack it."""
        slots.has_matrix(setup[self.argument], self.argument)
        measured_cells(self, slots, setup)

    def freeze(self, slots: Slots, setup: Setup) -> Frozen:
        """Check every count and name, and record the features."""
        _check_feature_names(slots)
        there = [str(name) for name in slots.feature_names]
        names = there if self.features is None else _chosen_features(self.features, there, slots.spelled)
        totals = self._check(slots, setup, self._aligned(slots, setup, {"names": names}), names)
        if self.absent_ok:
            require_measured(self, totals)
        return Frozen(self.over({"given": True}, names), totals=totals)

    def over(self, record: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
        """Return a record of the field over other features."""
        cells = {
            self.name: tensor_like("float32", len(names), fill=1),
            self.library: tensor_like("float32", 1, fill=len(names)),
        }
        if self.absent_ok:
            cells[self.mask] = tensor_like("bool", fill=1)
        return {**record, "names": names, "cells": cells}

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Align the features by name; more features than recorded are ignored."""
        matrix = self._as_read(self._aligned(slots, setup, record))
        measured = measured_cells(self, slots, setup)

        def read(rows: np.ndarray) -> dict[str, Tensor | NonZeros | None]:
            counts = matrix.nonzeros(rows)
            if measured is not None:
                counts = counts.only_rows(measured[rows])
            library = torch.from_numpy(counts.totals().astype(np.float32)).unsqueeze(1)
            found: dict[str, Tensor | NonZeros | None] = {self.name: counts, self.library: library}
            if self.absent_ok:
                mask = np.ones(len(rows), dtype=bool) if measured is None else measured[rows]
                found[self.mask] = torch.from_numpy(mask)
            return found

        return read

    def extend(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Frozen:
        """Check every count of a query; features of the reference that it lacks are taken for zeros."""
        record = self.lacking(slots, record)
        return Frozen(record, totals=self.totals(slots, setup, record))

    def lacking(self, slots: Slots, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record with the features added that a query lacks."""
        absent = absent_features(slots.feature_names, record["names"])
        return {**record, "absent": _in_order(record["names"], {*record.get("absent", ()), *absent})}

    def totals(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> np.ndarray:
        """Check every count of the features that a record names, and return the total of each cell over them.

        Parameters as for `open`.
        """
        return self._check(slots, setup, self._aligned(slots, setup, record), record["names"])

    def check_values(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> None:
        """Check every count of the recorded features."""
        self.totals(slots, setup, record)

    def _check(self, slots: Slots, setup: Setup, matrix: MatrixReader, names: list[str]) -> np.ndarray:
        return preflight.check_counts(
            matrix,
            slots.cell_names,
            names,
            allow_noninteger=bool(setup["allow_noninteger"]),
            where=slots.where(setup[self.argument]),
            there={**slots.describe(), "argument": self.argument},
            measured=measured_cells(self, slots, setup),
        )

    def _as_read(self, matrix: MatrixReader) -> MatrixReader:
        """Return what the values mean to the model; a kind of counts may see them otherwise."""
        return matrix

    def _aligned(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> MatrixReader:
        _check_feature_names(slots)
        self.check_setup(slots, setup)  # data other than those that were set up may lack the layer
        there, wanted = slots.feature_names.astype(str), record["names"]
        if list(there) == wanted:
            return slots.matrix(setup[self.argument])
        columns = there.get_indexer(wanted)
        absent = [name for name, column in zip(wanted, columns, strict=True) if column < 0]
        missing = sorted(set(absent) - set(record.get("absent", ())), key=absent.index)
        if missing:
            kind = " None of them is there: are the names of another kind (symbols, Ensembl)?"
            word, place = f"{slots.words[1]}s", f"{slots.spelled}.{slots.names_in[1]}"
            raise DataError(
                f"{len(missing)} of the {len(wanted)} {word} of the model are not in {place}: "
                f"{list_some(missing)}.{kind if len(missing) == len(wanted) else ''} Give data that have them all; "
                f"their order, and further {word}, do not matter. {place} has {list_some(there)}."
            )
        matrix = slots.matrix(setup[self.argument], columns[columns >= 0])
        return with_empty_columns(matrix, columns >= 0) if absent else matrix


def _in_order(names: list[str], chosen: set[str]) -> list[str]:
    return [name for name in names if name in chosen]


def _check_feature_names(slots: Slots) -> None:
    """Raise a DataError if names of columns (features) repeat."""
    remedy = f"call {slots.spelled}.{slots.names_in[1]}_make_unique()."
    preflight.check_names(slots.feature_names, slots.words[1], remedy)


def _chosen_features(wanted: list[str], there: list[str], data: str = "adata") -> list[str]:
    """Return the features that a model asks for; raise a DataError that names those which ``data`` lack."""
    missing = sorted(set(wanted) - set(there), key=wanted.index)
    if not missing:
        return wanted
    kind = " None of them is there: are the names of another kind (symbols, Ensembl)?"
    raise DataError(
        f"{len(missing)} of the {len(wanted)} features that the model is to read are not in {data}.var_names: "
        f"{list_some(missing)}.{kind if len(missing) == len(wanted) else ''} Leave them out, or give data that have "
        f"them. For {missing[0]!r}:{what_there_is(missing[0], there)}"
    )
