"""The scvi-tools side of ``quality.py``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
import scvi
from peer_answers import QUIET, answer

Answer = dict[str, np.ndarray]


def labels(adata: anndata.AnnData, epochs: int) -> Answer:
    """Train SCVI, then SCANVI from it; tell probabilities of the labels, and SCVI's latent."""
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    first = scvi.model.SCVI(adata)
    plan = {"n_epochs_kl_warmup": epochs // 2}
    first.train(max_epochs=epochs, plan_kwargs=plan, **QUIET)
    model = scvi.model.SCANVI.from_scvi_model(first, unlabeled_category="unknown", labels_key="label")
    model.train(**QUIET)
    table = model.predict(soft=True)
    return {
        "probabilities": table.to_numpy(),
        "labels": np.array(table.columns, dtype=str),
        "scvi_latent": first.get_latent_representation(),
    }


def proteins(adata: anndata.AnnData, epochs: int) -> Answer:
    """Train TOTALVI; predict what was not measured. It takes a batch of zeros for one without proteins."""
    scvi.model.TOTALVI.setup_anndata(
        adata, batch_key="batch", protein_expression_obsm_key="protein_expression"
    )
    model = scvi.model.TOTALVI(adata)
    model.train(max_epochs=epochs, plan_kwargs={"n_epochs_kl_warmup": epochs // 2}, **QUIET)
    _, draws = model.get_normalized_expression(
        n_samples=25, transform_batch="seen", include_protein_background=True, return_mean=False
    )
    return {"log_proteins": _mean_log(draws), "latent": model.get_latent_representation()}


def _mean_log(draws: Any) -> np.ndarray:
    """Mean of log1p over the 25 draws, which lie along the first axis or the last one."""
    values = np.log1p(np.asarray(draws))
    return values.mean(0 if values.shape[0] == 25 else -1)


def regions(adata: anndata.AnnData, epochs: int) -> Answer:
    """Train PEAKVI; tell the probability that each region is seen open."""
    scvi.model.PEAKVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.PEAKVI(adata)
    model.train(max_epochs=epochs, **QUIET)
    told = model.get_normalized_accessibility(normalize_cells=True, normalize_regions=True)
    return {"seen_probability": np.asarray(told), "latent": model.get_latent_representation()}


ANSWERS: dict[str, Callable[[anndata.AnnData, int], Answer]] = {
    "SCANVI": labels,
    "TOTALVI": proteins,
    "PEAKVI": regions,
}


if __name__ == "__main__":
    answer(ANSWERS, given="epochs", told=lambda: {"cpu_seconds": time.process_time()})
