"""Rows of sparse tables, gathered and put in order by loops in machine code; see `compiled.py`."""

from __future__ import annotations

import numpy as np

from pyrocell.distributions.elementary import compiled

__all__ = ["bounds_of_rows", "ordered_by_column", "positions_of_rows", "rows_of_matrix"]

Array = np.ndarray
F = np.float32
_ZERO = F(0.0)


@compiled
def ordered_by_column(
    starts: Array, cols: Array, values: Array, n_columns: int
) -> tuple[Array, Array, Array]:
    """Order entries by column, and by row within one: where each column begins, and rows and values in that order."""
    ends = np.zeros(n_columns + 1, dtype=np.int64)
    for i in range(cols.shape[0]):
        ends[cols[i] + 1] += 1
    for column in range(n_columns):
        ends[column + 1] += ends[column]
    begins = ends[:-1].copy()
    rows, ordered = np.empty(cols.shape[0], dtype=np.int64), np.empty_like(values)
    for row in range(starts.shape[0] - 1):
        for i in range(starts[row], starts[row + 1]):
            place = ends[cols[i]]
            rows[place], ordered[place] = row, values[i]
            ends[cols[i]] = place + 1
    return begins, rows, ordered


@compiled
def bounds_of_rows(rows: Array, cols: Array, n_rows: int, n_columns: int) -> tuple[Array, bool]:
    """Return where each row begins among entries (and where the last one ends), and whether these are in order.

    In order means row by row, by column in each, without repeats, and inside of the array.
    """
    bounds = np.empty(n_rows + 1, dtype=np.int64)
    last_row, last_column, begun = -1, -1, 0
    for i in range(rows.shape[0]):
        row, column = rows[i], cols[i]
        if row < last_row or row >= n_rows or column >= n_columns or column < 0 or row < 0:
            return bounds, False
        if row == last_row and column <= last_column:
            return bounds, False
        last_row, last_column = row, column
        while begun <= row:
            bounds[begun] = i
            begun += 1
    while begun <= n_rows:
        bounds[begun] = rows.shape[0]
        begun += 1
    return bounds, True


@compiled
def rows_of_matrix(
    starts: Array, ends: Array, indices: Array, data: Array, n_columns: int
) -> tuple[Array, Array, Array, bool]:
    """Gather rows of a CSR matrix: columns, values (float32), where each begins, and whether the matrix is sound.

    Sound means that rows lie inside of the matrix, with ascending columns. Stored zeros are left out.
    """
    n, bounds = 0, np.zeros(starts.shape[0] + 1, dtype=np.int64)
    for row in range(starts.shape[0]):
        if starts[row] < 0 or starts[row] > ends[row] or ends[row] > min(indices.shape[0], data.shape[0]):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=F), bounds, False
        n += ends[row] - starts[row]
    cols, values = np.empty(n, dtype=np.int64), np.empty(n, dtype=F)
    n = 0
    for row in range(starts.shape[0]):
        last = np.int64(-1)
        for i in range(starts[row], ends[row]):
            column, value = np.int64(indices[i]), F(data[i])
            if column <= last or column >= n_columns:
                return cols, values, bounds, False
            last = column
            cols[n], values[n] = column, value
            n += value != _ZERO
        bounds[row + 1] = n
    return cols[:n], values[:n], bounds, True


@compiled
def positions_of_rows(starts: Array, ends: Array) -> tuple[Array, Array]:
    """Return the row of each entry and its position, ``starts[row]`` to ``ends[row] - 1``, one row after the other."""
    n = 0
    for row in range(starts.shape[0]):
        n += max(0, ends[row] - starts[row])
    rows, positions = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    n = 0
    for row in range(starts.shape[0]):
        for position in range(starts[row], ends[row]):
            rows[n], positions[n] = row, position
            n += 1
    return rows, positions
