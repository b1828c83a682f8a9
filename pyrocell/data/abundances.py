"""The field of smoothed abundances, such as those of spliced and unspliced RNA."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrocell.data import preflight
from pyrocell.data.base import Argument, Field, Frozen, Reader, Setup, tensor_like
from pyrocell.data.fields import Counts
from pyrocell.data.matrices import MatrixReader
from pyrocell.data.slots import Slots
from pyrocell.errors import DataError, PyrocellWarning, list_some

__all__ = ["Abundances"]


class Abundances(Counts):
    """Non-negative abundances of genes, smoothed over neighbours; each gene is read on a scale from 0 to 1.

    ``cells.<name>`` is dense float32, shape (n_cells, n_genes): 0 is the smallest value that the gene had in the data
    that the model was made with, 1 the largest. The record keeps both, as ``low`` and ``range``, so that other data
    are read on the same scale.

    Parameters
    ----------
    argument
        Argument of ``setup_anndata`` that names the layer; by default ``<name>_layer``.
    doc
        What the documentation of ``setup_anndata`` says about it.
    """

    def __init__(self, *, argument: str | None = None, doc: str | None = None) -> None:
        super().__init__(argument=argument, doc=doc)

    def default_argument(self) -> str:
        """Return ``<name>_layer``."""
        return f"{self.name}_layer"

    def arguments(self) -> list[Argument]:
        """Return the layer."""
        doc = self.doc or (
            f"Layer of ``adata.layers`` with {self.name} RNA, smoothed over the neighbours of each cell, see "
            "``pyrocell.data.smooth_velocity_layers``."
        )
        return [Argument(self.argument, "str", doc, required=True)]

    def freeze(self, slots: Slots, setup: Setup) -> Frozen:
        """Check every value and name, and record the genes and the range of each."""
        remedy = f"call {slots.spelled}.var_names_make_unique()."
        preflight.check_names(slots.feature_names, "feature", remedy)
        names = [str(name) for name in slots.feature_names]
        where = slots.where(setup[self.argument])
        low, high, whole = self._range(slots, setup, slots.matrix(setup[self.argument]), names)
        flat = [name for name, span in zip(names, high - low, strict=True) if span <= 0]
        if flat:
            raise DataError(
                f"{len(flat)} of {len(names)} genes have no {self.name} RNA that varies ({where} is constant): "
                f"{list_some(flat)}. No kinetics can be learned from them; keep the genes that have it, for example "
                "with pyrocell.data.filter_velocity_genes(adata, subset=True)."
            )
        if whole:
            warnings.warn(
                f"{where} has whole numbers only: raw counts? The model is one of abundances that are smoothed over "
                "neighbours; make them with pyrocell.data.smooth_velocity_layers(adata).",
                PyrocellWarning,
                stacklevel=2,
            )
        cells = {self.name: tensor_like("float32", len(names), fill=0.5)}
        record = {"given": True, "names": names, "cells": cells}
        return Frozen(record | {"low": low.tolist(), "range": (high - low).tolist()})

    def over(self, record: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
        """Return a record of the field over some of its features."""
        at = [record["names"].index(name) for name in names]
        spans = {key: [record[key][i] for i in at] for key in ("low", "range")}
        cells = {self.name: tensor_like("float32", len(names), fill=0.5)}
        return {**record, "names": names, "cells": cells, **spans}

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Align the genes by name; more genes than recorded are ignored."""
        matrix = self._aligned(slots, setup, record)
        low, span = (np.asarray(record[key], dtype=np.float32) for key in ("low", "range"))

        def read(rows: np.ndarray) -> dict[str, Tensor | None]:
            entries = matrix.entries(rows)
            values = np.zeros((len(rows), matrix.n_cols), dtype=np.float32)
            values[entries.rows, entries.cols] = entries.values
            return {self.name: torch.from_numpy((values - low) / span)}

        return read

    def extend(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Frozen:
        """Check every value of a query, which must have all genes: an absent one has no abundance to smooth."""
        return Field.extend(self, slots, setup, record)

    def check_values(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> None:
        """Check every value of the recorded genes."""
        self._range(slots, setup, self._aligned(slots, setup, record), record["names"])

    def _range(
        self, slots: Slots, setup: Setup, matrix: MatrixReader, names: list[str]
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return smallest and largest value of each gene, and whether all values are whole, in one checked pass."""
        where, faults = slots.where(setup[self.argument]), preflight.CountFaults()
        if matrix.n_rows == 0 or matrix.n_cols == 0:
            raise DataError(
                f"{where} has {matrix.n_rows} cells and {matrix.n_cols} genes: nothing to learn from."
            )
        low, high, filled = np.full(len(names), np.inf), np.zeros(len(names)), np.zeros(len(names), dtype=int)
        for start, _, entries in matrix.blocks():
            faults.look(entries, start)
            np.minimum.at(low, entries.cols, entries.values)
            np.maximum.at(high, entries.cols, entries.values)
            filled += np.bincount(entries.cols, minlength=len(names))
        for found, what in ((faults.not_finite, "NaN or infinite"), (faults.negative, "negative")):
            if found.n:
                raise DataError(
                    f"{where} has {found.n} {what} values: "
                    f"{found.spell(slots.cell_names, names, slots.words)}. Expected "
                    "abundances of at least 0, neither centred nor log-transformed nor scaled to variance one; make "
                    "them with pyrocell.data.smooth_velocity_layers(adata)."
                )
        return np.where(filled < matrix.n_rows, 0.0, low), high, faults.not_whole.n == 0
