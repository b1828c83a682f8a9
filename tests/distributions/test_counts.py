"""The index of non-zero counts."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.sparse
import torch

from pyrocell.distributions import NonZeros, attach_nonzeros, log1p_counts
from tests.distributions.families import sparse_counts


def assert_indexes(nonzeros: NonZeros, x: torch.Tensor) -> None:
    rows, cols = x.nonzero().T
    assert torch.equal(nonzeros.rows, rows)
    assert torch.equal(nonzeros.cols, cols)
    assert torch.equal(nonzeros.flat, rows * x.shape[1] + cols)
    assert torch.equal(nonzeros.values, x[rows, cols])
    assert len(nonzeros) == len(rows)


@pytest.mark.parametrize("n_columns", [5, 300, 70_000])
def test_entries_by_column(n_columns: int) -> None:
    x = torch.zeros(9, n_columns)
    torch.manual_seed(0)
    places = torch.randperm(x.numel())[:30]
    x.view(-1)[places] = torch.arange(1.0, 31.0)
    nonzeros = NonZeros.of(x)
    cols, rows = x.T.nonzero().T
    found = nonzeros.by_column
    assert torch.equal(found.rows, rows)
    assert torch.equal(found.values, x[rows, cols])
    sizes = (x != 0).sum(0)
    assert torch.equal(found.starts, sizes.cumsum(0) - sizes)
    sizes = (x != 0).sum(1)
    assert torch.equal(nonzeros.row_starts, sizes.cumsum(0) - sizes)


def test_other_values_at_the_same_places() -> None:
    x = sparse_counts()
    nonzeros = NonZeros.of(x)
    doubled = nonzeros.with_values(2 * nonzeros.values)
    assert_indexes(doubled, 2 * x)
    assert NonZeros.known(x) is nonzeros
    assert NonZeros.known(x.clone()) is None


def test_search_and_cache() -> None:
    x = sparse_counts()
    found = NonZeros.of(x)
    assert_indexes(found, x)
    assert NonZeros.of(x) is found


def test_the_cache_notices_changes_in_place() -> None:
    x = sparse_counts()
    before = NonZeros.of(x)
    x[0, 0] += 7
    after = NonZeros.of(x)
    assert after is not before
    assert_indexes(after, x)


def test_counts_made_in_inference_mode() -> None:
    with torch.inference_mode():
        x = sparse_counts()
        assert_indexes(NonZeros.of(x), x)


@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_attach_from_a_sparse_matrix_with_stored_zeros(index: type) -> None:
    x = sparse_counts()
    matrix = scipy.sparse.csr_matrix(x.numpy())
    matrix.data[::5] = 0
    dense = torch.from_numpy(matrix.toarray())
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr)).astype(index)
    assert attach_nonzeros(dense, rows, matrix.indices.astype(index), matrix.data) is dense
    assert_indexes(NonZeros.of(dense), dense)


def test_attach_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="2, 2 and 3 entries; give one of each"):
        attach_nonzeros(torch.zeros(2, 2), [0, 1], [0, 1], [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("rows", "cols"), [([1, 0], [0, 1]), ([0, 0], [1, 1]), ([0], [2]), ([2], [0]), ([-1], [0]), ([1], [-1])]
)
def test_entries_out_of_order_or_place_are_refused(rows: list[int], cols: list[int]) -> None:
    with pytest.raises(ValueError, match="2 x 2 counts row by row"):
        attach_nonzeros(torch.zeros(2, 2), rows, cols, [1.0] * len(rows))


def test_a_deep_copy_keeps_a_right_index() -> None:
    x = sparse_counts()
    NonZeros.of(x)
    assert_indexes(NonZeros.of(copy.deepcopy(x)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_log1p_counts(dtype: torch.dtype) -> None:
    x = sparse_counts(dtype)
    expected = torch.log1p(x if x.is_floating_point() else x.float())
    torch.testing.assert_close(log1p_counts(x), expected, rtol=0, atol=0)


def test_log1p_of_an_index_is_an_index():
    for dtype in (torch.float32, torch.float64, torch.int64):
        x = sparse_counts(dtype)
        logs = log1p_counts(NonZeros.of(x))
        assert isinstance(logs, NonZeros)
        assert logs.values.dtype == torch.float32
        assert torch.equal(logs.dense(), torch.log1p(x.float()))


def test_an_index_of_other_counts_is_refused():
    index = NonZeros.of(torch.eye(3))
    with pytest.raises(ValueError, match="3 rows of 3"):
        index.attach_to(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="3 rows of 3"):
        index.attach_to(torch.zeros(9, 1))
