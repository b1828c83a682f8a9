"""The pyrocell side of ``de.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
from de_common import answer_all

import pyrocell


def prepare(adata: anndata.AnnData, job: dict[str, Any]) -> Callable[..., dict[str, np.ndarray]]:
    """Train SCVI; compare the means of groups, between donors where the question has them."""
    pyrocell.settings.progress, pyrocell.settings.seed = False, job["seed"]
    pyrocell.SCVI.setup_anndata(adata)
    model = pyrocell.SCVI(adata, gene_likelihood="nb")
    model.train(job["epochs"], lr=1e-3)  # that of scvi-tools

    def ask(column: str, sample_key: str | None) -> dict[str, np.ndarray]:
        options = pyrocell.DifferentialOptions(sample_key=sample_key)
        table = model.differential_expression(groupby=column, group1="A", group2="B", options=options)
        table = table.loc[adata.var_names]
        return {
            "lfc": table["lfc_mean"].fillna(0).to_numpy(),
            "estimate": table["lfc_estimate"].fillna(0).to_numpy(),
            "score": np.log(table["proba_de"].to_numpy() + 1e-300)
            - np.log(table["lfsr"].to_numpy() + 1e-300),
            "called": table["is_de_fdr_0.05"].to_numpy(),
            "low": table["lfc_low"].to_numpy(),
            "high": table["lfc_high"].to_numpy(),
            # the order of the table: the smallest effect in the interval
            "order": np.maximum(np.maximum(table["lfc_low"], -table["lfc_high"]), 0).fillna(0).to_numpy(),
        }

    return ask


if __name__ == "__main__":
    answer_all(prepare)
