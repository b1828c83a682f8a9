"""What data hold, in one number: the same from memory and from disk, sparse and dense, whatever the type of numbers."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from pyrocell.data.minibatch import Dataset

__all__ = ["content_hash"]

_NUMBERS_AT_ONCE = 2**22


def content_hash(dataset: Dataset) -> str:
    """Return the SHA-256 of all that a model reads of the data: values in the order of its features, and all names.

    Parameters
    ----------
    dataset
        Data seen through a schema.
    """
    n_wide = sum(len(record["names"]) for record in dataset.schema.fields.values())
    n_rows = max(1, _NUMBERS_AT_ONCE // max(1, n_wide))
    sums = {name: hashlib.sha256() for name in ("names of rows", "names of features")}
    for name in dataset.obs_names:
        sums["names of rows"].update(f"{name}\n".encode())
    for field, record in sorted(dataset.schema.fields.items()):
        sums["names of features"].update("\n".join([field, *map(str, record["names"])]).encode())
    for start in range(0, dataset.n_cells, n_rows):
        cells = dataset.cells(np.arange(start, min(start + n_rows, dataset.n_cells)))
        for name in cells.names():
            value = getattr(cells, name)
            if isinstance(value, torch.Tensor) and not (start and name in dataset.shared):
                sums.setdefault(name, hashlib.sha256()).update(_bytes(value))
    parts = [f"{name}:{one.hexdigest()}" for name, one in sorted(sums.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _bytes(value: torch.Tensor) -> bytes:
    array = value.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
