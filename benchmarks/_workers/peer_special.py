"""The scvi-tools side of ``special.py``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scvi
import scvi.external
import torch
from common import SMALL_SCBASSET
from peer_answers import QUIET, answer
from scipy import sparse

Answer = dict[str, np.ndarray]
Options = dict[str, Any]
training_seconds = 0.0


def _train(model: Any, epochs: int, **options: Any) -> None:
    """Train, and count the processor seconds."""
    global training_seconds
    start = time.process_time()
    model.train(max_epochs=epochs, **options)
    training_seconds += time.process_time() - start


def types(adata: anndata.AnnData, options: Options) -> Answer:
    """Tell types from markers, with the defaults of its training."""
    markers = adata.uns[options.get("markers", "markers")]
    adata.obs["size"] *= options["mean_size"]
    seen = adata[:, markers.index].copy()
    seen.X = np.asarray(seen.X.todense(), dtype=np.float32)
    scvi.external.CellAssign.setup_anndata(seen, size_factor_key="size")
    model = scvi.external.CellAssign(seen, markers)
    _train(model, 400, **QUIET)
    return {"probabilities": model.predict().to_numpy(), "types": np.array(markers.columns, dtype=str)}


def spots(adata: anndata.AnnData, options: Options) -> Answer:
    """Fit the reference, then the spots."""
    table = adata.uns["spots"]
    scvi.external.RNAStereoscope.setup_anndata(adata, labels_key="cell_type")
    reference = scvi.external.RNAStereoscope(adata)
    _train(reference, options["reference_epochs"], lr=options.get("reference_lr", 0.01), **QUIET)
    of_spots = anndata.AnnData(sparse.csr_matrix(table.to_numpy()))
    of_spots.obs_names, of_spots.var_names = table.index, table.columns
    scvi.external.SpatialStereoscope.setup_anndata(of_spots)
    model = scvi.external.SpatialStereoscope.from_rna_model(of_spots, reference)
    _train(model, options["epochs"], lr=options.get("lr", 0.01), **QUIET)
    told = model.get_proportions()
    return {"proportions": told.to_numpy(), "types": np.array(told.columns, dtype=str)}


def cell_map(adata: anndata.AnnData, options: Options) -> Answer:
    """Lay the cells, scaled to one depth over the shared genes, onto the spots; it needs JAX."""
    import mudata

    table, whole = adata.uns["spots"], adata.X.toarray()
    totals = adata[:, table.columns].X.sum(1)
    scaled = whole * (np.asarray(totals).mean() / np.asarray(totals))
    cells = anndata.AnnData(scaled, obs=adata.obs.copy(), var=adata.var.copy())[:, table.columns].copy()
    of_spots = anndata.AnnData(
        table.to_numpy(), pd.DataFrame(index=table.index), pd.DataFrame(index=table.columns)
    )
    of_spots.obs["density"] = table.sum(1) / table.to_numpy().sum()
    both = mudata.MuData({"cells": cells, "spots": of_spots})
    modalities = {"density_prior_key": "spots", "sc_layer": "cells", "sp_layer": "spots"}
    scvi.external.Tangram.setup_mudata(both, density_prior_key="density", modalities=modalities)
    model = scvi.external.Tangram(both)
    _train(model, options["epochs"], plan_kwargs=options.get("plan"))
    mapping = np.asarray(model.get_mapper_matrix())
    mapping = mapping if mapping.shape[0] == adata.n_obs else mapping.T
    names, code = np.unique(adata.obs["cell_type"].astype(str), return_inverse=True)
    return {
        "genes": mapping.T @ scaled,
        "cell_types": mapping.T @ np.eye(len(names))[code],
        "names": names.astype(str),
    }


def velocity(adata: anndata.AnnData, options: Options) -> Answer:
    """Fit the kinetics of layers scaled from 0 to 1, as its documentation asks."""
    scvi.external.VELOVI.setup_anndata(adata, spliced_layer="Ms_scaled", unspliced_layer="Mu_scaled")
    model = scvi.external.VELOVI(adata)
    plan = {"n_epochs_kl_warmup": options["epochs"] // 2}
    _train(model, options["epochs"], early_stopping=False, plan_kwargs=plan, **QUIET)
    asked: Any = {"n_samples": options["n_samples"], "return_numpy": True}
    spliced, unspliced = model.get_expression_fit(**asked)
    return {
        "velocity": model.get_velocity(**asked),
        "time": model.get_latent_time(**asked),
        "permutation": model.get_permutation_scores(labels_key="cell_type")[0].to_numpy(),
        "fit_spliced": spliced,
        "fit_unspliced": unspliced,
    }


def dna(adata: anndata.AnnData, options: Options) -> Answer:
    """Learn from the peaks that are not held out; predictions and activities come from its network itself."""
    codes = adata.varm["dna_code"].astype(int)
    held = adata.var["held_out"].to_numpy()
    adata.varm["dna_code"] = pd.DataFrame(codes, index=adata.var_names)
    peaks = adata[:, ~held].copy().transpose().copy()
    peaks.layers["open"] = peaks.X.copy()
    scvi.external.SCBASSET.setup_anndata(peaks, layer="open", dna_code_key="dna_code")
    model = scvi.external.SCBASSET(peaks, **SMALL_SCBASSET)
    _train(
        model,
        options["epochs"],
        train_size=1.0,
        batch_size=64,
        early_stopping=False,
        check_val_every_n_epoch=None,
        **QUIET,
    )
    module = model.module.eval()

    @torch.no_grad()
    def logits(sequences: np.ndarray) -> np.ndarray:
        told = module.inference(torch.as_tensor(sequences).long())
        found: np.ndarray = module.generative(told["region_embedding"])["reconstruction_logits"].numpy()
        return found

    background = np.asarray(adata.uns["background"]).astype(int)
    before, activity = logits(background), []
    for site in map(str, adata.uns["sites"]):
        changed, start = background.copy(), (background.shape[1] - len(site)) // 2
        changed[:, start : start + len(site)] = ["ACGT".index(base) for base in site]
        activity.append((logits(changed) - before).mean(0))
    latent = np.asarray(model.get_latent_representation())
    return {
        "chance": 1 / (1 + np.exp(-logits(codes[held]))),
        "latent": latent if latent.shape[0] == adata.n_obs else latent.T,
        "bias": np.asarray(model.get_cell_bias()).ravel(),
        "activity": np.array(activity).T,
    }


ANSWERS: dict[str, Callable[[anndata.AnnData, Options], Answer]] = {
    "CellAssign": types,
    "SpatialStereoscope": spots,
    "Tangram": cell_map,
    "VELOVI": velocity,
    "SCBASSET": dna,
}


if __name__ == "__main__":
    answer(ANSWERS, given="options", told=lambda: {"training_seconds": training_seconds})
