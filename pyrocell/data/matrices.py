"""Rows of a cell-by-feature matrix, whatever holds it: dense or sparse, in memory or on disk."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from pyrocell.distributions import NonZeros
from pyrocell.distributions.counts import sums_of_rows
from pyrocell.distributions.rows import positions_of_rows, rows_of_matrix
from pyrocell.errors import DataError, PyrocellWarning

__all__ = ["Entries", "MatrixReader", "by_column", "open_matrix", "with_absent"]

# Reads from disk that are closer than this are joined: one longer read is faster than two calls.
_GAP_BYTES = 65536
# Entries of the dense equivalent that one block of a pass over the whole matrix holds: 16 MB as float32.
_BLOCK = 2**22


class Entries(NamedTuple):
    """Non-zero entries of some rows, ordered by row, then by column; no position occurs twice.

    ``rows`` (position among the rows asked for) and ``cols`` are int64, ``values`` float32, all of one length.
    """

    rows: np.ndarray
    cols: np.ndarray
    values: np.ndarray

    def totals(self, n_rows: int) -> np.ndarray:
        """Return the sum of each row in float64, shape (n_rows,)."""
        return sums_of_rows(self.values, np.searchsorted(self.rows, np.arange(n_rows + 1)))

    def only(self, wanted: np.ndarray) -> Entries:
        """Return some of the entries, chosen by a boolean each."""
        return self if wanted.all() else Entries(*(part[wanted] for part in self))


class MatrixReader(ABC):
    """Matrix of shape (n_rows, n_cols) that gives the entries of any rows, in any order."""

    n_rows: int
    n_cols: int

    @abstractmethod
    def entries(self, rows: np.ndarray) -> Entries:
        """Return the non-zero entries of ``rows`` (int64), which may repeat and need no order."""

    def nonzeros(self, rows: np.ndarray) -> NonZeros:
        """Return the same as an index of non-zero counts."""
        return NonZeros.of_entries(*self.entries(rows), n_rows=len(rows), n_columns=self.n_cols)

    def blocks(self) -> Iterator[tuple[int, int, Entries]]:
        """Walk once over all rows: yield (first row, number of rows, entries), with bounded memory."""
        step = max(1, _BLOCK // max(1, self.n_cols))
        for start in range(0, self.n_rows, step):
            rows = np.arange(start, min(start + step, self.n_rows))
            yield start, len(rows), self.entries(rows)


def open_matrix(
    matrix: Any, rows: np.ndarray | None = None, cols: np.ndarray | None = None, *, where: str = "the matrix"
) -> MatrixReader:
    """Open a matrix for reading by rows; the matrix itself is never changed.

    Parameters
    ----------
    matrix
        Dense array, any scipy sparse matrix or array, or a matrix of a backed AnnData.
    rows, cols
        Rows and columns to see, in this order; by default all. In memory, columns are selected here, once; on disk,
        in every block.
    where
        Name of the matrix in messages.
    """
    _check_numbers(matrix, where)
    if _is_sparse_on_disk(matrix):
        if matrix.format == "csr":
            return _SparseOnDisk(matrix, rows, cols)
        warnings.warn(
            f"{where} is stored by column (CSC) in its file, so single cells cannot be read from it: all of it is "
            "loaded into memory. To stay on disk, store it by row: adata.X = adata.X.tocsr() before "
            "adata.write_h5ad(...).",
            PyrocellWarning,
            stacklevel=2,
        )
        matrix = matrix.to_memory()
    if sp.issparse(matrix):
        return _Sparse(*_by_row(matrix, rows, cols))
    if isinstance(matrix, np.ndarray):
        return _Dense(*_selected(np.asarray(matrix), rows, cols))
    return _DenseOnDisk(matrix, rows, cols)


def _is_sparse_on_disk(matrix: Any) -> bool:
    return not sp.issparse(matrix) and hasattr(matrix, "group") and hasattr(matrix, "format")


def _check_numbers(matrix: Any, where: str) -> None:
    readable = sp.issparse(matrix) or isinstance(matrix, np.ndarray) or _is_sparse_on_disk(matrix)
    lazy = hasattr(matrix, "compute")  # Dask
    if not readable and (lazy or not hasattr(matrix, "chunks")):
        raise DataError(
            f"{where} is a {type(matrix).__name__}, which pyrocell cannot read; expected a NumPy array, a SciPy "
            "sparse matrix, or the matrix of a backed AnnData."
        )
    if getattr(matrix, "ndim", 2) != 2:
        raise DataError(f"{where} has shape {matrix.shape}; expected cells in rows and features in columns.")
    if np.dtype(matrix.dtype).kind not in "buif":
        raise DataError(f"{where} holds values of type {matrix.dtype}; expected numbers.")


def _selected(matrix: Any, rows: np.ndarray | None, cols: np.ndarray | None) -> tuple[Any, np.ndarray | None]:
    """Select columns by a copy; leave a selection of rows alone to be done minibatch by minibatch."""
    if cols is None:
        return matrix, rows
    return (matrix if rows is None else matrix[rows])[:, cols], None


def _by_row(matrix: Any, rows: np.ndarray | None, cols: np.ndarray | None) -> tuple[Any, np.ndarray | None]:
    selected, rows = _selected(matrix, rows, cols)
    by_row = selected.tocsr()
    if not by_row.has_canonical_format:
        by_row = by_row.copy() if by_row is matrix else by_row
        by_row.sum_duplicates()
    return by_row, rows


def _numbers(values: np.ndarray) -> np.ndarray:
    """Convert to float32, which is what the models see; a selection of rows is a copy already."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False)


