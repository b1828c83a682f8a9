"""Minibatches: the same cells from every container, in the order asked for, and nothing else touched."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pyrocell.data import Cells, Counts, Dataset, Schema, prototype_cells
from pyrocell.data.minibatch import _dense_on
from pyrocell.distributions import NonZeros
from pyrocell.errors import DataError, QueryError, SetupError
from tests.data.helpers import (
    COMBINATIONS,
    CONTAINERS,
    FIELDS,
    SETUP,
    assert_same_cells,
    freeze,
    make_adata,
    make_counts,
    open_data,
)

ROWS = np.array([7, 3, 3, 29, 0, 7])
ADATA = make_adata()
EXPECTED = open_data(ADATA, **SETUP).cells(ROWS)


def test_every_attribute_against_pandas():
    obs, cells = ADATA.obs.iloc[ROWS], EXPECTED
    x = make_counts()[ROWS]
    np.testing.assert_array_equal(cells.counts, x)
    np.testing.assert_array_equal(cells.library[:, 0], x.sum(1))
    np.testing.assert_array_equal(cells.batch, obs["lane"].astype(int))
    np.testing.assert_array_equal(cells.label, obs["type"].cat.codes)
    np.testing.assert_array_equal(cells.size_factor[:, 0], obs["size"].astype(np.float32))
    np.testing.assert_array_equal(
        cells.categorical_covariates, np.column_stack([obs["donor"], obs["kit"].astype(int)])
    )
    values = ADATA.obs[["age", "score"]].to_numpy(float)
    standardised = ((values - values.mean(0)) / values.std(0))[ROWS]
    np.testing.assert_allclose(cells.continuous_covariates, standardised, rtol=1e-6)
    np.testing.assert_array_equal(cells.rows, ROWS)
    assert cells.n_total == 30
    assert len(cells) == 6
    assert cells.counts.dtype == cells.library.dtype == cells.continuous_covariates.dtype == torch.float32
    assert cells.batch.dtype == cells.categorical_covariates.dtype == cells.rows.dtype == torch.int64


def test_the_index_of_nonzeros_is_attached_and_valid():
    cells = open_data(ADATA).cells(ROWS)
    attached = cells.counts._nonzeros
    assert NonZeros.of(cells.counts) is attached, "taken for outdated"
    searched = NonZeros.search(cells.counts)
    for part in ("flat", "rows", "cols", "values"):
        assert torch.equal(getattr(attached, part), getattr(searched, part))


@pytest.mark.parametrize(("kind", "dtype"), COMBINATIONS)
def test_every_container_and_type_gives_the_same_cells(kind, dtype):
    adata = make_adata(CONTAINERS[kind](make_counts().astype(dtype)))
    assert_same_cells(open_data(adata, **SETUP).cells(ROWS), EXPECTED)


def test_booleans():
    counts = make_counts() > 0
    expected = open_data(make_adata(counts.astype(np.float32))).cells(ROWS)
    assert_same_cells(open_data(make_adata(counts)).cells(ROWS), expected)
    assert_same_cells(open_data(make_adata(sp.csr_matrix(counts))).cells(ROWS), expected)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_layer(kind):
    adata = make_adata(np.zeros((30, 12), np.float32))
    adata.layers["raw"] = CONTAINERS[kind](make_counts())
    assert_same_cells(open_data(adata, layer="raw", **SETUP).cells(ROWS), EXPECTED)


@pytest.mark.parametrize("kind", ["dense", "csr_matrix", "csc_array"])
@pytest.mark.parametrize("layer", [None, "raw"])
def test_a_view(kind, layer):
    """Cells and genes of a view come from behind it: in order, and by the view's own numbers."""
    adata = make_adata(CONTAINERS[kind](make_counts()))
    adata.layers["raw"] = adata.X.copy()
    rows, cols = np.array([4, 2, 9, 25, 11, 12, 1]), np.array([5, 0, 7])
    view = adata[rows][:, cols]
    assert view.is_view
    fields = {"counts": Counts()}
    expected = open_data(view.copy(), fields, layer=layer).cells(np.array([6, 0, 0, 2]))
    assert_same_cells(open_data(view, fields, layer=layer).cells(np.array([6, 0, 0, 2])), expected)
    assert view.is_view, "reading turned the view into a copy"
    by_mask = adata[adata.obs["kit"].to_numpy()]
    assert_same_cells(
        open_data(by_mask, fields).cells(np.arange(3)), open_data(by_mask.copy(), fields).cells(np.arange(3))
    )


