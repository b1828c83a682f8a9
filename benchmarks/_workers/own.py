"""The pyrocell side: runs in the environment that the driver itself runs in."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import anndata
import numpy as np
from common import Job, main


class Own:
    """Pyrocell with the options of the job."""

    def __init__(self, job: Job) -> None:
        import torch

        import pyrocell

        torch.set_num_threads(job.threads)
        pyrocell.settings.progress = False
        pyrocell.settings.device = "cpu"
        pyrocell.settings.seed = job.seed
        self._pyrocell = pyrocell
        # Imported lazily: here, so that the import does not count as the model's memory.
        self._model_class = pyrocell.SCVI

    def versions(self) -> dict[str, str]:
        """Versions of what decides the timing."""
        found = {name: version(name) for name in ("torch", "pyro-ppl", "numpy", "anndata")}
        try:
            return {"pyrocell": version("pyrocell"), **found}
        except PackageNotFoundError:
            return {"pyrocell": "not installed (run from the source tree)", **found}

    def build(self, adata: anndata.AnnData, job: Job) -> None:
        """Set up the data and make the model."""
        self._model_class.setup_anndata(adata, batch_key="batch")
        self._model = self._model_class(
            adata,
            gene_likelihood=job.gene_likelihood,
            dispersion=job.dispersion,
            n_latent=job.n_latent,
            n_hidden=job.n_hidden,
            n_layers=job.n_layers,
        )

    def train(self, train: np.ndarray, validation: np.ndarray, job: Job) -> list[float]:
        """Fit on the given cells, without validation."""
        plan = self._pyrocell.TrainingPlan(train_indices=train, validation_indices=validation)
        self._model.train(
            max_epochs=job.epochs,
            lr=1e-3,  # that of scvi-tools, for all steps
            n_epochs_kl_warmup=job.warmup,
            batch_size=job.batch_size,
            plan=plan,
        )
        return [float(seconds) for seconds in self._model.history["seconds"]]

    def latent(self) -> Any:
        """Posterior means."""
        return self._model.get_latent_representation()

    def expression(self, genes: list[str] | None = None) -> Any:
        """Normalised expression of all genes or of those named."""
        return self._model.get_normalized_expression(gene_list=genes)

    def differential(self) -> Any:
        """Every group against the rest."""
        return self._model.differential_expression(groupby="group", mode="change")

    def population_differential(self) -> Any:
        """Every group against the rest, of means of groups: the default here, which the other side does not know."""
        return self._model.differential_expression(groupby="group")

    def elbo(self, rows: np.ndarray) -> float:
        """Mean bound per cell."""
        return float(self._model.get_elbo(indices=rows))

    def latent_moments(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and variances of q(z|x)."""
        mean, variance = self._model.get_latent_representation(indices=rows, return_dist=True)
        return mean, variance

    def count_parameters(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and inverse dispersion at one draw of z."""
        found = self._model.get_likelihood_parameters(indices=rows)
        return found["mean"], found["theta"]


if __name__ == "__main__":
    main(Own)
