"""Labels of which some are unknown: ``Category(unlabeled=True)``."""

from __future__ import annotations

import inspect
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch

from pyrocell.data import Category, Counts, Dataset, Schema, make_setup_anndata, prototype_cells, read_setup
from pyrocell.errors import DataError, PyrocellWarning, SetupError
from tests.data.helpers import make_adata

FIELDS = {"counts": Counts(), "label": Category(unlabeled=True)}


def labelled(values=None):
    """Thirty cells with labels T, B, and Unknown in turn, unless told otherwise."""
    adata = make_adata()
    adata.obs["type"] = np.resize(["T", "Unknown", "B"], 30) if values is None else values
    return adata


def opened(adata, unlabeled_category="Unknown", fields=FIELDS):
    make_setup_anndata(fields, "M")(adata, labels_key="type", unlabeled_category=unlabeled_category)
    schema = Schema.freeze(adata, fields, read_setup(adata, "M"))
    return schema, Dataset(adata, schema, fields).cells(np.arange(30))


def test_arguments():
    signature = inspect.signature(make_setup_anndata(FIELDS, "M"))
    assert signature.parameters["labels_key"].default is inspect.Parameter.empty
    assert signature.parameters["unlabeled_category"].default is None
    assert (
        "unlabeled_category"
        not in inspect.signature(make_setup_anndata({"label": Category()}, "M")).parameters
    )


def test_unknown_is_no_category():
    adata = labelled()
    schema, cells = opened(adata)
    assert schema.names("label") == ["B", "T"]
    assert schema.record("label")["n_labeled"] == [10, 10]
    assert cells.is_labeled.dtype == torch.bool and cells.label.dtype == torch.int64
    known = adata.obs["type"] != "Unknown"
    assert cells.is_labeled.tolist() == known.tolist()
    names = np.array(schema.names("label"))[cells.label.numpy()]
    assert (names[known] == adata.obs["type"][known]).all()
    assert (cells.label[~cells.is_labeled] == 0).all()


def test_unknown_first_and_last_in_the_order_of_categories():
    for categories in (["Unknown", "T", "B"], ["T", "B", "Unknown"], ["T", "Unknown", "B", "never used"]):
        adata = labelled()
        adata.obs["type"] = pd.Categorical(adata.obs["type"], categories=categories)
        schema, cells = opened(adata)
        assert schema.names("label") == ["T", "B"]
        known = cells.is_labeled.numpy()
        assert (np.array(["T", "B"])[cells.label.numpy()][known] == adata.obs["type"][known]).all()


@pytest.mark.parametrize("unlabeled_category", [None, "unknown"])
def test_all_labelled(unlabeled_category):
    with (
        nullcontext() if unlabeled_category is None else pytest.warns(PyrocellWarning, match="does not occur")
    ):
        schema, cells = opened(labelled(np.resize(["T", "B"], 30)), unlabeled_category)
    assert cells.is_labeled.all() and schema.record("label")["n_labeled"] == [15, 15]


def test_a_misspelt_category_is_told_with_the_one_that_may_be_meant():
    with pytest.warns(
        PyrocellWarning, match="'unknown' does not occur.*every cell is taken as labelled.*Unknown"
    ):
        schema, _ = opened(labelled(), "unknown")
    assert "Unknown" in schema.names("label")


def test_a_class_of_the_name_none_is_a_class():
    schema, cells = opened(labelled(np.resize(["None", "T", "B"], 30)), None)
    assert set(schema.names("label")) == {"None", "T", "B"} and cells.is_labeled.all()


def test_a_query_counts_its_own_labels():
    schema, _ = opened(labelled())
    query = labelled(np.resize(["T", "Unknown", "T"], 30))
    found = schema.extend(query, FIELDS)
    names = found.names("label")
    assert dict(zip(names, found.record("label")["n_labeled"], strict=True)) == {"T": 20, "B": 0}
    without = make_adata()
    del without.obs["type"]
    assert schema.extend(without, FIELDS).record("label")["n_labeled"] == [0, 0]


def test_none_labelled_is_refused_by_name():
    with pytest.raises(DataError, match=r"'type'.* is 'Unknown'.*all 30 cells.*their label"):
        opened(labelled(["Unknown"] * 30))


def test_one_labelled_cell_in_a_class():
    schema, cells = opened(labelled(["T"] * 20 + ["B"] + ["Unknown"] * 9))
    assert schema.record("label")["n_labeled"] == [1, 20]
    assert cells.is_labeled.sum() == 21


def test_an_unlabelled_category_counts_as_none():
    fields = {"counts": Counts(), "label": Category(unlabeled=True, min_levels=2)}
    with pytest.raises(DataError, match=r"1 category \('T'\).*at least 2"):
        opened(labelled(["T"] * 20 + ["Unknown"] * 10), fields=fields)


def test_missing_labels_are_named():
    adata = labelled()
    adata.obs["type"] = adata.obs["type"].astype(object)
    adata.obs.loc["c4", "type"] = None
    with pytest.raises(DataError, match=r"missing.*1 cells.*c4"):
        opened(adata)


def test_new_data_may_lack_labels_or_their_column():
    schema, _ = opened(labelled())
    for change in (lambda obs: obs.assign(type="Unknown"), lambda obs: obs.drop(columns="type")):
        adata = labelled()
        adata.obs = change(adata.obs)
        cells = Dataset(adata, schema, FIELDS).cells(np.arange(30))
        assert not cells.is_labeled.any() and (cells.label == 0).all()


def test_new_data_may_not_have_new_labels():
    schema, _ = opened(labelled())
    adata = labelled()
    adata.obs.loc["c3", "type"] = "NK"
    with pytest.raises(DataError, match=r"not seen the categories 'NK' \(1 cells\)"):
        Dataset(adata, schema, FIELDS)


def test_the_column_must_be_there_to_make_a_model():
    adata = labelled()
    del adata.obs["type"]
    with pytest.raises(SetupError, match="labels_key='type'"):
        opened(adata)


def test_prototype_and_record_survive_json():
    schema, _ = opened(labelled())
    again = Schema.from_json(schema.to_json())
    cells = prototype_cells(again)
    assert cells.is_labeled.dtype == torch.bool and cells.is_labeled.shape == (2,)
    assert again.record("label") == schema.record("label")
