"""The verb that says how far cells lie outside of what a model was fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pyrocell.errors import DataError, QueryError
from pyrocell.infer.landmarks import Landmarks
from pyrocell.models.queries import Queries
from pyrocell.models.roles import needs

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Novelty", "find_landmarks"]

_MOST_LANDMARKS = 5000
_MOST_OTHERS = 2000
_N_DRAWS = 100  # where the mean of the latent has no closed form


class Novelty(Queries):
    """Mix-in of `CellModel`: cells unlike those of the reference."""

    @needs("latent_site", "guide")
    def get_novelty(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Say how far each cell lies from the cells of the reference, in the latent space.

        The distance is the mean to the 15 nearest of up to 5,000 cells that the reference was trained on. It is
        compared with the distances of cells that it was not trained on, its validation cells: those are as far as new
        cells of known kinds are (where there are none, a fifth of the training cells stands for them). For a model that
        is no query, the reference is the model itself; its own training cells are then among their neighbours, and lie
        nearer than new cells would.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.

        Returns
        -------
        DataFrame
            For each cell: ``distance``, in units of the median distance of the reference's validation cells, and
            ``quantile``, the fraction of these which lie nearer, 0 to 1. Of cells like those of the reference 5 % have
            a quantile above 0.95; a cluster in which most have one is not in the reference, or maps badly.

        Raises
        ------
        QueryError
            If the model has kept nothing of its reference: it was saved without data.
        """
        latents = self._latents(adata, indices, batch_size)
        landmarks = self.landmarks or find_landmarks(self)
        if landmarks is None and self.mapping is not None and not self.mapping["frozen"]:
            raise QueryError(
                "This query was mapped with frozen=False, so that its latent space is another than the reference's. "
                "Map it with frozen=True to ask how far its cells lie from those of the reference."
            )
        if landmarks is None:
            raise QueryError(
                "Nothing is known of the cells that the reference was trained on: it was saved without its data. Load "
                "the reference with its data, and map or save it again."
            )
        distance = landmarks.distance(latents)
        names = self.require_data(adata).obs_names
        return pd.DataFrame(
            {
                "distance": landmarks.relative(distance),
                "quantile": landmarks.quantile(distance),
            },
            index=names if indices is None else names[np.asarray(indices)],
        )

    def _latents(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | np.ndarray | None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Return the latent of each cell as the guide sees it, shape (n_cells, n_latent)."""
        return np.asarray(
            self.get_latent_representation(adata, indices=indices, n_samples=_N_DRAWS, batch_size=batch_size)
        )


def find_landmarks(model: Novelty) -> Landmarks | None:
    """Choose landmarks among the cells that a model was trained on; None if it has none, or no latent to measure in.

    Without validation cells, other training cells stand for them.
    """
    if model.landmarks is not None:
        return model.landmarks
    if not hasattr(model, "get_novelty") or not model.is_trained or model.dataset is None:
        return None
    other = not len(model.train_indices) or model.dataset.n_cells != model.data.n_cells
    if model.mapping is not None or other:
        return None  # these are not the cells of the reference
    try:
        model.require_data(None)
    except DataError:  # they have changed since: nothing can be learned from them
        return None
    training, others = _chosen(model, model.train_indices), _chosen(model, model.validation_indices)
    if len(others) < 2:
        cut = max(1, len(training) // 5)
        training, others = training[cut:], training[:cut]
    latents = model._latents(None, training[:_MOST_LANDMARKS])
    model.landmarks = Landmarks.of(latents, model._latents(None, others[:_MOST_OTHERS]))
    return model.landmarks


def _chosen(model: Novelty, rows: np.ndarray) -> np.ndarray:
    """Put rows in a random order, always the same one."""
    return np.random.default_rng(model.stream.seed).permutation(rows)
