"""An answer on its way into a sink."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd

from pyrocell.data.sinks import Asked, GivenArray, NewArray, Sink, Where
from pyrocell.data.zarr_sink import Zarr
from pyrocell.errors import QueryError

__all__ = ["Filled", "FilledTable", "Filling", "Out"]

Out = Sink | np.ndarray | str | Path | None
"""Where an answer goes: a sink, an array, the path of a zarr array, or a new array."""

Filled = np.ndarray | Any
"""What a verb with ``out`` returns: a new array by default, else what was written to (an array, or a zarr array)."""

FilledTable = pd.DataFrame | Filled
"""The same where the default is a table with names, or an array of several draws."""


def _sink(out: Out) -> Sink:
    """Return the sink that a user means."""
    if out is None or isinstance(out, Sink):
        return NewArray() if out is None else out
    if isinstance(out, str | Path):
        return Zarr(out)
    if isinstance(out, np.ndarray):
        return GivenArray(out)
    raise QueryError(
        f"out is a {type(out).__name__}; expected a NumPy array of float32, the path of a zarr array, or "
        "pyrocell.data.Layer, Obsm or Zarr."
    )


class Filling:
    """One answer on its way into a sink: opened by the first block, kept after the last, abandoned in between.

    Parameters
    ----------
    out
        What the user gave: None for a new array, an array, a path, or a sink.
    asked
        The question.

    Raises
    ------
    QueryError
        If the answer cannot go there.
    """

    def __init__(self, out: Out, asked: Asked) -> None:
        self._sink, self._asked = _sink(out), asked
        self._sink.check(asked)
        self._writer: Any = None

    def __enter__(self) -> Filling:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.abandon()

    def add(self, values: np.ndarray, place: slice | None, draws: slice | None = None) -> None:
        """Take the values of some cells, float32.

        Parameters
        ----------
        values
            Shape (n, ...), or (m, n, ...) with ``draws``; without the n, where there is one value for all cells.
        place
            Which cells, counted in those asked for; blocks come in order. None for all at once.
        draws
            Which draws, where these are kept side by side.
        """
        first = () if draws is None else (self._asked.n_draws or 1,)
        cells = () if place is None else (len(self._asked.rows),)
        shape = (*first, *cells, *values.shape[len(first) + len(cells) :])
        where = tuple(part for part in (draws, place) if part is not None)
        self._write(where, values, shape)

    def _write(self, where: Where, values: np.ndarray, shape: tuple[int, ...]) -> None:
        if self._writer is None:
            self._writer = self._sink.open(self._asked, shape, values.shape)
        self._writer.write(where, values)

    def kept(self) -> Filled:
        """Finish, and return what was filled."""
        writer, self._writer = self._writer, None
        assert writer is not None  # a question has at least one cell
        try:
            return writer.close()
        except BaseException:
            writer.abandon()
            raise
