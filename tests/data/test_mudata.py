"""MuData seen through the same fields as AnnData."""

from __future__ import annotations

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from pyrocell.data import Category, Continuous, Counts, Dataset, Proteins, Schema, read_setup, setup_of
from pyrocell.data.registration import complete_setup, make_setup_anndata, make_setup_mudata
from pyrocell.data.slots import open_slots
from pyrocell.errors import DataError, LoadError, SetupError
from tests.multimodal import (
    MODALITIES,
    N_CELLS,
    WITH_PROTEINS,
    as_mudata,
    make_adata,
    mudata_of,
    nothing_pulled,  # noqa: F401
    real_data,
)

pytestmark = pytest.mark.usefixtures("nothing_pulled")

FIELDS = {
    "counts": Counts(),
    "proteins": Proteins(),
    "batch": Category(optional=True),
    "continuous_covariates": Continuous(),
}
COLUMNS = {"batch_key": "batch", "continuous_covariate_keys": ["age"]}
ONE = {"layer": "counts", **COLUMNS, **WITH_PROTEINS}
MANY = {"modalities": MODALITIES, "layer": "counts", "protein_mask_layer": "measured", **COLUMNS}
RNA = {"counts": "rna"}
ONLY_RNA = {"counts": Counts(), "batch": Category(optional=True)}


def open_data(data, setup, fields=None):
    fields = fields or FIELDS
    return Dataset(data, Schema.freeze(data, fields, setup), fields)


def assert_same_cells(one, other, names=None):
    assert one.names() == other.names()
    for name in names or one.names():
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name


def all_cells(dataset, names=None):
    rows = np.arange(dataset.n_cells) if names is None else dataset.obs_names.get_indexer(names)
    return dataset.cells(rows)


@pytest.fixture
def adata():
    return make_adata()


@pytest.fixture
def mdata(adata):
    return as_mudata(adata, seed=1)


def test_the_same_schema_and_tensors_either_way(adata, mdata):
    one, many = open_data(adata, ONE), open_data(mdata, MANY)
    assert one.schema.fields == many.schema.fields
    assert one.schema.statistics == many.schema.statistics
    assert one.schema.n_cells == many.schema.n_cells == N_CELLS
    cells = all_cells(one)
    assert_same_cells(cells, all_cells(many))
    assert not cells.proteins_mask[::8].any() and not cells.proteins[::8].any()
    assert cells.proteins_mask.any()
    some = np.array([5, 0, 5, 159])
    assert_same_cells(one.cells(some), many.cells(some))
    assert Schema.from_json(many.schema.to_json()) == many.schema


def test_order_of_modalities_and_cells_changes_nothing(adata, mdata):
    one = open_data(mdata, MANY)
    names = one.obs_names
    for seed, swapped in ((None, False), (2, False), (3, True)):
        other = as_mudata(adata, seed=seed, swapped=swapped)
        two = open_data(other, MANY | {"modalities": dict(reversed(MODALITIES.items()))})
        assert two.schema.fields.keys() == one.schema.fields.keys()
        for name in ("counts", "proteins", "batch"):
            assert two.schema.fields[name] == one.schema.fields[name]
        seen = Dataset(other, one.schema, FIELDS)
        assert_same_cells(all_cells(one, names), all_cells(seen, names), one.cells(np.arange(1)).names())
    assert list(two.obs_names) != list(names)  # swapped and shuffled: the test saw another order


