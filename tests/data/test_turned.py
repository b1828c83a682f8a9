"""Data whose rows, for the model, are features and whose columns are cells."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from pyrocell.data import Accessibility, CellCategory, Dataset, DnaSequence, Schema, make_setup_anndata
from pyrocell.data.matrices import by_column, open_matrix
from pyrocell.errors import DataError, SetupError

FIELDS = {"accessibility": Accessibility(), "dna": DnaSequence(), "batch": CellCategory(optional=True)}
N_CELLS, N_PEAKS, LENGTH = 12, 30, 20


def peaks(seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.6, (N_CELLS, N_PEAKS)).astype(np.float32)
    counts[0], counts[:, 0] = 1, 1
    adata = anndata.AnnData(sp.csr_matrix(counts))
    adata.obs_names = [f"c{i}" for i in range(N_CELLS)]
    adata.var_names = [f"p{i}" for i in range(N_PEAKS)]
    adata.obs["lane"] = pd.Categorical(rng.permutation(np.arange(N_CELLS) % 3).astype(str))
    adata.varm["dna_code"] = rng.integers(4, size=(N_PEAKS, LENGTH), dtype=np.uint8)
    return adata


def freeze(adata, **setup):
    return Schema.freeze(adata, FIELDS, setup)


def test_rows_are_features():
    adata = peaks()
    schema = freeze(adata, batch_key="lane")
    data = Dataset(adata, schema, FIELDS)
    assert data.n_cells == N_PEAKS and list(data.obs_names) == list(adata.var_names)
    assert schema.names("accessibility") == list(adata.obs_names) and str(schema).startswith("30 features;")
    rows = np.array([7, 2])
    found = data.cells(rows)
    np.testing.assert_array_equal(found.accessibility.numpy(), adata.X.toarray().T[rows] > 0)
    np.testing.assert_array_equal(found.dna.numpy(), adata.varm["dna_code"][rows])
    assert found.dna.dtype == torch.uint8 and found.batch.shape == (N_CELLS,)
    names = np.array(schema.names("batch"))[found.batch.numpy()]
    np.testing.assert_array_equal(names, adata.obs["lane"])
    assert torch.equal(data.cells(rows[:1]).batch, found.batch)


def test_cells_are_aligned_by_name_and_more_may_be_there():
    adata = peaks()
    data = Dataset(adata[3:].copy(), freeze(adata[4:].copy(), batch_key="lane"), FIELDS)
    order = np.random.default_rng(1).permutation(N_CELLS - 3)
    other = Dataset(adata[3:][order].copy(), data.schema, FIELDS)
    rows = np.arange(5)
    for name in ("accessibility", "batch", "dna"):
        assert torch.equal(getattr(data.cells(rows), name), getattr(other.cells(rows), name))
    with pytest.raises(DataError, match=r"1 of the 8 cells of the model are not in adata.obs_names: 'c11'"):
        Dataset(adata[:11].copy(), data.schema, FIELDS)


@pytest.mark.parametrize("store", [np.asarray, sp.csr_matrix, sp.csc_array])
def test_by_column(store):
    values = peaks().X.toarray()
    matrix = by_column(open_matrix(store(values)), np.array([5, 0]))
    assert (matrix.n_rows, matrix.n_cols) == (N_PEAKS, 2)
    found = matrix.entries(np.array([9, 3]))
    dense = np.zeros((2, 2), dtype=np.float32)
    dense[found.rows, found.cols] = found.values
    np.testing.assert_array_equal(dense, values[[5, 0]].T[[9, 3]])
    empty = by_column(open_matrix(store(values[:0])))
    assert (empty.n_rows, empty.n_cols) == (N_PEAKS, 0)
    with pytest.raises(DataError, match="30 features and 0 cells: nothing to learn from"):
        freeze(peaks()[:0].copy())


def with_codes(change):
    adata = peaks()
    adata.varm["dna_code"] = change(adata.varm["dna_code"].astype(float))
    return adata


def test_wrong_codes_are_refused_by_name():
    def spoiled(codes):
        codes[4, 2], codes[6, 0] = 7, 0.5
        return codes

    with pytest.raises(DataError, match=r"other codes than 0, 1, 2, 3 .* for 2 regions: 'p4', 'p6'"):
        freeze(with_codes(spoiled))
    with pytest.raises(DataError, match=r"has shape \(30, 0\)"):
        freeze(with_codes(lambda codes: codes[:, :0]))
    schema = freeze(peaks())
    with pytest.raises(DataError, match=r"sequences of 15 bases; the model was made with 20.*seq_len=20"):
        Dataset(with_codes(lambda codes: codes[:, :15]), schema, FIELDS)
    table = peaks()
    table.varm["dna_code"] = pd.DataFrame(table.varm["dna_code"], index=table.var_names)
    assert torch.equal(
        Dataset(table, schema, FIELDS).cells(np.arange(3)).dna,
        Dataset(peaks(), schema, FIELDS).cells(np.arange(3)).dna,
    )


def test_the_setup_names_what_is_not_there():
    setup = make_setup_anndata(FIELDS, "Model")
    adata = peaks()
    with pytest.raises(
        SetupError, match=r"dna_code_key='dna': adata.varm has no such entry.*add_dna_sequence"
    ):
        setup(adata, dna_code_key="dna")
    with pytest.raises(
        SetupError, match=r"batch_key='Lane': adata.obs has no such column. Did you mean 'lane'"
    ):
        setup(adata, batch_key="Lane")
    turned = peaks().transpose()
    turned.obsm["dna_code"] = peaks().varm["dna_code"]
    with pytest.raises(SetupError, match=r"the regions lie in rows. Give cells in rows.*adata.transpose\(\)"):
        setup(turned)


def closed(matrix, rows=(), columns=()):
    values = matrix.toarray()
    values[list(rows)] = 0
    values[:, list(columns)] = 0
    return sp.csr_matrix(values)


@pytest.mark.filterwarnings("ignore::UserWarning")  # anndata on names that repeat
def test_faults_are_named_as_what_they_are():
    adata = peaks()
    adata.X = closed(adata.X, columns=[5])
    with pytest.raises(
        DataError, match=r"1 features have no counts over the 12 cells of adata.X: 'p5'.*filter_genes"
    ):
        freeze(adata)
    adata = peaks()
    adata.X = closed(adata.X, rows=[3])
    with pytest.raises(
        DataError, match=r"1 cells have no counts over the 30 features of adata.X: 'c3'.*filter_cells"
    ):
        freeze(adata)
    adata = peaks()
    values = adata.X.toarray()
    values[2, 4] = -1
    adata.X = sp.csr_matrix(values)
    with pytest.raises(DataError, match=r"-1 \(feature 'p4', cell 'c2'\)"):
        freeze(adata)
    adata = peaks()
    adata.var_names = ["same", "same", *adata.var_names[2:]]
    with pytest.raises(
        DataError, match=r"1 feature names occur more than once: 'same'.*adata.var_names_make_unique"
    ):
        freeze(adata)
    adata = peaks()
    adata.obs_names = ["same", "same", *adata.obs_names[2:]]
    with pytest.raises(
        DataError, match=r"1 cell names occur more than once: 'same'.*adata.obs_names_make_unique"
    ):
        freeze(adata)
