"""Fields of models that read DNA: the sequence of each region, and what is known of the cells across."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyrocell.data.base import Argument, Field, Frozen, Reader, Setup, tensor_like
from pyrocell.data.categories import Category
from pyrocell.data.dna import N_CODES
from pyrocell.data.slots import Slots
from pyrocell.data.turned import TurnedSlots
from pyrocell.errors import DataError, SetupError, list_some

__all__ = ["CellCategory", "DnaSequence"]

_REMEDY = "Make the codes with pyrocell.data.add_dna_sequence(adata, fasta)."


class DnaSequence(Field):
    """DNA of each region: codes 0 to 3 for A, C, G, T, and 4 for an unknown base; uint8, shape (n_regions, length).

    A model with this field reads regions row by row. The user gives cells by regions all the same.

    Parameters
    ----------
    argument, doc
        As for `Field`.
    """

    by_feature = True

    def __init__(self, *, argument: str | None = None, doc: str | None = None) -> None:
        super().__init__(argument=argument, doc=doc)

    def default_argument(self) -> str:
        """Return the name that users know."""
        return f"{self.name}_code_key"

    def arguments(self) -> list[Argument]:
        """Return the entry of ``varm``."""
        doc = self.doc or (
            "Entry of ``adata.varm`` with the DNA of each region, as ``pyrocell.data.add_dna_sequence`` writes it."
        )
        return [Argument(self.argument, "str", doc, default=f"{self.name}_code")]

    def check_setup(self, slots: Slots, setup: Setup) -> None:
        """Look for the entry."""
        self._entry(slots, setup)

    def freeze(self, slots: Slots, setup: Setup) -> Frozen:
        """Check the codes, and record the length of the sequences."""
        length = self._codes(slots, setup).shape[1]
        cells = {self.name: tensor_like("uint8", length)}
        return Frozen({"given": True, "names": [], "rows": "features", "length": length, "cells": cells})

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Require sequences of the recorded length."""
        codes = self._codes(slots, setup)
        if codes.shape[1] != record["length"]:
            raise DataError(
                f"{self._where(slots, setup)} has sequences of {codes.shape[1]} bases; the model was made with "
                f"{record['length']}. {_REMEDY[:-1]}, with seq_len={record['length']}."
            )
        tensor = torch.from_numpy(codes)
        return lambda rows: {self.name: tensor.index_select(0, torch.from_numpy(rows))}

    def _where(self, slots: Slots, setup: Setup) -> str:
        return f"{slots.spelled}.varm[{setup[self.argument]!r}]"

    def _entry(self, slots: Slots, setup: Setup) -> Any:
        key = setup[self.argument]
        assert isinstance(slots, TurnedSlots)  # this field makes them so
        if key in slots.adata.obsm:
            raise SetupError(
                f"{self.argument}={key!r} is in {slots.spelled}.obsm, so the regions lie in rows. Give cells in rows "
                "and regions in columns, as for any other model: adata.transpose()."
            )
        try:
            return slots.varm(key, self.argument)
        except SetupError as error:
            raise SetupError(f"{error} {_REMEDY}") from None

    def _codes(self, slots: Slots, setup: Setup) -> np.ndarray:
        entry, where = self._entry(slots, setup), self._where(slots, setup)
        codes = entry.to_numpy() if isinstance(entry, pd.DataFrame) else np.asarray(entry)
        if codes.ndim != 2 or codes.shape[1] == 0 or codes.dtype.kind not in "iuf":
            raise DataError(
                f"{where} has shape {codes.shape} and type {codes.dtype}; expected a code for each region and base. "
                f"{_REMEDY}"
            )
        wrong = np.asarray(~np.isin(codes, np.arange(N_CODES)).all(1))
        if wrong.any():
            raise DataError(
                f"{where} has other codes than 0, 1, 2, 3 (A, C, G, T) and 4 (unknown base) for {wrong.sum()} regions: "
                f"{list_some(slots.cell_names[wrong])}. {_REMEDY}"
            )
        return np.ascontiguousarray(codes, dtype=np.uint8)


class CellCategory(Category):
    """One category per cell where rows are features: int64, shape (n_cells,), the same in every minibatch.

    When it is optional and left out, all cells have category 0 of 1. Parameters are those of `Category`.
    """

    def check_setup(self, slots: Slots, setup: Setup) -> None:
        """Look for the column of ``adata.obs``."""
        super().check_setup(_by_cell(slots), setup)

    def freeze(self, slots: Slots, setup: Setup) -> Frozen:
        """Record the categories that occur, and the cells, which are aligned by name."""
        record = super().freeze(_by_cell(slots), setup).record
        names = [str(name) for name in slots.feature_names]
        cells = {self.name: tensor_like("int64", len(names), shared=True)}
        return Frozen({**record, "columns": names, "cells": cells})

    def open(self, slots: Slots, setup: Setup, record: Mapping[str, Any]) -> Reader:
        """Align cells and categories by name."""
        read = super().open(_by_cell(slots), setup, record)
        codes = read(slots.feature_names.astype(str).get_indexer(record["columns"]).astype(np.int64))
        return lambda rows: codes


def _by_cell(slots: Slots) -> Slots:
    return slots.by_cell if isinstance(slots, TurnedSlots) else slots
