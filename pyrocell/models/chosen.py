"""What a question chooses: cells, features, sizes; refused by name where there is no such thing."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from pyrocell.data import Cells
from pyrocell.errors import QueryError, list_some

__all__ = ["chosen_cells", "chosen_features", "is_latent_size", "measured_in"]


def chosen_cells(indices: Sequence[int] | np.ndarray | None, n_cells: int) -> np.ndarray:
    """Turn positions or a boolean mask into positions, refusing what is out of range."""
    if indices is None:
        return np.arange(n_cells)
    chosen = np.asarray(indices)
    if chosen.dtype == bool:
        if chosen.shape != (n_cells,):
            raise QueryError(
                f"indices is a mask of shape {chosen.shape}; expected one entry for each of {n_cells} cells."
            )
        return np.flatnonzero(chosen)
    if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
        raise QueryError(
            f"indices has type {chosen.dtype} and {chosen.ndim} dimensions; expected positions (integers) or a boolean "
            "mask. For names, use adata.obs_names.get_indexer(names)."
        )
    bad = chosen[(chosen < -n_cells) | (chosen >= n_cells)]
    if bad.size:
        raise QueryError(f"indices has {list_some(bad.tolist())}; the data have {n_cells} cells.")
    return chosen.astype(np.int64) % n_cells


def chosen_features(
    features: Sequence[str], names: Sequence[str], elsewhere: Mapping[str, Sequence[str]] | None = None
) -> list[int]:
    """Turn feature names into positions, refusing unknown ones by name, also those of fields ``elsewhere``."""
    if isinstance(features, str):
        raise QueryError(f"Features were given as the single string {features!r}; give a list of names.")
    where = {name: i for i, name in enumerate(names)}
    missing = [name for name in features if name not in where]
    if missing:
        close = [match for name in missing[:5] for match in difflib.get_close_matches(str(name), names, n=1)]
        hint = f" Close: {list_some(close)}." if close else ""
        for field, known in (elsewhere or {}).items():
            if found := [name for name in missing if name in known]:
                hint = f" {list_some(found)} are among the {field}: ask for these with their own argument."
        raise QueryError(f"The model has no features {list_some(missing)}; it has {len(names)}.{hint}")
    return [where[name] for name in features]


def measured_in(cells: Cells, field: str) -> torch.Tensor | None:
    """Return which values of a field were measured, bool (B, n_features), or None for all."""
    mask: torch.Tensor | None = getattr(cells, f"{field}_mask", None)
    if mask is None or mask.dim() == 2:
        return mask
    return mask.unsqueeze(-1).expand(getattr(cells, field).shape)  # a cell has all of them, or none


def is_latent_size(library_size: object) -> bool:
    """Whether each cell's own size is meant, refusing what is neither that nor a positive number."""
    if library_size == "latent":
        return True
    if not isinstance(library_size, int | float | np.number) or not 0 < library_size < math.inf:
        raise QueryError(f"library_size is {library_size!r}; expected a positive number, or 'latent'.")
    return False
