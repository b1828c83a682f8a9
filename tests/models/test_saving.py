"""Saved models: what goes in comes out, and each fault of a folder has an error of its own."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

import pyrocell
from pyrocell import SCVI, files
from pyrocell.data import synthetic_iid
from pyrocell.errors import DataError, LoadError, NotTrainedError, PyrocellError, QueryError, SetupError
from tests.models.zoo import BatchVAE, PoissonFactors

SMALL = {"n_hidden": 8, "n_latent": 3}
SETUP = {
    "layer": "counts",
    "batch_key": "batch",
    "labels_key": "label",
    "size_factor_key": "size_factor",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["age"],
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)


def data(seed=0) -> AnnData:
    adata = synthetic_iid(n_cells=90, n_genes=20, n_proteins=0, n_regions=0, seed=seed)
    SCVI.setup_anndata(adata, **SETUP)
    return adata


@pytest.fixture(scope="module")
def fitted():
    before, pyrocell.settings.progress = pyrocell.settings.progress, False
    pyrocell.settings.seed = 5
    try:
        model = SCVI(data(), **SMALL, gene_likelihood="nb", dispersion="gene-batch", encode_covariates=True)
        model.train(3, batch_size=32)
    finally:
        pyrocell.settings.progress, pyrocell.settings.seed = before, 0
    return model


@pytest.fixture
def folder(fitted, tmp_path):
    fitted.save(tmp_path / "saved", save_anndata=True)
    return tmp_path / "saved"


@pytest.fixture
def bare(fitted, tmp_path):
    """A folder without the data."""
    fitted.save(tmp_path / "bare")
    return tmp_path / "bare"


def answers(model, adata=None):
    return [
        model.get_latent_representation(adata),
        model.get_normalized_expression(adata, n_samples=2, return_numpy=True),
        model.get_elbo(adata, return_mean=False),
        model.get_likelihood_parameters(adata)["theta"],
    ]


def assert_same_answers(one, two):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def state(model):
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def edit(folder, change):
    """Change the JSON record of a saved model, and seal it again, as whoever means harm would."""
    record = json.loads((folder / "model.json").read_text())
    change(record)
    (folder / "model.json").write_text(json.dumps(files.sealed(record)))


# ------------------------------------------------------------------------------------------------ round trips


def test_with_the_saved_data(fitted, folder):
    again = SCVI.load(folder)
    assert_same_answers(answers(fitted), answers(again))
    assert again.constructor == fitted.constructor and again.stream.seed == 5 and again.is_trained
    assert repr(again) == repr(fitted)
    assert not again.module.training
    pd.testing.assert_frame_equal(again.history, fitted.history, check_dtype=False)
    np.testing.assert_array_equal(again.train_indices, fitted.train_indices)
    np.testing.assert_array_equal(again.validation_indices, fitted.validation_indices)


def test_without_data_and_with_new_data(fitted, bare):
    again = SCVI.load(bare)
    with pytest.raises(QueryError, match="loaded without data; give adata="):
        again.get_latent_representation()
    with pytest.raises(QueryError, match="loaded without data"):
        again.train(1)
    fresh = synthetic_iid(n_cells=40, n_genes=20, n_proteins=0, n_regions=0, seed=1)  # never set up
    assert_same_answers(answers(fitted, fresh), answers(again, fresh))
    assert_same_answers(answers(fitted, fresh), answers(SCVI.load(bare, fresh)))


def test_given_data_come_before_saved_data(fitted, folder):
    fresh = synthetic_iid(n_cells=40, n_genes=20, n_proteins=0, n_regions=0, seed=1)
    assert SCVI.load(folder, fresh).get_elbo(return_mean=False).shape == (40,)


def test_an_untrained_model_stays_untrained(tmp_path):
    model = SCVI(data(), **SMALL)
    model.save(tmp_path)
    again = SCVI.load(tmp_path, data())
    assert not again.is_trained and len(again.history) == 0
    with pytest.raises(NotTrainedError):
        again.get_elbo()
    model.train(2, batch_size=32)
    again.train(2, batch_size=32)
    assert all(torch.equal(value, state(again)[name]) for name, value in state(model).items())


def test_training_goes_on_to_the_bit(tmp_path):
    model = SCVI(data(), **SMALL)
    model.train(2, batch_size=32)
    model.save(tmp_path, save_anndata=True)
    again = SCVI.load(tmp_path)
    for either in (model, again):
        either.train(2, batch_size=32, lr=3e-3)
    assert list(again.history.index) == [0, 1, 2, 3]
    assert all(torch.equal(value, state(again)[name]) for name, value in state(model).items())
    assert_same_answers(answers(model), answers(again))


def test_a_guide_with_parameters_of_single_cells(tmp_path):
    adata = synthetic_iid(n_cells=40, n_genes=8, n_proteins=0, n_regions=0)
    PoissonFactors.setup_anndata(adata)
    model = PoissonFactors(adata)
    model.train(2)
    model.save(tmp_path)
    again = PoissonFactors.load(tmp_path, adata)
    np.testing.assert_array_equal(model.get_elbo(return_mean=False), again.get_elbo(return_mean=False))


def test_shuffled_genes_and_further_genes_align(fitted, bare):
    adata = data()
    order = np.random.default_rng(0).permutation(adata.n_vars)
    more = synthetic_iid(n_cells=90, n_genes=3, n_proteins=0, n_regions=0)
    wide = AnnData(
        np.hstack([more.X.toarray(), adata.X.toarray()[:, order]]),
        obs=adata.obs,
        var=pd.DataFrame(index=["x1", "x2", "x3", *adata.var_names[order]]),
    )
    wide.layers["counts"] = wide.X.copy()
    again = SCVI.load(bare, wide)
    assert_same_answers(answers(fitted), answers(again))


def test_no_file_can_hold_a_pickle(folder):
    kinds = {path.name: path.suffix for path in folder.rglob("*")}
    assert kinds == {
        "model.safetensors": ".safetensors",
        "model.json": ".json",
        "adata.h5ad": ".h5ad",
    }
    record = json.loads((folder / "model.json").read_text())
    assert set(record["versions"]) >= {"python", "pyrocell", "torch", "pyro-ppl", "anndata", "numpy"}
    assert record["format_version"] == 2 and record["class"] == "SCVI" and record["seed"] == 5


def test_loading_disturbs_nothing(fitted, folder):
    before, others = state(fitted), answers(fitted)
    stream, seed = fitted.stream.state.clone(), pyrocell.settings.seed
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - the user's global generator
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    again = SCVI.load(folder)
    answers(again)
    fitted.save(folder, overwrite=True)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(fitted.stream.state, stream) and pyrocell.settings.seed == seed
    assert all(torch.equal(before[name], value) for name, value in state(fitted).items())
    again.train(1, batch_size=32)
    assert all(torch.equal(before[name], value) for name, value in state(fitted).items())
    assert_same_answers(others, answers(fitted))


def test_saving_leaves_the_data_alone(fitted, tmp_path):
    adata = fitted.dataset.adata
    before = adata.copy()
    fitted.save(tmp_path, save_anndata=True)
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert list(adata.uns) == list(before.uns) and list(adata.layers) == list(before.layers)
    assert (adata.X != before.X).nnz == 0


# ------------------------------------------------------------------------------------------------ refusals


def test_overwriting_is_asked_for(fitted, folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"saved model already.*overwrite=True"):
        fitted.save(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    fitted.save(folder, overwrite=True)
    assert_same_answers(answers(fitted), answers(SCVI.load(folder, data())))


def test_overwriting_leaves_no_data_of_the_model_before(folder):
    """A folder that was saved with data, then overwritten without: the old data are not the new model's."""
    other = SCVI(data(seed=2), **SMALL)
    other.train(1, batch_size=32)
    other.save(folder, overwrite=True)
    again = SCVI.load(folder)
    assert again.dataset is None


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("beside_a_model", [False, True])
def test_data_of_the_user_are_never_replaced(fitted, tmp_path, overwrite, beside_a_model):
    if beside_a_model:
        fitted.save(tmp_path)
    (tmp_path / "adata.h5ad").write_bytes(b"the only copy")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        FileExistsError, match=r"saved model already|adata\.h5ad was not written .* move that file"
    ):
        fitted.save(tmp_path, save_anndata=True, overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_data_of_the_model_before_are_replaced_where_asked(folder):
    other = SCVI(data(seed=2), **SMALL)
    other.train(1, batch_size=32)
    other.save(folder, overwrite=True, save_anndata=True)
    assert SCVI.load(folder).get_elbo() == other.get_elbo()


def test_data_are_saved_only_where_there_are_any(bare, tmp_path):
    again = SCVI.load(bare)
    with pytest.raises(PyrocellError, match="without data"):
        again.save(tmp_path / "x", save_anndata=True)
    again.save(tmp_path / "y")
    assert_same_answers([SCVI.load(tmp_path / "y", data()).get_elbo()], [SCVI.load(bare, data()).get_elbo()])


def test_wrong_class_names_both(bare):
    with pytest.raises(LoadError, match=r"holds a SCVI, not a BatchVAE.*SCVI\.load"):
        BatchVAE.load(bare)


def test_missing_genes_are_named(bare):
    adata = data()
    with pytest.raises(DataError, match=r"2 of the 20 features .*'gene_3', 'gene_7'.*Give data"):
        SCVI.load(bare, adata[:, ~adata.var_names.isin(["gene_3", "gene_7"])].copy())


def test_genes_of_another_kind_are_recognised(bare):
    adata = data()
    adata.var_names = [f"ENSG{i:05d}" for i in range(adata.n_vars)]
    with pytest.raises(DataError, match=r"another kind \(symbols, Ensembl\)"):
        SCVI.load(bare, adata)


@pytest.mark.parametrize("column", ["batch", "donor"])
def test_unseen_categories_are_named(bare, column):
    adata = data()
    adata.obs[column] = adata.obs[column].astype(str)
    adata.obs.loc[adata.obs_names[:2], column] = "new one"
    with pytest.raises(DataError, match=rf"{column}.*not seen.*'new one' \(2 cells\).*knows '{column}_0'"):
        SCVI.load(bare, adata)


@pytest.mark.parametrize("column", ["batch", "age", "size_factor"])
def test_missing_columns_are_named(bare, column):
    adata = data()
    del adata.obs[column]
    with pytest.raises(SetupError, match=f"{column}.*no such column.*Available"):
        SCVI.load(bare, adata)


def test_a_missing_layer_is_named(bare):
    adata = data()
    del adata.layers["counts"]
    with pytest.raises(SetupError, match=r"layer='counts'.*no such layer"):
        SCVI.load(bare, adata)


def test_bad_counts_of_new_data_are_refused(bare):
    adata = data()
    counts = adata.layers["counts"].toarray()
    counts[0, 0] = -1
    adata.layers["counts"] = counts
    with pytest.raises(DataError, match=r"layers\['counts'\] has 1 negative"):
        SCVI.load(bare, adata)


def test_a_folder_that_is_none(tmp_path, bare):
    with pytest.raises(LoadError, match=r"does not exist.*no such folder"):
        SCVI.load(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.pt").write_bytes(b"\x80\x02.")
    with pytest.raises(LoadError, match=r"found: \['model.pt'\].*written by save"):
        SCVI.load(tmp_path / "other")
    with pytest.raises(LoadError):
        SCVI.load(bare / "model.json")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "adata.h5ad"])
