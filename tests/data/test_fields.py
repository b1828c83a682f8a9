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


def reading(adata, names, fields, **setup):
    """Data of which some features are read, as a model's constructor does it."""
    make_setup_anndata(fields, "Model")(adata, **setup)
    schema = Schema.freeze(adata, fields, read_setup(adata, "Model"), features={"counts": names})
    return Dataset(adata, schema, fields, check=False)


def fields_with_totals():
    counts = Counts()
    return {"counts": counts.renamed("counts"), "size_factor": SizeFactor(total_of=counts.renamed("counts"))}


def test_some_features_are_read_in_the_order_asked_for():
    adata = make_adata()
    names = [adata.var_names[i] for i in (7, 0, 3)]
    data = reading(adata, names, {"counts": Counts()})
    cells = data.cells(np.arange(5))
    expected = adata[:5, names].X
    np.testing.assert_array_equal(cells.counts.numpy(), np.asarray(expected))
    np.testing.assert_array_equal(cells.library.numpy()[:, 0], np.asarray(expected).sum(1))
    assert data.schema.names("counts") == names
    with pytest.raises(
        DataError, match=r"1 of the 2 features that the model is to read.*'nowhere'.*Leave them out"
    ):
        reading(adata, [names[0], "nowhere"], {"counts": Counts()})
    with pytest.raises(TypeError, match="no features to choose from"):
        Schema.freeze(adata, {"batch": Category(optional=True)}, {}, features={"batch": names})


def test_a_size_that_is_left_out_is_the_total_over_all_features():
    adata, fields = make_adata(), fields_with_totals()
    names = list(adata.var_names[:3])
    totals = np.asarray(adata.X).sum(1)
    data = reading(adata, names, fields)
    np.testing.assert_array_equal(data.cells(np.arange(30)).size_factor.numpy()[:, 0], totals)
    assert prototype_cells(data.schema).size_factor.shape == (2, 1) and not data.schema.has("size_factor")
    fewer = adata[:, adata.var_names[:-1]].copy()
    with pytest.raises(
        DataError, match=f"Without size_factor_key.*{adata.var_names[-1]!r}.*size_factor_key="
    ):
        Dataset(fewer, data.schema, fields)
    query = data.schema.extend(fewer, fields)  # what a query lacks is taken for zeros
    np.testing.assert_array_equal(
        Dataset(fewer, query, fields).cells(np.arange(30)).size_factor.numpy()[:, 0],
        np.asarray(fewer.X).sum(1),
    )
    given = reading(adata, names, fields, size_factor_key="size")
    np.testing.assert_allclose(
        given.cells(np.arange(30)).size_factor.numpy()[:, 0], adata.obs["size"], rtol=1e-6
    )
    Dataset(fewer, given.schema, fields)
