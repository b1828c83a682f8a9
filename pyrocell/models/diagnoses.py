"""The verb that looks a fit over for what may be wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from pyrocell.data.preflight import category_levels
from pyrocell.data.slots import what_there_is
from pyrocell.errors import QueryError
from pyrocell.infer import contents, diagnosis
from pyrocell.infer.criticism import PredictiveCheck
from pyrocell.infer.diagnosis import Diagnosis, Finding
from pyrocell.models.asking import Question
from pyrocell.models.assessments import Assessments
from pyrocell.models.chosen import chosen_cells

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Diagnoses"]

_N_DRAWS = 25
_FEWEST_HELD_OUT = 200


class Diagnoses(Assessments):
    """Mix-in of `CellModel`: what may be wrong with a fit."""

    def diagnose(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        batch_key: str | None = None,
        n_cells: int = 2000,
    ) -> Diagnosis:
        """Look the fit over: what may be wrong, by how much, and what to do about it.

        Whatever the model, whether the loss still falls. With a latent, whether it tells cells apart, how many of its
        dimensions do, and whether it holds the size of cells and their batch. With a likelihood, which features are
        predicted badly.

        Parameters
        ----------
        adata, indices
            Which cells; by default those that were held out of training, where there are 200 of them at least, and all
            where the model has other data than it was trained on.
        batch_key
            Column of ``adata.obs`` whose values should be mixed in the latent; by default the model's batch.
        n_cells
            At most so many of the cells are looked at, a random choice.

        Returns
        -------
        Diagnosis
            A table with a row for each check, and numbers for each latent dimension and feature; draw it with
            `pyrocell.plotting.diagnosis`.

        Raises
        ------
        NotTrainedError, QueryError
            If the model is not trained; if there is no such column or cell.
        """
        self.require_trained()
        rows = self._rows_to_diagnose(adata, indices, n_cells)
        codes, name = self._batch_of(adata, rows, batch_key)
        history = self.history["elbo_train"] if "elbo_train" in self.history else pd.Series(dtype=float)
        findings = self._convergence_of(history) if len(history) else []
        dimensions = features = None
        held: list[Finding] = []
        if self.latent_site is not None:
            mean, dimensions = self._latent_to_diagnose(adata, rows)
            findings += diagnosis.latent_findings(dimensions)
            # What a dead dimension holds is lost in its own uncertainty.
            alive = mean[:, ~dimensions["is_dead"].to_numpy(bool)]
            held = self._contents_of(alive, self._totals_of(adata, rows), codes, name)
        if self.observed_site is not None:
            check = self.posterior_predictive_check(adata, indices=rows, n_samples=_N_DRAWS)
            features, finding = diagnosis.fit_of_features(_named_apart(check), len(rows))
            findings.append(finding)
        return Diagnosis.of([*findings, *held], history, dimensions=dimensions, features=features)

    def _convergence_of(self, loss: pd.Series) -> list[Finding]:
        """Look at the last training alone: warm-up begins anew in each."""
        began = [record["first_epoch"] for record in self.trainings if record["first_epoch"] < len(loss)]
        weight = self.history.get("kl_weight")
        return [diagnosis.convergence(loss, kl_weight=weight, first_epoch=max(began, default=0))]

    def _rows_to_diagnose(
        self, adata: AnnData | None, indices: Sequence[int] | np.ndarray | None, n_cells: int
    ) -> np.ndarray:
        """Choose cells: those asked for, or those that training has not seen, in the order of the data."""
        if n_cells < 1:
            raise QueryError(f"n_cells is {n_cells}; expected at least 1.")
        held_out = self.validation_indices
        if adata is None and indices is None and len(held_out) >= _FEWEST_HELD_OUT:
            indices = held_out
        rows = chosen_cells(indices, self.require_data(adata).n_cells)
        if len(rows) > n_cells:
            rows = np.random.default_rng(self.stream.seed).choice(rows, n_cells, replace=False)
        return np.sort(rows)

    def _batch_of(
        self, adata: AnnData | None, rows: np.ndarray, batch_key: str | None
    ) -> tuple[np.ndarray | None, str]:
        """Return the batch of each cell as a number, or None where there is one batch alone, and what it is called."""
        dataset = self.require_data(adata)
        if batch_key is None:
            if self.latent_site is None or "batch" not in self.fields or self.data.size("batch") < 2:
                return None, ""
            name = self.data.setup.get(self.fields["batch"].argument) or "batch"
            return dataset.cells(rows).batch.numpy(), str(name)
        if self.latent_site is None:
            raise QueryError(
                f"{type(self).__name__} has no latent that could hold {batch_key!r}; leave batch_key out."
            )
        obs = dataset.obs
        if batch_key not in obs:
            raise QueryError(f"batch_key={batch_key!r} is no column.{what_there_is(batch_key, list(obs))}")
        return category_levels(obs[batch_key], f"adata.obs[{batch_key!r}]")[1][rows], batch_key

    def _latent_to_diagnose(self, adata: AnnData | None, rows: np.ndarray) -> tuple[np.ndarray, pd.DataFrame]:
        """Return the mean latent of each cell, and what is explained of each dimension."""
        site, question = str(self.latent_site), Question(self, adata, rows)
        with self.asking():
            moments = question.latent_moments(site)
        if moments is not None:
            return moments[0], diagnosis.explained_shares(*moments)
        draws = self.posterior(site, adata, indices=rows, n_samples=_N_DRAWS, return_mean=False)
        mean, variance = draws.mean(0), draws.var(0, ddof=1)
        return mean, diagnosis.explained_shares(mean, variance, n_samples=_N_DRAWS)

    def _totals_of(self, adata: AnnData | None, rows: np.ndarray) -> np.ndarray:
        """Return the total of each cell over the features that the model explains first."""
        blocks = Question(self, adata, rows).blocks()
        totals = [getattr(cells, self.feature_field).sum(-1, dtype=torch.float64) for _, cells in blocks]
        return np.asarray(torch.cat(totals).cpu())

    def _contents_of(
        self, latents: np.ndarray, totals: np.ndarray, codes: np.ndarray | None, name: str
    ) -> list[Finding]:
        """Say what the latent holds besides what is meant."""
        given = {column for column in self.data.setup.values() if isinstance(column, str)}
        listed = [columns for columns in self.data.setup.values() if isinstance(columns, list | tuple)]
        is_known = name in given.union(*listed)
        size_is_given = self.data.setup.get("size_factor_key") is not None
        found = [contents.size_finding(latents, totals, size_is_given=size_is_given)]
        if codes is not None:
            found.append(contents.batch_finding(latents, codes, name, is_known=is_known))
        return found


def _named_apart(check: PredictiveCheck) -> pd.DataFrame:
    """Return the features of a check; those of several fields with the same name say which field is meant."""
    if not check.parts or check.features.index.is_unique:
        return check.features
    names = [f"{name} ({field})" for field, part in check.parts.items() for name in part.features.index]
    return check.features.set_axis(names)
