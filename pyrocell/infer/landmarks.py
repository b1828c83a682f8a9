"""How far cells lie from those that a model was fitted to, told by a few of these."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Landmarks"]

_N_NEAREST = 15
_BLOCK = 4096


@dataclass(frozen=True)
class Landmarks:
    """Some cells of a reference, and how far others of the reference lie from them.

    Parameters
    ----------
    latents
        Latents of the cells to measure from, float32, shape (n_landmarks, n_latent).
    distances
        Distances of other cells of the reference from these, in increasing order, float32, shape (n_others,).
    """

    latents: torch.Tensor
    distances: torch.Tensor

    @classmethod
    def of(cls, latents: np.ndarray, others: np.ndarray) -> Landmarks:
        """Make landmarks of some latents, and calibrate them with the latents of other cells."""
        near = torch.from_numpy(np.ascontiguousarray(latents, dtype=np.float32))
        found = cls(near, torch.zeros(0))
        return cls(near, torch.from_numpy(np.sort(found.distance(others))))

    def distance(self, latents: np.ndarray) -> np.ndarray:
        """Mean Euclidean distance of each cell to its 15 nearest landmarks, float32, shape (n_cells,)."""
        n = min(_N_NEAREST, len(self.latents))
        cells = torch.from_numpy(np.ascontiguousarray(latents, dtype=np.float32))
        # The quick form of cdist subtracts large numbers from each other: far cells would lose their digits.
        exact = "donot_use_mm_for_euclid_dist"
        found = [
            torch.cdist(part, self.latents, compute_mode=exact).topk(n, largest=False).values.mean(1)
            for part in cells.split(_BLOCK)
        ]
        return np.asarray(torch.cat(found))

    def relative(self, distance: np.ndarray) -> np.ndarray:
        """Distance in units of the median one of the reference's other cells, shape (n_cells,)."""
        return distance / max(float(self.distances.median()), float(np.finfo(np.float32).tiny))

    def quantile(self, distance: np.ndarray) -> np.ndarray:
        """Fraction of the reference's other cells that lie nearer, shape (n_cells,); above all of them, 1."""
        place = np.searchsorted(self.distances.numpy(), distance, side="left")
        return place / len(self.distances)