@pytest.fixture(params=["dense", "csr_matrix"])
def backed(request, tmp_path):
    make_adata(CONTAINERS[request.param](make_counts())).write_h5ad(tmp_path / "data.h5ad")
    adata = anndata.read_h5ad(tmp_path / "data.h5ad", backed="r")
    yield adata
    adata.file.close()


def test_backed(backed):
    assert_same_cells(open_data(backed, **SETUP).cells(ROWS), EXPECTED)
    assert backed.isbacked


def test_backed_view_with_other_genes(backed):
    schema = freeze(make_adata()[:, ["g7", "g0", "g3"]], {"counts": Counts()})
    rows = np.array([4, 2, 25, 11])
    dataset = Dataset(backed[rows], schema, {"counts": Counts()})
    np.testing.assert_array_equal(
        dataset.cells(np.array([3, 0, 3])).counts, make_counts()[np.ix_([11, 4, 11], [7, 0, 3])]
    )


def test_backed_view_stays_on_disk(backed, monkeypatch):
    """The matrix of a view is never asked for: AnnData would load all of it."""
    view = backed[np.arange(5)]

    def loaded(self):
        assert not self.is_view, "the view was loaded"
        return whole(self)

    whole = anndata.AnnData.X.fget
    monkeypatch.setattr(anndata.AnnData, "X", property(loaded))
    assert open_data(view, {"counts": Counts()}).cells(np.arange(5)).counts.shape == (5, 12)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_shuffled_and_further_genes_align_by_name(kind):
    order = np.random.default_rng(1).permutation(12)
    wider = np.concatenate([make_counts(), np.full((30, 2), 9, np.float32)], axis=1)
    adata = make_adata(CONTAINERS[kind](np.concatenate([wider[:, order], wider[:, 12:]], axis=1)))
    adata.var_names = [*(f"g{i}" for i in order), "extra1", "extra2"]
    dataset = Dataset(adata, freeze(ADATA, **SETUP), FIELDS)
    assert_same_cells(dataset.cells(ROWS), EXPECTED)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_view_aligns_by_name(kind):
    fields = {"counts": Counts()}
    schema = freeze(make_adata()[:, ["g7", "g0", "g3"]], fields)
    view = make_adata(CONTAINERS[kind](make_counts()))[[4, 2, 9], ["g9", "g3", "g0", "g7"]]
    cells = Dataset(view, schema, fields).cells(np.array([2, 0]))
    np.testing.assert_array_equal(cells.counts, make_counts()[np.ix_([9, 4], [7, 0, 3])])


def test_missing_genes_are_named():
    schema = freeze(ADATA)
    with pytest.raises(DataError, match=r"3 of the 12 features.*'g9', 'g10', 'g11'"):
        Dataset(ADATA[:, :9], schema, FIELDS)
    other = make_adata()
    other.var_names = [f"ENSG{i}" for i in range(12)]
    with pytest.raises(DataError, match=r"and 7 more. None of them is there.*'ENSG0'"):
        Dataset(other, schema, FIELDS)


def test_categories_align_by_name():
    schema = freeze(ADATA, **SETUP)
    query = ADATA[ADATA.obs["type"] != "T"].copy()
    query.obs["type"] = query.obs["type"].astype(str)
    query.obs["donor"] = query.obs["donor"].astype(float)
    cells = Dataset(query, schema, FIELDS).cells(np.arange(query.n_obs))
    names = np.array(schema.names("label"))
    np.testing.assert_array_equal(names[cells.label], query.obs["type"])
    np.testing.assert_array_equal(cells.categorical_covariates[:, 0], query.obs["donor"])


@pytest.mark.parametrize(("column", "name"), [("lane", "batch_key"), ("donor", "categorical_covariate_keys")])
def test_unseen_categories_are_named(column, name):
    query = make_adata()
    query.obs[column] = query.obs[column].astype(str)
    query.obs.loc[["c1", "c2"], column] = "new"
    with pytest.raises(
        DataError, match=rf"{name}.*{column}.*not seen the categories 'new' \(2 cells\)\. It knows '0', '1'"
    ):
        Dataset(query, freeze(ADATA, **SETUP), FIELDS)


def test_new_data_are_checked_and_standardised_as_frozen():
    schema = freeze(ADATA, **SETUP)
    query = make_adata()
    query.obs["age"] = query.obs["age"] + 10
    cells = Dataset(query, schema, FIELDS).cells(ROWS)
    shift = cells.continuous_covariates - EXPECTED.continuous_covariates
    np.testing.assert_allclose(shift[:, 0], 10 / schema.fields["continuous_covariates"]["sds"][0], rtol=1e-5)
    query.X[3, 1] = -2
    with pytest.raises(DataError, match=r"-2 \(cell 'c3', feature 'g1'\)"):
        Dataset(query, schema, FIELDS)
    Dataset(query, schema, FIELDS, check=False)
    del query.obs["lane"]
    with pytest.raises(SetupError, match="batch_key='lane'"):
        Dataset(query, schema, FIELDS, check=False)


