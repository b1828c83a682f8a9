"""The diagnosis of fitted models: each check fires on a model with that fault, and on no good one."""

from __future__ import annotations

from functools import cache

import anndata
import numpy as np
import pandas as pd
import pytest

import pyrocell
from pyrocell import SCVI, TrainingPlan
from pyrocell.errors import DataError, NotTrainedError, QueryError
from pyrocell.infer.diagnosis import Diagnosis
from tests.models.test_contract import CASES
from tests.models.zoo import NoLatent

N_CELLS, N_GENES = 500, 25


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


def simulate(*, batch_effect=0.5):
    """Overdispersed counts of three kinds of cells in two batches, whose depth says nothing of the kind."""
    rng = np.random.default_rng(0)
    kind, batch = rng.integers(3, size=N_CELLS), rng.integers(2, size=N_CELLS)
    log_rho = rng.normal(0, 1, (3, N_GENES))[kind] + batch_effect * rng.normal(0, 1, (2, N_GENES))[batch]
    rho = np.exp(log_rho) / np.exp(log_rho).sum(1, keepdims=True)
    mu = rho * rng.lognormal(5.5, 0.5, N_CELLS)[:, None]
    counts = rng.poisson(rng.gamma(3, mu / 3))
    counts[:, 0] += 1
    obs = pd.DataFrame(
        {"lane": batch.astype(str), "kind": kind.astype(str), "one": 1.0},
        index=[f"c{i}" for i in range(N_CELLS)],
    )
    return anndata.AnnData(counts.astype(np.float32), obs=obs)


def fit(setup, max_epochs=120, *, plan=None, **options):
    adata = simulate()
    SCVI.setup_anndata(adata, **setup)
    settings = {"gene_likelihood": "nb", "n_hidden": 32, "n_latent": 3, "dropout_rate": 0.0}
    model = SCVI(adata, **settings | options)
    model.train(max_epochs, lr=1e-2, n_epochs_kl_warmup=10, plan=plan)
    return model


@cache
def good():
    return fit({"batch_key": "lane"}, 160)


FAULTS = {
    "convergence": lambda: fit({"batch_key": "lane"}, 1).diagnose(),
    "posterior collapse": lambda: fit(
        {"batch_key": "lane"}, 30, plan=TrainingPlan(max_kl_weight=50.0)
    ).diagnose(),
    "dead dimensions": lambda: fit({"batch_key": "lane"}, 60, n_latent=30).diagnose(),
    "predictive fit": lambda: fit({"batch_key": "lane"}, 60, gene_likelihood="poisson").diagnose(),
    "library size in the latent": lambda: fit({"batch_key": "lane", "size_factor_key": "one"}, 60).diagnose(),
    "batch in the latent": lambda: fit({}, 60).diagnose(batch_key="lane"),
}


@pytest.mark.parametrize("check", FAULTS)
def test_a_fault_is_found(check):
    found = FAULTS[check]()
    assert check in found.flagged, found
    row = found.table.loc[check]
    assert ("size_factor_key" in row["advice"]) == (check == "library size in the latent")
    assert ("as batch_key" in row["advice"]) == (check == "batch in the latent")
    assert "nothing to do" not in row["advice"] and row["advice"].endswith(".")


def test_nothing_is_found_in_a_good_fit():
    found = good().diagnose()
    assert list(found.table.index) == [
        "convergence",
        "posterior collapse",
        "dead dimensions",
        "predictive fit",
        "library size in the latent",
        "batch in the latent",
    ]
    assert found.flagged == [], found
    assert (found.table["value"] <= found.table["limit"]).all()
    assert repr(found).startswith("Diagnosis: 0 of 6 checks are worth a look\n")


def test_a_second_training_is_judged_by_itself(tmp_path):
    model = fit({"batch_key": "lane"}, 30)
    model.train(21, lr=1e-2, n_epochs_kl_warmup=10)
    found = model.diagnose().table.loc["convergence"]
    assert found["is_flagged"] and found["advice"].startswith("11 epochs after warm-up are too few")
    model.save(tmp_path / "model")
    again = SCVI.load(tmp_path / "model", model.dataset.adata)
    assert again.diagnose().table.loc["convergence", "advice"] == found["advice"]
    model.train(20, lr=1e-2, n_epochs_kl_warmup=0)
    assert "in the last 5 epochs" in model.diagnose().table.loc["convergence", "advice"]


def test_the_numbers_behind_the_table():
    found = good().diagnose()
    assert isinstance(found, Diagnosis)
    assert list(found.table) == ["value", "limit", "is_flagged", "measure", "advice"]
    assert len(found.dimensions) == 3 and len(found.features) == N_GENES
    assert found.worst_features == list(found.features.index[:10])
    pd.testing.assert_series_equal(found.history, good().history["elbo_train"])


def test_the_batch_is_that_of_the_model_or_a_column():
    of_model, of_column = good().diagnose(), good().diagnose(batch_key="lane")
    pd.testing.assert_frame_equal(of_model.table, of_column.table)
    of_kinds = good().diagnose(batch_key="kind")
    assert of_kinds.flagged == ["batch in the latent"]  # a latent is there to tell kinds
    advice = of_kinds.table.loc["batch in the latent", "advice"]
    assert "'kind'" in advice and "as batch_key" in advice  # it was set up with lanes