def test_views_files_and_containers(mdata, tmp_path):
    expected = all_cells(open_data(mdata, MANY))
    rows = np.array([40, 41, 8, 3])
    schema = Schema.freeze(mdata, FIELDS, MANY)
    view = mdata[mdata.obs_names[rows]]
    assert view.is_view
    assert_same_cells(
        all_cells(Dataset(mdata, schema, FIELDS), view.obs_names),
        all_cells(Dataset(view, schema, FIELDS)),
        ["counts", "proteins"],
    )
    mdata.write(tmp_path / "data.h5mu")
    backed = mudata.read_h5mu(tmp_path / "data.h5mu", backed="r")
    assert_same_cells(expected, all_cells(open_data(backed, MANY)))
    backed.file.close()
    for convert in (sp.csc_matrix, sp.csr_array, np.asarray):
        for part in mdata.mod.values():
            dense = part.X.toarray() if sp.issparse(part.X) else part.X
            part.X = convert(dense)
        assert_same_cells(expected, all_cells(open_data(mdata, MANY)))


def test_features_are_aligned_within_each_modality(adata, mdata):
    one = open_data(mdata, MANY)
    other = mudata_of({name: part[:, ::-1].copy() for name, part in mdata.mod.items()}, mdata.obs)
    assert_same_cells(all_cells(one), all_cells(Dataset(other, one.schema, FIELDS)))


def test_two_fields_may_read_one_modality(mdata):
    fields = {"counts": Counts(), "spliced": Counts()}
    schema = Schema.freeze(
        mdata, fields, {"modalities": {"counts": "rna", "spliced": "rna"}, "spliced_layer": "counts"}
    )
    cells = Dataset(mdata, schema, fields).cells(np.arange(3))
    assert torch.equal(cells.counts, cells.spliced)


def test_features_of_two_modalities_may_have_the_same_names(mdata):
    mdata.mod["protein"].var_names = [*mdata.mod["rna"].var_names[:8]]
    assert open_data(mdata, MANY).schema.names("proteins") == list(mdata.mod["rna"].var_names[:8])


# cells that a modality lacks


def test_cells_without_counts_are_refused_by_name(adata):
    mdata = as_mudata(adata)
    swapped = {"modalities": {"counts": "protein"}}
    message = r"20 cells have no 'protein': 'cell_0', 'cell_8'.*needs the counts .*mdata\[mdata.mod\['protein'\].obs_na"
    with pytest.raises(DataError, match=message):
        Schema.freeze(mdata, ONLY_RNA, swapped)
    kept = mdata[mdata.mod["protein"].obs_names].copy()
    assert open_data(kept, swapped, ONLY_RNA).n_cells == 140
    schema = Schema.freeze(kept, ONLY_RNA, swapped)
    with pytest.raises(DataError, match="20 cells have no 'protein'"):
        Dataset(mdata, schema, ONLY_RNA)


def test_cells_without_proteins_are_not_measured_whatever_the_mask(mdata):
    has = np.arange(N_CELLS) % 8 > 0
    setup = {name: value for name, value in MANY.items() if name != "protein_mask_layer"}
    cells = all_cells(open_data(mdata, setup))
    assert np.array_equal(cells.proteins_mask.numpy(), np.repeat(has[:, None], 8, axis=1))
    mdata.mod["protein"].layers["measured"] = np.ones((140, 8))
    assert torch.equal(all_cells(open_data(mdata, MANY)).proteins_mask, cells.proteins_mask)


def test_a_field_that_may_be_absent_has_a_mask(adata):
    fields = {"counts": Counts(absent_ok=True), "batch": Category(optional=True)}
    has = np.arange(N_CELLS) % 4 > 0
    rna = anndata.AnnData(adata.X[has], adata.obs[[]][has], adata.var)
    protein = anndata.AnnData(adata.obsm["proteins"], adata.obs[[]].copy())
    mdata = mudata_of({"protein": protein, "rna": rna}, adata.obs)
    many = open_data(mdata, {"modalities": RNA, "batch_key": "batch"}, fields)
    cells = all_cells(many)
    assert np.array_equal(cells.counts_mask.numpy(), has) and cells.counts_mask.dtype == torch.bool
    assert not cells.counts[~has].any() and not cells.library[~has].any()
    x = adata.X.toarray()
    assert np.array_equal(cells.counts[has].numpy(), x[has])
    assert np.array_equal(cells.counts._nonzeros.values.numpy(), adata.X[has].data)
    # the same said of an AnnData
    adata.obs["has_rna"] = has
    adata.X = np.where(has[:, None], adata.X.toarray(), np.nan)
    one = open_data(adata, {"batch_key": "batch", "counts_mask_key": "has_rna"}, fields)
    assert one.schema.fields == many.schema.fields and one.schema.statistics == many.schema.statistics
    assert_same_cells(all_cells(one), cells)
    logs = np.log(x[has].sum(1))[(adata.obs["batch"] == "batch_0")[has]]
    assert many.schema.statistics["library_log_mean"][0] == pytest.approx(logs.mean(), rel=1e-6)


