"""Constructor arguments survive saving: arrays, tables and series among them."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from scipy import sparse

from pyrocell import CellModel
from pyrocell.data import Counts, synthetic_iid
from pyrocell.distributions import Poisson
from pyrocell.errors import LoadError
from pyrocell.models.packing import pack, shortened, unpack


def back(value):
    """Go through JSON and through the bytes of tensors, as a file does."""
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(pack(value, tensors)))
    return unpack(packed, {name: tensor.clone() for name, tensor in tensors.items()})


ARRAYS = [
    np.arange(6, dtype=np.int8).reshape(2, 3),
    np.array([[0.1, -0.0], [np.inf, 1e-45]], dtype=np.float32),
    np.array([np.pi, np.nextafter(1, 2)]),
    np.array([2**64 - 1], dtype=np.uint64),
    np.array([1, 2], dtype=">i4"),
    np.array([[True], [False]]),
    np.array(3.5, dtype=np.float16),
    np.zeros((0, 4)),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array([["CD3", "é"], ["", "CD19"]]),
    np.array(["a", None], dtype=object),
    np.arange(10)[::3],
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_arrays(array):
    found = back(array)
    assert isinstance(found, np.ndarray) and found.shape == array.shape
    assert np.array_equal(found, array)
    assert found.dtype == array.dtype.newbyteorder("=")
    assert found.flags.writeable


def test_missing_numbers_stay_missing():
    found = back({"a": np.array([1.0, np.nan]), "b": pd.Series([np.nan, 2.0])})
    assert np.isnan(found["a"][1]) and np.isnan(found["b"].iloc[0])


TABLES = [
    pd.DataFrame({"T": [1, 0, 1], "B": [0.5, 1.0, np.nan]}, index=["CD3", "CD19", "MS4A1"]),
    pd.DataFrame(
        {"name": ["x", None], "kind": pd.Categorical(["b", "a"], categories=["b", "a", "c"], ordered=True)}
    ),
    pd.DataFrame(np.eye(3, dtype=bool), columns=[2, 0, 1]),
    pd.DataFrame({"a": pd.array(["x", pd.NA], dtype="string"), "b": np.array([1, 2], dtype=np.int16)}),
    pd.DataFrame(index=pd.Index(["g0", "g1"], name="gene")),
    pd.DataFrame([[1, 2]], columns=["same", "same"]),
]


@pytest.mark.parametrize("table", TABLES, ids=range(len(TABLES)))
def test_tables(table):
    pd.testing.assert_frame_equal(back(table), table)


@pytest.mark.parametrize(
    "series",
    [
        pd.Series([1.5, 2.0], index=["a", "b"], name="weights"),
        pd.Series(["x", "y"]),
        pd.Series(pd.Categorical(["b", "a", "b"])),
        pd.Series([True, False], index=[3, 1]),
    ],
)
def test_series(series):
    pd.testing.assert_series_equal(back(series), series)


def test_plain_values_and_nesting():
    value = {
        "a": [1, 2.5, None, True, "x"],
        "b": {"c": np.float32(0.5), "d": [np.arange(2)]},
        "t": torch.eye(2),
    }
    found = back(value)
    assert found["a"] == value["a"] and found["b"]["c"] == 0.5
    assert np.array_equal(found["b"]["d"][0], [0, 1]) and torch.equal(found["t"], torch.eye(2))
    pd.testing.assert_index_equal(back(pd.Index(["x", "y"], name="g")), pd.Index(["x", "y"], name="g"))
    assert list(back(pd.Categorical(["x", "y"]))) == ["x", "y"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"markers": object()}, "argument markers is of type object, which cannot be saved"),
        ({"m": sparse.csr_matrix((2, 2))}, "argument m is of type csr_matrix"),
        ({"f": len}, "argument f is of type builtin_function_or_method"),
        ({"t": {"x": np.array([{}, 1], dtype=object)}}, "argument t.x is of type array of object"),
        ({"t": np.array([1j])}, "array of complex128"),
        ({"t": pd.DataFrame({"when": pd.to_datetime(["2020-01-01"])})}, "column of datetime64"),
        ({"t": pd.DataFrame({"mixed": ["a", 1]})}, "column of object"),
        ({"t": pd.Series([1], index=pd.MultiIndex.from_tuples([(1, 2)]))}, "MultiIndex"),
        ({"t": {"pyrocell:kind": 1}}, "reserved"),
    ],
)
def test_what_cannot_be_saved_is_named(value, message):
    with pytest.raises(TypeError, match=message):
        pack(value, {})


@pytest.mark.parametrize(
    "damage",
    [
        {"pyrocell:kind": "array", "name": "gone", "dtype": "<f4", "shape": [2]},
        {"pyrocell:kind": "array", "name": "x", "dtype": "<f4", "shape": [3]},
        {"pyrocell:kind": "array", "name": "x", "dtype": "O", "shape": [1]},
        {"pyrocell:kind": "unknown"},
        {"pyrocell:kind": "categorical", "codes": [7], "categories": ["a"], "ordered": False},
        {"pyrocell:kind": "texts", "dtype": "str"},
    ],
)
def test_damage_is_told(damage):
    with pytest.raises(LoadError, match="damaged"):
        unpack({"a": damage}, {"x": torch.zeros(8, dtype=torch.uint8)})


def test_arguments_are_spelled_in_one_line():
    assert shortened(np.zeros((3, 4))) == "ndarray of shape (3, 4)"
    assert shortened(TABLES[0]) == "DataFrame of shape (3, 2)"
    assert shortened("x") == "'x'"


class Markers(CellModel):
    """Mean expression of cell types from a table of markers."""

    counts = Counts()

    def __init__(self, adata, markers, weights, names=("a", "b")):
        super().__init__(adata)
        self.markers, self.names = markers, list(names)
        self.rates = torch.nn.Parameter(torch.zeros(self.data.size("counts")))
        self.weights = torch.tensor(weights, dtype=torch.float32)

    def model(self, cells):
        with self.plate(cells):
            rates = cells.library * (self.rates + self.weights).softmax(-1)
            pyro.sample("x", Poisson(rates).to_event(1), obs=cells.counts)

    def guide(self, cells):
        pass


def test_a_model_with_a_table_is_saved_and_loaded(tmp_path):
    adata = synthetic_iid(60, 8)
    Markers.setup_anndata(adata)
    markers = pd.DataFrame({"B": [1, 0], "T": [0, 1]}, index=["gene_1", "gene_5"])
    model = Markers(adata, markers, np.linspace(0, 1, 8))
    model.train(2, device="cpu")
    model.save(tmp_path)
    assert "markers=DataFrame of shape (2, 2)" in repr(model)
    again = Markers.load(tmp_path, adata)
    pd.testing.assert_frame_equal(again.markers, markers)
    pd.testing.assert_frame_equal(again.constructor["markers"], markers)
    assert np.array_equal(again.constructor["weights"], np.linspace(0, 1, 8))
    assert np.array_equal(again.get_elbo(return_mean=False), model.get_elbo(return_mean=False))
    again.save(tmp_path, overwrite=True)  # what was read can be written
    pd.testing.assert_frame_equal(Markers.load(tmp_path).markers, markers)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    "part", [{"block": 5}, {"block": [5, 6, 7]}, {"values": [5, 6, 7]}, {"values": [[1], [2], [3]]}]
)
def test_a_table_whose_values_are_fewer_than_its_labels_is_refused(part):
    """pandas would repeat one number for as many labels as a file names: a few bytes for gigabytes."""
    frame = pd.DataFrame(np.ones((2, 3)), index=["a", "b"], columns=["x", "y", "z"])
    tensors = {}
    packed = pack(frame, tensors)
    del packed["block"]
    with pytest.raises(LoadError, match="damaged"):
        unpack(packed | part, tensors)
