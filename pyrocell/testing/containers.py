"""The same data in other containers: each check runs on an AnnData and on a MuData."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyrocell.data.slots import is_mudata

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["parts_of", "read_backed", "with_parts", "write"]


def parts_of(data: Any) -> dict[str, AnnData]:
    """Return the AnnData with features by name: the modalities of a MuData, or the data themselves."""
    return dict(data.mod) if is_mudata(data) else {"": data}


def with_parts(data: Any, change: Callable[[AnnData], AnnData], names: Iterable[str] | None = None) -> Any:
    """Return a copy of the data with some of its parts changed.

    Parameters
    ----------
    data
        AnnData or MuData.
    change
        Gives a changed AnnData; the cells stay.
    names
        Which parts; by default all.
    """
    chosen = set(parts_of(data) if names is None else names)
    parts = {name: change(part) if name in chosen else part for name, part in parts_of(data).items()}
    if not is_mudata(data):
        return parts[""]
    import mudata

    with mudata.set_options(pull_on_update=False):
        changed = mudata.MuData({name: part.copy() for name, part in parts.items()})
    changed.obs = data.obs.copy()
    changed.uns = dict(data.uns)
    return changed


def write(data: Any, folder: str | Path) -> Path:
    """Write the data into a folder; return the file."""
    path = Path(folder) / ("data.h5mu" if is_mudata(data) else "data.h5ad")
    data.write(path)
    return path


def read_backed(path: Path) -> Any:
    """Open the data of a file without loading the matrices."""
    if path.suffix == ".h5mu":
        import mudata

        with mudata.set_options(pull_on_update=False):
            return mudata.read_h5mu(path, backed="r")
    from anndata import read_h5ad

    return read_h5ad(path, backed="r")