def _check_bounds(bounds: np.ndarray) -> None:
    """Refuse a damaged sparse matrix: the loops that read rows look no further."""
    backwards = np.flatnonzero(bounds[1:] < bounds[:-1])
    if len(backwards):
        raise DataError(
            f"A sparse matrix is damaged: its row {backwards[0]} ends before it begins (indptr does not ascend). Read "
            "its file again from where it came, or rebuild the matrix."
        )


def _without_zeros(rows: np.ndarray, cols: np.ndarray, values: np.ndarray) -> Entries:
    stored = values != 0
    return (
        Entries(rows, cols, values) if stored.all() else Entries(rows[stored], cols[stored], values[stored])
    )


def _is_compiled_for(array: np.ndarray) -> bool:
    return bool(array.dtype.isnative) and array.dtype.name not in ("float16", "longdouble", "float128")


class _Sparse(MatrixReader):
    """CSR in memory: the user's own matrix where its columns need no change."""

    def __init__(self, matrix: Any, rows: np.ndarray | None) -> None:
        _check_bounds(matrix.indptr)
        self._matrix, self._rows = matrix, rows
        self.n_rows, self.n_cols = matrix.shape if rows is None else (len(rows), matrix.shape[1])

    def entries(self, rows: np.ndarray) -> Entries:
        found, chosen = positions_of_rows(*self._place_of(rows))  # a sixth of the time of indexing the matrix
        cols = self._matrix.indices[chosen].astype(np.int64)
        return _without_zeros(found, cols, _numbers(self._matrix.data[chosen]))

    def nonzeros(self, rows: np.ndarray) -> NonZeros:
        data, indices = self._matrix.data, self._matrix.indices
        if not (_is_compiled_for(data) and _is_compiled_for(indices)):
            return super().nonzeros(rows)
        found = rows_of_matrix(*self._place_of(rows), indices, data, self.n_cols)
        if not found[-1]:
            raise DataError(
                "A sparse matrix is damaged, or has changed since it was set up: rows reach beyond its data, or their "
                "columns do not ascend or lie outside of it. Rebuild it, or read its file again from where it came."
            )
        cols, values, bounds = map(torch.from_numpy, found[:-1])
        return NonZeros.of_rows(cols, values, bounds, self.n_cols)

    def _place_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where rows begin and end among the entries of the matrix."""
        there = rows if self._rows is None else self._rows[rows]
        starts, ends = (self._matrix.indptr[ends].astype(np.int64) for ends in (there, there + 1))
        return starts, ends


def _entries_of_dense(dense: np.ndarray) -> Entries:
    values = _numbers(dense).ravel()
    flat = (values != 0).nonzero()[0]  # several times faster than a search in floats
    rows, cols = np.divmod(flat, max(1, dense.shape[1]))
    return Entries(rows, cols, values[flat])


class _Dense(MatrixReader):
    """Array in memory."""

    def __init__(self, matrix: np.ndarray, rows: np.ndarray | None) -> None:
        self._matrix, self._rows = matrix, rows
        self.n_rows, self.n_cols = matrix.shape if rows is None else (len(rows), matrix.shape[1])

    def entries(self, rows: np.ndarray) -> Entries:
        return _entries_of_dense(self._matrix[rows if self._rows is None else self._rows[rows]])


def _runs(starts: np.ndarray, ends: np.ndarray, gap: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Join sorted intervals that lie less than ``gap`` apart.

    Returns the joined intervals, and the position of each start in what reading them one after the other gives.
    """
    first = np.flatnonzero(np.concatenate([[True], starts[1:] - ends[:-1] > gap]))
    run_starts, run_ends = starts[first], ends[np.concatenate([first[1:] - 1, [len(ends) - 1]])]
    lengths = run_ends - run_starts
    shift = np.repeat(np.cumsum(lengths) - lengths - run_starts, np.diff(np.append(first, len(starts))))
    return list(zip(run_starts.tolist(), run_ends.tolist(), strict=True)), starts + shift


def _read(array: Any, runs: list[tuple[int, int]]) -> np.ndarray:
    return np.concatenate([array[start:end] for start, end in runs])


