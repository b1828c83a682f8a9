"""The index of the non-zero entries of a minibatch of counts, shared by everything that reads the counts on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from pyrocell.distributions.operators import as_operator
from pyrocell.distributions.rows import bounds_of_rows, ordered_by_column

__all__ = ["NonZeros", "attach_nonzeros", "log1p_counts", "working_dtype"]


def working_dtype(device: torch.device) -> torch.dtype:
    """Give the precision in which non-zero entries are scored: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


_FEW = 0.25
"""Fraction of non-zeros up to which products read them alone; a dense product takes over between 0.4 and 0.6."""


class ByColumn(NamedTuple):
    """Non-zero entries ordered by column, then by row."""

    starts: Tensor
    """Position of the first entry of each column, int64, shape (n_columns,)."""
    rows: Tensor
    """Row of each entry, int64, shape (n_nonzero,)."""
    values: Tensor
    """Its value, shape (n_nonzero,)."""


def _order_by_column(bounds: Tensor, cols: Tensor, values: Tensor, n_columns: int) -> tuple[Tensor, ...]:
    found = ordered_by_column(bounds.numpy(), cols.numpy(), values.numpy(), n_columns)
    return tuple(map(torch.from_numpy, found))


order_by_column = as_operator(
    "order_by_column(Tensor bounds, Tensor cols, Tensor values, int n_columns) -> (Tensor, Tensor, Tensor)",
    _order_by_column,
)
"""Order entries by column: where each column begins, rows and values, from what `NonZeros` holds row by row."""


def _find_nonzeros(counts: Tensor) -> tuple[Tensor, ...]:
    n_rows, n_columns = counts.shape
    flat = (counts.reshape(-1) != 0).numpy().nonzero()[0]  # numpy's search takes half the time of torch's
    rows, cols = np.divmod(flat, max(n_columns, 1))
    bounds = np.searchsorted(rows, np.arange(n_rows + 1))
    return tuple(map(torch.from_numpy, (flat, cols, bounds)))


find_nonzeros = as_operator("find_nonzeros(Tensor counts) -> (Tensor, Tensor, Tensor)", _find_nonzeros)
"""Search a table of counts: positions in the flattened one, columns, and where each row begins (one more)."""


def _rows_of(bounds: Tensor) -> Tensor:
    ends = bounds.numpy()
    return torch.from_numpy(np.repeat(np.arange(len(ends) - 1), np.diff(ends)))


rows_of = as_operator("rows_of(Tensor bounds) -> Tensor", _rows_of)
"""Row of each entry, from where each row begins."""


