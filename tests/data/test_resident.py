"""Cells that lie on a device as a whole are those that the data set reads, minibatch by minibatch."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

from pyrocell.data import Accessibility, Dataset, Schema, synthetic_iid
from pyrocell.data.resident import Resident, estimate_bytes, resident_on
from pyrocell.models.scbasset import SCBASSET
from pyrocell.models.scvi import SCVI
from pyrocell.models.totalvi import TOTALVI

CPU = torch.device("cpu")


def dataset_of(model_class, adata, **setup):
    model_class.setup_anndata(adata, **setup)
    return model_class(adata).dataset


@pytest.fixture(scope="module")
def dataset():
    adata = synthetic_iid(n_cells=90, n_genes=25, n_proteins=6, seed=0)
    counts = sparse.csr_matrix(adata.X).toarray()
    counts[3] = 0
    counts[3, 5] = 300  # more than a byte holds
    adata.X = sparse.csr_matrix(counts)
    return dataset_of(
        TOTALVI,
        adata,
        batch_key="batch",
        protein_expression_obsm_key="protein_expression",
        protein_names_uns_key="protein_names",
        continuous_covariate_keys=["age"],
        categorical_covariate_keys=["donor"],
    )


def assert_equal(one, two):
    assert one.names() == two.names() and one.n_total == two.n_total
    for name in (*one.names(), "rows"):
        left, right = getattr(one, name), getattr(two, name)
        assert (left is None) == (right is None)
        if left is not None:
            assert left.dtype == right.dtype
            assert torch.equal(left, right), name


def test_any_cells_in_any_order(dataset):
    rows = np.array([7, 3, 89, 0, 3])
    assert_equal(
        Resident(dataset, CPU).cells(torch.from_numpy(rows), n_total=90), dataset.cells(rows, n_total=90)
    )


def test_minibatches_come_in_the_same_order(dataset):
    resident, rows = Resident(dataset, CPU), np.arange(0, 90, 2)
    found = resident.minibatches(rows, 20, rng=np.random.default_rng(1), n_total=45)
    expected = dataset.minibatches(rows, 20, rng=np.random.default_rng(1), n_total=45)
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other)
        assert_equal(one.load(), other.load())


@pytest.mark.parametrize("largest", [200, 30_000, 100_000])
def test_large_and_broken_counts_keep_their_values(largest):
    adata = synthetic_iid(n_cells=30, n_genes=8, seed=0)
    adata.X = sparse.csr_matrix(adata.X).astype(np.float32)
    adata.X.data[:2] = largest, 2.5
    data = dataset_of(SCVI, adata, allow_noninteger=True)
    counts = Resident(data, CPU).cells(torch.arange(30), n_total=30).counts
    np.testing.assert_array_equal(counts.numpy(), adata.X.toarray())


def test_shapes_depend_on_the_number_of_cells_alone(dataset):
    resident = Resident(dataset, CPU)
    sizes = [
        [t.shape for t in vars(resident.cells(rows, n_total=9)).values() if isinstance(t, torch.Tensor)]
        for rows in (torch.arange(4), torch.tensor([3, 3, 3, 3]))
    ]
    assert sizes[0] == sizes[1]


def test_the_estimate_is_near_what_it_takes(dataset):
    resident = Resident(dataset, CPU)
    taken = 0
    for column in resident._columns.values():
        if column is not None:
            tensors = [t for t in vars(column).values() if isinstance(t, torch.Tensor)]
            taken += sum(t.numel() * t.element_size() for t in tensors)
    assert 0.7 * taken < estimate_bytes(dataset) < 1.5 * taken


def test_only_cuda_takes_the_data(dataset):
    assert resident_on(dataset, CPU) is None


def test_regions_too():
    adata = synthetic_iid(n_cells=30, n_genes=8, seed=0)
    schema = Schema.freeze(adata, {"accessibility": Accessibility()}, {})
    data = Dataset(adata, schema, {"accessibility": Accessibility()})
    rows = np.arange(30)
    assert_equal(Resident(data, CPU).cells(torch.from_numpy(rows), n_total=30), data.cells(rows))


def test_what_all_minibatches_share_is_whole():
    rng = np.random.default_rng(0)
    is_open = rng.random((12, 40)) < 0.5
    is_open[0], is_open[:, 0] = True, True
    adata = anndata.AnnData(sparse.csr_matrix(is_open.astype(np.float32)))
    adata.obs["batch"] = rng.integers(2, size=12).astype(str)
    adata.varm["dna_code"] = rng.integers(5, size=(40, 20), dtype=np.uint8)
    SCBASSET.setup_anndata(adata, batch_key="batch")
    small = {"n_filters_init": 4, "n_repeat_blocks_tower": 1, "n_filters_pre_bottleneck": 4}
    dataset = SCBASSET(adata, 2, **small).dataset
    rows = np.array([38, 2, 17])
    found = Resident(dataset, CPU).cells(torch.from_numpy(rows), n_total=40)
    assert dataset.shared == {"batch"} and len(found.batch) == 12 and found.dna.dtype == torch.uint8
    assert_equal(found, dataset.cells(rows, n_total=40))
