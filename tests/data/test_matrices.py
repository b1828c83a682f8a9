"""Rows of matrices of every kind: the same entries in the order asked for."""

from __future__ import annotations

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pyrocell.data import matrices
from pyrocell.data.matrices import open_matrix
from pyrocell.errors import DataError, PyrocellWarning
from tests.data.helpers import COMBINATIONS, CONTAINERS, make_counts

COUNTS = make_counts(25, 9)
ROWS = np.array([7, 3, 3, 24, 0, 7, 12])


def dense_of(entries, shape):
    x = np.zeros(shape, np.float32)
    x[entries.rows, entries.cols] = entries.values
    return x


def check(reader, truth, rows=ROWS):
    entries = reader.entries(rows)
    assert (entries.rows.dtype, entries.cols.dtype, entries.values.dtype) == (np.int64, np.int64, np.float32)
    flat = entries.rows * reader.n_cols + entries.cols
    assert (np.diff(flat) > 0).all()
    assert (entries.values != 0).all()
    np.testing.assert_array_equal(dense_of(entries, (len(rows), reader.n_cols)), truth[rows])
    np.testing.assert_array_equal(entries.totals(len(rows)), truth[rows].sum(1))
    index = reader.nonzeros(rows)
    assert (index.cols.dtype, index.bounds.dtype, index.n_rows) == (torch.int64, torch.int64, len(rows))
    np.testing.assert_array_equal(index.dense().numpy(), truth[rows])
    np.testing.assert_array_equal(index.totals(), truth[rows].sum(1))
    only = np.arange(len(rows)) % 2 == 0
    np.testing.assert_array_equal(index.only_rows(only).dense().numpy(), truth[rows] * only[:, None])


@pytest.mark.parametrize(("kind", "dtype"), [*COMBINATIONS, ("dense", "bool"), ("csr_array", "bool")])
def test_memory(kind, dtype):
    x = COUNTS.astype(dtype)
    check(open_matrix(CONTAINERS[kind](x)), x.astype(np.float32))


@pytest.mark.parametrize("data", [">f4", ">f8", "<f2", "float32", "int8", "uint64", "longdouble"])
@pytest.mark.parametrize("indices", [">i4", "int32", "int64", "int16"])
def test_numbers_of_any_kind(data, indices):
    x = sp.csr_matrix(COUNTS)
    x.data, x.indices = x.data.astype(data), x.indices.astype(indices)
    x.data.flags.writeable = False
    check(matrices._Sparse(x, None), COUNTS)


def spoil_data(x):
    x.data = x.data[:-5]


def spoil_order(x):
    x.indices[x.indptr[7] : x.indptr[8]] = x.indices[x.indptr[7] : x.indptr[8]][::-1].copy()


def spoil_column(x):
    x.indices[x.indptr[24]] = 99


def spoil_negative(x):
    x.indices[x.indptr[7]] = -1


def spoil_rows(x):
    x.indptr[8] = x.indptr[7] - 1


@pytest.mark.parametrize("spoil", [spoil_data, spoil_order, spoil_column, spoil_negative, spoil_rows])
def test_a_matrix_that_changes_under_the_reader(spoil):
    x = sp.csr_matrix(np.maximum(COUNTS, 1))
    reader = open_matrix(x)
    spoil(x)
    with pytest.raises(DataError, match="has changed since it was set up"):
        reader.nonzeros(ROWS)


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_numpy_matrix():
    check(open_matrix(np.matrix(COUNTS)), COUNTS)


@pytest.fixture(params=["csr", "dense", "csc"])
def on_disk(request, tmp_path):
    x = {"csr": sp.csr_matrix, "dense": np.array, "csc": sp.csc_matrix}[request.param](COUNTS)
    anndata.AnnData(x).write_h5ad(tmp_path / "x.h5ad")
    adata = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    yield adata.X
    adata.file.close()


def open_disk(matrix, *args):
    if getattr(matrix, "format", "") == "csc":
        with pytest.warns(PyrocellWarning, match="by column"):
            return open_matrix(matrix, *args)
    return open_matrix(matrix, *args)


def test_disk(on_disk):
    check(open_disk(on_disk), COUNTS)


def test_disk_without_joined_reads(on_disk, monkeypatch):
    monkeypatch.setattr(matrices, "_GAP_BYTES", 0)
    check(open_disk(on_disk), COUNTS)


def test_disk_rows_and_columns(on_disk):
    rows, cols = np.array([20, 4, 9, 4]), np.array([8, 0, 3])
    check(open_disk(on_disk, rows, cols), COUNTS[np.ix_(rows, cols)], np.array([3, 1, 1, 0]))


def test_disk_no_rows(on_disk):
    assert len(open_disk(on_disk).entries(np.zeros(0, np.int64)).values) == 0


