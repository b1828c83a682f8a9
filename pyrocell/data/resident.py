"""Cells that lie on a device as a whole: minibatches are put together there, without a word from the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyrocell import settings
from pyrocell.data.minibatch import Cells, Dataset
from pyrocell.distributions import NonZeros

__all__ = ["Resident", "Selection", "estimate_bytes", "resident_on"]

_BLOCK = 4096
_SHARE = 0.5
"""Part of the free memory of the device that the data may take."""
_SMALL = ((torch.uint8, 255), (torch.int16, 32767))
"""Types that whole numbers are kept in, with the largest that each holds."""


@dataclass(frozen=True)
class Selection:
    """Some cells of a `Resident`, not put together yet.

    Attributes
    ----------
    rows
        Their rows, on the device.
    n_total
        Number of cells that these stand for.
    home
        Where they lie.
    """

    rows: Tensor
    n_total: int
    home: Resident

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, rows: Tensor) -> Selection:
        """Return the selection of other cells that lie in the same place."""
        return Selection(rows, self.n_total, self.home)

    def load(self) -> Cells:
        """Put the cells together, in arrays whose shapes depend on their number alone."""
        return self.home.cells(self.rows, n_total=self.n_total)


class Resident:
    """A data set on a device.

    Values with many zeros lie there row by row without them (CSR), whole numbers in one or two bytes.

    Parameters
    ----------
    dataset
        The data.
    device
        Where to put them.
    """

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        self.n_cells, self.device = dataset.n_cells, device
        parts: dict[str, list[Any]] = {}
        for start in range(0, dataset.n_cells, _BLOCK):
            cells = dataset.cells(np.arange(start, min(start + _BLOCK, dataset.n_cells)))
            for name in cells.names():  # of a block, its zeros are not kept
                parts.setdefault(name, []).append(cells.as_read(name))
        self._columns: dict[str, _Column | _Shared | _Sparse | None] = {
            name: _Shared(blocks[0].to(device)) if name in dataset.shared else _column(blocks, device)
            for name, blocks in parts.items()
        }

    def cells(self, rows: Tensor, *, n_total: int) -> Cells:
        """Put some cells together.

        Parameters
        ----------
        rows
            Their rows, int64, on the device.
        n_total
            Number of cells that these stand for.
        """
        values = {name: None if c is None else c.take(rows) for name, c in self._columns.items()}
        return Cells(values, rows, n_total)

    def minibatches(
        self, rows: np.ndarray, batch_size: int, *, rng: np.random.Generator | None, n_total: int
    ) -> Iterator[Selection]:
        """Yield minibatches to be put together, in the order in which `Dataset.minibatches` would.

        Parameters
        ----------
        rows
            Rows to go through once.
        batch_size
            Cells in a minibatch; the last one may be smaller.
        rng
            Generator that shuffles the rows; without one they keep their order.
        n_total
            Number of cells that all rows stand for.
        """
        order = torch.from_numpy(rows if rng is None else rng.permutation(rows)).to(self.device)
        for chosen in order.split(batch_size):
            yield Selection(chosen, n_total, self)


class _Column:
    """Values of every cell, shape (n_cells, ...)."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def take(self, rows: Tensor) -> Tensor:
        return self.values.index_select(0, rows)


class _Shared:
    """Values that are the same in every minibatch."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def take(self, rows: Tensor) -> Tensor:
        return self.values


class _Sparse:
    """Non-zero values of every cell, row by row."""

    def __init__(self, found: list[NonZeros], device: torch.device) -> None:
        lengths = torch.cat([torch.bincount(seen.rows, minlength=seen.n_rows) for seen in found])
        self.n_columns, self.dtype = found[0].n_columns, found[0].values.dtype
        self.starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device)
        # One slot for each entry of the longest row: shapes that do not depend on the cells chosen.
        self.slots = torch.arange(int(lengths.max()), device=device)
        columns = torch.cat([seen.cols.to(torch.int32) for seen in found])
        values = torch.cat([seen.values for seen in found])
        # A last entry of zero, for the slots behind the end.
        self.columns = torch.cat([columns, columns.new_zeros(1)]).to(device)
        self.values = torch.cat([_compact(values), _compact(values).new_zeros(1)]).to(device)

    def take(self, rows: Tensor) -> Tensor:
        start, stop = self.starts.index_select(0, rows), self.starts.index_select(0, rows + 1)
        place = start.unsqueeze(-1) + self.slots
        place = torch.where(place < stop.unsqueeze(-1), place, len(self.values) - 1)
        dense = torch.zeros(len(rows), self.n_columns, dtype=self.dtype, device=rows.device)
        # Added, not written: the slots behind the end all add zero to the first column.
        return dense.scatter_add_(1, self.columns[place].long(), self.values[place].to(self.dtype))


def _column(blocks: list[Any], device: torch.device) -> _Column | _Sparse | None:
    if blocks[0] is None:
        return None
    return (
        _Sparse(blocks, device) if isinstance(blocks[0], NonZeros) else _Column(torch.cat(blocks).to(device))
    )


def _compact(values: Tensor) -> Tensor:
    if values.numel() == 0 or not bool((values == values.floor()).all() & (values >= 0).all()):
        return values
    largest = float(values.max())
    return values.to(next((dtype for dtype, limit in _SMALL if largest <= limit), values.dtype))


def estimate_bytes(dataset: Dataset, n_seen: int = 512) -> int:
    """Estimate from some cells how much memory a `Resident` takes.

    Parameters
    ----------
    dataset
        The data.
    n_seen
        Number of cells to look at.
    """
    rows = np.linspace(0, dataset.n_cells - 1, min(n_seen, dataset.n_cells)).astype(np.int64)
    cells, total = dataset.cells(rows), 0.0
    for name in cells.names():
        value = cells.as_read(name)
        if value is None or name in dataset.shared:
            continue
        sparse = isinstance(value, NonZeros)
        size = len(value) * 6 if sparse else value.numel() * value.element_size()
        total += size / len(rows)
    return int(total * dataset.n_cells)


def resident_on(dataset: Dataset, device: torch.device) -> Resident | None:
    """Put the data on a CUDA device if they fit in half of its free memory, and log the estimate.

    Parameters
    ----------
    dataset
        The data.
    device
        The device; on any but CUDA the data stay where they are.
    """
    if device.type != "cuda":
        return None
    needed, free = estimate_bytes(dataset), torch.cuda.mem_get_info(device)[0]
    fits = needed <= _SHARE * free
    settings.logger.info(
        "the data take about %.0f MiB; %.0f MiB are free on %s: %s",
        needed / 2**20,
        free / 2**20,
        device,
        "they stay there" if fits else "they are sent there minibatch by minibatch",
    )
    return Resident(dataset, device) if fits else None
