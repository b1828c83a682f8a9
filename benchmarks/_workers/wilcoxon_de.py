"""The rank test of scanpy for ``de.py``: cells are replicates, Benjamini-Hochberg at 5 %."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
import scanpy
from de_common import answer_all


def prepare(adata: anndata.AnnData, job: dict[str, Any]) -> Callable[..., dict[str, np.ndarray]]:
    """Scale cells to 10,000 counts and take logs."""
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)

    def ask(column: str, sample_key: str | None) -> dict[str, np.ndarray]:
        cells = adata[adata.obs[column].isin(["A", "B"])].copy()
        cells.obs[column] = cells.obs[column].astype(str).astype("category")
        scanpy.tl.rank_genes_groups(cells, column, groups=["A"], reference="B", method="wilcoxon")
        table = scanpy.get.rank_genes_groups_df(cells, "A").set_index("names").loc[adata.var_names]
        return {
            "lfc": table["logfoldchanges"].to_numpy(),
            "score": np.abs(table["scores"].to_numpy()),
            "called": (table["pvals_adj"] <= 0.05).to_numpy(),
        }

    return ask


if __name__ == "__main__":
    answer_all(prepare)
