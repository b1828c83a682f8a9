"""Preparation for RNA velocity: smoothing, and the choice of genes."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

from pyrocell.data import Dataset, filter_velocity_genes, smooth_velocity_layers
from pyrocell.data.abundances import Abundances
from pyrocell.errors import DataError, SetupError
from tests.data.helpers import freeze


@pytest.fixture
def adata():
    """Fifty cells in a ring: each knows the one before and the one after, with weights of their own."""
    draw = np.random.default_rng(0)
    counts = {name: draw.poisson(4, (50, 6)).astype(np.uint16) for name in ("spliced", "unspliced")}
    made = anndata.AnnData(counts["spliced"].astype(np.float32), layers=counts)
    made.obs_names, made.var_names = [f"cell{i}" for i in range(50)], [f"gene{g}" for g in range(6)]
    weights = draw.uniform(0.1, 1, 50)
    ring = np.roll(np.diag(weights), 1, axis=1)
    made.obsp["connectivities"] = sparse.csr_matrix(ring + ring.T)
    made.uns["neighbors"] = {"connectivities_key": "connectivities"}
    return made


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_smoothing_is_the_mean_over_a_cell_and_its_neighbours(adata, kind):
    for name in adata.layers:
        adata.layers[name] = kind(adata.layers[name])
    smooth_velocity_layers(adata)
    for layer, name in (("Ms", "spliced"), ("Mu", "unspliced")):
        raw = adata.layers[name]
        raw = np.asarray(raw.todense() if sparse.issparse(raw) else raw, dtype=float)
        scaled = raw / raw.sum(1, keepdims=True) * np.median(raw.sum(1))
        expected = (scaled + np.roll(scaled, 1, 0) + np.roll(scaled, -1, 0)) / 3
        np.testing.assert_allclose(adata.layers[layer], expected, rtol=1e-5)
        assert adata.layers[layer].dtype == np.float32


def test_a_graph_under_another_name(adata):
    adata.obsp["mine_connectivities"] = adata.obsp.pop("connectivities")
    adata.uns["mine"] = {"connectivities_key": "mine_connectivities"}
    del adata.uns["neighbors"]
    smooth_velocity_layers(adata, neighbors_key="mine")
    with pytest.raises(SetupError, match=r"obsp has no 'connectivities'.*scanpy\.pp\.neighbors"):
        smooth_velocity_layers(adata)


@pytest.mark.parametrize(
    ("value", "said"),
    [(-1.0, "0 values that are NaN or infinite and 1 negative"), (np.nan, "1 values that are NaN")],
)
def test_wrong_counts_are_refused(adata, value, said):
    layer = adata.layers["unspliced"].astype(np.float32)
    layer[2, 3] = value
    adata.layers["unspliced"] = layer
    with pytest.raises(DataError, match=said):
        smooth_velocity_layers(adata)


def test_a_layer_or_counts_that_are_not_there(adata):
    with pytest.raises(SetupError, match="no 'intron'.*Available: 'spliced', 'unspliced'"):
        smooth_velocity_layers(adata, unspliced_layer="intron")
    adata.layers["unspliced"][7] = 0
    with pytest.raises(DataError, match="1 cells have no counts in .*'unspliced'.*cell7"):
        smooth_velocity_layers(adata)


def test_genes_on_a_line_pass_and_others_do_not(adata):
    draw = np.random.default_rng(1)
    s = draw.uniform(0, 5, (50, 6)).astype(np.float32)
    u = 0.3 * s + 1
    u[:, 2] = draw.uniform(0, 5, 50)  # noise
    u[:, 3] = 6 - s[:, 3]  # falls where spliced rises
    s[:, 4] = 2.0  # constant
    u[:, 5] = 0.0
    adata.layers["Ms"], adata.layers["Mu"] = s, u
    filter_velocity_genes(adata)
    assert adata.var["velocity_genes"].tolist() == [True, True, False, False, False, False]
    np.testing.assert_allclose(adata.var["velocity_gamma"][:2], 0.3, rtol=1e-3)
    np.testing.assert_allclose(adata.var["velocity_r2"][:2], 1, rtol=1e-3)
    adata.layers["Ms"], adata.layers["Mu"] = sparse.csr_matrix(s), sparse.csr_matrix(u)
    before = adata.var["velocity_r2"].copy()
    filter_velocity_genes(adata, subset=True)
    assert list(adata.var_names) == ["gene0", "gene1"]
    np.testing.assert_allclose(adata.var["velocity_r2"], before[:2])


def test_no_gene_that_passes(adata):
    adata.layers["Ms"] = adata.layers["Mu"] = np.ones((50, 6))
    with pytest.raises(DataError, match=r"No gene .* min_r2=0.01"):
        filter_velocity_genes(adata)


def test_some_genes_are_read_on_their_own_scale(adata):
    smooth_velocity_layers(adata)
    fields = {"spliced": Abundances().renamed("spliced")}
    schema = freeze(adata, fields, spliced_layer="Ms")
    cells = [
        Dataset(adata, s, fields).cells(np.arange(9)).spliced
        for s in (schema, schema.over(fields["spliced"], ["gene4", "gene1"]))
    ]
    torch.testing.assert_close(cells[1], cells[0][:, [4, 1]])
