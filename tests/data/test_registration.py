"""setup_anndata: a signature made from fields, one JSON record, and nothing else changed."""

from __future__ import annotations

import copy
import inspect
import json
import pydoc

import anndata
import numpy as np
import pytest

from pyrocell.data import Category, Counts, make_setup_anndata, read_setup
from pyrocell.errors import SetupError
from tests.data.helpers import FIELDS, SETUP, make_adata

setup_anndata = make_setup_anndata(FIELDS, "SCVI")


def test_signature():
    parameters = inspect.signature(setup_anndata).parameters
    assert list(parameters) == [
        "adata",
        "layer",
        "batch_key",
        "labels_key",
        "size_factor_key",
        "categorical_covariate_keys",
        "continuous_covariate_keys",
        "allow_noninteger",
    ]
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name != "adata")
    assert parameters["batch_key"].default is None
    assert parameters["allow_noninteger"].default is False
    assert parameters["batch_key"].annotation == "str | None"
    assert setup_anndata.__name__ == "setup_anndata"
    assert setup_anndata.__qualname__ == "SCVI.setup_anndata"


def test_required_arguments_have_no_default_and_come_first():
    function = make_setup_anndata({"counts": Counts(), "label": Category(min_levels=2)}, "M")
    parameter = list(inspect.signature(function).parameters.values())[1]
    assert parameter.name == "labels_key"
    assert parameter.default is parameter.empty
    with pytest.raises(TypeError, match="labels_key"):
        function(make_adata())


def test_a_shared_argument_is_there_once():
    function = make_setup_anndata({"counts": Counts(), "accessibility": Counts()}, "M")
    assert list(inspect.signature(function).parameters) == [
        "adata",
        "layer",
        "accessibility_layer",
        "allow_noninteger",
    ]


def test_help_can_be_read():
    text = pydoc.plain(pydoc.render_doc(setup_anndata))
    flowing = " ".join(text.split())
    for words in (
        "setup_anndata(adata: 'AnnData', *, layer: 'str | None' = None",
        "Say where the data for SCVI are",
        "batch_key : str, optional\n",
        "in which batch (sample, lane, donor, experiment)",
        "allow_noninteger : bool, default False\n",
    ):
        assert words in text
    assert "whole numbers, neither normalised nor log-transformed" in flowing
    assert max(map(len, inspect.getdoc(setup_anndata).splitlines())) <= 110


def test_one_record_and_no_other_change():
    adata = make_adata()
    adata.uns["mine"] = {"a": 1}
    before = copy.deepcopy(adata)
    assert setup_anndata(adata, **SETUP) is None
    assert sorted(adata.uns) == ["mine", "pyrocell"]
    assert json.loads(adata.uns["pyrocell"]) == {"format": 1, "setups": {"SCVI": SETUP}}
    assert adata.obs.equals(before.obs)
    assert adata.var.equals(before.var)
    np.testing.assert_array_equal(adata.X, before.X)
    assert read_setup(adata, "SCVI") == SETUP


def test_models_do_not_overwrite_each_other():
    adata = make_adata()
    setup_anndata(adata, batch_key="lane")
    make_setup_anndata(FIELDS, "Other")(adata, batch_key="kit", allow_noninteger=True)
    setup_anndata(adata, labels_key="type")
    assert read_setup(adata, "SCVI") == {"labels_key": "type"}
    assert read_setup(adata, "Other") == {"batch_key": "kit", "allow_noninteger": True}


def test_the_record_survives_copies_views_and_files(tmp_path):
    adata = make_adata()
    setup_anndata(adata, **SETUP)
    adata.write_h5ad(tmp_path / "x.h5ad")
    for other in (adata.copy(), adata[:5], adata[:5].copy(), anndata.read_h5ad(tmp_path / "x.h5ad")):
        assert read_setup(other, "SCVI") == SETUP


def test_backed(tmp_path):
    make_adata().write_h5ad(tmp_path / "x.h5ad")
    adata = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    with pytest.raises(SetupError, match="view of a backed AnnData"):
        setup_anndata(adata[:4])
    setup_anndata(adata, batch_key="lane")
    assert read_setup(adata[:4], "SCVI") == {"batch_key": "lane"}
    adata.file.close()


def test_keys_are_looked_up_at_once_and_nothing_is_written():
    adata = make_adata()
    with pytest.raises(SetupError, match=r"batch_key='lan'.*Did you mean 'lane'"):
        setup_anndata(adata, batch_key="lan")
    with pytest.raises(SetupError, match="layer='raw'"):
        setup_anndata(adata, layer="raw")
    assert "pyrocell" not in adata.uns


def test_wrong_arguments():
    with pytest.raises(
        TypeError, match=r"SCVI.setup_anndata\(\) has no argument 'bach_key'. Did you mean 'batch_key'\?"
    ):
        setup_anndata(make_adata(), bach_key="lane")
    with pytest.raises(TypeError, match="wrong arguments"):
        setup_anndata(make_adata(), "counts")
    with pytest.raises(SetupError, match="Got a ndarray; expected an AnnData"):
        setup_anndata(np.zeros((3, 2)))


def test_data_that_were_not_set_up():
    adata = make_adata()
    with pytest.raises(SetupError, match=r"not set up for SCVI. Call SCVI.setup_anndata\(adata"):
        read_setup(adata, "SCVI")
    make_setup_anndata(FIELDS, "Other")(adata)
    with pytest.raises(SetupError, match=r"They are set up for 'Other'\. Call SCVI"):
        read_setup(adata, "SCVI")


@pytest.mark.parametrize("record", ["{", 3, '{"format": 2, "setups": {}}', '{"format": 1}', "[]"])
def test_a_record_that_cannot_be_read(record):
    adata = make_adata()
    adata.uns["pyrocell"] = record
    for use in (lambda: read_setup(adata, "SCVI"), lambda: setup_anndata(adata)):
        with pytest.raises(SetupError, match="Delete it"):
            use()


def test_a_model_without_fields():
    adata = make_adata()
    make_setup_anndata({}, "Empty")(adata)
    assert read_setup(adata, "Empty") == {}