class _OnDisk(MatrixReader):
    """What the two readers of files share: rows and columns are mapped block by block."""

    def __init__(self, shape: tuple[int, int], rows: np.ndarray | None, cols: np.ndarray | None) -> None:
        self._rows, self._cols = rows, cols
        self.n_rows = shape[0] if rows is None else len(rows)
        self.n_cols = shape[1] if cols is None else len(cols)

    def entries(self, rows: np.ndarray) -> Entries:
        there = rows if self._rows is None else self._rows[rows]
        if len(there) == 0:
            nothing = np.zeros(0, dtype=np.int64)
            return Entries(nothing, nothing, np.zeros(0, dtype=np.float32))
        # A file is read forwards and each row once; the order asked for is restored in memory.
        unique, inverse = np.unique(there, return_inverse=True)
        return self._read_rows(unique, inverse)

    @abstractmethod
    def _read_rows(self, unique: np.ndarray, inverse: np.ndarray) -> Entries:
        """Return the entries of ``unique[inverse]``."""


class _SparseOnDisk(_OnDisk):
    """CSR in a file: only the row pointers are held in memory."""

    def __init__(self, matrix: Any, rows: np.ndarray | None, cols: np.ndarray | None) -> None:
        super().__init__(matrix.shape, rows, cols)
        self._data, self._indices = matrix.group["data"], matrix.group["indices"]
        self._indptr = np.asarray(matrix.group["indptr"][:], dtype=np.int64)
        _check_bounds(self._indptr)
        self._gap = _GAP_BYTES // (self._data.dtype.itemsize + self._indices.dtype.itemsize)
        self._new_col: np.ndarray | None = None
        if cols is not None:
            self._new_col = np.full(matrix.shape[1], -1)
            self._new_col[cols] = np.arange(len(cols))

    def _read_rows(self, unique: np.ndarray, inverse: np.ndarray) -> Entries:
        starts, ends = self._indptr[unique], self._indptr[unique + 1]
        runs, local = _runs(starts, ends, self._gap)
        rows, chosen = positions_of_rows(local[inverse], (local + ends - starts)[inverse])
        cols = _read(self._indices, runs)[chosen].astype(np.int64)
        values = _numbers(_read(self._data, runs)[chosen])
        if self._new_col is not None:
            cols = self._new_col[cols]
            rows, cols, values = rows[cols >= 0], cols[cols >= 0], values[cols >= 0]
        return _without_zeros(*self._in_order(rows, cols, values))

    def _in_order(self, rows: np.ndarray, cols: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
        flat = rows * self.n_cols + cols
        if (np.diff(flat) > 0).all():
            return rows, cols, values
        flat, slot = np.unique(flat, return_inverse=True)
        summed = np.zeros(len(flat))
        np.add.at(summed, slot, values)
        return flat // self.n_cols, flat % self.n_cols, _numbers(summed)


class _DenseOnDisk(_OnDisk):
    """Dense array in a file."""

    def __init__(self, matrix: Any, rows: np.ndarray | None, cols: np.ndarray | None) -> None:
        super().__init__(matrix.shape, rows, cols)
        self._matrix = matrix
        self._gap = _GAP_BYTES // max(1, matrix.shape[1] * matrix.dtype.itemsize)

    def _read_rows(self, unique: np.ndarray, inverse: np.ndarray) -> Entries:
        runs, local = _runs(unique, unique + 1, self._gap)
        dense = _read(self._matrix, runs)[local[inverse]]
        return _entries_of_dense(dense if self._cols is None else dense[:, self._cols])


def with_absent(matrix: MatrixReader, position: np.ndarray) -> MatrixReader:
    """See a matrix through other rows, some of which it lacks: these are empty.

    Parameters
    ----------
    matrix
        The matrix.
    position
        Row of the matrix for each row wanted, -1 where there is none; int64, shape (n_rows,).
    """
    return _WithAbsent(matrix, position)


class _WithAbsent(MatrixReader):
    """Rows of another matrix, in another order, with empty rows among them."""

    def __init__(self, matrix: MatrixReader, position: np.ndarray) -> None:
        self._matrix, self._position = matrix, position
        self.n_rows, self.n_cols = len(position), matrix.n_cols

    def entries(self, rows: np.ndarray) -> Entries:
        there = self._position[rows]
        present = np.flatnonzero(there >= 0)
        found = self._matrix.entries(there[present])
        return Entries(present[found.rows], found.cols, found.values)


def by_column(matrix: MatrixReader, columns: np.ndarray | None = None) -> MatrixReader:
    """See a matrix turned round: its columns as rows. All non-zeros are read once, and held in memory.

    Parameters
    ----------
    matrix
        The matrix, read row by row.
    columns
        Columns of the turned matrix, that is, rows of ``matrix``, to see, in this order; by default all.
    """
    blocks = [Entries(start + found.rows, found.cols, found.values) for start, _, found in matrix.blocks()]
    blocks = blocks or [matrix.entries(np.zeros(0, dtype=np.int64))]  # there may be no row at all
    rows, cols, values = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    shape = (matrix.n_cols, matrix.n_rows)
    return _Sparse(*_by_row(sp.csr_matrix((values, (cols, rows)), shape=shape), None, columns))
