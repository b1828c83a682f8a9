"""Whether an array shares its memory, or its file, with what lies in an AnnData or MuData."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyrocell.data.slots import is_mudata

__all__ = ["overlaps_itself", "place_of_array"]

_MAPPINGS = ("layers", "obsm", "varm", "obsp", "varp")


def overlaps_itself(array: np.ndarray) -> bool:
    """Return whether two entries may lie at one address, as after ``broadcast_to`` or in a sliding window.

    Slices, transposes and reversals of plain arrays never do: each stride reaches beyond all smaller ones.
    """
    reach = array.itemsize
    sizes = zip(array.strides, array.shape, strict=True)
    for stride, n in sorted((abs(stride), n) for stride, n in sizes if n > 1):
        if stride < reach:
            return True
        reach += (n - 1) * stride
    return False


def place_of_array(array: np.ndarray, data: Any) -> str | None:
    """Return where in the data the memory or the mapped file of an array lies; None where nowhere.

    Only bounds of memory are compared, so that columns of one array that lie between those of another count, too.
    """
    file = _file_of(array)
    for place, there in _arrays_of(data):
        if np.may_share_memory(array, there) or (file is not None and file == _file_of(there)):
            return place
    return None


def _file_of(array: Any) -> Path | None:
    """Return the file that an array is mapped from."""
    while isinstance(array, np.ndarray):
        name = getattr(array, "filename", None)
        if name is not None:
            return Path(name).resolve()
        array = array.base
    return None


def _arrays_of(data: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield all arrays in memory of an AnnData or MuData, each with its place; those of the whole for a view."""
    for reference in ("_adata_ref", "_mudata_ref"):
        whole = getattr(data, reference, None)
        if whole is not None:
            yield from _arrays_of(whole)
            return
    if is_mudata(data):
        for name, modality in data.mod.items():
            yield from ((f"mod[{name!r}].{place}", array) for place, array in _arrays_of(modality))
    else:
        yield from _parts("X", data.X)
        if data.raw is not None and not data.isbacked:
            yield from _parts("raw.X", data.raw.X)
            yield from _parts("raw.varm", data.raw.varm)
    for name in _MAPPINGS:
        yield from _parts(name, getattr(data, name, {}))
    for name in ("obs", "var", "uns"):
        yield from _parts(name, getattr(data, name))


def _parts(place: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays that a matrix, a table or a mapping of them consists of."""
    if isinstance(value, np.ndarray):
        yield place, value
    elif isinstance(value, pd.DataFrame):
        for name, column in value.items():
            if isinstance(column.dtype, np.dtype):
                yield f"{place}[{name!r}]", column.to_numpy(copy=False)
    elif isinstance(value, Mapping):
        for key in value:
            yield from _parts(f"{place}[{key!r}]", value[key])
    else:  # sparse matrices of all formats; what is on disk has none of these in memory
        for name in ("data", "indices", "indptr", "row", "col"):
            part = getattr(value, name, None)
            if isinstance(part, np.ndarray):
                yield place, part
