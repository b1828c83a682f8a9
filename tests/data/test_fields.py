"""Fields: declared in a class, named after it, and easily extended."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import torch

from pyrocell.data import (
    Argument,
    Categories,
    Category,
    Continuous,
    Counts,
    Dataset,
    Field,
    Frozen,
    Schema,
    SizeFactor,
    column_reader,
    make_setup_anndata,
    prototype_cells,
    read_setup,
    tensor_like,
)
from pyrocell.errors import DataError, SetupError
from tests.data.helpers import make_adata, make_counts


def test_a_field_takes_its_name_from_the_class():
    class Model:
        counts = Counts()
        label = Category()

    assert Model.counts.name == "counts"
    assert repr(Model.label) == "Category('label')"
    assert Model.label.argument == "labels_key"


@pytest.mark.parametrize(
    ("name", "field", "argument"),
    [
        ("counts", Counts(), "layer"),
        ("accessibility", Counts(), "accessibility_layer"),
        ("batch", Category(), "batch_key"),
        ("label", Category(), "labels_key"),
        ("sample", Category(argument="sample_id"), "sample_id"),
        ("size_factor", SizeFactor(), "size_factor_key"),
        ("categorical_covariates", Categories(), "categorical_covariate_keys"),
        ("continuous_covariates", Continuous(), "continuous_covariate_keys"),
    ],
)
def test_arguments(name, field, argument):
    assert field.renamed(name).argument == argument
    assert field.renamed(name).arguments()[0].name == argument
    assert field.name == ""


def test_one_field_object_under_two_names():
    shared = Category()
    fields = {"counts": Counts(), "batch": shared, "label": shared}
    adata = make_adata()
    make_setup_anndata(fields, "M")(adata, batch_key="lane", labels_key="type")
    schema = Schema.freeze(adata, fields, read_setup(adata, "M"))
    cells = Dataset(adata, schema, fields).cells(np.arange(30))
    assert schema.sizes is not None
    assert (schema.size("batch"), schema.size("label")) == (2, 3)
    assert cells.label.max() == 2


def test_own_words_in_the_documentation():
    function = make_setup_anndata({"sample": Category(optional=True, min_levels=2, doc="Where from.")}, "M")
    assert "sample_key : str, optional\n    Where from. At least 2 categories." in function.__doc__


def test_two_matrices_of_counts():
    fields = {"counts": Counts(), "accessibility": Counts()}
    adata = make_adata()
    adata.layers["atac"] = make_counts(seed=5)
    schema = Schema.freeze(adata, fields, {"accessibility_layer": "atac"})
    cells = Dataset(adata, schema, fields).cells(np.array([4, 2]))
    np.testing.assert_array_equal(cells.accessibility, make_counts(seed=5)[[4, 2]])
    np.testing.assert_array_equal(cells.accessibility_library[:, 0], make_counts(seed=5)[[4, 2]].sum(1))
    np.testing.assert_array_equal(cells.library[:, 0], make_counts()[[4, 2]].sum(1))


class Coordinates(Field):
    """Position of each cell: float32, shape (n_cells, n_dimensions)."""

    def arguments(self):
        return [Argument("spatial_key", "str", "Entry of ``adata.obsm``.", default="spatial")]

    def check_setup(self, slots, setup):
        slots.obsm(setup["spatial_key"], "spatial_key")

    def freeze(self, slots, setup):
        n = slots.obsm(setup["spatial_key"], "spatial_key").shape[1]
        names = [f"dimension {i}" for i in range(n)]
        return Frozen({"given": True, "names": names, "cells": {self.name: tensor_like("float32", n)}})

    def open(self, slots, setup, record):
        values = np.asarray(slots.obsm(setup["spatial_key"], "spatial_key"), dtype=float)
        if values.shape[1] != len(record["names"]):
            raise DataError("other dimensions")
        return column_reader(self.name, values)


def test_a_field_of_ones_own(tmp_path):
    fields = {"counts": Counts(), "position": Coordinates()}
    setup = make_setup_anndata(fields, "Spatial")
    adata = make_adata()
    with pytest.raises(
        SetupError, match=r"spatial_key='spatial': adata.obsm has no such entry. Available: none"
    ):
        setup(adata)
    adata.obsm["xy"] = np.random.default_rng(0).normal(size=(30, 2))
    setup(adata, spatial_key="xy")
    schema = Schema.from_json(Schema.freeze(adata, fields, read_setup(adata, "Spatial")).to_json())
    cells = Dataset(adata, schema, fields).cells(np.array([3, 1]))
    np.testing.assert_allclose(cells.position, adata.obsm["xy"][[3, 1]], rtol=1e-6)
    assert prototype_cells(schema).position.shape == (2, 2)
    assert schema.size("position") == 2
    adata.obsm["xy"] = np.zeros((30, 3))
    with pytest.raises(DataError, match="other dimensions"):
        Dataset(adata, schema, fields)


def test_column_reader_types():
    read = column_reader("x", np.array([3, 4, 5], dtype=np.int8))
    assert read(np.array([2, 2]))["x"].tolist() == [5, 5]
    assert read(np.array([0]))["x"].dtype == torch.int64
    assert column_reader("x", np.zeros((3, 2)))(np.array([0]))["x"].dtype == torch.float32


def test_a_reader_holds_a_copy():
    values = np.array([1.0, 2.0], dtype=np.float32)
    read = column_reader("x", values)
    values[:] = 9
    assert read(np.array([0, 1]))["x"].tolist() == [1, 2]


def test_fields_work_on_real_anndata_only():
    with pytest.raises(SetupError, match="Got a dict"):
        Schema.freeze({}, {"counts": Counts()}, {})


def test_string_genes_from_integer_names():
    adata = anndata.AnnData(make_counts())
    schema = Schema.freeze(adata, {"counts": Counts()}, {})
    assert schema.names("counts")[:2] == ["0", "1"]
    assert (
        Dataset(adata[:, ::-1], schema, {"counts": Counts()}).cells(np.array([0])).counts[0, 0]
        == adata.X[0, 0]
    )