def test_truncated_files(folder, name, share):
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(LoadError, match=re.escape(name)):
        SCVI.load(folder)


def test_files_of_two_saves_do_not_mix(folder, bare):
    other = SCVI(data(), n_hidden=9, n_latent=3)
    other.save(bare, overwrite=True)
    shutil.copy(bare / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(LoadError, match="belongs to another save"):
        SCVI.load(folder)


def test_files_of_two_saves_of_one_size_do_not_mix(folder, bare):
    other = SCVI(data(), **SMALL, gene_likelihood="nb", dispersion="gene-batch", encode_covariates=True)
    other.train(1, batch_size=32)
    other.save(bare, overwrite=True)
    assert (bare / "model.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size
    shutil.copy(bare / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(LoadError, match=r"^[^(]*come from two different saves"):
        SCVI.load(folder)


def test_a_newer_format_says_what_to_do(bare):
    edit(bare, lambda record: record.update(format_version=99, versions={"pyrocell": "7.1"}))
    with pytest.raises(LoadError, match=r"format version 99.*reads up to 2.*Upgrade pyrocell.*7\.1"):
        SCVI.load(bare)


def test_a_newer_format_whose_record_looks_different(bare):
    edit(bare, lambda record: record.update(format_version=99, versions="7.1"))
    with pytest.raises(LoadError, match="Upgrade"):
        SCVI.load(bare)


def test_a_newer_schema_says_what_to_do(bare):
    edit(bare, lambda record: record["schema"].update(format=99))
    with pytest.raises(LoadError, match="format 99"):
        SCVI.load(bare)


FIELDS = ["class", "constructor", "schema", "seed", "is_trained", "history"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_missing_field_is_named(bare, field):
    edit(bare, lambda record: record.pop(field))
    with pytest.raises(LoadError, match=field):
        SCVI.load(bare)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [None, "text", [1, 2], {"a": 1}], ids=["null", "text", "list", "object"])
def test_a_field_of_another_type_is_refused(bare, field, value):
    edit(bare, lambda record: record.update({field: value}))
    with pytest.raises(LoadError, match=r"model\.json|holds a"):
        SCVI.load(bare)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_neurons": 3}, "n_neurons"),
        ({"gene_likelihood": "gauss"}, "gene_likelihood"),
        ({"n_hidden": "many"}, "constructor"),
        ({"n_latent": -1}, "constructor"),
    ],
    ids=["unknown", "value", "type", "negative"],
)
def test_constructor_arguments_that_do_not_fit(bare, change, said):
    edit(bare, lambda record: record["constructor"].update(change))
    with pytest.raises(LoadError, match=said):
        SCVI.load(bare)


def test_tensors_of_another_size(bare):
    edit(bare, lambda record: record["constructor"].update(n_hidden=9))
    with pytest.raises(LoadError, match=r"(?s)do not fit a SCVI.*size mismatch"):
        SCVI.load(bare)


@pytest.mark.parametrize(
    "change",
    [
        lambda schema: schema.pop("fields"),
        lambda schema: schema["fields"].pop("counts"),
        lambda schema: schema["fields"]["counts"].pop("names"),
        lambda schema: schema["fields"]["batch"].update(names=3),
        lambda schema: schema["fields"].update(batch="lane"),
        lambda schema: schema.update(setup=None),
        lambda schema: schema.update(fields=[]),
        lambda schema: schema.update(n_cells="many"),
    ],
)
@pytest.mark.parametrize("with_data", [False, True])
def test_a_schema_that_is_damaged(bare, change, with_data):
    edit(bare, lambda record: change(record["schema"]))
    with pytest.raises(LoadError):
        SCVI.load(bare, data() if with_data else None)


@pytest.mark.parametrize("gone", ["stream", "train_indices", "module.log_theta"])
def test_tensors_that_are_missing_are_named(bare, gone):
    tensors, record = files.read_folder(bare, "model")
    del tensors[gone]
    own = {
        key: record[key]
        for key in record
        if key not in ("n_bytes", "pair", "format_version", "sha256", "beside")
    }
    files.write_folder(bare, "model", tensors, own)
    with pytest.raises(LoadError, match=gone.removeprefix("module.")):
        SCVI.load(bare)


def test_a_refusal_leaves_the_folder_as_it_is(folder):
    edit(folder, lambda record: record.update(seed="x"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(LoadError):
        SCVI.load(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