def test_fields_left_out():
    cells = open_data(ADATA).cells(ROWS)
    assert cells.size_factor is None
    assert cells.categorical_covariates.shape == cells.continuous_covariates.shape == (6, 0)
    assert cells.batch.tolist() == cells.label.tolist() == [0] * 6


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("aligned", [True, False])
def test_the_data_are_never_changed(kind, aligned):
    adata = make_adata(CONTAINERS[kind](make_counts()))
    adata.layers["other"] = adata.X.copy()
    before = copy.deepcopy(adata)
    query = adata if aligned else adata[:, ::-1].copy()
    dataset = Dataset(query, freeze(adata, **SETUP), FIELDS)
    dataset.cells(ROWS).counts.fill_(-1)
    dataset.cells(ROWS).counts._nonzeros.values.fill_(-1)
    for matrix, same in ((adata.X, before.X), (adata.layers["other"], before.layers["other"])):
        assert type(matrix) is type(same)
        np.testing.assert_array_equal(
            matrix.toarray() if sp.issparse(matrix) else matrix, same.toarray() if sp.issparse(same) else same
        )
    assert adata.obs.equals(before.obs)
    assert adata.var.equals(before.var)
    assert list(adata.uns) == list(before.uns)


def test_only_the_dataset_refers_to_the_data():
    adata = make_adata(sp.csr_matrix(make_counts()))
    watch = weakref.ref(adata)
    dataset = open_data(adata, **SETUP)
    schema, cells = dataset.schema, dataset.cells(ROWS)
    assert dataset.adata is adata
    del adata
    gc.collect()
    assert watch() is not None
    del dataset
    gc.collect()
    assert watch() is None
    assert len(cells) == 6
    assert schema.n_cells == 30


def test_minibatches_go_through_all_rows_once():
    dataset = open_data(ADATA)
    rows = np.array([5, 1, 8, 20, 3, 11, 2])
    batches = list(dataset.minibatches(rows, 3))
    assert [len(cells) for cells in batches] == [3, 3, 1]
    np.testing.assert_array_equal(torch.cat([cells.rows for cells in batches]), rows)
    assert {cells.n_total for cells in batches} == {7}
    assert {cells.n_total for cells in dataset.minibatches(rows, 3, n_total=100)} == {100}
    assert sum(len(cells) for cells in dataset.minibatches(None, 8)) == 30


def test_minibatches_shuffle_with_the_generator_given():
    dataset = open_data(ADATA)

    def order(seed):
        rng = np.random.default_rng(seed)
        return torch.cat([c.rows for c in dataset.minibatches(None, 7, rng=rng)]).tolist()

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != sorted(order(0))
    assert sorted(order(0)) == list(range(30))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array([0, 30]), "no rows 30: the data have 30 cells"),
        (np.array([-1]), "no rows -1"),
        (np.array([True, False]), "type bool"),
        (np.array([0.5]), "type float64"),
        (np.array([[1]]), r"shape \(1, 1\)"),
    ],
)
def test_rows_that_are_none(rows, message):
    with pytest.raises(QueryError, match=message):
        open_data(ADATA).cells(rows)


def test_no_cells_and_no_batch_size():
    dataset = open_data(ADATA, **SETUP)
    assert dataset.cells(np.array([], dtype=np.int64)).counts.shape == (0, 12)
    assert list(dataset.minibatches(np.array([], dtype=np.int64), 5)) == []
    with pytest.raises(QueryError, match="batch_size is 0"):
        next(dataset.minibatches(None, 0))


def test_dataset_says_what_it_is():
    dataset = open_data(ADATA, **SETUP)
    assert dataset.n_cells == len(dataset) == 30
    assert dataset.obs_names.tolist() == ADATA.obs_names.tolist()
    assert "30 cells" in repr(dataset)


# Cells


def test_replace():
    changed = EXPECTED.replace(batch=torch.ones(6, dtype=torch.int64), n_total=99)
    assert changed.batch.tolist() == [1] * 6
    assert changed.n_total == 99
    assert changed.counts is EXPECTED.counts
    assert EXPECTED.n_total == 30
    with pytest.raises(QueryError, match="no 'bach'; they have counts"):
        EXPECTED.replace(bach=0)


