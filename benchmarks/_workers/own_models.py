"""The pyrocell side of ``models.py``."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
from common import RESULT, SIZES, marker_table, seconds_of_steps

import pyrocell


def _set_up(name: str, adata: anndata.AnnData) -> Any:
    if name == "SpatialStereoscope":
        return _spots(adata)
    if name == "Tangram":
        pyrocell.Tangram.setup_anndata(adata)
        return pyrocell.Tangram(adata, adata.uns["spots"])
    model_class = getattr(pyrocell, name)
    arguments: dict[str, Any] = {"batch_key": "batch"}
    if name == "VELOVI":
        arguments = {"spliced_layer": "Ms", "unspliced_layer": "Mu"}
    if name == "SCANVI":
        arguments |= {"labels_key": "label", "unlabeled_category": "unknown"}
    if name == "TOTALVI":
        arguments |= {"protein_expression_obsm_key": "protein_expression"}
    if name == "CellAssign":
        arguments |= {"size_factor_key": "size"}
    if name == "RNAStereoscope":
        arguments = {"labels_key": "group"}
    model_class.setup_anndata(adata, **arguments)
    return model_class(adata, *marker_table(name, adata), **SIZES.get(name, {}))


def _spots(adata: anndata.AnnData) -> Any:
    """Take the cells for spots, after one epoch of the first stage."""
    reference = _set_up("RNAStereoscope", adata.copy())
    reference.train(1)
    pyrocell.SpatialStereoscope.setup_anndata(adata)
    return pyrocell.SpatialStereoscope.from_rna_model(adata, reference)


def main() -> None:
    """Train, and print the seconds of each epoch."""
    import torch

    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    pyrocell.settings.progress = False
    pyrocell.settings.device = "cpu"
    pyrocell.settings.seed = job["seed"]
    adata = anndata.read_h5ad(job["data"])
    print(RESULT + json.dumps({"epoch_seconds": _epoch_seconds(adata, job)}), flush=True)


def _epoch_seconds(adata: anndata.AnnData, job: dict[str, Any]) -> list[float]:
    if job["model"] == "Tangram":
        return seconds_of_steps(lambda: _set_up("Tangram", adata))
    model = _set_up(job["model"], adata)
    # No learning-rate plateau, which needs a validation in each epoch.
    plan = replace(model.default_plan, lr_plateau=False)
    model.train(job["epochs"], batch_size=job["batch_size"], early_stopping=False, plan=plan)
    return [float(s) for s in model.history["seconds"]]


if __name__ == "__main__":
    main()
