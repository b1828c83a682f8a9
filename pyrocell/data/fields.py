"""The fields that models read of each cell; a model declares them as class attributes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pyrocell.data import preflight
from pyrocell.data.absence import mask_arguments, measured_cells, require_measured
from pyrocell.data.base import NONINTEGER, Argument, Field, Frozen, Reader, Setup, column_reader, tensor_like
from pyrocell.data.columns import Columns, Continuous, OneColumn, SizeFactor
from pyrocell.data.extension import absent_features, joined_levels, require_as_many, with_empty_columns
from pyrocell.data.matrices import MatrixReader
from pyrocell.data.slots import Slots
from pyrocell.distributions import NonZeros, attach_nonzeros
from pyrocell.errors import DataError, list_some

__all__ = ["Categories", "Category", "Continuous", "Counts", "SizeFactor"]


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
        names = (
            there if self.features is None else preflight.chosen_features(self.features, there, slots.spelled)
        )
        totals = self._check(slots, setup, self._aligned(slots, setup, {"names": names}), names)
        cells = {
            self.name: tensor_like("float32", len(names), fill=1),
            self.library: tensor_like("float32", 1, fill=len(names)),
        }
        if self.absent_ok:
            require_measured(self, totals)
            cells[self.mask] = tensor_like("bool", fill=1)
        return Frozen({"given": True, "names": names, "cells": cells}, totals=totals)

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Align the features by name; more features than recorded are ignored."""
        matrix = self._as_read(self._aligned(slots, setup, record))
        measured = measured_cells(self, slots, setup)

        def read(rows: np.ndarray) -> dict[str, Tensor | None]:
            entries = matrix.entries(rows)
            if measured is not None:
                entries = entries.only(measured[rows[entries.rows]])
            counts = np.zeros((len(rows), matrix.n_cols), dtype=np.float32)
            dense = attach_nonzeros(torch.from_numpy(counts), *entries)
            # Written through NumPy: torch would take the index of non-zeros for outdated.
            counts.ravel()[NonZeros.of(dense).flat.numpy()] = entries.values
            library = torch.from_numpy(entries.totals(len(rows)).astype(np.float32)).unsqueeze(1)
            found: dict[str, Tensor | None] = {self.name: dense, self.library: library}
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
        return {**record, "absent": sorted({*record.get("absent", ()), *absent})}

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
            raise DataError(
                f"{len(missing)} of the {len(wanted)} features of the model are not in {slots.spelled}.var_names: "
                f"{list_some(missing)}.{kind if len(missing) == len(wanted) else ''} Give data that have them all; "
                f"their order, and further features, do not matter. {slots.spelled}.var_names has {list_some(there)}."
            )
        matrix = slots.matrix(setup[self.argument], columns[columns >= 0])
        return with_empty_columns(matrix, columns >= 0) if absent else matrix


def _check_feature_names(slots: Slots) -> None:
    """Raise a DataError if feature names repeat."""
    preflight.check_names(slots.feature_names, "feature", f"call {slots.spelled}.var_names_make_unique().")


_UNLABELED = (
    "Value in that column that means that the label of a cell is not known, such as ``'Unknown'``. Left out: every "
    "cell is labelled."
)


