"""The scvi-tools side: runs in the environment that the driver made for it."""

from __future__ import annotations

import time
import warnings
from importlib.metadata import version
from typing import Any

import anndata
import numpy as np
from common import Job, main

warnings.filterwarnings("ignore")


class Peer:
    """scvi-tools with the options of the job, and nothing switched on that costs time."""

    def __init__(self, job: Job) -> None:
        import lightning.pytorch
        import scvi
        from peer_common import prepare

        prepare(job.threads, job.seed)
        self._callback = lightning.pytorch.Callback
        self._scvi = scvi

    def versions(self) -> dict[str, str]:
        """Versions of what decides the timing."""
        return {name: version(name) for name in ("scvi-tools", "torch", "lightning", "numpy", "anndata")}

    def build(self, adata: anndata.AnnData, job: Job) -> None:
        """Set up the data and make the model."""
        self._scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
        self._model = self._scvi.model.SCVI(
            adata,
            gene_likelihood=job.gene_likelihood,
            dispersion=job.dispersion,
            n_latent=job.n_latent,
            n_hidden=job.n_hidden,
            n_layers=job.n_layers,
        )

    def _stop_watch(self, seconds: list[float]) -> Any:
        class StopWatch(self._callback):  # type: ignore[name-defined,misc]
            def on_train_epoch_start(self, *_: Any) -> None:
                self.start = time.perf_counter()

            def on_train_epoch_end(self, *_: Any) -> None:
                seconds.append(time.perf_counter() - self.start)

        return StopWatch()

    def train(self, train: np.ndarray, validation: np.ndarray, job: Job) -> list[float]:
        """Fit without validation, checkpoints, logger or progress bar."""
        seconds: list[float] = []
        self._model.train(
            max_epochs=job.epochs,
            accelerator="cpu",
            batch_size=job.batch_size,
            early_stopping=False,
            check_val_every_n_epoch=None,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            logger=False,
            callbacks=[self._stop_watch(seconds)],
            plan_kwargs={"n_epochs_kl_warmup": job.warmup},
            datasplitter_kwargs={"external_indexing": [train, validation]},
        )
        self._model.module.eval()
        return seconds

    def latent(self) -> Any:
        """Posterior means."""
        return self._model.get_latent_representation()

    def expression(self, genes: list[str] | None = None) -> Any:
        """Normalised expression of all genes or of those named."""
        return self._model.get_normalized_expression(gene_list=genes)

    def differential(self) -> Any:
        """Each group in turn against the rest."""
        return self._model.differential_expression(groupby="group", mode="change", silent=True)

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
        return found["mean"], found["dispersions"]


if __name__ == "__main__":
    main(Peer)