def test_without_a_mask_all_are_measured(adata):
    fields = {"counts": Counts(absent_ok=True)}
    assert all_cells(open_data(adata, {}, fields)).counts_mask.all()
    with pytest.raises(DataError, match="have no counts over"):  # zeros are not absence
        adata.X = np.where(np.arange(N_CELLS)[:, None] == 3, 0, adata.X.toarray())
        Schema.freeze(adata, fields, {})
    with pytest.raises(DataError, match=r"counts_mask_key: adata.obs\['age'\] holds .*expected True"):
        Schema.freeze(adata, fields, {"counts_mask_key": "age"})


def test_a_batch_without_counts_is_taken_for_an_average_one(adata):
    fields = {"counts": Counts(absent_ok=True), "batch": Category(optional=True)}
    adata.obs["has_rna"] = adata.obs["batch"] == "batch_0"
    setup = {"batch_key": "batch", "counts_mask_key": "has_rna"}
    mean, var = Schema.freeze(adata, fields, setup).statistics.values()
    assert mean[0] == mean[1] and var[0] == var[1] > 0
    adata.obs["has_rna"] = False
    with pytest.raises(DataError, match="counts were measured in no cell"):
        Schema.freeze(adata, fields, setup)


def test_an_optional_modality_may_be_left_out(mdata):
    fields = {"counts": Counts(), "proteins": Proteins(optional=True)}
    dataset = open_data(mdata, {"modalities": RNA}, fields)
    assert not dataset.schema.has("proteins") and dataset.cells(np.arange(2)).proteins.shape == (2, 0)


# columns


def with_columns(adata, rna=None, protein=None, whole=None):
    mdata = as_mudata(adata)
    for name, columns in (("rna", rna), ("protein", protein)):
        for key in columns or ():
            mdata.mod[name].obs[key] = adata.obs[key].loc[mdata.mod[name].obs_names]
    mdata.obs = adata.obs[whole or []].copy()
    return mdata


def batches(mdata, key="batch", fields=None):
    fields, setup = fields or FIELDS, {"modalities": MODALITIES, "batch_key": key}
    setup["modalities"] = {name: part for name, part in MODALITIES.items() if name in fields}
    return all_cells(open_data(mdata, setup, fields)).batch.numpy()


