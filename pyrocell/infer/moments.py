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
    n_seen
        Of these, the cells that were looked at, which stand for all.
    spread
        What ``sums[0] + sums[1]`` would be if each cell counted by the square of the cells that it stands for, shape
        ``(n_strata, n_features)``.
    sums
        Of what was counted, what the model expects to be counted, and the quantity that is compared, shape
        ``(3, n_strata, n_features)``.
    products
        Of the squares of the three and of their products (counted and expected, counted and quantity, expected and
        quantity), shape ``(6, n_strata, n_features)``. Where few cells stand for many, their own sampling is in them.
    """

    n: np.ndarray
    n_seen: np.ndarray
    spread: np.ndarray
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
        tables = (self.n, self.n_seen, self.spread, self.sums, self.products)
        return StratumMoments(*(chooser @ table for table in tables))

    @property
    def inflation(self) -> np.ndarray:
        """Variance of a sum of Poisson counts over its mean: more than 1 where few cells stand for many."""
        total = self.sums[0] + self.sums[1]
        ones = np.ones_like(total)
        return np.where(total > 0, self.spread / np.where(total > 0, total, 1.0), ones)

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
    weights
        How many cells of its stratum each cell looked at stands for, shape ``(n_strata,)``; None for one.
    """

    def __init__(self, n_strata: int, n_features: int, weights: np.ndarray | None = None) -> None:
        self.weights = np.ones(n_strata) if weights is None else weights
        self.n = np.zeros(n_strata)
        self.sums = np.zeros((3, n_strata, n_features))
        self.products = np.zeros((6, n_strata, n_features))

    def update(self, codes: np.ndarray, values: Sequence[torch.Tensor]) -> None:
        """Add a block: the stratum of each cell ``(B,)``, and the three values, ``(B, n_features)`` each."""
        present, codes = np.unique(codes, return_inverse=True)
        self.n[present] += np.bincount(codes)
        # in double precision: variances of large values are small differences; a device without it leaves it to the CPU
        device = torch.device("cpu") if values[0].device.type == "mps" else values[0].device
        values = [value.to(device).double() for value in values]
        chooser = torch.zeros((len(present), len(codes)), device=device, dtype=torch.float64)
        chooser[torch.as_tensor(codes, device=device), torch.arange(len(codes), device=device)] = 1.0
        for index, value in enumerate(values):
            self.sums[index, present] += (chooser @ value).cpu().numpy()
        for index, (one, two) in enumerate(_PAIRS):
            self.products[index, present] += (chooser @ (values[one] * values[two])).cpu().numpy()

    def result(self, feature_names: Sequence[str]) -> StratumMoments:
        """Return the sums; raise if some are not finite."""
        bad = np.asarray(~(np.isfinite(self.sums).all((0, 1)) & np.isfinite(self.products).all((0, 1))))
        if bad.any():
            names = [name for name, is_bad in zip(feature_names, bad, strict=True) if is_bad]
            raise DataError(
                f"Posterior draws of {len(names)} features are not finite: {list_some(names)}; expected finite values. "
                "Check that training did not diverge."
            )
        return self._represented()

    def _represented(self) -> StratumMoments:
        """Moments of all cells, from those of the cells that stand for them.

        A weighted sum over all cells has the variance of its sampling, the sum of squares over all cells, and that of
        the choice among them, w (w - 1) times the sum of squares around the mean of the stratum.
        """
        weight, table = self.weights, self.weights[:, None]
        n_seen = np.maximum(self.n, 1.0)[:, None]
        means = np.stack([self.sums[one] * self.sums[two] / n_seen for one, two in _PAIRS])
        products = table**2 * self.products - table * (table - 1.0) * means
        spread = table**2 * self.sums[:2].sum(axis=0)
        return StratumMoments(weight * self.n, self.n, spread, table * self.sums, products)
