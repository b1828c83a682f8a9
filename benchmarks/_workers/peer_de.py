"""The scvi-tools side of ``de.py``: its mode "change" at its defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
import scvi
from de_common import answer_all


def prepare(adata: anndata.AnnData, job: dict[str, Any]) -> Callable[..., dict[str, np.ndarray]]:
    """Train SCVI; it knows no replicates, so that donors' cells are compared."""
    scvi.settings.seed = job["seed"]
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, gene_likelihood="nb")
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False}
    plan = {"n_epochs_kl_warmup": job["epochs"] // 2}
    model.train(max_epochs=job["epochs"], accelerator="cpu", plan_kwargs=plan, **quiet)

    def ask(column: str, sample_key: str | None) -> dict[str, np.ndarray]:
        table = model.differential_expression(
            groupby=column, group1="A", group2="B", mode="change", silent=True
        ).loc[adata.var_names]
        return {
            "lfc": table["lfc_mean"].to_numpy(),
            "score": table["proba_de"].to_numpy(),
            "called": table["is_de_fdr_0.05"].to_numpy(),
        }

    return ask


if __name__ == "__main__":
    answer_all(prepare)