@pytest.mark.parametrize("kind", CONTAINERS)
def test_rows_and_columns(kind):
    rows, cols = np.array([20, 4, 9, 4]), np.array([8, 0, 3])
    check(
        open_matrix(CONTAINERS[kind](COUNTS), rows, cols), COUNTS[np.ix_(rows, cols)], np.array([3, 1, 1, 0])
    )
    check(open_matrix(CONTAINERS[kind](COUNTS), rows), COUNTS[rows], np.array([3, 1, 1, 0]))


def untidy():
    """CSR with unsorted columns, a position stored twice, and a stored zero."""
    data = np.array([2.0, 1.0, 3.0, 0.0, 5.0], np.float32)
    indices, indptr = np.array([3, 1, 3, 0, 2]), np.array([0, 3, 5])
    truth = np.array([[0, 1, 0, 5], [0, 0, 5, 0]], np.float32)
    return sp.csr_matrix((data, indices, indptr), shape=(2, 4)), truth


def test_untidy_sparse_is_read_right_and_left_alone():
    x, truth = untidy()
    check(open_matrix(x), truth, np.array([1, 0, 1]))
    np.testing.assert_array_equal(x.indices, [3, 1, 3, 0, 2])
    np.testing.assert_array_equal(x.data, [2, 1, 3, 0, 5])


def test_untidy_sparse_on_disk(tmp_path):
    x, truth = untidy()
    with h5py.File(tmp_path / "x.h5", "w") as file:
        anndata.io.write_elem(file, "x", x)
        # SciPy or AnnData might tidy up on the way; the file must not be tidy.
        np.testing.assert_array_equal(file["x/indices"][:], [3, 1, 3, 0, 2])
        check(open_matrix(anndata.io.sparse_dataset(file["x"])), truth, np.array([1, 0, 1]))


def test_rows_of_the_users_matrix_are_copies():
    for x in (sp.csr_matrix(COUNTS), COUNTS.copy()):
        entries = open_matrix(x).entries(np.arange(25))
        entries.values[:] = -1
        np.testing.assert_array_equal(x.toarray() if sp.issparse(x) else x, COUNTS)


def test_memory_is_shared_when_columns_stay():
    x = sp.csr_matrix(COUNTS)
    reader = open_matrix(x, np.array([3, 1]))
    assert reader._matrix is x
    assert np.shares_memory(open_matrix(COUNTS, np.array([3, 1]))._matrix, COUNTS)


def test_blocks_cover_everything_once(monkeypatch):
    monkeypatch.setattr(matrices, "_BLOCK", 9 * 4)
    blocks = list(open_matrix(sp.csr_matrix(COUNTS)).blocks())
    assert [(start, n) for start, n, _ in blocks] == [
        (0, 4),
        (4, 4),
        (8, 4),
        (12, 4),
        (16, 4),
        (20, 4),
        (24, 1),
    ]
    np.testing.assert_array_equal(np.concatenate([dense_of(e, (n, 9)) for _, n, e in blocks]), COUNTS)


def test_joined_intervals():
    starts, ends = np.array([0, 5, 30, 32]), np.array([3, 10, 31, 40])
    runs, local = matrices._runs(starts, ends, gap=2)
    assert runs == [(0, 10), (30, 40)]
    np.testing.assert_array_equal(local, [0, 5, 10, 12])
    assert matrices._runs(starts, ends, gap=0)[0] == [(0, 3), (5, 10), (30, 31), (32, 40)]


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.array([["1"]]), "type <U1; expected numbers"),
        (np.zeros((2, 2), complex), "complex128; expected numbers"),
        (np.zeros(3), r"shape \(3,\)"),
        ([[1, 2]], "is a list, which pyrocell cannot read"),
    ],
)
def test_what_cannot_be_read(matrix, message):
    with pytest.raises(DataError, match=message):
        open_matrix(matrix)


def test_a_lazy_array_is_refused():
    class Lazy:
        shape, ndim, dtype, chunks = (2, 2), 2, np.dtype("f4"), ((2,), (2,))

        def compute(self):
            return np.zeros((2, 2))

    with pytest.raises(DataError, match="is a Lazy"):
        open_matrix(Lazy())


@pytest.mark.parametrize("there", ["memory", "file"])
def test_a_row_that_ends_before_it_begins_is_refused(there, tmp_path):
    """Compiled loops would read past the end of the matrix."""
    x = sp.random(20, 8, 0.5, format="csr", dtype=np.float32, random_state=0)
    if there == "memory":
        x.indptr[5] = x.indptr[7] + 1
        opened = x
    else:
        adata = anndata.AnnData(x)
        adata.write_h5ad(tmp_path / "damaged.h5ad")
        with h5py.File(tmp_path / "damaged.h5ad", "r+") as file:
            file["X/indptr"][5] = file["X/indptr"][7] + 1
        opened = anndata.read_h5ad(tmp_path / "damaged.h5ad", backed="r").X
    with pytest.raises(DataError, match="its row 5 ends before it begins"):
        open_matrix(opened)