def test_advice_knows_how_the_model_was_set_up():
    z, totals = np.random.default_rng(0).standard_normal((500, 3)), np.exp(np.linspace(1, 9, 500))
    z[:, 0] = np.log(totals)
    held = good()._contents_of(z, totals, np.repeat([0, 1], 250), "lane")
    assert [finding.is_flagged for finding in held] == [True, True]
    assert "size_factor_key" not in held[0].advice and "batch_key" not in held[1].advice


def test_some_cells_and_other_data():
    model = good()
    few = model.diagnose(indices=np.arange(40))
    assert few.table.drop("convergence")["value"].isna().all() and few.flagged == []
    assert model.diagnose(indices=[3]).flagged == []
    again = model.diagnose(model.dataset.adata.copy())
    pd.testing.assert_frame_equal(again.table, model.diagnose().table)
    assert len(model.diagnose(n_cells=60).features) == N_GENES


def test_held_out_cells_come_first(monkeypatch):
    model = good()
    asked = []
    monkeypatch.setattr(model, "validation_indices", np.arange(250, 500))
    monkeypatch.setattr(
        model, "posterior_predictive_check", lambda adata, indices, n_samples: asked.append(indices) or CHECK
    )
    CHECK = SCVI.posterior_predictive_check(model, n_samples=3)
    model.diagnose()
    np.testing.assert_array_equal(asked[0], np.arange(250, 500))
    model.diagnose(indices=[3, 1, 2])
    np.testing.assert_array_equal(asked[1], [1, 2, 3])


def test_impossible_questions_are_named():
    model = good()
    with pytest.raises(QueryError, match=r"batch_key='lan' is no column. Did you mean 'lane'\?"):
        model.diagnose(batch_key="lan")
    with pytest.raises(QueryError, match="n_cells is 0"):
        model.diagnose(n_cells=0)
    gap = model.dataset.adata.copy()
    gap.obs["site"] = [np.nan] + ["a", "b"] * 249 + ["a"]
    with pytest.raises(DataError, match=r"adata.obs\['site'\] is missing \(NaN\) for 1 cells: 'c0'"):
        model.diagnose(gap, batch_key="site")
    untrained = SCVI(model.dataset.adata, n_latent=2, n_hidden=8)
    with pytest.raises(NotTrainedError):
        untrained.diagnose()


@pytest.mark.parametrize("name", ["NoLatent", "Tangram", "RNAStereoscope", "SCBASSET", "PoissonFactors"])
def test_a_model_is_asked_what_its_roles_allow(name):
    model = CASES[name].trained
    found = model.diagnose()
    assert (found.dimensions is None) == (model.latent_site is None)
    assert (found.features is None) == (model.observed_site is None)
    if model.latent_site is None:
        with pytest.raises(QueryError, match=f"{name} has no latent that could hold 'batch'"):
            model.diagnose(batch_key="batch")


def test_a_latent_known_by_its_draws_alone():
    model = CASES["SCVI-logistic-normal"].trained
    found = model.diagnose().dimensions
    assert len(found) == 4 and found["explained"].between(0, 1).all()


def test_a_loaded_model_gives_the_same_diagnosis(tmp_path):
    model = good()
    model.save(tmp_path / "model")
    again = SCVI.load(tmp_path / "model", model.dataset.adata)
    pd.testing.assert_frame_equal(model.diagnose().table, again.diagnose().table)


@pytest.mark.parametrize("kind", ["fewer", "more", "renamed", "reordered", "other counts"])
def test_a_model_with_other_data_forgets_which_cells_were_held_out(kind, tmp_path):
    model = fit(
        {"batch_key": "lane"},
        2,
        plan=TrainingPlan(train_indices=range(250), validation_indices=range(250, 500)),
    )
    own = model.dataset.adata
    model.save(tmp_path / "model")
    same = SCVI.load(tmp_path / "model", own.copy())
    np.testing.assert_array_equal(same.validation_indices, np.arange(250, 500))
    np.testing.assert_array_equal(same._rows_to_diagnose(None, None, 2000), np.arange(250, 500))
    other = own.copy()
    if kind == "fewer":
        other = own[:300].copy()
    elif kind == "reordered":
        other = own[::-1].copy()
    elif kind == "other counts":  # and names that any data could have
        other.X = np.random.default_rng(1).poisson(8.0, other.shape).astype(np.float32)
    elif kind == "more":
        other = anndata.concat([own, own[:50]], keys=["a", "b"], index_unique="-")
    else:
        other.obs_names = [f"n{i}" for i in range(500)]
    SCVI.setup_anndata(other, batch_key="lane")
    again = SCVI.load(tmp_path / "model", other)
    assert len(again.train_indices) == len(again.validation_indices) == 0
    np.testing.assert_array_equal(again._rows_to_diagnose(None, None, 2000), np.arange(other.n_obs))
    assert again.diagnose().table.notna().loc["predictive fit", "value"]
    again.save(tmp_path / "again")  # without a split there are no landmarks to choose


def test_an_author_needs_nothing_for_it():
    assert "diagnose" in dir(NoLatent) and "diagnose" not in vars(NoLatent)