class Category(OneColumn):
    """One category per cell, such as the batch: int64, shape (n_cells,).

    When it is optional and left out, all cells have category 0 of 1.

    With ``unlabeled`` cells may be without a category: the set-up says which value of the column means that, and
    ``cells.is_labeled`` (bool, shape (n_cells,)) says which cells have one; the others have code 0, without meaning.
    Data that lack the column altogether are then read as unlabelled, except for those that a model is made from.

    Parameters
    ----------
    optional
        Whether the user may leave it out.
    unlabeled
        Whether cells may be without a category.
    min_levels
        How many categories the data must have at least.
    argument, doc
        As for `Field`.
    """

    # What users of this field know these columns by.
    _ARGUMENTS: ClassVar[dict[str, str]] = {"label": "labels_key"}
    _DOCS: ClassVar[dict[str, str]] = {
        "batch": "Column of ``adata.obs`` that says in which batch (sample, lane, donor, experiment) a cell was "
        "measured: the technical differences to correct for.",
        "label": "Column of ``adata.obs`` with the label of each cell, such as its cell type.",
    }

    def __init__(
        self,
        *,
        optional: bool = False,
        unlabeled: bool = False,
        min_levels: int = 1,
        argument: str | None = None,
        doc: str | None = None,
    ) -> None:
        super().__init__(optional=optional, argument=argument, doc=doc)
        self.unlabeled = unlabeled
        self.min_levels = min_levels

    def default_argument(self) -> str:
        """Return ``<name>_key``, or the name that users know."""
        return self._ARGUMENTS.get(self.name, f"{self.name}_key")

    def arguments(self) -> list[Argument]:
        """Return the name of the column."""
        doc = self.doc or self._DOCS.get(
            self.name, f"Column of ``adata.obs`` with the {self.name} of each cell."
        )
        if self.min_levels > 1:
            doc += f" At least {self.min_levels} categories."
        if self.optional:
            doc += " Left out: all cells are alike."
        column = Argument(
            self.argument, "str | None" if self.optional else "str", doc, required=not self.optional
        )
        return (
            [column, Argument("unlabeled_category", "str | None", _UNLABELED)] if self.unlabeled else [column]
        )

    def freeze(self, slots: Slots, setup: Setup) -> Frozen:
        """Record the categories that occur."""
        key = setup[self.argument]
        names, codes = (["all"], np.zeros(0, dtype=np.int64)) if key is None else self._levels(slots, setup)
        if self.unlabeled and not names:
            raise DataError(
                f"{self._where(slots, setup)} is {setup['unlabeled_category']!r}, which is the unlabeled_category, in "
                f"all {slots.n_cells} cells. Give some cells of each category their label."
            )
        if len(names) < self.min_levels:
            raise DataError(
                f"{self.argument}={key!r} has {len(names)} category ({list_some(names)}); this model needs at least "
                f"{self.min_levels}. Name a column that tells the cells apart."
            )
        cells = {self.name: tensor_like("int64")}
        record = {"given": key is not None, "names": names, "cells": cells}
        if self.unlabeled:
            record["n_labeled"] = np.bincount(codes[codes >= 0], minlength=len(names)).tolist()
            cells["is_labeled"] = tensor_like("bool")
        return Frozen(record, codes={} if key is None else {key: codes})

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Align the categories by name."""
        if record["given"] and not (self.unlabeled and not slots.has_column(setup[self.argument])):
            where = f"{self._where(slots, setup)}: this model"
            codes = _known_codes(self._levels(slots, setup), record["names"], where)
        else:
            codes = np.full(slots.n_cells, -1 if self.unlabeled else 0, dtype=np.int64)
        labels = column_reader(self.name, np.maximum(codes, 0))
        if not self.unlabeled:
            return labels
        is_labeled = column_reader("is_labeled", codes >= 0)
        return lambda rows: {**labels(rows), **is_labeled(rows)}

    def extend(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Frozen:
        """Put the categories of a query that are new after those of the reference."""
        key = setup[self.argument]
        if self.name == "label" and (not record["given"] or not slots.has_column(key)):
            # A query may be without labels: all unlabelled where a model knows what that is, else as if never given.
            return Frozen({**record, "given": record["given"] and self.unlabeled})
        if key is None:
            if record["given"]:
                raise DataError(
                    f"The reference has the categories {list_some(record['names'])} of {self.name!r}, the query none: "
                    f"set it up with {self.argument}=. A column with one new name makes all of it one new category."
                )
            return Frozen(dict(record))
        levels = self._levels(slots, setup)
        if self.unlabeled:  # what tells classes apart was learned for these
            codes = _known_codes(levels, record["names"], f"{self._where(slots, setup)}: the reference")
            return Frozen({**record, "given": True}, codes={key: codes})
        names, codes = joined_levels(record["names"], *levels)
        return Frozen({**record, "given": True, "names": names}, codes={key: codes})

    def _levels(self, slots: Slots, setup: Setup) -> tuple[list[str], np.ndarray]:
        """Names of the categories that occur, and the position of each cell's in them; -1 for an unlabelled one."""
        names, codes = preflight.category_levels(self._column(slots, setup), self._where(slots, setup))
        unknown = str(setup["unlabeled_category"]) if self.unlabeled else None
        if unknown not in names:
            return names, codes
        nothing = names.index(unknown)
        codes = np.where(codes == nothing, -1, codes - (codes > nothing))
        return [name for name in names if name != unknown], codes


