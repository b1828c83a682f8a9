"""Answers on disk: a zarr array that is written a few cells at a time, and has its name when it is complete."""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyrocell.data.sinks import Asked, Sink, Where
from pyrocell.errors import QueryError, SaveError

__all__ = ["Zarr"]

# A file of a zarr array holds at least this many numbers where blocks are smaller: 4 MB.
_CHUNK_NUMBERS = 2**20
_ZARR_ARRAY, _ZARR_GROUP = ".zarray", ".zgroup"  # of zarr's format 2; format 3 has zarr.json for both


@dataclass(frozen=True)
class Zarr(Sink):
    """Write an answer into a zarr array on disk, a block of cells at a time: ``out="denoised.zarr"`` for short.

    Only a block (8 MB by default), or a file of the array (4 MB, if that is more), is held in memory. The array is
    written beside its place, and moved there when it is complete: nothing that was interrupted has its name.

    Parameters
    ----------
    path
        Folder of the array, on a local disk, in a folder that exists; not inside another zarr group.
    overwrite
        Whether a zarr array at this path may be replaced, which happens once the new one is complete. What appears
        there in the meantime is looked at again: the answer then keeps its name ending in ``.partial``, which the error
        tells.

    Notes
    -----
    Rows are the cells asked for, columns the features asked for, each in the order of the question; several draws come
    first. ``zarr.open_array(path)`` reads it, and so do ``anndata.io.read_elem`` and ``dask.array.from_zarr``. anndata
    0.12 and later bring the package zarr along; with an older one, install it.
    """

    path: str | Path
    overwrite: bool = False

    def check(self, asked: Asked) -> None:
        """Refuse what is there already, and places where nothing can be."""
        _import_zarr()
        if "://" in str(self.path):
            raise QueryError(f"out={str(self.path)!r} is an address; expected a path on a local disk.")
        place = Path(self.path).absolute()
        if not place.parent.is_dir():
            raise QueryError(
                f"The folder {place.parent} of out={str(self.path)!r} is not there; make it first."
            )
        group = next((above for above in place.parents if _holds_zarr(above)), None)
        if group is not None:
            raise QueryError(
                f"out={str(self.path)!r} lies inside the zarr group {group}, whose list of contents would not know of "
                "it; give a path of its own."
            )
        _check_free(place, overwrite=self.overwrite)

    def open(self, asked: Asked, shape: tuple[int, ...], block: tuple[int, ...]) -> _OnDisk:
        """Start the array beside its place."""
        place, by_rows = Path(self.path).absolute(), asked.n_draws is None
        return _OnDisk(place, shape, block, by_rows=by_rows, overwrite=self.overwrite)


def _import_zarr() -> Any:
    try:
        import zarr
    except ImportError:
        raise QueryError(
            "out= with a path writes a zarr array, and the package zarr is not installed: pip install zarr. Or give an "
            "array, such as np.lib.format.open_memmap(path, mode='w+', dtype='float32', shape=...)."
        ) from None
    return zarr


def _holds_zarr(folder: Path, names: tuple[str, ...] = (_ZARR_ARRAY, _ZARR_GROUP, "zarr.json")) -> bool:
    return any((folder / name).is_file() for name in names)


def _check_free(place: Path, *, overwrite: bool) -> None:
    """Refuse a place that is taken, unless by a zarr array that may be replaced."""
    if not (place.is_symlink() or place.exists()):
        return
    if not overwrite:
        raise QueryError(
            f"There is already something at out={str(place)!r}; use another path, or Zarr({str(place)!r}, "
            "overwrite=True) to replace a zarr array."
        )
    if not _is_array(place):
        raise QueryError(f"out={str(place)!r} is no zarr array, and is not replaced; remove it yourself.")


def _is_array(place: Path) -> bool:
    if place.is_symlink() or not _holds_zarr(place, (_ZARR_ARRAY, "zarr.json")):
        return False
    record = place / "zarr.json"
    return not record.is_file() or _node_type(record) == "array"


