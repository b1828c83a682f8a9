"""The same cells as an AnnData and as a MuData, for the tests of both floors."""

from __future__ import annotations

import os
from pathlib import Path

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest

from pyrocell.data import synthetic_iid

N_CELLS, N_GENES, N_PROTEINS = 160, 30, 8
MODALITIES = {"counts": "rna", "proteins": "protein"}
WITH_PROTEINS = {"protein_expression_obsm_key": "proteins", "protein_mask_obsm_key": "measured"}


def make_adata(seed: int = 0) -> anndata.AnnData:
    """Genes in X, proteins and what was measured of them in obsm; every eighth cell has no proteins at all."""
    adata = synthetic_iid(N_CELLS, N_GENES, n_proteins=N_PROTEINS, n_regions=0, label_effect=0.5, seed=seed)
    names = adata.uns.pop("protein_names")
    values = pd.DataFrame(adata.obsm.pop("protein_expression"), index=adata.obs_names, columns=names)
    measured = pd.DataFrame(True, index=adata.obs_names, columns=names)
    measured.loc[adata.obs["batch"] == "batch_1", "protein_2"] = False
    measured.iloc[::8] = False
    adata.obsm["proteins"], adata.obsm["measured"] = values, measured
    return adata


@pytest.fixture
def nothing_pulled():
    """Let mudata leave columns where they are, as its next version will; the present one warns of that."""
    with mudata.set_options(pull_on_update=False):
        yield


def mudata_of(parts: dict[str, anndata.AnnData], obs: pd.DataFrame | None = None) -> mudata.MuData:
    """MuData of some modalities, with nothing of them pulled into the whole."""
    with mudata.set_options(pull_on_update=False):
        mdata = mudata.MuData(parts)
    if obs is not None:
        mdata.obs = obs.loc[mdata.obs_names].copy()
    return mdata


def as_mudata(adata: anndata.AnnData, *, seed: int | None = None, swapped: bool = False) -> mudata.MuData:
    """Put the cells of `make_adata` into a MuData: only cells with proteins are in the modality of proteins.

    With a seed, the cells of the modality of proteins lie in another order; swapped, it comes first.
    """
    some = np.flatnonzero(adata.obsm["measured"].any(axis=1))
    if seed is not None:
        some = np.random.default_rng(seed).permutation(some)
    values, measured = adata.obsm["proteins"].iloc[some], adata.obsm["measured"].iloc[some]
    var = pd.DataFrame(index=values.columns)
    layers = {"measured": measured.to_numpy()}
    protein = anndata.AnnData(values.to_numpy(), pd.DataFrame(index=values.index), var, layers=layers)
    rna = anndata.AnnData(adata.X.copy(), adata.obs[[]].copy(), adata.var.copy(), layers=dict(adata.layers))
    parts = {"protein": protein, "rna": rna} if swapped else {"rna": rna, "protein": protein}
    return mudata_of(parts, adata.obs)


def real_data(name: str) -> Path:
    """Path of a real data set; skip the test where it is not there."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("PYROCELL_DATA", beside)) / name
    if not path.is_file():
        pytest.skip(f"{name} is not there (folder named by PYROCELL_DATA)")
    return path