def test_columns_are_looked_for_in_the_whole_first(adata):
    expected = adata.obs["batch"].cat.codes.to_numpy()
    mdata = with_columns(adata, rna=["batch"], protein=["batch"], whole=["batch"])
    mdata.mod["rna"].obs["batch"] = "other"
    assert np.array_equal(batches(mdata), expected)
    assert np.array_equal(batches(with_columns(adata, rna=["batch"])), expected)
    assert np.array_equal(batches(with_columns(adata, rna=["batch"]), "rna:batch"), expected)
    both = with_columns(adata, rna=["batch"], protein=["batch"])
    assert np.array_equal(batches(both, "rna:batch"), expected)
    assert np.array_equal(batches(both, fields=ONLY_RNA), expected)  # of modalities in use there is one


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (
            "batch",
            SetupError,
            r"mdata.mod\['rna'\].obs and mdata.mod\['protein'\].obs; write 'rna:batch' or 'protein:batch'",
        ),
        (
            "protein:batch",
            DataError,
            r"mdata.mod\['protein'\].obs\['batch'\] says nothing of 20 cells.*'cell_0', 'cell_8'",
        ),
        ("donor", DataError, r"mdata.mod\['protein'\].obs\['donor'\] says nothing of 20 cells"),
        ("Batch", SetupError, "neither mdata.obs nor the obs of a modality in use.*Did you mean 'batch'"),
        ("rna:donor", SetupError, "neither mdata.obs nor"),
        (3, SetupError, "batch_key is 3; expected the name of a column of mdata.obs"),
    ],
)
def test_columns_that_cannot_be_meant(adata, key, error, message):
    mdata = with_columns(adata, rna=["batch"], protein=["batch", "donor"])
    with pytest.raises(error, match=message):
        make_setup_mudata(FIELDS, "Model")(mdata, modalities=MODALITIES, batch_key=key)


def test_all_columns_in_one_table(adata):
    mdata = with_columns(adata, rna=["batch", "label"], protein=["batch", "donor"], whole=["age"])
    obs = Dataset(mdata, Schema.freeze(mdata, FIELDS, {"modalities": MODALITIES}), FIELDS).obs
    assert list(obs) == ["age", "rna:batch", "label", "protein:batch", "donor"]
    assert list(obs["label"]) == list(adata.obs["label"]) and list(obs.index) == list(mdata.obs_names)
    assert obs["donor"].isna().to_numpy().nonzero()[0].tolist() == list(range(0, N_CELLS, 8))
    assert list(mdata.obs) == ["age"]
    assert Dataset(adata, Schema.freeze(adata, FIELDS, ONE), FIELDS).obs is adata.obs


# messages and bad input


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: _set(m, "rna", -1), r"mdata.mod\['rna'\].layers\['counts'\] has 1 negative values"),
        (
            lambda m: _set(m, "rna", np.nan),
            r"mdata.mod\['rna'\].layers\['counts'\] has 1 values that are NaN.*Remove these",
        ),
        (lambda m: _set(m, "rna", 0.5), r"not whole.*set up with layer= \(there are: 'counts'\)"),
        (
            lambda m: _set(m, "protein", np.nan),
            r"mdata.mod\['protein'\].X has 1 values that are NaN.*protein_mask_layer",
        ),
        (
            lambda m: _set(m, "protein", 0.5),
            r"not whole.*set up with protein_layer= \(there are: 'measured'\)",
        ),
        (lambda m: _repeat(m, "rna"), r"call mdata.mod\['rna'\].var_names_make_unique"),
        (lambda m: _repeat(m, "protein"), r"protein names occur more than once.*mdata.mod\['protein'\].X"),
        (
            lambda m: m.obs.__setitem__("batch", np.nan),
            r"batch_key: mdata.obs\['batch'\] is missing.*= mdata.obs\['batch'\].astype",
        ),
        (lambda m: m.obs.__setitem__("age", "old"), r"mdata.obs\['age'\] is not numeric"),
    ],
)
@pytest.mark.filterwarnings("ignore:var_names are not unique:UserWarning")
def test_messages_say_where_in_the_mudata(mdata, spoil, message):
    spoil(mdata)
    with pytest.raises(DataError, match=message):
        Schema.freeze(mdata, FIELDS, MANY)


def _set(mdata, name, value):
    part = mdata.mod[name]
    matrix = part.layers["counts"].toarray() if name == "rna" else part.X.copy()
    matrix[2, 1] = value
    if name == "rna":
        part.layers["counts"] = matrix
    else:
        part.X = matrix


def _repeat(mdata, name):
    mdata.mod[name].var_names = ["x", "x", *mdata.mod[name].var_names[2:]]


