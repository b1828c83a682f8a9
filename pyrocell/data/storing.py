"""Data beside a saved model: written without a change to the user's own, read without following them elsewhere."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from anndata import AnnData, read_h5ad
from scipy import sparse

from pyrocell.data.slots import is_mudata
from pyrocell.errors import LoadError

if TYPE_CHECKING:
    import h5py
    from mudata import MuData

__all__ = ["DATA_FILES", "data_file_of", "read_data", "write_data"]

DATA_FILES = ("adata.h5ad", "mdata.h5mu")
_ALIGNED = ("obsm", "varm", "obsp", "varp")
# What a compressed array may unpack to: a thousandfold is what gzip can do, more is a trap.
_MOST_FOLD, _SMALL, _SMALL_IN_ALL = 10_000, 2**26, 2**28


def data_file_of(data: AnnData | MuData) -> str:
    """Return the name of the file that data of this kind are written to."""
    return DATA_FILES[is_mudata(data)]


def write_data(data: AnnData | MuData, path: Path) -> None:
    """Write data to a file; both libraries turn columns of text into categories as they write, here of a stand-in.

    Parameters
    ----------
    data
        In memory or backed.
    path
        Where to write.

    Raises
    ------
    OSError
        If the disk has no room for them: seen before, since HDF5 does not survive a disk that fills up as it writes.
    """
    needed, free = _size_of(data), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"No space left for data of {needed / 1e6:.1f} MB, where {free / 1e6:.1f} are free"
        )
    if not is_mudata(data):
        from anndata.io import write_h5ad

        if data.isbacked:
            write_h5ad(path, data, convert_strings_to_categoricals=False)
        else:
            write_h5ad(path, _stand_in(data))
        return
    import mudata

    with _random_numbers_kept(), mudata.set_options(pull_on_update=False):
        mudata.write_h5mu(path, data if data.isbacked else _stand_in_of_all(data))


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Give Python's global generator back as it was: mudata makes up names of columns with it."""
    before = random.getstate()
    try:
        yield
    finally:
        random.setstate(before)


def _size_of(data: Any) -> int:
    """Return how many bytes the data take in a file, without compression, at least."""
    if data.isbacked:
        return Path(data.filename).stat().st_size
    if is_mudata(data):
        return sum(_size_of(part) for part in data.mod.values())
    parts = [data.X, *data.layers.values(), data.obs, data.var]
    parts += [value for name in _ALIGNED for value in getattr(data, name).values()]
    return sum(map(_bytes_of, parts))


def _bytes_of(values: Any) -> int:
    if isinstance(values, pd.DataFrame):
        return int(values.memory_usage().sum())
    if sparse.issparse(values):
        return sum(
            getattr(values, name).nbytes for name in ("data", "indices", "indptr") if hasattr(values, name)
        )
    return int(getattr(values, "nbytes", 0))


def _stand_in(adata: AnnData) -> AnnData:
    """Return an AnnData of the same matrices, which are not copied, and of tables of its own."""
    raw = adata.raw and {"X": adata.raw.X, "var": adata.raw.var.copy(), "varm": dict(adata.raw.varm)}
    return AnnData(
        adata.X,
        obs=adata.obs.copy(),
        var=adata.var.copy(),
        uns=dict(adata.uns),
        layers=dict(adata.layers),
        raw=raw,
        **{name: dict(getattr(adata, name)) for name in _ALIGNED},
    )


def _stand_in_of_all(data: Any) -> Any:
    import mudata

    other = mudata.MuData({name: _stand_in(part) for name, part in data.mod.items()}, axis=data.axis)
    other.obs, other.var = data.obs.copy(), data.var.copy()
    for name in _ALIGNED:
        getattr(other, name).update(dict(getattr(data, name)))
    other.uns = dict(data.uns)
    return other


def read_data(path: Path) -> AnnData | MuData:
    """Read data that `write_data` wrote.

    Raises
    ------
    LoadError
        If the file is damaged, or leads to other files.
    """
    import h5py

    try:
        with h5py.File(path, "r") as file:
            n_bytes = sum(map(_checked_size, _datasets(file, set())))
        if n_bytes > max(_SMALL_IN_ALL, _MOST_FOLD * path.stat().st_size):
            raise ValueError(
                f"its arrays say that they have {n_bytes:,} bytes together, far more than the file"
            )
        if path.name.removesuffix(".new").endswith(".h5mu"):
            import mudata

            # As it was written: by default, mudata copies columns of the modalities while reading.
            with _random_numbers_kept(), mudata.set_options(pull_on_update=False):
                return mudata.read_h5mu(path)
        return read_h5ad(path)
    except Exception as error:  # h5py and anndata raise many kinds on damaged files
        raise LoadError(
            f"{path} cannot be read ({error}); copy the whole folder again, or give the data with adata=."
        ) from error


def _datasets(group: h5py.Group, seen: set[int]) -> Iterator[h5py.Dataset]:
    """Yield all arrays of an HDF5 file; raise a ValueError if a link points out of it."""
    import h5py

    for name in group:
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise ValueError(f"{group.name}/{name} is a link to another file")
        if isinstance(link, h5py.SoftLink):
            continue  # within the file: what it points to is met on its own
        item = group[name]
        place = h5py.h5o.get_info(item.id).addr
        if isinstance(item, h5py.Group) and place not in seen:
            seen.add(place)
            yield from _datasets(item, seen)
        elif isinstance(item, h5py.Dataset):
            yield item


def _checked_size(item: h5py.Dataset) -> int:
    """Return the bytes of an array; raise a ValueError if they lie elsewhere, or are far more than are there."""
    if item.is_virtual or item.external:
        raise ValueError(f"the values of {item.name} lie in another file")
    if item.shape is None:
        return 0
    if item.nbytes > max(_SMALL, _MOST_FOLD * item.id.get_storage_size()):
        raise ValueError(
            f"{item.name} says that it has {item.nbytes:,} bytes, of which {item.id.get_storage_size():,} are there"
        )
    return int(item.nbytes)
