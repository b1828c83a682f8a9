"""The scvi-tools side of ``models.py``, with nothing switched on that costs time."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import anndata
import lightning.pytorch
import pandas as pd
import scvi
import scvi.external
from common import RESULT, SIZES, marker_table, seconds_of_steps
from peer_common import prepare

warnings.filterwarnings("ignore")


class StopWatch(lightning.pytorch.Callback):
    """Seconds of each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.start)


QUIET = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}


def _set_up(name: str, adata: anndata.AnnData) -> Any:
    if name == "SpatialStereoscope":
        return _spots(adata)
    if name == "Tangram":
        return _cells_and_spots(adata)
    model_class = getattr(scvi.model, name, None) or getattr(scvi.external, name)
    arguments: dict[str, Any] = {"batch_key": "batch"}
    if name == "VELOVI":
        arguments = {"spliced_layer": "Ms", "unspliced_layer": "Mu"}
    if name == "SCANVI":
        arguments |= {"labels_key": "label", "unlabeled_category": "unknown"}
    if name == "TOTALVI":
        arguments |= {"protein_expression_obsm_key": "protein_expression"}
    if name == "RNAStereoscope":
        arguments = {"labels_key": "group"}
    if name == "SCBASSET":  # it wants the data the other way round
        adata, arguments = adata.transpose(), arguments | {"dna_code_key": "dna_code"}
    tables = marker_table(name, adata)
    if tables:
        arguments |= {"size_factor_key": "size"}
        adata = adata[:, tables[0].index].copy()
        adata.X = adata.X.toarray()
    model_class.setup_anndata(adata, **arguments)
    return model_class(adata, *tables, **SIZES.get(name, {}))


def _spots(adata: anndata.AnnData) -> Any:
    """Take the cells for spots, after one epoch of the first stage."""
    reference = _set_up("RNAStereoscope", adata.copy())
    reference.train(1, accelerator="cpu", logger=False, **QUIET)
    scvi.external.SpatialStereoscope.setup_anndata(adata)
    return scvi.external.SpatialStereoscope.from_rna_model(adata, reference)


def _cells_and_spots(adata: anndata.AnnData) -> Any:
    """Set up both modalities; this model needs JAX."""
    import mudata

    table = adata.uns["spots"]
    spots = anndata.AnnData(
        table.to_numpy(), pd.DataFrame(index=table.index), pd.DataFrame(index=table.columns)
    )
    spots.obs["density"] = table.sum(1) / table.to_numpy().sum()
    both = mudata.MuData({"cells": adata.copy(), "spots": spots})
    modalities = {"density_prior_key": "spots", "sc_layer": "cells", "sp_layer": "spots"}
    scvi.external.Tangram.setup_mudata(both, density_prior_key="density", modalities=modalities)
    return scvi.external.Tangram(both)


def _options(name: str) -> dict[str, Any]:
    """Switch off what costs time within an epoch; both stages of Stereoscope train on all cells."""
    if "Stereoscope" in name:
        return {"logger": False} | ({"train_size": 1.0} if name == "RNAStereoscope" else {})
    return {
        "train_size": 0.9,
        "early_stopping": False,
        "logger": None if name == "TOTALVI" else False,  # its watcher of the learning rate wants one
        # TOTALVI would score the validation cells within each epoch that is timed
        "plan_kwargs": None if name == "CellAssign" else {"reduce_lr_on_plateau": False},
    }


def main() -> None:
    """Train, and print the seconds of each epoch."""
    job = json.loads(Path(sys.argv[1]).read_text())
    prepare(job["threads"], job["seed"])
    adata = anndata.read_h5ad(job["data"])
    print(RESULT + json.dumps({"epoch_seconds": _epoch_seconds(adata, job)}), flush=True)


def _epoch_seconds(adata: anndata.AnnData, job: dict[str, Any]) -> list[float]:
    if job["model"] == "Tangram":
        return seconds_of_steps(lambda: _set_up("Tangram", adata))
    model, watch = _set_up(job["model"], adata), StopWatch()
    model.train(
        max_epochs=job["epochs"],
        accelerator="cpu",
        batch_size=job["batch_size"],
        check_val_every_n_epoch=None,
        callbacks=[watch],
        **QUIET,
        **_options(job["model"]),
    )
    return watch.seconds


if __name__ == "__main__":
    main()
