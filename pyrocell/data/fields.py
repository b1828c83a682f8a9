"""The fields that models read of each cell; a model declares them as class attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyrocell.data import preflight
from pyrocell.data.base import Argument, Field, Frozen, Reader, Setup, column_reader, tensor_like
from pyrocell.data.matrices import MatrixReader
from pyrocell.data.slots import Slots
from pyrocell.distributions import NonZeros, attach_nonzeros
from pyrocell.errors import DataError, list_some

__all__ = ["Categories", "Category", "Continuous", "Counts", "SizeFactor"]


class Counts(Field):
    """Counts of features: raw, whole, non-negative.

    ``cells.counts`` is dense float32, shape (n_cells, n_features), with the index of its non-zeros attached;
    ``cells.library`` (``<name>_library`` for a field of another name) is its row sums, shape (n_cells, 1).

    Parameters
    ----------
    argument
        Argument of ``setup_anndata`` that names the layer; by default ``layer``, or ``<name>_layer`` for a field
        that is not called ``counts``.
    doc
        What the documentation of ``setup_anndata`` says about it.
    """

    def __init__(self, *, argument: str | None = None, doc: str | None = None) -> None:
        super().__init__(argument=argument, doc=doc)

    def default_argument(self) -> str:
        """Return ``layer``, the name that users know, for the main counts."""
        return "layer" if self.name == "counts" else f"{self.name}_layer"

    @property
    def library(self) -> str:
        """Attribute of `Cells` with the row sums."""
        return "library" if self.name == "counts" else f"{self.name}_library"

    def arguments(self) -> list[Argument]:
        """Return the layer and the leave for values that are not whole."""
        doc = self.doc or (
            f"Layer of ``adata.layers`` that holds the {self.name if self.name != 'counts' else 'raw counts'}: whole "
            "numbers, neither normalised nor log-transformed. Left out: ``adata.X``."
        )
        leave = (
            "Accept counts that are not whole numbers, such as those corrected for ambient RNA. Negative, missing "
            "and infinite values are refused all the same."
        )
        return [
            Argument(self.argument, "str | None", doc),
            Argument("allow_noninteger", "bool", leave, default=False),
        ]

    def check_setup(self, slots: Slots, setup: Setup) -> None:
        """Look for the layer."""
        slots.has_matrix(setup[self.argument], self.argument)

    def freeze(self, slots: Slots, setup: Setup) -> Frozen:
        """Check every count and name, and record the features."""
        _check_feature_names(slots)
        names = [str(name) for name in slots.feature_names]
        totals = self._check(slots, setup, slots.matrix(setup[self.argument]), names)
        cells = {
            self.name: tensor_like("float32", len(names), fill=1),
            self.library: tensor_like("float32", 1, fill=len(names)),
        }
        return Frozen({"given": True, "names": names, "cells": cells}, totals=totals)

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Align the features by name; more features than recorded are ignored."""
        matrix = self._aligned(slots, setup, record)

        def read(rows: np.ndarray) -> dict[str, Tensor | None]:
            entries = matrix.entries(rows)
            counts = np.zeros((len(rows), matrix.n_cols), dtype=np.float32)
            dense = attach_nonzeros(torch.from_numpy(counts), *entries)
            # Written through NumPy: torch would take the index of non-zeros for outdated.
            counts.ravel()[NonZeros.of(dense).flat.numpy()] = entries.values
            library = torch.from_numpy(entries.totals(len(rows)).astype(np.float32)).unsqueeze(1)
            return {self.name: dense, self.library: library}

        return read

    def check_values(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> None:
        """Check every count of the recorded features."""
        self._check(slots, setup, self._aligned(slots, setup, record), record["names"])

    def _check(self, slots: Slots, setup: Setup, matrix: MatrixReader, names: list[str]) -> np.ndarray:
        return preflight.check_counts(
            matrix,
            slots.cell_names,
            names,
            allow_noninteger=bool(setup["allow_noninteger"]),
            where=slots.where(setup[self.argument]),
            there=slots.describe(),
        )

    def _aligned(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> MatrixReader:
        _check_feature_names(slots)
        self.check_setup(slots, setup)  # data other than those that were set up may lack the layer
        there, wanted = slots.feature_names.astype(str), record["names"]
        if list(there) == wanted:
            return slots.matrix(setup[self.argument])
        columns = there.get_indexer(wanted)
        missing = [name for name, column in zip(wanted, columns, strict=True) if column < 0]
        if missing:
            kind = " None of them is there: are the names of another kind (symbols, Ensembl)?"
            raise DataError(
                f"{len(missing)} of the {len(wanted)} features of the model are not in adata.var_names: "
                f"{list_some(missing)}.{kind if len(missing) == len(wanted) else ''} Give data that have them all; "
                f"their order, and further features, do not matter. adata.var_names has {list_some(there)}."
            )
        return slots.matrix(setup[self.argument], columns)


def _check_feature_names(slots: Slots) -> None:
    """Raise a DataError if feature names repeat."""
    preflight.check_names(slots.feature_names, "feature", "call adata.var_names_make_unique().")


class _OneColumn(Field):
    """A field that lies in one column of ``adata.obs``."""

    def check_setup(self, slots: Slots, setup: Setup) -> None:
        """Look for the column."""
        if setup[self.argument] is not None:
            self._column(slots, setup)

    def _column(self, slots: Slots, setup: Setup) -> pd.Series:
        return slots.column(setup[self.argument], self.argument)

    def _where(self, setup: Setup) -> str:
        return f"{self.argument}: adata.obs[{setup[self.argument]!r}]"


class _Columns(Field):
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


class Category(_OneColumn):
    """One category per cell, such as the batch: int64, shape (n_cells,).

    When it is optional and left out, all cells have category 0 of 1.

    Parameters
    ----------
    optional
        Whether the user may leave it out.
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
        min_levels: int = 1,
        argument: str | None = None,
        doc: str | None = None,
    ) -> None:
        super().__init__(optional=optional, argument=argument, doc=doc)
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
        return [
            Argument(self.argument, "str | None" if self.optional else "str", doc, required=not self.optional)
        ]

    def freeze(self, slots: Slots, setup: Setup) -> Frozen:
        """Record the categories that occur."""
        key = setup[self.argument]
        names, codes = (["all"], np.zeros(0, dtype=np.int64)) if key is None else self._levels(slots, setup)
        if len(names) < self.min_levels:
            raise DataError(
                f"{self.argument}={key!r} has {len(names)} category ({list_some(names)}); this model needs at least "
                f"{self.min_levels}. Name a column that tells the cells apart."
            )
        record = {"given": key is not None, "names": names, "cells": {self.name: tensor_like("int64")}}
        return Frozen(record, codes={} if key is None else {key: codes})

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Align the categories by name."""
        if not record["given"]:
            return column_reader(self.name, np.zeros(slots.n_cells, dtype=np.int64))
        codes = _known_codes(self._levels(slots, setup), record["names"], f"{self._where(setup)}: this model")
        return column_reader(self.name, codes)

    def _levels(self, slots: Slots, setup: Setup) -> tuple[list[str], np.ndarray]:
        return preflight.category_levels(self._column(slots, setup), self._where(setup))


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
            f"{list_some(known, 20)}. Remove or rename these cells, or train a model with them."
        )
    return np.array([place[name] for name in names], dtype=np.int64)[codes]


class Categories(_Columns):
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
        where = f"{self.argument}: adata.obs"
        return {key: preflight.category_levels(column, f"{where}[{key!r}]") for key, column in columns}

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

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Align the categories of each column by name."""
        found = self._levels(slots, setup)
        codes = np.zeros((slots.n_cells, len(found)), dtype=np.int64)
        for i, (key, known) in enumerate(zip(record["names"], record["levels"], strict=True)):
            codes[:, i] = _known_codes(found[key], known, f"{self.argument}: adata.obs[{key!r}]: this model")
        return column_reader(self.name, codes)


class Continuous(_Columns):
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
        for i, column in enumerate(columns.values()):
            values[:, i] = preflight.numbers(column, self.argument)
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

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Standardise as recorded."""
        _, values = self._values(slots, setup)
        return column_reader(self.name, (values - np.array(record["means"])) / np.array(record["sds"]))


class SizeFactor(_OneColumn):
    """Size of each cell known from elsewhere: float32, shape (n_cells, 1), positive; None when left out.

    Parameters
    ----------
    argument, doc
        As for `Field`.
    """

    def __init__(self, *, argument: str | None = None, doc: str | None = None) -> None:
        super().__init__(optional=True, argument=argument, doc=doc)

    def arguments(self) -> list[Argument]:
        """Return the name of the column."""
        doc = self.doc or (
            "Column of ``adata.obs`` with the size of each cell, above 0, in place of its total count: the expected "
            "count is the size times the expression."
        )
        return [Argument(self.argument, "str | None", doc)]

    def freeze(self, slots: Slots, setup: Setup) -> Frozen:
        """Check the values; nothing of them is recorded."""
        key = setup[self.argument]
        if key is None:
            return Frozen({"given": False, "names": [], "cells": {self.name: None}})
        preflight.size_factors(self._column(slots, setup), self.argument)
        return Frozen(
            {"given": True, "names": [key], "cells": {self.name: tensor_like("float32", 1, fill=1)}}
        )

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Check and read the column."""
        if not record["given"]:
            return lambda rows: {self.name: None}
        values = preflight.size_factors(self._column(slots, setup), self.argument)
        return column_reader(self.name, values[:, None])
