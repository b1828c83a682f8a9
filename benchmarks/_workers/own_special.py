"""The pyrocell side of ``special.py``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from common import SMALL_SCBASSET
from own_answers import answer

import pyrocell

Answer = dict[str, np.ndarray]
Options = dict[str, Any]
training_seconds = 0.0


def _train(model: Any, epochs: int | None = None, **options: Any) -> None:
    """Train, and count the processor seconds."""
    global training_seconds
    start = time.process_time()
    model.train(epochs, **options)
    training_seconds += time.process_time() - start


def types(adata: anndata.AnnData, options: Options) -> Answer:
    """Tell types from markers; without sizes, unless a mean size is asked for."""
    markers = adata.uns[options.pop("markers", "markers")]
    mean_size, setup = options.pop("mean_size", None), {}
    if mean_size is not None:
        adata.obs["size"] *= mean_size
        setup = {"size_factor_key": "size"}
    pyrocell.CellAssign.setup_anndata(adata, **setup)
    model = pyrocell.CellAssign(adata, markers, **options)
    _train(model)
    table = model.predict()
    effects = model.get_marker_effects()
    return {
        "probabilities": table.to_numpy(),
        "types": np.array(table.columns, dtype=str),
        "effects": effects.to_numpy(),
        "genes": np.array(effects.index, dtype=str),
    }


def spots(adata: anndata.AnnData, options: Options) -> Answer:
    """Fit the reference, then the spots."""
    table = adata.uns["spots"]
    pyrocell.RNAStereoscope.setup_anndata(adata, labels_key="cell_type")
    reference = pyrocell.RNAStereoscope(adata)
    _train(reference, options["reference_epochs"])
    of_spots = anndata.AnnData(table)
    pyrocell.SpatialStereoscope.setup_anndata(of_spots)
    model = pyrocell.SpatialStereoscope.from_rna_model(of_spots, reference)
    _train(model, options["epochs"])
    told = model.get_proportions()
    return {
        "proportions": told.to_numpy(),
        "of_transcripts": model.get_proportions(unit="transcripts")[told.columns].to_numpy(),
        "types": np.array(told.columns, dtype=str),
    }


def cell_map(adata: anndata.AnnData, options: Options) -> Answer:
    """Lay the cells onto the spots."""
    epochs = options.pop("epochs")
    if "weights" in options:
        options["weights"] = pyrocell.models.TangramWeights(**options["weights"])
    pyrocell.Tangram.setup_anndata(adata, labels_key="cell_type")
    model = pyrocell.Tangram(adata, adata.uns["spots"], **options)
    _train(model, epochs)
    cell_types = model.project_cell_annotations()
    return {
        "genes": model.project_genes(gene_list=list(adata.var_names)).to_numpy(),
        "cell_types": cell_types.to_numpy(),
        "names": np.array(cell_types.columns, dtype=str),
    }


def velocity(adata: anndata.AnnData, options: Options) -> Answer:
    """Fit the kinetics; velocities and fits are told on the scale from 0 to 1."""
    epochs, draws = options.pop("epochs"), options.pop("n_samples")
    layers = {"spliced": "Ms", "unspliced": "Mu"}
    pyrocell.VELOVI.setup_anndata(adata, **{f"{name}_layer": layer for name, layer in layers.items()})
    model = pyrocell.VELOVI(adata, **options)
    _train(model, epochs, early_stopping=False)
    asked: Any = {"n_samples": draws, "return_numpy": True}
    span = {name: np.ptp(adata.layers[layer], axis=0) for name, layer in layers.items()}
    low = {name: adata.layers[layer].min(0) for name, layer in layers.items()}
    spliced, unspliced = model.get_expression_fit(**asked)
    return {
        "velocity": model.get_velocity(**asked) / span["spliced"],
        "time": model.get_latent_time(**asked),
        "permutation": model.get_permutation_scores("cell_type").to_numpy(),
        "fit_spliced": (spliced - low["spliced"]) / span["spliced"],
        "fit_unspliced": (unspliced - low["unspliced"]) / span["unspliced"],
    }


def dna(adata: anndata.AnnData, options: Options) -> Answer:
    """Learn from the peaks that are not held out."""
    held = np.flatnonzero(adata.var["held_out"])
    pyrocell.SCBASSET.setup_anndata(adata)
    model = pyrocell.SCBASSET(adata, **SMALL_SCBASSET)
    plan = pyrocell.infer.TrainingPlan(
        **{
            **vars(model.default_plan),
            "train_indices": np.flatnonzero(~adata.var["held_out"]),
            **options.get("plan", {}),
        }
    )
    _train(model, options["epochs"], plan=plan, early_stopping=False, batch_size=64)
    fasta = Path("background.fa")
    letters = ["".join("ACGTN"[c] for c in row) for row in adata.uns["background"]]
    fasta.write_text("".join(f">b{i}\n{row}\n" for i, row in enumerate(letters)))
    sites = {str(site): str(site) for site in adata.uns["sites"]}
    return {
        "chance": model.posterior("accessibility", indices=held),
        "latent": model.get_latent_representation(),
        "bias": np.asarray(model.get_cell_bias()),
        "activity": model.get_tf_activity(sites, background=fasta)[list(sites)].to_numpy(),
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
