"""Bundled and simulated data: what they promise, and that only the seed makes them differ."""

from __future__ import annotations

import subprocess
import sys

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from pyrocell.data import Schema, pbmc68k, simulate_scvi, synthetic_iid
from tests.data.helpers import FIELDS


@pytest.fixture(scope="module")
def pbmc():
    return pbmc68k()


@pytest.fixture(scope="module")
def simulated():
    return simulate_scvi(1500, 60, zero_inflation=0.3, seed=3)


def test_pbmc68k_holds_counts(pbmc):
    assert pbmc.shape == (700, 765)
    assert sp.isspmatrix_csr(pbmc.X)
    assert (pbmc.layers["counts"] != pbmc.X).nnz == 0
    assert pbmc.X.data.min() == 1
    np.testing.assert_array_equal(pbmc.X.data, np.rint(pbmc.X.data))
    totals = np.asarray(pbmc.X.sum(1)).ravel()
    assert (totals <= pbmc.obs["n_counts"]).all()
    assert totals.min() > 0


def test_pbmc68k_inverts_the_normalisation(pbmc):
    import scanpy

    raw = scanpy.datasets.pbmc68k_reduced().raw.X.toarray()
    again = np.log1p(pbmc.X.toarray() / pbmc.obs["n_counts"].to_numpy()[:, None] * 1e4)
    np.testing.assert_allclose(again, raw, atol=0.2)
    assert np.abs(again - raw).mean() < 0.002


def test_pbmc68k_annotations(pbmc):
    assert pbmc.obs["cell_type"].nunique() == 10
    assert set(pbmc.obs["phase"]) == {"G1", "S", "G2M"}
    assert {"S_score", "G2M_score", "louvain", "n_genes", "n_counts", "percent_mito"} < set(pbmc.obs)
    assert "CD3D" in pbmc.var_names
    schema = Schema.freeze(pbmc, FIELDS, {"layer": "counts", "labels_key": "cell_type"})
    assert schema.size("label") == 10


def test_pbmc68k_is_new_each_time(pbmc):
    other = pbmc68k()
    other.X.data[:] = 0
    other.layers["counts"].data[:] = 0
    assert pbmc.X.data.min() == 1


def same(one, other):
    return (one.X != other.X).nnz == 0 and one.obs.equals(other.obs)


@pytest.mark.parametrize("make", [synthetic_iid, lambda seed: simulate_scvi(50, 20, seed=seed)])
def test_only_the_seed_makes_a_difference(make):
    np.random.seed(0)  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert same(make(seed=1), make(seed=1))
    assert not same(make(seed=1), make(seed=2))
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


@pytest.mark.parametrize("make", [synthetic_iid, lambda: simulate_scvi(50, 20)])
def test_simulated_data_can_be_written_and_are_fit_for_models(make, tmp_path):
    adata = make()
    adata.write_h5ad(tmp_path / "x.h5ad")
    again = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert same(adata, again)
    schema = Schema.freeze(again, FIELDS, {"layer": "counts", "batch_key": "batch"})
    assert schema.names("batch") == ["batch_0", "batch_1"]


def test_synthetic_iid_parts():
    adata = synthetic_iid(60, 20, n_batches=3, n_labels=4, n_proteins=5, n_regions=7)
    assert adata.shape == (60, 20)
    assert adata.obsm["protein_expression"].shape == (60, 5)
    assert len(adata.uns["protein_names"]) == 5
    assert adata.obsm["accessibility"].shape == (60, 7)
    assert len(adata.uns["region_names"]) == 7
    assert list(adata.obs["batch"].cat.categories) == ["batch_0", "batch_1", "batch_2"]
    assert adata.obs["label"].nunique() == 4
    bare = synthetic_iid(n_proteins=0, n_regions=0)
    assert not bare.obsm
    assert not bare.uns
    assert np.asarray(synthetic_iid(500, 1).X.sum(1)).min() > 0


def test_synthetic_iid_labels_differ_only_on_demand():
    def largest_change(effect):
        adata = synthetic_iid(3000, 30, label_effect=effect)
        means = [np.log(np.asarray(adata[adata.obs["label"] == f"label_{i}"].X.mean(0))) for i in range(3)]
        return np.abs(means[0] - means[1]).max()

    assert largest_change(0.0) < 0.35
    assert largest_change(1.0) > 1.0


def test_simulated_truth_is_the_process_described(simulated):
    truth, batch = simulated.uns["truth"], simulated.obs["batch"].cat.codes.to_numpy()
    logits = (
        np.tanh(simulated.obsm["z"] @ truth["W1"]) @ truth["W2"]
        + truth["intercept"]
        + truth["batch_shift"][batch]
    )
    rho = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(simulated.layers["rho"], rho, rtol=1e-5)
    assert truth["batch_shift"][0].tolist() == [0] * 60
    assert sorted(np.unique(truth["batch_shift"][1])) == [-0.5, 0, 0.5]
    assert (truth["batch_shift"][1] != 0).sum() == 18
    centred = simulated.obsm["z"] - truth["centres"][simulated.obs["cluster"].cat.codes]
    np.testing.assert_allclose(centred.std(0), 1, atol=0.1)
    composition = simulated.obs.groupby("batch", observed=True)["cluster"].value_counts(normalize=True)
    np.testing.assert_allclose(composition, 0.25, atol=0.06)


def test_simulated_library_and_dispersion():
    adata = simulate_scvi(2000, 400, seed=1)
    logs = np.log(adata.obs["library"])
    assert logs.mean() == pytest.approx(8, abs=0.03)
    assert logs.std() == pytest.approx(0.3, abs=0.02)
    log_theta = np.log(adata.var["theta"])
    assert log_theta.mean() == pytest.approx(0.7, abs=0.13)
    assert log_theta.std() == pytest.approx(0.8, abs=0.1)
    assert (adata.var["pi"] == 0).all()


def test_simulated_counts_have_the_moments_of_the_truth(simulated):
    mean = simulated.obs["library"].to_numpy()[:, None] * simulated.layers["rho"]
    pi, theta = simulated.var["pi"].to_numpy(), simulated.var["theta"].to_numpy()
    x = simulated.X.toarray()
    variance = (1 - pi) * (mean + mean**2 / theta + pi * mean**2)
    z_of_mean = (x - (1 - pi) * mean).sum(0) / np.sqrt(variance.sum(0))
    assert np.abs(z_of_mean).max() < 4.5
    assert 0.7 < z_of_mean.std() < 1.35
    p_zero = pi + (1 - pi) * (theta / (theta + mean)) ** theta
    z_of_zeros = ((x == 0) - p_zero).sum(0) / np.sqrt((p_zero * (1 - p_zero)).sum(0) + 1e-9)
    assert np.abs(z_of_zeros).max() < 4.5
    assert sorted(set(pi)) == [0, 0.3]
    assert (pi > 0).sum() == 30


def test_importing_the_data_floor_is_light():
    heavy = ("anndata", "mudata", "scanpy", "matplotlib", "h5py")
    code = f"import sys, pyrocell.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
