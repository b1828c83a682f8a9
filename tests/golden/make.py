"""Golden files: a small fitted model of every public class, and what it answers.

``python -m tests.golden.make`` from the root of the project writes those of the present version. Files of a version
that was released are never written anew: that a later version reads them is what they are for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from safetensors.torch import save_file
from scipy import sparse

import pyrocell
from pyrocell.infer.effects import AtMean
from pyrocell.testing import ModelCase

HERE = Path(__file__).parent
N_CELLS, N_FEATURES = 24, 12
ANSWERS = "answers.safetensors"


def whole_numbers(n_rows: int, n_columns: int, most: int, seed: int = 0) -> np.ndarray:
    """Numbers from 0 to ``most`` by integer arithmetic: the same on every machine and in every version of NumPy."""
    i, j = np.ogrid[:n_rows, :n_columns]
    mixed = (i * i * 7 + j * j * 3 + (i + 1) * (j + 2) * 13 + seed * 1009).astype(np.uint64) * np.uint64(
        2654435761
    )
    return ((mixed >> np.uint64(13)) % np.uint64(most + 1)).astype(np.float32)


def cells() -> AnnData:
    """Counts of cells in two batches, with labels of which some are unknown, and proteins."""
    counts = whole_numbers(N_CELLS, N_FEATURES, 30) // 6 * (whole_numbers(N_CELLS, N_FEATURES, 4, 1) > 1)
    counts[:, 0] += 1
    adata = AnnData(sparse.csr_matrix(counts))
    adata.var_names = [f"gene{j}" for j in range(N_FEATURES)]
    adata.obs_names = [f"cell{i}" for i in range(N_CELLS)]
    adata.obs["batch"] = [f"batch{i % 2}" for i in range(N_CELLS)]
    adata.obs["label"] = [f"type{i % 3}" for i in range(N_CELLS)]
    adata.obs["partly"] = [f"type{i % 3}" if i % 4 else "Unknown" for i in range(N_CELLS)]
    proteins = whole_numbers(N_CELLS, 4, 40, 2) + 1
    adata.obsm["proteins"] = pd.DataFrame(
        proteins, index=adata.obs_names, columns=[f"protein{j}" for j in range(4)]
    )
    return adata


def regions() -> AnnData:
    """Fragments, 0 to 2, in regions."""
    adata = cells()
    adata.X = sparse.csr_matrix(np.minimum(adata.X.toarray(), 2))
    adata.var_names = [f"chr1:{1000 * j}-{1000 * j + 500}" for j in range(N_FEATURES)]
    return adata


def kinetics() -> AnnData:
    """Smoothed abundances of spliced and unspliced RNA."""
    adata = cells()
    adata.layers["Ms"] = whole_numbers(N_CELLS, N_FEATURES, 64, 3) / 16 + 0.125
    adata.layers["Mu"] = whole_numbers(N_CELLS, N_FEATURES, 64, 4) / 16 + 0.125
    return adata


def peaks() -> AnnData:
    """Regions that are open or not, with 48 bases of DNA each."""
    adata = regions()
    adata.X = sparse.csr_matrix((adata.X.toarray() > 0).astype(np.float32))
    adata.varm["dna_code"] = whole_numbers(N_FEATURES, 48, 3, 5).astype(np.uint8)
    return adata


def table(rows: list[str], columns: list[str], most: int, seed: int, least: float = 0.0) -> pd.DataFrame:
    """Whole numbers with names."""
    return pd.DataFrame(
        whole_numbers(len(rows), len(columns), most, seed).astype(float) + least, rows, columns
    )


GENES = [f"gene{j}" for j in range(N_FEATURES)]
TYPES = ["type0", "type1", "type2"]
SMALL = {"n_hidden": 4, "n_latent": 2}
BATCH = {"batch_key": "batch"}
TOWER = {
    "n_bottleneck_layer": 2,
    "n_filters_init": 3,
    "n_repeat_blocks_tower": 1,
    "n_filters_pre_bottleneck": 3,
}

CASES: dict[str, tuple[type, Callable[[], AnnData], dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "SCVI": (pyrocell.SCVI, cells, BATCH, SMALL, ("z", "rho")),
    "SCANVI": (
        pyrocell.SCANVI,
        cells,
        BATCH | {"labels_key": "partly", "unlabeled_category": "Unknown"},
        SMALL,
        ("z", "rho"),
    ),
    "TOTALVI": (
        pyrocell.TOTALVI,
        cells,
        BATCH | {"protein_expression_obsm_key": "proteins"},
        SMALL | {"empirical_protein_background_prior": False},
        ("z", "rho", "protein"),
    ),
    "PEAKVI": (pyrocell.PEAKVI, regions, BATCH, SMALL, ("z", "accessibility", "depth")),
    "VELOVI": (
        pyrocell.VELOVI,
        kinetics,
        {"spliced_layer": "Ms", "unspliced_layer": "Mu"},
        SMALL,
        ("z", "velocity", "pi"),
    ),
    "SCBASSET": (pyrocell.SCBASSET, peaks, {}, TOWER, ("peak_embedding", "accessibility")),
    "CellAssign": (
        pyrocell.CellAssign,
        cells,
        BATCH,
        {"cell_type_markers": (table(GENES[:8], TYPES, 1, 6) > 0).astype(int)},
        (),
    ),
    "RNAStereoscope": (pyrocell.RNAStereoscope, cells, {"labels_key": "label"}, {}, ("rho",)),
    "SpatialStereoscope": (
        pyrocell.SpatialStereoscope,
        cells,
        {},
        {
            "profiles": table(TYPES, GENES, 20, 7, least=1.0),
            "logits": table(["logits"], GENES, 4, 8).loc["logits"] / 4,
        },
        ("proportions", "mu"),
    ),
    "Tangram": (
        pyrocell.Tangram,
        cells,
        {},
        {"spatial": table([f"spot{v}" for v in range(5)], GENES, 9, 9, least=1.0)},
        ("mapping",),
    ),
}


def case_of(name: str) -> ModelCase:
    """Make the row of the contract of a golden model."""
    model_class, make_data, setup, options, _ = CASES[name]
    return ModelCase(model_class, make_data, setup, options, max_epochs=4)


def answers(name: str, model: Any) -> dict[str, torch.Tensor]:
    """Ask what depends on parameters and data alone: no random number, so no version of a generator, is in it."""
    rows = np.arange(N_CELLS if model.full_batch else model.require_data(None).n_cells)
    found: dict[str, Any] = {}
    with model.running(), AtMean(), torch.no_grad():
        found["loss"] = model.elbo()(model.require_data(None).cells(rows)).loss.reshape(1)
        for site in CASES[name][4]:
            found[site] = torch.from_numpy(np.asarray(model.posterior(site)))
    if not CASES[name][4]:  # a model whose only latent is summed over
        found["predicted"] = torch.from_numpy(model.predict(soft=True).to_numpy())
    if hasattr(model, "get_latent_representation"):
        found["latent"] = torch.from_numpy(model.get_latent_representation())
    return {key: value.to(torch.float32).contiguous() for key, value in found.items()}


def make(folder: Path, names: list[str]) -> None:
    """Fit and save."""
    for name in names:
        case = case_of(name)
        model = case.train(case.make(), batch_size=8)
        model.save(folder / name, overwrite=True)
        save_file(answers(name, model), folder / name / ANSWERS)


if __name__ == "__main__":
    make(HERE / pyrocell.__version__, sys.argv[1:] or list(CASES))
