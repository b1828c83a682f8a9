"""pydeseq2 for ``de.py``: a negative-binomial test of the summed counts of each donor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
import pandas as pd
from de_common import answer_all
from pydeseq2.dds import DeseqDataSet
from pydeseq2.ds import DeseqStats


def prepare(adata: anndata.AnnData, job: dict[str, Any]) -> Callable[..., dict[str, np.ndarray]]:
    """Nothing to fit before a question."""

    def ask(column: str, sample_key: str | None) -> dict[str, np.ndarray]:
        if sample_key is None:  # without donors there is nothing that it could compare
            nothing = np.zeros(adata.n_vars)
            return {"lfc": nothing, "score": nothing, "called": nothing.astype(bool)}
        cells = adata[adata.obs[column].isin(["A", "B"])]
        unit = cells.obs[sample_key].astype(str) + "_" + cells.obs[column].astype(str)
        sums = pd.DataFrame(cells.X.toarray(), index=unit.to_numpy(), columns=adata.var_names)
        counts = sums.groupby(level=0).sum().astype(int)
        groups = [name.rsplit("_", 1) for name in counts.index]
        about = pd.DataFrame(groups, index=counts.index, columns=["donor", "group"])
        paired = about["donor"].duplicated().any()
        counts = counts.loc[:, counts.sum() >= 10]
        data = DeseqDataSet(
            counts=counts, metadata=about, design="~ donor + group" if paired else "~ group", quiet=True
        )
        data.deseq2()
        test = DeseqStats(data, contrast=["group", "A", "B"], alpha=0.05, quiet=True)
        test.summary()
        table = test.results_df.reindex(adata.var_names)
        return {
            "lfc": table["log2FoldChange"].fillna(0).to_numpy(),
            "score": table["stat"].abs().fillna(0).to_numpy(),
            "called": (table["padj"] <= 0.05).to_numpy(),
        }

    return ask


if __name__ == "__main__":
    answer_all(prepare)
