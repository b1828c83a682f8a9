"""The index of the non-zero entries of a minibatch of counts, shared by everything that reads the counts on the CPU."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyrocell.distributions.compiled import ordered_by_column, row_by_row
from pyrocell.distributions.operators import as_operator

__all__ = ["NonZeros", "attach_nonzeros", "log1p_counts", "working_dtype"]


def working_dtype(device: torch.device) -> torch.dtype:
    """Give the precision in which non-zero entries are scored: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


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


class NonZeros:
    """Positions and values of the non-zero entries of one dense array of counts.

    Leading dimensions of the counts are read as one: "row" means everything but the last dimension.

    Parameters
    ----------
    flat : Tensor
        int64, shape (n_nonzero,): positions in the flattened counts, in increasing order, each at most once.
    values : Tensor
        The counts there, shape (n_nonzero,), any real dtype.
    n_rows, n_columns : int
        Size of the counts.
    rows, cols : Tensor, optional
        ``flat // n_columns`` and ``flat % n_columns``, when they are at hand.
    bounds : Tensor, optional
        Where each row begins among the entries, and where the last one ends, int64, shape (n_rows + 1,), when it is at
        hand.
    """

    def __init__(
        self,
        flat: Tensor,
        values: Tensor,
        *,
        n_rows: int,
        n_columns: int,
        rows: Tensor | None = None,
        cols: Tensor | None = None,
        bounds: Tensor | None = None,
    ) -> None:
        self.flat = flat
        self.values = values
        self.n_rows, self.n_columns = n_rows, n_columns
        self.version: int | None = None
        if rows is not None:
            self.rows = rows
        if cols is not None:
            self.cols = cols
        if bounds is not None:
            self.bounds = bounds

    @cached_property
    def rows(self) -> Tensor:
        """Row of each non-zero entry, int64, shape (n_nonzero,)."""
        return torch.div(self.flat, max(self.n_columns, 1), rounding_mode="floor")

    @cached_property
    def cols(self) -> Tensor:
        """Column of each non-zero entry, int64, shape (n_nonzero,)."""
        return self.flat.remainder(max(self.n_columns, 1))

    @cached_property
    def row_starts(self) -> Tensor:
        """Position of the first entry of each row, int64, shape (n_rows,)."""
        return self.bounds[:-1]

    @cached_property
    def bounds(self) -> Tensor:
        """Where each row begins among the entries, and where the last one ends, int64, shape (n_rows + 1,)."""
        return torch.searchsorted(self.rows, torch.arange(self.n_rows + 1))

    @cached_property
    def by_column(self) -> ByColumn:
        """The same entries column by column."""
        return ByColumn(*order_by_column(self.bounds, self.cols, self.values, self.n_columns))

    def __len__(self) -> int:
        """Give the number of non-zero entries."""
        return self.flat.numel()

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
        line = x.detach().reshape(-1)
        flat = _positions(line != 0)
        n_columns = x.shape[-1] if x.ndim else 1
        n_rows = x.numel() // max(n_columns, 1)
        return cls(flat, line.index_select(0, flat), n_rows=n_rows, n_columns=n_columns)

    def attach_to(self, x: Tensor) -> Tensor:
        """Keep this index on the counts ``x`` that it describes, which are returned."""
        self.version = _version(x)
        x._nonzeros = self  # type: ignore[attr-defined]
        return x

    def with_values(self, values: Tensor) -> NonZeros:
        """Index other values, shape (n_nonzero,), at the same positions."""
        return NonZeros(
            self.flat,
            values,
            n_rows=self.n_rows,
            n_columns=self.n_columns,
            rows=self.rows,
            cols=self.cols,
            bounds=self.bounds,
        )


def attach_nonzeros(x: Tensor, rows: Any, cols: Any, values: Any) -> Tensor:
    """Attach a known index of non-zeros to dense counts, so that no likelihood has to search them.

    Parameters
    ----------
    x : Tensor
        Dense counts on the CPU, shape (n_rows, n_columns).
    rows, cols, values : Tensor or array
        Each shape (n_nonzero,): the entries row by row, and by column in each, each position at most once. Stored zeros
        are dropped.

    Returns
    -------
    Tensor
        ``x`` itself.

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
    if not bool(values.all()):
        stored = values != 0
        rows, cols, values = rows[stored], cols[stored], values[stored]
    n_rows, n_columns = x.shape
    flat, bounds, in_order = row_by_row(rows.numpy(), cols.numpy(), n_rows, n_columns)
    if not in_order:
        raise ValueError(
            f"rows and cols do not go through the {n_rows} x {n_columns} counts row by row, by column in each, without"
            " repeats; sort them, and sum entries of the same position"
        )
    positions = torch.from_numpy(flat)
    size = {"n_rows": n_rows, "n_columns": n_columns}
    return NonZeros(
        positions, values, **size, rows=rows, cols=cols, bounds=torch.from_numpy(bounds)
    ).attach_to(x)


def log1p_counts(x: Tensor) -> Tensor:
    """Compute log(1 + x) of dense counts; on the CPU, at non-zeros only, whose index is kept on the result.

    Parameters
    ----------
    x : Tensor
        Counts, shape (..., n_columns).

    Returns
    -------
    Tensor
        Dense, same shape; float32 for whole-number dtypes.
    """
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    if x.device.type != "cpu":
        return torch.log1p(x.to(dtype))
    nonzeros = NonZeros.of(x)
    dense = torch.zeros(x.shape, dtype=dtype, device=x.device)
    values = torch.log1p(nonzeros.values.to(dtype))
    dense.view(-1).scatter_(0, nonzeros.flat, values)
    return nonzeros.with_values(values).attach_to(dense)


def _positions(mask: Tensor) -> Tensor:
    return torch.from_numpy(mask.numpy().nonzero()[0])  # numpy's search takes half the time of torch's


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
