"""The pyrocell side of ``quality.py``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
from own_answers import answer

import pyrocell

Answer = dict[str, np.ndarray]


def labels(adata: anndata.AnnData, epochs: int) -> Answer:
    """Train SCVI, then SCANVI from it; tell probabilities of the labels, and SCVI's latent."""
    pyrocell.SCVI.setup_anndata(adata, batch_key="batch")
    scvi = pyrocell.SCVI(adata)
    scvi.train(epochs, lr=1e-3)  # that of scvi-tools
    model = pyrocell.SCANVI.from_scvi_model(scvi, unlabeled_category="unknown", labels_key="label")
    model.train()
    table = model.predict(soft=True)
    return {
        "probabilities": table.to_numpy(),
        "labels": np.array(table.columns, dtype=str),
        "scvi_latent": scvi.get_latent_representation(),
    }


def proteins(adata: anndata.AnnData, epochs: int) -> Answer:
    """Train TOTALVI; predict what was not measured."""
    pyrocell.TOTALVI.setup_anndata(
        adata,
        batch_key="batch",
        protein_expression_obsm_key="protein_expression",
        protein_mask_obsm_key="measured",
    )
    model = pyrocell.TOTALVI(adata)
    model.train(epochs)
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
    pyrocell.PEAKVI.setup_anndata(adata, batch_key="batch")
    model = pyrocell.PEAKVI(adata)
    model.train(epochs)
    told = model.get_normalized_accessibility(normalize_cells=True, normalize_regions=True)
    return {"seen_probability": np.asarray(told), "latent": model.get_latent_representation()}


ANSWERS: dict[str, Callable[[anndata.AnnData, int], Answer]] = {
    "SCANVI": labels,
    "TOTALVI": proteins,
    "PEAKVI": regions,
}


if __name__ == "__main__":
    answer(ANSWERS, given="epochs", told=lambda: {"cpu_seconds": time.process_time()})
