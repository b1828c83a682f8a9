"""Sums over the cells of strata, from which means and their sampling errors follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pyrocell.errors import DataError, list_some

__all__ = ["MomentSums", "StratumMoments"]

_PAIRS = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))


@dataclass(frozen=True)
class StratumMoments:
    """Sums and sums of products, over the cells of each stratum, of three values of a cell and feature.

    Parameters
    ----------
    n
        Cells of each stratum, shape ``(n_strata,)``.
    sums
        Of what was counted, what the model expects to be counted, and the quantity that is compared, shape
        ``(3, n_strata, n_features)``.
    products
        Of the squares of the three and of their products (counted and expected, counted and quantity, expected and
        quantity), shape ``(6, n_strata, n_features)``.
    """

    n: np.ndarray
    sums: np.ndarray
    products: np.ndarray

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.sums.shape[2]

    def united(self, members: Sequence[Sequence[int]]) -> StratumMoments:
        """Put strata together: one for each list of positions; the sums add up."""
        chooser = np.zeros((len(members), len(self.n)))
        for index, positions in enumerate(members):
            chooser[index, list(positions)] = 1.0
        return StratumMoments(chooser @ self.n, chooser @ self.sums, chooser @ self.products)

    def weighted(self, counted: np.ndarray, expected: np.ndarray, quantity: np.ndarray) -> np.ndarray:
        """Sum over cells the square of a weighted sum of the three values; weights ``(n_strata, n_features)``."""
        weights = (counted, expected, quantity)
        factors = [(2.0 - (one == two)) * weights[one] * weights[two] for one, two in _PAIRS]
        return sum(
            (factor * product for factor, product in zip(factors, self.products, strict=True)),
            np.zeros_like(self.sums[0]),
        )


class MomentSums:
    """Add up the moments of strata, a block of cells at a time.

    Parameters
    ----------
    n_strata, n_features
        Sizes of the tables: all that is ever held.
    """

    def __init__(self, n_strata: int, n_features: int) -> None:
        self.n = np.zeros(n_strata)
        self.sums = np.zeros((3, n_strata, n_features))
        self.products = np.zeros((6, n_strata, n_features))

    def update(self, codes: np.ndarray, values: Sequence[torch.Tensor]) -> None:
        """Add a block: the stratum of each cell ``(B,)``, and the three values, ``(B, n_features)`` each."""
        present, codes = np.unique(codes, return_inverse=True)
        self.n[present] += np.bincount(codes)
        device = values[0].device
        chooser = torch.zeros((len(present), len(codes)), device=device)
        chooser[torch.as_tensor(codes, device=device), torch.arange(len(codes), device=device)] = 1.0
        for index, value in enumerate(values):
            self.sums[index, present] += (chooser @ value).cpu().double().numpy()
        for index, (one, two) in enumerate(_PAIRS):
            self.products[index, present] += (chooser @ (values[one] * values[two])).cpu().double().numpy()

    def result(self, feature_names: Sequence[str]) -> StratumMoments:
        """Return the sums; raise if some are not finite."""
        bad = np.asarray(~(np.isfinite(self.sums).all((0, 1)) & np.isfinite(self.products).all((0, 1))))
        if bad.any():
            names = [name for name, is_bad in zip(feature_names, bad, strict=True) if is_bad]
            raise DataError(
                f"Posterior draws of {len(names)} features are not finite: {list_some(names)}; expected finite values. "
                "Check that training did not diverge."
            )
        return StratumMoments(self.n, self.sums, self.products)
