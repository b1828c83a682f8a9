"""The pyrocell side of ``memory.py``: what each query adds to the memory of the process, one after the other."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from common import RESULT, Meter, release

import pyrocell

N_TRAIN = 2000
"""Cells that the model is trained on: the queries need a trained model, not a good one."""


def queries(model: Any, adata: anndata.AnnData, folder: Path) -> dict[str, Callable[[], Any]]:
    """Name the queries; ``folder`` is for those that write their result to a file."""
    genes = list(adata.var_names[:10])
    return {
        "latent": model.get_latent_representation,
        "latent, into zarr": lambda: model.get_latent_representation(out=folder / "latent.zarr"),
        "expression of 10 genes": lambda: model.get_normalized_expression(gene_list=genes),
        "expression, into zarr": lambda: model.get_normalized_expression(out=folder / "expression.zarr"),
        "DE, means of groups": lambda: model.differential_expression(groupby="group"),
        "DE, change": lambda: model.differential_expression(groupby="group", mode="change"),
    }


def main() -> None:
    """Train on some cells, then ask everything of all."""
    import torch

    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    pyrocell.settings.progress, pyrocell.settings.device = False, "cpu"
    adata = anndata.read_h5ad(job["data"])
    pyrocell.SCVI.setup_anndata(adata, batch_key="batch")
    model = pyrocell.SCVI(adata, gene_likelihood="nb")
    rows = np.arange(min(N_TRAIN, adata.n_obs - 1))
    model.train(1, plan=pyrocell.TrainingPlan(train_indices=rows))
    meter, growth = Meter(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, ask in queries(model, adata, Path(folder)).items():
            before = release()
            meter.run(name, ask)
            growth[name] = meter.peaks[name] - before
    told = {
        "growth_bytes": growth,
        "n_genes": adata.n_vars,
        "seconds": meter.seconds,
        "errors": meter.errors,
    }
    print(RESULT + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