def test_missing_features_are_named_where_they_are_missed(mdata):
    schema = Schema.freeze(mdata, FIELDS, MANY)
    for name, gone in (("rna", "gene_3"), ("protein", "protein_3")):
        parts = {k: part[:, part.var_names != gone].copy() for k, part in mdata.mod.items()}
        other = mudata_of({**mdata.mod, name: parts[name]}, mdata.obs)
        with pytest.raises(DataError, match=rf"not in mdata.mod\['{name}'\].*'{gone}'"):
            Dataset(other, schema, FIELDS)


def test_a_mudata_that_does_not_know_its_cells(adata, mdata):
    mdata.mod["protein"].obs_names = [f"x{name}" for name in mdata.mod["protein"].obs_names]
    with pytest.raises(
        DataError, match=r"mdata.mod\['protein'\] has 140 cells that mdata.obs_names lacks.*update\(\)"
    ):
        Schema.freeze(mdata, FIELDS, MANY)
    mdata = as_mudata(adata)
    mdata.mod["protein"].obs_names = ["cell_1"] * 2 + list(mdata.mod["protein"].obs_names[2:])
    with pytest.raises(
        DataError, match=r"Cell names of mdata.mod\['protein'\] occur more than once: 'cell_1'"
    ):
        Schema.freeze(mdata, FIELDS, MANY)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"counts": "rna"},
            r"modalities lacks 'proteins'; give modalities=\{'counts': '...', 'proteins': '...'\}",
        ),
        ({"counts": "RNA", "proteins": "protein"}, "no modality 'RNA'. Did you mean 'rna'"),
        ({"count": "rna"}, "modalities names 'count', which the model does not read. Did you mean 'counts'"),
        (["rna", "protein"], r"modalities is \['rna', 'protein'\]; expected names"),
        ({"counts": 1, "proteins": 2}, "expected names of modalities"),
        ("rna", "expected names of modalities"),
    ],
)
def test_modalities_that_cannot_be_meant(mdata, given, message):
    with pytest.raises(SetupError, match=message):
        make_setup_mudata(FIELDS, "Model")(mdata, modalities=given)
    assert "pyrocell" not in mdata.uns


@pytest.mark.filterwarnings("ignore:obs_names are not unique:UserWarning")
def test_other_kinds_of_data(adata, mdata):
    setup = make_setup_mudata(FIELDS, "Model")
    with pytest.raises(SetupError, match="expected a MuData. For an AnnData, call setup_anndata"):
        setup(adata, modalities=MODALITIES)
    with pytest.raises(
        SetupError, match="'rna', 'protein'; expected an AnnData.*set up the whole with setup_mudata"
    ):
        make_setup_anndata(FIELDS, "Model")(mdata, protein_expression_obsm_key="x")
    with pytest.raises(SetupError, match=r"Model.setup_mudata\(mdata, modalities="):
        read_setup(mdata, "Model")
    features = mudata.MuData({"a": adata[:, :5].copy(), "b": adata[:, 5:].copy()}, axis=1)
    with pytest.raises(SetupError, match="share axis 1; expected axis 0"):
        setup(features, modalities={"counts": "a", "proteins": "b"})
    nested = mudata.MuData({"all": mdata})
    with pytest.raises(SetupError, match="Got a MuData with the modalities"):
        setup(nested, modalities={"counts": "all", "proteins": "all"})
    fields = {"counts": _NoModality()}
    with pytest.raises(SetupError, match="given no modality"):
        make_setup_mudata(fields, "Model")(mdata, modalities={})


class _NoModality(Counts):
    """A field whose author forgot that it has features."""

    has_features = False


# the record


