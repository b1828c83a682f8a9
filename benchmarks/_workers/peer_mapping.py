"""The scvi-tools side of ``mapping.py``."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scvi
from common import RESULT
from peer_common import prepare

warnings.filterwarnings("ignore")


def main() -> None:
    """Train a reference, map the query, and write the latents."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    prepare(job["threads"], job["seed"])
    adata = anndata.read_h5ad(job["data"])
    is_query = adata.obs["is_query"].to_numpy()

    def train(model: Any, **plan: float) -> None:
        model.train(
            max_epochs=job["epochs"],
            accelerator="cpu",
            enable_progress_bar=False,
            enable_checkpointing=False,
            logger=False,
            plan_kwargs={"lr": job["lr"], "n_epochs_kl_warmup": job["epochs"] // 2, **plan},
        )

    cells, query = adata[~is_query].copy(), adata[is_query].copy()
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    reference = scvi.model.SCVI(cells, gene_likelihood="nb", encode_covariates=job["encode_covariates"])
    train(reference)
    latents = {"reference": reference.get_latent_representation()}
    mapped = scvi.model.SCVI.load_query_data(query, reference)
    train(mapped, weight_decay=0.0)
    latents["query"] = mapped.get_latent_representation()
    moved = np.abs(mapped.get_latent_representation(cells) - latents["reference"]).max()
    np.savez(job["out"], **latents)
    print(RESULT + json.dumps({"cpu_seconds": time.process_time(), "moved": float(moved)}), flush=True)


if __name__ == "__main__":
    main()
