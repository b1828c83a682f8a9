"""The fields of categories: one per cell, such as the batch, or several columns of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from pyrocell.data import preflight
from pyrocell.data.base import Argument, Frozen, Reader, Setup, column_reader, tensor_like
from pyrocell.data.columns import Columns, OneColumn
from pyrocell.data.extension import joined_levels, matched_columns
from pyrocell.data.slots import Slots, what_there_is
from pyrocell.errors import DataError, PyrocellWarning, list_some

__all__ = ["Categories", "Category"]

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
    query_may_lack
        Whether a query that is mapped onto a reference may be without the column, though the reference has it.
    groups_of
        Name of a field of which each category must have measured cells, such as the proteins of a panel.
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
        query_may_lack: bool = False,
        groups_of: str | None = None,
        argument: str | None = None,
        doc: str | None = None,
    ) -> None:
        super().__init__(optional=optional, argument=argument, doc=doc)
        self.unlabeled, self.min_levels = unlabeled, min_levels
        self.query_may_lack = query_may_lack or unlabeled
        self.groups_of = groups_of

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
            self._warn_misspelt(slots, setup)
            record["n_labeled"] = _n_labeled(codes, names)
            cells["is_labeled"] = tensor_like("bool")
        return Frozen(record, codes={} if key is None else {key: codes})

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Align the categories by name."""
        if record["given"] and not (self.unlabeled and not slots.has_column(setup[self.argument])):
            where = f"{self._where(slots, setup)}: this model"
            codes = _known_codes(self._levels(slots, setup), record["names"], where, self._remedy(setup))
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
        if self.query_may_lack and (not record["given"] or not slots.has_column(key)):
            # All unlabelled where a model knows what that is, else as if never given.
            nothing = {"n_labeled": [0] * len(record["names"])} if self.unlabeled else {}
            return Frozen({**record, **nothing, "given": record["given"] and self.unlabeled})
        if key is None or not slots.has_column(key):
            if record["given"]:
                raise DataError(
                    f"The reference has the categories {list_some(record['names'])} of {self.name!r}, the query has no "
                    f"column of them ({self.argument}={key!r}). Set the query up with {self.argument}=; a column with "
                    "one new name makes all of it one new category."
                )
            return Frozen(dict(record))
        levels = self._levels(slots, setup)
        if self.unlabeled:  # what tells classes apart was learned for these
            where = f"{self._where(slots, setup)}: the reference"
            codes = _known_codes(levels, record["names"], where, self._remedy(setup))
            n_labeled = _n_labeled(codes, record["names"])
            return Frozen({**record, "given": True, "n_labeled": n_labeled}, codes={key: codes})
        names, codes = joined_levels(record["names"], *levels)
        return Frozen({**record, "given": True, "names": names}, codes={key: codes})

    def _levels(self, slots: Slots, setup: Setup) -> tuple[list[str], np.ndarray]:
        """Names of the categories that occur, and the position of each cell's in them; -1 for an unlabelled one."""
        given = setup["unlabeled_category"] if self.unlabeled else None
        unknown = None if given is None else str(given)
        names, codes = preflight.category_levels(
            self._column(slots, setup), self._where(slots, setup), unlabeled=unknown
        )
        if unknown is None or unknown not in names:
            return names, codes
        nothing = names.index(unknown)
        codes = np.where(codes == nothing, -1, codes - (codes > nothing))
        return [name for name in names if name != unknown], codes

    def _warn_misspelt(self, slots: Slots, setup: Setup) -> None:
        """Warn if the value that means "not known" does not occur: then it tells nothing, or is misspelt."""
        unknown, key = setup["unlabeled_category"], setup[self.argument]
        if unknown is None or key is None:
            return
        there = [str(value) for value in self._column(slots, setup).unique()]
        if str(unknown) not in there:
            warnings.warn(
                f"unlabeled_category={unknown!r} does not occur in {slots.column_place(key)}: every cell is taken as "
                f"labelled.{what_there_is(str(unknown), there)}",
                PyrocellWarning,
                stacklevel=2,
            )

    def _remedy(self, setup: Setup) -> str:
        if self.unlabeled:
            return f"Rename these labels, or give the cells the unlabeled_category ({setup['unlabeled_category']!r})."
        return _MAPPABLE


_MAPPABLE = (
    "Remove or rename these cells, train a model with them, or map them onto this one with load_query_data."
)


def _n_labeled(codes: np.ndarray, names: list[str]) -> list[int]:
    """Count the labelled cells of each category."""
    counted: list[int] = np.bincount(codes[codes >= 0], minlength=len(names)).tolist()
    return counted


def _known_codes(
    levels: tuple[list[str], np.ndarray], known: list[str], where: str, remedy: str
) -> np.ndarray:
    """Turn categories of new data into the codes of the known ones.

    Raises a DataError that names the categories which are not known, and says what to do.
    """
    names, codes = levels
    place = {name: code for code, name in enumerate(known)}
    unseen = [name for name in names if name not in place]
    if unseen:
        n_cells = int(np.isin(codes, [names.index(name) for name in unseen]).sum())
        raise DataError(
            f"{where} has not seen the categories {list_some(unseen)} ({n_cells} cells). It knows "
            f"{list_some(known, 20)}. {remedy}"
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
        found = self._matched(slots, setup, record)
        joined = [
            joined_levels(known, *new) for known, new in zip(record["levels"], found.values(), strict=True)
        ]
        return Frozen(
            {**record, "names": list(found), "levels": [names for names, _ in joined]},
            codes={key: codes for key, (_, codes) in zip(found, joined, strict=True)},
        )

    def _matched(
        self, slots: Slots, setup: Setup, record: Mapping[str, Any]
    ) -> dict[str, tuple[list[str], np.ndarray]]:
        """Return the columns in the order of those recorded."""
        found = list(self._levels(slots, setup).items())
        order = matched_columns(self.argument, [key for key, _ in found], record["names"])
        return dict(found[i] for i in order)

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Align the categories of each column by name."""
        found = self._matched(slots, setup, record)
        codes = np.zeros((slots.n_cells, len(found)), dtype=np.int64)
        for i, (key, known) in enumerate(zip(found, record["levels"], strict=True)):
            where = f"{self.argument}: {slots.column_place(key)}: this model"
            codes[:, i] = _known_codes(found[key], known, where, _MAPPABLE)
        return column_reader(self.name, codes)