def _node_type(record: Path) -> Any:
    try:
        return json.loads(record.read_text(encoding="utf-8"))["node_type"]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise QueryError(
            f"{record} cannot be read as the record of a zarr array or group ({type(error).__name__}: {error}), so "
            "that its folder is not replaced; mend it, or remove the folder yourself."
        ) from error


class _OnDisk:
    """A zarr array on its way to its place: each of its files is written once, when all rows of it are there."""

    def __init__(
        self, place: Path, shape: tuple[int, ...], block: tuple[int, ...], *, by_rows: bool, overwrite: bool
    ) -> None:
        self.place, self.overwrite = place, overwrite
        self.complete = False
        self.partial = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
        self.before = self.partial.with_suffix(".before")
        self.waiting: list[np.ndarray] = []
        self.start = self.n_waiting = 0
        self.n_rows = 0
        if by_rows and len(shape) > 1:
            a_block = math.prod(block)
            self.n_rows = min(shape[0], block[0] * max(1, _CHUNK_NUMBERS // max(1, a_block)))
            block = (self.n_rows, *block[1:])
        options = {"shape": shape, "chunks": block, "dtype": "float32", "fill_value": float("nan")}
        try:
            self.array = _import_zarr().open_array(str(self.partial), mode="w-", **options)
            # By these, anndata knows how to read it.
            self.array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        except BaseException as error:
            self._failed(error)

    def write(self, where: Where, values: np.ndarray) -> None:
        if not self.n_rows:
            self._put(where, values)
            return
        self.waiting.append(values)
        self.n_waiting += len(values)
        if self.n_waiting >= self.n_rows:
            self._flush()

    def _flush(self) -> None:
        if self.waiting:
            rows = slice(self.start, self.start + self.n_waiting)
            self._put((rows,), np.concatenate(self.waiting))
            self.start, self.n_waiting, self.waiting = rows.stop, 0, []

    def _put(self, where: Where, values: np.ndarray) -> None:
        try:
            self.array[where] = values
        except OSError as error:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        self.abandon()
        if not isinstance(error, OSError):
            raise error
        raise SaveError(
            f"{self.place} could not be written ({error}); nothing of it is left. Make room, or choose another path."
        ) from error

    def close(self) -> Any:
        self._flush()
        self.complete = True  # from here on it is kept, whatever happens
        try:
            _check_free(self.place, overwrite=self.overwrite)
            self._move()
        except QueryError as error:
            raise QueryError(
                f"{self.place} was taken while the question was answered, by something that may not be replaced, and "
                f"is left as it is. The answer is complete, in {self.partial}; rename that folder."
            ) from error
        except OSError as error:
            aside = f" What had the name before is in {self.before}." if self.before.exists() else ""
            raise SaveError(
                f"{self.place} could not get its name ({error}). The answer is complete, in {self.partial}; rename "
                f"that folder.{aside}"
            ) from error
        return _import_zarr().open_array(str(self.place), mode="r")

    def _move(self) -> None:
        """Take the place, which fails where another has taken it; what was there is removed last."""
        if self.overwrite:
            self._set_aside()
        try:
            self.partial.rename(self.place)
        except OSError:
            if self.before.exists() and not self.place.exists():
                self.before.rename(self.place)
            raise
        shutil.rmtree(self.before, ignore_errors=True)

    def _set_aside(self) -> None:
        """Give what is there a name of its own; only then is it sure that nobody puts something else into its place."""
        with contextlib.suppress(FileNotFoundError):
            self.place.rename(self.before)
            try:
                _check_free(self.before, overwrite=True)
            except QueryError:
                self.before.rename(self.place)
                raise

    def abandon(self) -> None:
        self.waiting = []
        if not self.complete:
            shutil.rmtree(self.partial, ignore_errors=True)