def test_the_record_and_the_documentation(mdata, tmp_path):
    setup = make_setup_mudata(FIELDS, "Model")
    before = mdata.copy()
    setup(mdata, **MANY)
    assert list(mdata.uns) == ["pyrocell"]
    pd.testing.assert_frame_equal(mdata.obs, before.obs)
    assert all(not part.uns for part in mdata.mod.values())
    assert read_setup(mdata, "Model") == MANY
    assert read_setup(mdata[:20], "Model") == MANY
    mdata.write(tmp_path / "data.h5mu")
    again = mudata.read_h5mu(tmp_path / "data.h5mu")
    assert read_setup(again, "Model") == MANY
    for words in ("Needed: 'counts', 'proteins'", "protein_mask_layer : str, optional", "``mdata.obs``"):
        assert words in setup.__doc__
    assert "adata" not in setup.__doc__
    assert list(setup.__signature__.parameters)[:2] == ["mdata", "modalities"]
    with pytest.raises(TypeError, match="modalities"):
        setup(mdata)


def test_each_kind_of_data_is_read_where_it_has_things(adata, mdata):
    make_setup_anndata(FIELDS, "Model")(adata, **ONE)
    make_setup_mudata(FIELDS, "Model")(mdata, **MANY)
    schema = Schema.freeze(adata, FIELDS, read_setup(adata, "Model"))
    place = setup_of(mdata, schema.setup, FIELDS, "Model")
    assert place == complete_setup(FIELDS, MANY)
    assert_same_cells(
        all_cells(Dataset(adata, schema, FIELDS)), all_cells(Dataset(mdata, schema, FIELDS, setup=place))
    )
    assert setup_of(adata, schema.setup, FIELDS, "Model") == schema.setup
    with pytest.raises(SetupError, match="not set up for Model"):
        setup_of(as_mudata(adata), schema.setup, FIELDS, "Model")
    with pytest.raises(
        SetupError, match="AnnData where a MuData with the modalities 'rna', 'protein' was set up"
    ):
        Dataset(adata, Schema.freeze(mdata, FIELDS, MANY), FIELDS)


def test_a_damaged_record(mdata):
    schema = Schema.freeze(mdata, FIELDS, MANY).to_json()
    schema["setup"]["modalities"] = ["rna"]
    with pytest.raises((SetupError, LoadError), match="modalities"):
        complete_setup(FIELDS, Schema.from_json(schema).setup)


def test_cells_are_found_by_name(mdata):
    slots = open_slots(mdata, MODALITIES).of("proteins")
    assert slots.modality == "protein" and slots.present.sum() == 140
    names = mdata.mod["protein"].obs_names
    entries = slots.matrix(None).entries(np.arange(N_CELLS))
    dense = np.zeros((N_CELLS, 8), np.float32)
    dense[entries.rows, entries.cols] = entries.values
    there = mdata.obs_names.get_indexer(names)
    assert np.array_equal(dense[there], mdata.mod["protein"].X)
    assert not np.delete(dense, there, axis=0).any()


def test_real_multiome():
    mdata = mudata.read_h5mu(real_data("multiome_scicar_a549.h5mu"))
    fields = {"counts": Counts(), "fragments": Counts(absent_ok=True), "batch": Category(optional=True)}
    setup = {"modalities": {"counts": "rna", "fragments": "atac"}, "batch_key": "rna:time_h"}
    dataset = open_data(mdata, setup, fields)
    rows = np.array([2640, 7, 0])
    cells = dataset.cells(rows)
    assert np.array_equal(cells.counts.numpy(), mdata.mod["rna"].X[rows].toarray())
    assert np.array_equal(cells.fragments.numpy(), mdata.mod["atac"].X[rows].toarray())
    assert dataset.schema.names("batch") == ["0", "1", "3"] and cells.fragments_mask.all()


def test_columns_are_those_of_now(mdata):
    """Clusters are often made after the model, and made again."""
    dataset = open_data(mdata, MANY)
    mdata["rna"].obs["total"] = 1.0
    mdata.obs["cluster"] = "a"
    assert set(dataset.obs["cluster"]) == {"a"}
    mdata.obs["cluster"] = "b"
    assert set(dataset.obs["cluster"]) == {"b"} and "total" in dataset.obs
