"""Fields that lie in columns of ``adata.obs``, and those of them that hold numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import pandas as pd

from pyrocell.data import preflight
from pyrocell.data.base import Argument, Field, Frozen, Reader, Setup, column_reader, tensor_like
from pyrocell.data.extension import matched_columns
from pyrocell.data.slots import Slots
from pyrocell.errors import DataError, list_some

__all__ = ["Columns", "Continuous", "OneColumn", "SizeFactor"]


class OneColumn(Field):
    """A field that lies in one column of ``adata.obs``."""

    def check_setup(self, slots: Slots, setup: Setup) -> None:
        """Look for the column."""
        if setup[self.argument] is not None:
            self._column(slots, setup)

    def _column(self, slots: Slots, setup: Setup) -> pd.Series:
        return slots.column(setup[self.argument], self.argument)

    def _where(self, slots: Slots, setup: Setup) -> str:
        return f"{self.argument}: {slots.column_place(setup[self.argument])}"


class Columns(Field):
    """A field of any number of columns of ``adata.obs``; none when it is left out.

    Parameters
    ----------
    argument, doc
        As for `Field`.
    """

    is_covariate = True

    def __init__(self, *, argument: str | None = None, doc: str | None = None) -> None:
        super().__init__(optional=True, argument=argument, doc=doc)

    def default_argument(self) -> str:
        """Return the field's name in the singular, with ``_keys``."""
        return f"{self.name.removesuffix('s')}_keys"

    def check_setup(self, slots: Slots, setup: Setup) -> None:
        """Look for the columns."""
        self._columns(slots, setup)

    def _columns(self, slots: Slots, setup: Setup) -> dict[str, pd.Series]:
        keys = preflight.check_keys(setup[self.argument], self.argument)
        return {key: slots.column(key, self.argument) for key in keys}


class Continuous(Columns):
    """Continuous covariates, standardised: float32, shape (n_cells, n_covariates); none when left out.

    The mean and the standard deviation of the training data are kept, and applied to any data.

    Parameters
    ----------
    argument, doc
        As for `Field`.
    """

    def arguments(self) -> list[Argument]:
        """Return the names of the columns."""
        doc = self.doc or (
            "Columns of ``adata.obs`` with numbers whose effect is to be corrected for, such as age or the "
            "percentage of mitochondrial counts. Each is brought to mean 0 and standard deviation 1."
        )
        return [Argument(self.argument, "list[str] | None", doc)]

    def _values(self, slots: Slots, setup: Setup) -> tuple[list[str], np.ndarray]:
        columns = self._columns(slots, setup)
        values = np.zeros((slots.n_cells, len(columns)))
        for i, (key, column) in enumerate(columns.items()):
            values[:, i] = preflight.numbers(column, f"{self.argument}: {slots.column_place(key)}")
        return list(columns), values

    def freeze(self, slots: Slots, setup: Setup) -> Frozen:
        """Record mean and standard deviation of each column."""
        keys, values = self._values(slots, setup)
        constant = preflight.constant_columns(values, keys)
        if constant:
            raise DataError(
                f"{self.argument}: {list_some(constant)} has the same value in all cells, so it explains nothing. "
                "Leave it out."
            )
        record = {
            "given": bool(keys),
            "names": keys,
            "means": values.mean(axis=0).tolist(),
            "sds": values.std(axis=0).tolist(),
            "cells": {self.name: tensor_like("float32", len(keys))},
        }
        return Frozen(record, numbers=dict(zip(keys, values.T, strict=True)))

    def extend(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Frozen:
        """Take the columns of a query for those of the reference."""
        keys, _ = self._values(slots, setup)
        order = matched_columns(self.argument, keys, record["names"])
        return Frozen({**record, "names": [keys[i] for i in order]})

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Standardise as recorded."""
        keys, values = self._values(slots, setup)
        values = values[:, matched_columns(self.argument, keys, record["names"])]
        return column_reader(self.name, (values - np.array(record["means"])) / np.array(record["sds"]))


class HasTotals(Protocol):
    """Field of counts that tells the total of each cell over features of the data, read by the model or not."""

    name: str

    def totals(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> np.ndarray:
        """Return the total of each cell over the features that a record names."""

    def lacking(self, slots: Slots, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record with the features added that a query lacks."""


class SizeFactor(OneColumn):
    """Size of each cell known from elsewhere: float32, shape (n_cells, 1), positive; None when left out.

    Parameters
    ----------
    total_of
        Field of counts: when the column is left out, the size of a cell is its total over all features of the data,
        also those that the model does not read. Other data must have them all.
    argument, doc
        As for `Field`.
    """

    def __init__(
        self, *, total_of: HasTotals | None = None, argument: str | None = None, doc: str | None = None
    ) -> None:
        super().__init__(optional=True, argument=argument, doc=doc)
        self.total_of = total_of

    def arguments(self) -> list[Argument]:
        """Return the name of the column."""
        doc = self.doc or (
            "Column of ``adata.obs`` with the size of each cell, above 0, in place of its total count: the expected "
            "count is the size times the expression."
        )
        return [Argument(self.argument, "str | None", doc)]

    def freeze(self, slots: Slots, setup: Setup) -> Frozen:
        """Check the values; nothing is recorded of them, but the features of a total are."""
        key, of_each = setup[self.argument], {self.name: tensor_like("float32", 1, fill=1)}
        if key is not None:
            preflight.size_factors(self._column(slots, setup), self._where(slots, setup))
            return Frozen({"given": True, "names": [key], "cells": of_each})
        if self.total_of is None:
            return Frozen({"given": False, "names": [], "cells": {self.name: None}})
        names = [str(name) for name in slots.of(self.total_of.name).feature_names]
        return Frozen({"given": False, "names": names, "cells": of_each})

    def extend(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Frozen:
        """Check a query; features of a total that it lacks are taken for zeros."""
        if self.total_of is not None and not record["given"]:
            record = self.total_of.lacking(slots.of(self.total_of.name), record)
        return super().extend(slots, setup, record)

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Check and read the column, or take the totals."""
        if record["given"]:
            values = preflight.size_factors(self._column(slots, setup), self._where(slots, setup))
        elif self.total_of is None:
            return lambda rows: {self.name: None}
        else:
            values = self._totals(self.total_of, slots, setup, record)
        return column_reader(self.name, values[:, None])

    def _totals(self, counts: HasTotals, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> np.ndarray:
        try:
            return counts.totals(slots.of(counts.name), setup, record)
        except DataError as error:
            raise DataError(
                f"Without {self.argument}, the size of a cell is its total count over all features: {error} A column "
                f"with sizes, named with {self.argument}=, needs no other features than those that the model reads."
            ) from error