def sums_of_rows(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Add up entries of rows in float64, shape (n_rows,).

    Parameters
    ----------
    values : ndarray
        Entries, row by row.
    bounds : ndarray
        Where each row begins among them (one more than rows).
    """
    filled, sums = bounds[1:] > bounds[:-1], np.zeros(len(bounds) - 1)
    if filled.any():
        sums[filled] = np.add.reduceat(values, bounds[:-1][filled], dtype=np.float64)
    return sums


class NonZeros:
    """Columns and values of the non-zero entries of one dense array of counts, row by row.

    Leading dimensions of the counts are read as one: "row" means everything but the last dimension.

    Parameters
    ----------
    cols : Tensor
        int64, shape (n_nonzero,): column of each entry, ascending in each row.
    values : Tensor
        The counts there, shape (n_nonzero,), any real dtype.
    bounds : Tensor
        Where each row begins among the entries, and where the last one ends, int64, shape (n_rows + 1,).
    n_columns : int
        Number of columns.
    are_few : bool
        Whether they are known to be so few that a product had better read them alone. That is not asked of an index
        that was searched within a step: what a step does must not depend on values.

    Notes
    -----
    That entries are in order and inside of the counts is not checked here, and loops rely on it: `of_entries` checks.
    """

    def __init__(
        self, cols: Tensor, values: Tensor, bounds: Tensor, n_columns: int, *, are_few: bool = False
    ) -> None:
        self.cols, self.values, self.bounds = cols, values, bounds
        self.n_rows, self.n_columns, self.are_few = len(bounds) - 1, n_columns, are_few
        self.version: int | None = None

    @cached_property
    def rows(self) -> Tensor:
        """Row of each non-zero entry, int64, shape (n_nonzero,)."""
        return rows_of(self.bounds)

    @cached_property
    def flat(self) -> Tensor:
        """Position of each entry in the flattened counts, int64, shape (n_nonzero,)."""
        return torch.add(self.cols, self.rows, alpha=self.n_columns)

    @cached_property
    def row_starts(self) -> Tensor:
        """Position of the first entry of each row, int64, shape (n_rows,)."""
        return self.bounds[:-1]

    @cached_property
    def by_column(self) -> ByColumn:
        """The same entries column by column."""
        return ByColumn(*order_by_column(self.bounds, self.cols, self.values, self.n_columns))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the counts."""
        return self.n_rows, self.n_columns

    def __len__(self) -> int:
        """Give the number of non-zero entries."""
        return self.cols.numel()

    @classmethod
    def known(cls, x: Tensor) -> NonZeros | None:
        """Give the index kept on the counts ``x``, if there is one; it holds until ``x`` is modified in place."""
        if x.is_inference():  # such tensors do not count modifications
            return None
        kept: NonZeros | None = getattr(x, "_nonzeros", None)
        return kept if kept is not None and kept.version == _version(x) else None

    @classmethod
    def of(cls, x: Tensor) -> NonZeros:
        """Give the index kept on the counts ``x``, or build one and keep it there."""
        kept = cls.known(x)
        if kept is not None:
            return kept
        found = cls.search(x)
        found.attach_to(x)
        return found

    @classmethod
    def search(cls, x: Tensor) -> NonZeros:
        """Build the index of the counts ``x``, shape (..., n_columns), without keeping it."""
        table = x.detach().reshape(math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1)
        flat, cols, bounds = find_nonzeros(table)
        found = cls(cols, table.reshape(-1).index_select(0, flat), bounds, table.shape[1])
        found.flat = flat
        return found

    @classmethod
    def of_entries(cls, rows: Any, cols: Any, values: Any, *, n_rows: int, n_columns: int) -> NonZeros:
        """Build an index of entries that are known.

        Parameters
        ----------
        rows, cols, values : Tensor or array
            Each shape (n_nonzero,): the entries row by row, and by column in each, each position at most once. Stored
            zeros are dropped.
        n_rows, n_columns : int
            Size of the counts.

        Raises
        ------
        ValueError
            If the entries are not in order, repeat, or lie outside of the counts.
        """
        rows, cols = torch.as_tensor(rows).to(torch.int64), torch.as_tensor(cols).to(torch.int64)
        values = torch.as_tensor(values)
        if not len(rows) == len(cols) == len(values):
            raise ValueError(
                f"rows, cols and values have {len(rows)}, {len(cols)} and {len(values)} entries; give one of each per"
                " non-zero count"
            )
        stored = values != 0
        if not bool(stored.all()):
            rows, cols, values = rows[stored], cols[stored], values[stored]
        bounds, in_order = bounds_of_rows(rows.numpy(), cols.numpy(), n_rows, n_columns)
        if not in_order:
            raise ValueError(
                f"rows and cols do not go through the {n_rows} x {n_columns} counts row by row, by column in each,"
                " without repeats; sort them, and sum entries of the same position"
            )
        found = cls.of_rows(cols, values, torch.from_numpy(bounds), n_columns)
        found.rows = rows
        return found

    @classmethod
    def of_rows(cls, cols: Tensor, values: Tensor, bounds: Tensor, n_columns: int) -> NonZeros:
        """Build an index that was read, and see whether its entries are few; arguments as for the class."""
        are_few = len(cols) <= _FEW * (len(bounds) - 1) * n_columns
        return cls(cols, values, bounds, n_columns, are_few=are_few)

    def totals(self) -> np.ndarray:
        """Return the sum of each row in float64, shape (n_rows,)."""
        return sums_of_rows(self.values.numpy(), self.bounds.numpy())

    def only_rows(self, wanted: np.ndarray) -> NonZeros:
        """Return the same with the entries of other rows left out, chosen by a boolean for each row."""
        if wanted.all():
            return self
        bounds = self.bounds.numpy()
        lengths = np.where(wanted, np.diff(bounds), 0)
        kept = torch.from_numpy(np.repeat(wanted, np.diff(bounds)))
        ends = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
        return self.of_rows(self.cols[kept], self.values[kept], ends, self.n_columns)

    def parts(self) -> list[Tensor]:
        """Return the tensors that this index consists of."""
        return [self.cols, self.values, self.bounds]

    @classmethod
    def of_parts(cls, tensors: Sequence[Tensor], n_columns: int, *, are_few: bool = False) -> NonZeros:
        """Return the index that consists of these tensors, given in the order of `parts`."""
        cols, values, bounds = tensors
        return cls(cols, values, bounds, n_columns, are_few=are_few)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the counts themselves, shape (n_rows, n_columns), with this index attached."""
        dense = torch.zeros(self.n_rows, self.n_columns, dtype=dtype, device=self.cols.device)
        dense.view(-1).scatter_(0, self.flat, self.values.to(dtype))
        return self.attach_to(dense)

    def attach_to(self, x: Tensor) -> Tensor:
        """Keep this index on the counts ``x`` that it describes, which are returned."""
        if x.numel() != self.n_rows * self.n_columns or (x.ndim and x.shape[-1] != self.n_columns):
            raise ValueError(
                f"the counts have shape {tuple(x.shape)}, their index {self.n_rows} rows of {self.n_columns}; give the "
                "counts that it describes"
            )
        self.version = _version(x)
        x._nonzeros = self  # type: ignore[attr-defined]
        return x

    def with_values(self, values: Tensor) -> NonZeros:
        """Index other values, shape (n_nonzero,), at the same positions."""
        other = NonZeros(self.cols, values, self.bounds, self.n_columns, are_few=self.are_few)
        for name in ("rows", "flat"):  # where they are known
            if name in self.__dict__:
                setattr(other, name, getattr(self, name))
        return other


def attach_nonzeros(x: Tensor, rows: Any, cols: Any, values: Any) -> Tensor:
    """Attach a known index of non-zeros to dense counts, so that no likelihood has to search them.

    Parameters
    ----------
    x : Tensor
        Dense counts on the CPU, shape (n_rows, n_columns).
    rows, cols, values : Tensor or array
        As for `NonZeros.of_entries`.

    Returns
    -------
    Tensor
        ``x`` itself.

    Raises
    ------
    ValueError
        If the entries are not in order, repeat, or lie outside of the counts.
    """
    n_rows, n_columns = x.shape
    return NonZeros.of_entries(rows, cols, values, n_rows=n_rows, n_columns=n_columns).attach_to(x)


@overload
def log1p_counts(x: Tensor) -> Tensor: ...
@overload
def log1p_counts(x: NonZeros) -> NonZeros: ...
def log1p_counts(x: Tensor | NonZeros) -> Tensor | NonZeros:
    """Compute log(1 + x) of counts; on the CPU, at non-zeros only, whose index is kept on the result.

    Parameters
    ----------
    x : Tensor or NonZeros
        Counts, shape (..., n_columns), or the index of their non-zeros.

    Returns
    -------
    Tensor or NonZeros
        As given: dense, same shape, float32 for whole-number dtypes; or an index of values of torch's default dtype.
    """
    if isinstance(x, NonZeros):
        return x.with_values(torch.log1p(x.values.to(torch.get_default_dtype())))
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    if x.device.type != "cpu":
        return torch.log1p(x.to(dtype))
    nonzeros = NonZeros.of(x)
    of_logs = nonzeros.with_values(torch.log1p(nonzeros.values.to(dtype)))
    dense = of_logs.dense(dtype).view(x.shape)
    return of_logs.attach_to(dense)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