def _known_codes(levels: tuple[list[str], np.ndarray], known: list[str], where: str) -> np.ndarray:
    """Turn categories of new data into the codes of the known ones.

    Raises a DataError that names the categories which are not known.
    """
    names, codes = levels
    place = {name: code for code, name in enumerate(known)}
    unseen = [name for name in names if name not in place]
    if unseen:
        n_cells = int(np.isin(codes, [names.index(name) for name in unseen]).sum())
        raise DataError(
            f"{where} has not seen the categories {list_some(unseen)} ({n_cells} cells). It knows "
            f"{list_some(known, 20)}. Remove or rename these cells, train a model with them, or map them onto this one "
            "with load_query_data."
        )
    # The last entry is for the code -1 of unlabelled cells, which stays what it is.
    return np.array([*(place[name] for name in names), -1], dtype=np.int64)[codes]


class Categories(Columns):
    """Further categorical covariates: int64, shape (n_cells, n_covariates); none when left out.

    Parameters
    ----------
    argument, doc
        As for `Field`.
    """

    def arguments(self) -> list[Argument]:
        """Return the names of the columns."""
        doc = self.doc or (
            "Columns of ``adata.obs`` with further categories whose effect is to be corrected for, such as donor or "
            "chemistry."
        )
        return [Argument(self.argument, "list[str] | None", doc)]

    def _levels(self, slots: Slots, setup: Setup) -> dict[str, tuple[list[str], np.ndarray]]:
        columns = self._columns(slots, setup).items()
        where = {key: f"{self.argument}: {slots.column_place(key)}" for key, _ in columns}
        return {key: preflight.category_levels(column, where[key]) for key, column in columns}

    def freeze(self, slots: Slots, setup: Setup) -> Frozen:
        """Record the columns and the categories of each."""
        found = self._levels(slots, setup)
        record = {
            "given": bool(found),
            "names": list(found),
            "levels": [names for names, _ in found.values()],
            "cells": {self.name: tensor_like("int64", len(found))},
        }
        return Frozen(record, codes={key: codes for key, (_, codes) in found.items()})

    def extend(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Frozen:
        """Put the categories of a query that are new after those of the reference, column by column."""
        found = self._levels(slots, setup)
        require_as_many(self.argument, list(found), record["names"])
        joined = [
            joined_levels(known, *new) for known, new in zip(record["levels"], found.values(), strict=True)
        ]
        return Frozen(
            {**record, "names": list(found), "levels": [names for names, _ in joined]},
            codes={key: codes for key, (_, codes) in zip(found, joined, strict=True)},
        )

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Align the categories of each column by name."""
        found = self._levels(slots, setup)
        codes = np.zeros((slots.n_cells, len(found)), dtype=np.int64)
        for i, (key, known) in enumerate(zip(record["names"], record["levels"], strict=True)):
            where = f"{self.argument}: {slots.column_place(key)}: this model"
            codes[:, i] = _known_codes(found[key], known, where)
        return column_reader(self.name, codes)
