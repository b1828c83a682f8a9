"""The field of chromatin accessibility: which regions are seen open in each cell."""

from __future__ import annotations

import warnings

import numpy as np

from pyrocell import settings
from pyrocell.data import preflight
from pyrocell.data.absence import mask_arguments
from pyrocell.data.base import Argument, Frozen, Setup
from pyrocell.data.fields import Counts
from pyrocell.data.matrices import Entries, MatrixReader
from pyrocell.data.slots import Slots
from pyrocell.errors import PyrocellWarning, list_some

__all__ = ["Accessibility"]


class Accessibility(Counts):
    """Whether each region (peak) is seen open in each cell: 1 where the value is above zero.

    ``cells.accessibility`` is dense float32 of zeros and ones, shape (n_cells, n_regions), with the index of its ones
    attached; ``cells.accessibility_library`` is the number of open regions, shape (n_cells, 1). Fragment or read
    counts become ones, with a notice; a region that is open in no cell gives a warning, a cell without any open
    region an error.

    Parameters
    ----------
    absent_ok
        As for `Counts`.
    argument
        Argument of ``setup_anndata`` that names the layer; by default ``layer``, or ``<name>_layer`` for a field
        that is not called ``accessibility``.
    doc
        What the documentation of ``setup_anndata`` says about it.
    """

    def default_argument(self) -> str:
        """Return ``layer``, the name that users know, for the main regions."""
        return "layer" if self.name == "accessibility" else f"{self.name}_layer"

    def arguments(self) -> list[Argument]:
        """Return the layer."""
        doc = self.doc or (
            "Layer of ``adata.layers`` with cells by regions: 0 and 1, or counts of fragments or reads, of which every "
            "value above zero is read as 1. Left out: ``adata.X``."
        )
        return [Argument(self.argument, "str | None", doc), *mask_arguments(self)]

    def freeze(self, slots: Slots, setup: Setup) -> Frozen:
        """Check every value and name, record the regions, and tell what will be binarised or is never open."""
        frozen = super().freeze(slots, setup)
        where, names = slots.where(setup[self.argument]), frozen.record["names"]
        n_open, binary, largest = np.zeros(len(names), dtype=np.int64), True, 0.0
        for _, _, entries in self._aligned(slots, setup, frozen.record).blocks():
            n_open += np.bincount(entries.cols, minlength=len(names))
            binary = binary and bool((entries.values == 1).all())
            largest = max(largest, float(entries.values.max(initial=0.0)))
        if not binary:
            settings.logger.warning(
                "%s is not binary: it has values up to %g. Every value above zero is read as 1 (open).",
                where,
                largest,
            )
        if slots.words[1] == "cell":
            preflight.refuse_empty(
                n_open, slots.feature_names, f"{slots.n_cells} features of {where}", "cell"
            )
        _warn_of_closed(n_open, names, where)
        return frozen

    def _check(self, slots: Slots, setup: Setup, matrix: MatrixReader, names: list[str]) -> np.ndarray:
        return super()._check(slots, {**setup, "allow_noninteger": True}, matrix, names)

    def _as_read(self, matrix: MatrixReader) -> MatrixReader:
        return _Binary(matrix)


def _warn_of_closed(n_open: np.ndarray, names: list[str], where: str) -> None:
    closed = [name for name, n in zip(names, n_open.tolist(), strict=True) if n == 0]
    if closed:
        warnings.warn(
            f"{len(closed)} of {len(names)} regions of {where} are open in no cell: {list_some(closed)}. Nothing can "
            "be learned about them, and they cost time: remove them, and best also those open in less than 1 to 5 % "
            "of the cells, with scanpy.pp.filter_genes(adata, min_cells=...).",
            PyrocellWarning,
            stacklevel=2,
        )


class _Binary(MatrixReader):
    """Another matrix with every value above zero read as one."""

    def __init__(self, matrix: MatrixReader) -> None:
        self._matrix = matrix
        self.n_rows, self.n_cols = matrix.n_rows, matrix.n_cols

    def entries(self, rows: np.ndarray) -> Entries:
        found = self._matrix.entries(rows)
        return Entries(found.rows, found.cols, np.ones_like(found.values))