def test_counts_that_somebody_wrote_to_are_those_that_count():
    cells = open_data(ADATA).cells(ROWS)
    assert isinstance(cells.as_read("counts"), NonZeros)
    kind, _ = cells.parts()
    cells.counts.mul_(2.0)
    assert cells.as_read("counts") is cells.counts
    assert torch.equal(cells.of_parts(cells.parts()[1]).counts, cells.counts)
    assert cells.parts()[0] != kind
    assert torch.equal(cells.replace(n_total=5).counts, cells.counts)
    cells.counts = torch.zeros(6, 12)
    assert cells.as_read("counts").sum() == 0


@pytest.mark.parametrize(("n_seen", "kind"), [(1, NonZeros), (11, torch.Tensor)])
def test_a_network_reads_few_counts_as_their_non_zeros(n_seen, kind):
    counts = sp.csr_matrix((np.add.outer(np.arange(30), np.arange(12)) % 12 < n_seen) * 1.0)
    cells = open_data(anndata.AnnData(counts)).cells(ROWS)
    encoder = SimpleNamespace(reads_nonzeros=True)
    found = cells.as_input("counts", encoder)
    assert isinstance(found, kind)
    assert torch.equal(found.dense() if kind is NonZeros else found, cells.counts)
    assert cells.as_input("counts", torch.nn.Linear(12, 3)) is cells.counts, "a network that wants a tensor"
    with torch.autocast("cpu", torch.bfloat16):
        assert cells.as_input("counts", encoder) is cells.counts
    cells.counts.requires_grad_()
    assert cells.as_input("counts", encoder) is cells.counts, "somebody wants its gradient"
    cells = cells.replace(counts=cells.counts.detach() * 2.0)
    assert cells.as_input("counts", encoder) is cells.counts


def test_a_network_reads_counts_that_somebody_wrote_to():
    cells = open_data(anndata.AnnData(sp.identity(12, format="csr"))).cells(ROWS[ROWS < 12])
    cells.counts.mul_(2.0)
    assert cells.as_input("counts", SimpleNamespace(reads_nonzeros=True)) is cells.counts


def test_dense_counts_are_made_once_for_all_who_share_them():
    cells = open_data(ADATA).cells(ROWS)
    other = cells.replace(n_total=5)
    assert other.counts is cells.counts


def test_cells_of_parts_are_those_cells():
    cells = open_data(ADATA, **SETUP).cells(ROWS)
    kind, parts = cells.parts()
    again = cells.of_parts(parts)
    assert again.parts()[0] == kind
    for name in cells.names():
        a, b = getattr(cells, name), getattr(again, name)
        assert a is b is None or torch.equal(a, b), name


def test_an_attribute_that_is_not_there():
    cells = open_data(ADATA, {"counts": Counts()}).cells(ROWS)
    with pytest.raises(AttributeError, match=r"no 'batch'; they have counts, library. Declare it as a field"):
        cells.batch  # noqa: B018
    assert getattr(cells, "batch", None) is None
    assert repr(cells) == "Cells(counts 6x12, library 6x1, rows 6, n_total 30)"


def test_to_a_device():
    assert EXPECTED.to("cpu") is EXPECTED
    moved = EXPECTED.to("meta")
    assert {getattr(moved, name).device.type for name in (*moved.names(), "rows")} == {"meta"}
    assert open_data(ADATA).cells(ROWS).to("meta").size_factor is None
    assert next(open_data(ADATA).minibatches(None, 4, device="meta")).batch.device.type == "meta"


def test_counts_become_dense_on_the_device():
    counts = open_data(ADATA).cells(ROWS).counts
    there = _dense_on("cpu", NonZeros.of(counts))
    assert there is not counts
    assert torch.equal(there, counts)


def test_prototype_cells_look_like_real_ones():
    for setup in ({}, SETUP):
        dataset = open_data(ADATA, **setup)
        real, made_up = dataset.cells(np.array([1, 2, 3])), prototype_cells(dataset.schema, 3)
        assert real.names() == made_up.names()
        for name in real.names():
            a, b = getattr(real, name), getattr(made_up, name)
            assert (a is None and b is None) or (a.shape, a.dtype) == (b.shape, b.dtype)
        assert (made_up.counts == 1).all()
        assert torch.equal(made_up.library, made_up.counts.sum(1, keepdim=True))
        assert made_up.n_total == 30
        assert made_up.rows.tolist() == [0, 1, 2]


def test_prototype_from_a_saved_schema():
    schema = Schema.from_json(freeze(ADATA, **SETUP).to_json())
    assert prototype_cells(schema).size_factor.shape == (2, 1)


def test_cells_copy():
    assert isinstance(copy.copy(EXPECTED), Cells)
    assert torch.equal(copy.deepcopy(EXPECTED).batch, EXPECTED.batch)
