"""The pyrocell side of ``mapping.py``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from common import RESULT

import pyrocell


def main() -> None:
    """Train a reference, map the query, and on request train on all cells; write the latents."""
    import torch

    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    pyrocell.settings.progress = False
    pyrocell.settings.device = "cpu"
    pyrocell.settings.seed = job["seed"]
    adata = anndata.read_h5ad(job["data"])
    is_query = adata.obs["is_query"].to_numpy()

    def fitted(cells: anndata.AnnData) -> pyrocell.SCVI:
        pyrocell.SCVI.setup_anndata(cells, batch_key="batch")
        model = pyrocell.SCVI(cells, gene_likelihood="nb", encode_covariates=job["encode_covariates"])
        model.train(job["epochs"], lr=job["lr"])
        return model

    cells, query = adata[~is_query].copy(), adata[is_query].copy()
    reference = fitted(cells)
    latents = {"reference": reference.get_latent_representation()}
    mapped = pyrocell.SCVI.load_query_data(query, reference)
    mapped.train(job["epochs"], lr=job["lr"])
    latents["query"] = mapped.get_latent_representation()
    moved = np.abs(mapped.get_latent_representation(cells) - latents["reference"]).max()
    found = {"cpu_seconds": time.process_time(), "moved": float(moved)}
    latents |= {name: column.to_numpy() for name, column in mapped.get_novelty().items()}
    if job["joint"]:
        latents["joint"] = fitted(adata).get_latent_representation()
    np.savez(job["out"], **latents)
    print(RESULT + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
