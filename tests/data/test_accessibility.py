"""The field of accessibility: what is read, what is told, what is refused."""

from __future__ import annotations

import logging

import anndata
import numpy as np
import pytest
from scipy import sparse

from pyrocell import settings
from pyrocell.data import Accessibility, Cells, Counts, Dataset, Schema
from pyrocell.distributions import NonZeros
from pyrocell.errors import DataError, PyrocellWarning, SetupError

FIELDS = {"accessibility": Accessibility()}
VALUES = np.array([[1, 0, 3, 0], [0, 2, 0, 1], [1, 1, 1, 1]], dtype=np.float32)


def regions(values=VALUES):
    adata = anndata.AnnData(sparse.csr_matrix(values))
    adata.var_names = [f"chr1:{j}00-{j}99" for j in range(adata.n_vars)]
    adata.obs_names = [f"cell{i}" for i in range(adata.n_obs)]
    return adata


def freeze(adata, **setup):
    schema = Schema.freeze(adata, FIELDS, setup)
    return Dataset(adata, schema, FIELDS, check=False)


def read(adata, rows=None) -> Cells:
    dataset = freeze(adata)
    return dataset.cells(np.arange(dataset.n_cells) if rows is None else rows)


@pytest.mark.parametrize("convert", [sparse.csr_matrix, sparse.csc_matrix, lambda x: x.toarray()], ids=str)
def test_values_above_zero_are_ones_with_their_index(convert):
    adata = regions()
    adata.X = convert(adata.X)
    cells = read(adata, np.array([2, 0, 0]))
    np.testing.assert_array_equal(cells.accessibility, (VALUES > 0)[[2, 0, 0]])
    np.testing.assert_array_equal(cells.accessibility_library, [[4], [2], [2]])
    known = NonZeros.known(cells.accessibility)
    assert known is not None and (known.values == 1).all() and len(known) == 8


def test_stored_zeros_are_closed():
    adata = regions()
    adata.X.data[0] = 0.0
    assert read(adata).accessibility[0].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("values", "said"), [(VALUES, "up to 3"), (VALUES * 0.25, "up to 0.75"), (VALUES > 0, None)], ids=str
)
def test_what_is_not_binary_is_told_once(values, said, caplog, monkeypatch):
    monkeypatch.setattr(settings.logger, "propagate", True)
    with caplog.at_level(logging.INFO, logger="pyrocell"):
        dataset = freeze(regions(np.asarray(values, dtype=np.float32)))
        dataset.cells(np.arange(3))
    assert len(caplog.messages) == (said is not None)
    if said:
        assert said in caplog.messages[0] and "not binary" in caplog.messages[0]


def test_regions_that_are_never_open_are_named_with_the_remedy():
    values = np.ones((3, 9), dtype=np.float32)
    values[:, [1, 2, 3, 4, 5, 8]] = 0
    with pytest.warns(
        PyrocellWarning, match="6 of 9 regions.*open in no cell.*'chr1:100-199'.*1 more.*filter_genes"
    ):
        dataset = freeze(regions(values))
    assert dataset.cells(np.array([0])).accessibility.sum() == 3
    few = regions(values[:, [0, 6]])
    few.var_names = ["chr1:000-099", "chr1:600-699"]
    Dataset(regions(values), dataset.schema, FIELDS)  # of other data they are no news


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([0, 0, 0, 0], "1 cells have no counts.*'cell1'"),
        ([0, -1, 0, 1], "negative.*cell 'cell1', feature 'chr1:100-199'"),
        ([0, np.nan, 0, 1], "NaN or infinite.*'cell1'"),
    ],
    ids=["empty", "negative", "nan"],
)
def test_what_cannot_be_read_is_refused_by_name(row, said):
    values = VALUES.copy()
    values[1] = row
    with pytest.raises(DataError, match=said):
        freeze(regions(values))
    good = freeze(regions())
    with pytest.raises(DataError, match=said):
        Dataset(regions(values), good.schema, FIELDS)


def test_arguments_and_layer():
    main = Accessibility().renamed("accessibility")
    assert [argument.name for argument in main.arguments()] == ["layer"]
    beside = Accessibility().renamed("peaks")
    assert beside.argument == "peaks_layer" and beside.library == "peaks_library"
    adata = regions()
    adata.layers["binary"] = sparse.csr_matrix(1 - (VALUES > 0) + (VALUES == 1))
    assert freeze(adata, layer="binary").cells(np.array([0])).accessibility.tolist() == [[1, 1, 0, 1]]
    with pytest.raises(SetupError, match="layer='peak'"):
        freeze(adata, layer="peak")


def test_counts_and_accessibility_live_side_by_side():
    fields = {"counts": Counts(), "accessibility": Accessibility(argument="accessibility_layer")}
    adata = regions()
    adata.layers["peaks"] = adata.X.copy()
    setup = {"layer": None, "accessibility_layer": "peaks", "allow_noninteger": False}
    schema = Schema.freeze(adata, fields, setup)
    cells = Dataset(adata, schema, fields, check=False).cells(np.array([0]))
    assert cells.counts.tolist() == [[1, 0, 3, 0]] and cells.accessibility.tolist() == [[1, 0, 1, 0]]
    assert (cells.library.item(), cells.accessibility_library.item()) == (4, 2)
