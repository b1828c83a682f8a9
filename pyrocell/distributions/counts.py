"""The index of the non-zero entries of a minibatch of counts, shared by everything that reads the counts on the CPU."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["NonZeros", "RankedCounts", "attach_nonzeros", "log1p_counts", "working_dtype"]

FINITE_SUM_LIMIT = 4
"""Counts up to this one (97 % of the non-zeros of UMI data) use finite sums in place of a series."""

_TOP_RANK = FINITE_SUM_LIMIT + 1


def working_dtype(device: torch.device) -> torch.dtype:
    """Give the precision in which non-zero entries are scored: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class ByColumn(NamedTuple):
    """Non-zero entries ordered by column, then by row."""

    rows: Tensor
    """Row of each entry, int64, shape (n_nonzero,)."""
    values: Tensor
    """Its value, shape (n_nonzero,)."""
    starts: Tensor
    """Position of the first entry of each column, int64, shape (n_columns,)."""


class NonZeros:
    """Positions and values of the non-zero entries of one dense array of counts.

    Leading dimensions of the counts are read as one: "row" means everything but the last dimension.

    Parameters
    ----------
    flat : Tensor
        int64, shape (n_nonzero,): positions in the flattened counts, row by row, each at most once.
    values : Tensor
        The counts there, shape (n_nonzero,), any real dtype.
    n_rows, n_columns : int
        Size of the counts.
    rows, cols : Tensor, optional
        ``flat // n_columns`` and ``flat % n_columns``, when they are at hand.
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
    ) -> None:
        self.flat = flat
        self.values = values
        self.n_rows, self.n_columns = n_rows, n_columns
        self.version: int | None = None
        if rows is not None:
            self.rows = rows
        if cols is not None:
            self.cols = cols

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
        return _starts(self.rows, self.n_rows)

    @cached_property
    def by_column(self) -> ByColumn:
        """The same entries column by column."""
        order = _ascending(self.cols, self.n_columns)
        return ByColumn(
            self.rows.index_select(0, order),
            self.values.index_select(0, order),
            _starts(self.cols, self.n_columns),
        )

    @cached_property
    def ranked(self) -> RankedCounts:
        """The same entries, with those that are not one sorted by size, as the likelihoods use them."""
        return RankedCounts(self)

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
            self.flat, values, n_rows=self.n_rows, n_columns=self.n_columns, rows=self.rows, cols=self.cols
        )


class RankedCounts:
    """What the likelihoods read of the non-zero entries: all of them, and apart those that are not one.

    Attributes
    ----------
    flat, cols : Tensor
        int64, shape (n_nonzero,): positions, as in :class:`NonZeros`.
    values : Tensor
        Counts, shape (n_nonzero,).
    several : Tensor
        int64, shape (n_several,): indices into the above of the counts other than one, largest first.
    at_least : tuple of int
        ``at_least[k]``, k = 0..5, is the number of entries of ``several`` of rank k or more. The rank of a
        count of 2..4 is the count; larger counts, and those that are not whole, have rank 5.
    n_large : int
        Number of entries of rank 5: the first ones of ``several``.
    counts, log_factorial : Tensor
        Counts and log(count!) of ``several``, float64 (float32 on MPS). The factorial has no parameters, so it is
        computed once per minibatch.
    """

    def __init__(self, nonzeros: NonZeros) -> None:
        self.flat, self.cols, self.values = nonzeros.flat, nonzeros.cols, nonzeros.values
        several = _positions(self.values != 1)
        values = self.values.index_select(0, several)
        rank = values.clamp(max=_TOP_RANK).to(torch.uint8)
        if values.is_floating_point():
            rank.masked_fill_(values != values.floor(), _TOP_RANK)
        order = _descending(rank)
        sizes = torch.bincount(rank, minlength=_TOP_RANK + 1).tolist()
        self.at_least = tuple(sum(sizes[k:]) for k in range(_TOP_RANK + 1))
        self.n_large = self.at_least[_TOP_RANK]
        self.several = several.index_select(0, order)
        self.counts = values.index_select(0, order).to(working_dtype(values.device))
        self.log_factorial = torch.empty_like(self.counts)
        self._fill_log_factorial()
        self._index_large()

    def _fill_log_factorial(self) -> None:
        self.log_factorial[: self.n_large] = torch.lgamma(self.counts[: self.n_large] + 1.0)
        for k in range(2, _TOP_RANK):  # equal counts lie together
            self.log_factorial[self.at_least[k + 1] : self.at_least[k]] = math.lgamma(k + 1.0)

    def _index_large(self) -> None:
        self.large = self.several[: self.n_large]
        self._places = (self.flat, self.cols)
        self._large_places = tuple(place.index_select(0, self.large) for place in self._places)

    def take(self, parameter: Tensor) -> Tensor:
        """Read a parameter of shape (n_samples or 1, n_rows or 1, n_columns) at the non-zeros.

        Returns
        -------
        Tensor
            Shape (n_samples or 1, n_nonzero), in the precision of the parameter.
        """
        return _gather(parameter, *self._places)

    def take_large(self, parameter: Tensor) -> Tensor:
        """Read a parameter at the large counts, (n_samples or 1, n_large), in the working precision."""
        return _gather(parameter, *self._large_places).to(self.counts.dtype)

    def put(self, dense: Tensor, values: Tensor) -> None:
        """Write values of shape (n_samples or 1, n_nonzero) into ``dense`` (n_samples, n_rows, n_columns)."""
        # positions are unique: a plain scatter, never an accumulating one
        if dense.shape[0] == 1:  # in one dimension it takes half the time
            dense.view(-1).scatter_(0, self.flat, values.view(-1))
            return
        shape = (dense.shape[0], self.flat.numel())
        dense.view(dense.shape[0], -1).scatter_(1, self.flat.expand(shape), values.expand(shape))

    def amend(self, seen: Tensor, *, add: Tensor | None, large: Tensor) -> None:
        """Add to the entries of ``several`` that are not large, and overwrite those that are, in place.

        Parameters
        ----------
        seen : Tensor
            Shape (n_samples, n_nonzero).
        add : Tensor, optional
            Shape (n_samples or 1, n_several - n_large).
        large : Tensor
            Shape (n_samples or 1, n_large).
        """
        if add is not None:
            seen.index_add_(1, self.several[self.n_large :], add.to(seen.dtype).expand(seen.shape[0], -1))
        seen.index_copy_(1, self.large, large.to(seen.dtype).expand(seen.shape[0], -1))


def attach_nonzeros(x: Tensor, rows: Any, cols: Any, values: Any) -> Tensor:
    """Attach a known index of non-zeros to dense counts, so that no likelihood has to search them.

    Parameters
    ----------
    x : Tensor
        Dense counts, shape (n_rows, n_columns).
    rows, cols, values : Tensor or array
        Each shape (n_nonzero,): the entries row by row, each position at most once. Stored zeros are
        dropped.

    Returns
    -------
    Tensor
        ``x`` itself.
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
    flat = torch.add(cols, rows, alpha=x.shape[-1])
    n_rows, n_columns = x.shape
    return NonZeros(flat, values, n_rows=n_rows, n_columns=n_columns, rows=rows, cols=cols).attach_to(x)


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


def _gather(parameter: Tensor, flat: Tensor, cols: Tensor) -> Tensor:
    where = cols if parameter.shape[1] == 1 else flat
    if parameter.shape[0] == 1:
        return parameter.view(-1).index_select(0, where).unsqueeze(0)
    return parameter.flatten(1).index_select(1, where)


def _positions(mask: Tensor) -> Tensor:
    return torch.from_numpy(mask.numpy().nonzero()[0])  # numpy's search takes half the time of torch's


def _descending(rank: Tensor) -> Tensor:
    down = _TOP_RANK - rank
    return torch.from_numpy(down.numpy().argsort(kind="stable"))  # bytes, by counting: several times faster


def _ascending(codes: Tensor, n_codes: int) -> Tensor:
    smallest = np.min_scalar_type(max(n_codes - 1, 0))  # numpy sorts two bytes by counting too
    return torch.from_numpy(codes.numpy().astype(smallest).argsort(kind="stable"))


def _starts(codes: Tensor, n_codes: int) -> Tensor:
    """Position at which each code would begin, were the codes in order."""
    sizes = torch.bincount(codes, minlength=n_codes)
    return sizes.cumsum(0).sub_(sizes)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
