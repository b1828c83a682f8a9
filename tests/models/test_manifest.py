"""The manifest says how a model came about, wherever the data lie and however often the model is saved."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import pyrocell
from pyrocell import SCVI, TrainingPlan
from pyrocell.data import synthetic_iid
from pyrocell.infer.trainer import Trainer
from tests.models.test_contract import CASES
from tests.models.test_packing import Markers


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


def data(seed=0):
    adata = synthetic_iid(n_cells=90, n_genes=12, n_proteins=0, n_regions=0, seed=seed)
    SCVI.setup_anndata(adata, batch_key="batch", continuous_covariate_keys=["age"])
    return adata


def make(adata=None):
    return SCVI(data() if adata is None else adata, n_hidden=8, n_latent=3)


def test_it_holds_everything_and_follows_the_model_into_the_file(tmp_path):
    model = make()
    assert model.manifest()["trainings"] == [] and model.manifest()["data"]["sha256"] is None
    model.train(2, batch_size=32, lr=2e-3, plan=TrainingPlan(patience=7))
    model.train(1, batch_size=16, train_size=0.5, early_stopping=True)
    manifest = model.manifest()
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest["model"] == "SCVI" and manifest["seed"] == 0
    assert manifest["constructor"] == model.constructor and manifest["setup"]["batch_key"] == "batch"
    assert set(manifest["versions"]) >= {"python", "pyrocell", "torch", "pyro-ppl", "numpy"}
    one, two = manifest["trainings"]
    assert (one["first_epoch"], one["n_epochs"], two["first_epoch"], two["n_epochs"]) == (0, 2, 2, 1)
    assert (
        one["options"]["lr"] == 2e-3 and one["options"]["patience"] == 7 and one["options"]["max_epochs"] == 2
    )
    assert two["options"]["early_stopping"] is True and two["options"]["batch_size"] == 16
    assert (one["n_train"], one["n_validation"], two["n_train"]) == (81, 9, 45)
    assert one["finished"] and one["n_skipped_steps"] == 0 and one["device"] == "cpu"
    assert len(one["data"]) == 64 and one["data"] == two["data"] == manifest["data"]["sha256"]
    missing = set(TrainingPlan.__dataclass_fields__) - set(one["options"])
    assert missing == {
        "train_indices",
        "validation_indices",
        "checkpoint",
        "hash_data",
    }  # cells, and what decides nothing
    model.save(tmp_path)
    assert json.loads((tmp_path / "model.json").read_text())["manifest"] == manifest
    again = SCVI.load(tmp_path)
    assert again.manifest() == manifest
    again.attach(data())
    again.train(1)
    assert len(again.manifest()["trainings"]) == 3 and again.manifest()["trainings"][:2] == [one, two]


def test_versions_are_those_that_did_the_work(tmp_path, monkeypatch):
    model = make()
    model.train(1)
    model.save(tmp_path)
    monkeypatch.setattr("pyrocell.models.manifest._versions", lambda: {"torch": "99"})
    again = SCVI.load(tmp_path, data())
    again.train(1)
    manifest = again.manifest()
    assert manifest["versions"]["torch"] == torch.__version__ == manifest["trainings"][0]["versions"]["torch"]
    assert manifest["trainings"][1]["versions"] == {"torch": "99"}


def test_a_resumed_training_is_one_training(tmp_path):
    plan = TrainingPlan(checkpoint=tmp_path)
    model = make()
    model.train(1)
    model.train(2, lr=1e-3, n_epochs_kl_warmup=1, plan=plan)
    model.train(4, lr=1e-3, n_epochs_kl_warmup=1, resume=tmp_path)
    first, second = model.manifest()["trainings"]
    assert (first["n_epochs"], second["first_epoch"], second["n_epochs"]) == (1, 1, 4)


def test_the_hash_is_of_the_data_of_each_training():
    model = make()
    model.train(1)
    adata = model.dataset.adata
    adata.X[80, int(adata.X[80].indices[0])] += 1  # not among the cells by which a model notices other data
    model.train(1)
    one, two = (record["data"] for record in model.manifest()["trainings"])
    assert one == hash_of(data()) and two == hash_of(adata) != one
    assert model.manifest()["data"]["sha256"] == two


def test_a_training_that_ended_in_its_first_epoch_is_told_and_stays(monkeypatch, tmp_path):
    model = make()
    with monkeypatch.context() as patch:
        steps, plain = iter(range(100)), Trainer._step

        def interrupted(self, cells, weight):
            if next(steps) == 2:
                raise KeyboardInterrupt
            plain(self, cells, weight)

        patch.setattr(Trainer, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.train(5, batch_size=16, lr=0.1)
    model.train(2, batch_size=16)
    first, second = model.manifest()["trainings"]
    assert (first["n_steps"], first["n_epochs"], first["finished"]) == (2, 0, False)
    assert first["options"]["lr"] == 0.1
    assert (second["n_steps"], second["n_epochs"], second["finished"]) == (12, 2, True)
    model.save(tmp_path)
    assert SCVI.load(tmp_path).manifest() == model.manifest()


def test_what_did_not_finish_says_so():
    model = make()
    parameter = next(iter(model.module.parameters()))
    steps = iter(range(100))
    parameter.register_hook(lambda grad: grad * (float("nan") if next(steps) > 3 else 1.0))
    with pytest.raises(pyrocell.errors.TrainingError):
        model.train(9, batch_size=32, plan=TrainingPlan(max_bad_steps=1, optimizer=torch.optim.AdamW))
    [record] = model.manifest()["trainings"]
    assert not record["finished"] and record["n_epochs"] == 1
    assert record["options"]["optimizer"].endswith("AdamW")


def hash_of(adata):
    return make(adata).dataset.content_hash


def test_the_hash_is_of_the_content_not_of_the_container(tmp_path):
    reference = hash_of(data())
    for convert in (sparse.csc_matrix, sparse.csr_array, lambda x: x.toarray(), lambda x: x.astype(np.int32)):
        adata = data()
        adata.X = convert(adata.X)
        assert hash_of(adata) == reference
    adata = data()
    adata.write(tmp_path / "data.h5ad")
    backed = anndata.read_h5ad(tmp_path / "data.h5ad", backed="r")
    try:
        assert hash_of(backed) == reference
    finally:
        backed.file.close()
    order = np.random.default_rng(0).permutation(adata.n_vars)
    assert make()._seen_through_schema(adata[:, order].copy()).content_hash == reference


@pytest.mark.parametrize(
    "what", ["count", "name of a cell", "name of a gene", "order", "batch", "covariate", "fewer"]
)
def test_the_hash_sees_every_change(what):
    adata = data()
    if what == "count":
        adata.X[3, int(adata.X[3].indices[0])] += 1
    elif what == "name of a cell":
        adata.obs_names = ["x", *adata.obs_names[1:]]
    elif what == "name of a gene":
        adata.var_names = ["x", *adata.var_names[1:]]
    elif what == "order":
        adata = adata[::-1].copy()
    elif what == "batch":
        adata.obs["batch"] = adata.obs["batch"].to_numpy()[np.r_[1, 0, 2 : adata.n_obs][::-1]]
    elif what == "covariate":
        adata.obs.loc[adata.obs_names[0], "age"] += 1
    else:
        adata = adata[:-1].copy()
    assert hash_of(adata) != hash_of(data())


def test_blocks_leave_no_trace_in_the_hash(monkeypatch):
    reference = hash_of(data())
    monkeypatch.setattr("pyrocell.data.content._NUMBERS_AT_ONCE", 100)
    assert hash_of(data()) == reference


def test_the_hash_can_be_left_out(monkeypatch):
    model = make()
    monkeypatch.setattr("pyrocell.data.minibatch.content_hash", None)  # not even asked for
    model.train(1, plan=TrainingPlan(hash_data=False))
    assert model.manifest()["data"]["sha256"] is None


def test_arrays_and_tables_are_told_by_shape_and_checksum():
    adata = synthetic_iid(60, 8)
    Markers.setup_anndata(adata)
    tables = [pd.DataFrame({"B": [1, 0], "T": [0, x]}, index=["gene_1", "gene_5"]) for x in (1, 1, 2)]
    told = [Markers(adata, table, np.linspace(0, 1, 8)).manifest()["constructor"] for table in tables]
    assert told[0]["markers"] == told[1]["markers"] != told[2]["markers"]
    assert told[0]["markers"]["shape"] == [2, 2] and told[0]["weights"]["type"] == "ndarray"
    assert told[0]["names"] == ["a", "b"]


@pytest.mark.parametrize("name", CASES)
def test_every_model_has_one(name):
    model = CASES[name].make()
    manifest = model.manifest()
    assert manifest["model"] == type(model).__name__ and set(manifest["constructor"]) == set(
        model.constructor
    )
    assert len(model.dataset.content_hash) == 64
