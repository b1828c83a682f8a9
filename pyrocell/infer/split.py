"""Who is trained on, for how long: splits of the cells and default lengths."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from pyrocell.errors import TrainingError, list_some

__all__ = ["chosen_rows", "default_kl_warmup", "default_max_epochs", "split_cells"]


def default_max_epochs(n_cells: int, cap: int = 400) -> int:
    """Return the field's heuristic: ``cap`` epochs up to 20,000 cells, then as many minibatches as those need."""
    return max(1, min(cap, round(cap * 20_000 / n_cells)))


def default_kl_warmup(max_epochs: int, cap: int = 400) -> int:
    """Warm up over the first half of training, at most ``cap`` epochs, so that it always ends."""
    return min(cap, math.ceil(max_epochs / 2))


def split_cells(
    n_cells: int, train_size: float, validation_size: float | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Split rows at random into training and validation rows, each sorted."""
    rest = 1.0 - train_size if validation_size is None else validation_size
    if not 0 < train_size <= 1 or rest < 0 or train_size + rest > 1 + 1e-9:
        raise TrainingError(
            f"train_size is {train_size} and validation_size {validation_size}; expected fractions with 0 < train_size "
            "and a sum of at most 1."
        )
    n_train = math.ceil(train_size * n_cells)
    n_validation = min(n_cells - n_train, round(rest * n_cells))
    order = rng.permutation(n_cells)
    return np.sort(order[:n_train]), np.sort(order[n_train : n_train + n_validation])


def chosen_rows(rows: Iterable[int], n_cells: int, name: str) -> np.ndarray:
    """Check rows given by the user."""
    chosen = np.asarray(rows if isinstance(rows, np.ndarray) else list(rows))
    if chosen.dtype == bool:
        if chosen.shape != (n_cells,):
            raise TrainingError(
                f"{name} is a mask of shape {chosen.shape}; expected one entry for each of {n_cells} cells."
            )
        chosen = np.flatnonzero(chosen)
    if chosen.ndim != 1 or (len(chosen) and chosen.dtype.kind not in "iu"):
        raise TrainingError(
            f"{name} holds {chosen.dtype} in {chosen.ndim} dimensions; expected row numbers, or a boolean mask."
        )
    bad = [int(r) for r in chosen if not 0 <= r < n_cells]
    if bad or len(chosen) == 0:
        raise TrainingError(
            f"{name} has rows {list_some(bad)}; expected at least one row within 0..{n_cells - 1}."
        )
    return chosen.astype(np.int64)
