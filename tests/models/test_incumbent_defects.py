"""Errors that say nothing, one test each; their numbers are those of docs/developer/silent_errors.md."""

from __future__ import annotations

import inspect

import numpy as np
import pandas as pd
import pytest
import torch

import pyrocell
from pyrocell import SCANVI, SCVI, TOTALVI, TrainingPlan
from pyrocell.data import synthetic_iid
from pyrocell.testing import ModelCase
from tests.models.test_contract import CASES, PROTEINS, SMALL, masked_proteins, small_data
from tests.models.zoo import BatchVAE, PoissonFactors

PUBLIC = [name for name, case in CASES.items() if case.model_class.__module__.startswith("pyrocell")]
SCVIS = [name for name in PUBLIC if name.startswith("SCVI")]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


# ---------------------------------------------------------------------------------------- wrong numbers, silently


@pytest.mark.parametrize("library_size", [1.0, 1e4])
def test_w3_a_library_size_counts_once_however_many_batches(library_size):
    model = CASES["TOTALVI"].trained
    rna, _ = model.get_normalized_expression(
        transform_batch=["batch_0", "batch_1"], library_size=library_size, n_samples=2
    )
    np.testing.assert_allclose(rna.sum(axis=1), library_size, rtol=1e-4)
    one = [
        model.get_normalized_expression(transform_batch=b, library_size=library_size)[0]
        for b in ("batch_0", "batch_1")
    ]
    both = model.get_normalized_expression(transform_batch=["batch_0", "batch_1"], library_size=library_size)[
        0
    ]
    np.testing.assert_allclose(both, (one[0] + one[1]) / 2, rtol=1e-4)


def test_w4_a_model_without_data_does_not_answer_from_zeros(tmp_path):
    model = CASES["TOTALVI"].trained
    model.save(tmp_path / "model")
    empty = TOTALVI.load(tmp_path / "model")
    with pytest.raises(pyrocell.errors.QueryError, match="loaded without data; give adata="):
        empty.get_latent_representation()
    given = empty.get_latent_representation(model.dataset.adata)
    np.testing.assert_array_equal(given, model.get_latent_representation())


def test_w7_each_model_has_the_score_of_its_own_predictions():
    """Whatever models are called: a check belongs to the model that was asked, not to the first one."""
    names = ("SCVI-nb-covariates", "SCVI-poisson-size-factor")
    alone = [CASES[name].trained.posterior_predictive_check(n_samples=5) for name in names]
    again = [CASES[name].trained.posterior_predictive_check(n_samples=5) for name in reversed(names)][::-1]
    for one, other in zip(alone, again, strict=True):
        pd.testing.assert_series_equal(one.summary, other.summary)
    assert alone[0].summary["coverage_90"] != alone[1].summary["coverage_90"]


@pytest.mark.parametrize(
    ("name", "verb"), [("PEAKVI", "differential_accessibility"), ("SCVI", "differential_expression")]
)
def test_w8_every_row_of_all_groups_says_what_was_compared(name, verb):
    model = CASES[name].trained
    table = getattr(model, verb)(groupby="label")
    groups = sorted(model.dataset.adata.obs["label"].unique())
    n = model.data.size(model.feature_field)
    assert len(table) == n * len(groups)
    assert sorted(table["group1"].unique()) == groups
    assert not pd.MultiIndex.from_arrays([table["group1"], table.index]).duplicated().any()
    assert (table.groupby("group1").size() == n).all()


def test_w9_nothing_that_a_user_passes_can_drop_a_part_of_training():
    """Labels are part of the objective, not of a list of callbacks that a user's own would replace."""
    options = inspect.signature(SCANVI.train).parameters
    assert not [name for name in options if "callback" in name or name.endswith("kwargs")]
    model = CASES["SCANVI"].make()
    CASES["SCANVI"].train(model, plan=TrainingPlan(lr_plateau=True, validate_every=1))
    assert model.history["classification_train"].notna().all()


@pytest.mark.parametrize("name", PUBLIC)
def test_w12_the_defaults_of_a_class_are_those_that_apply(name, monkeypatch):
    """What the class says about its training is what ``train()`` does with no argument."""
    case = CASES[name]
    model, seen = case.make(), {}

    class Stopped(Exception):
        pass

    def stop(self, *_):
        seen.update(self.options, max_epochs=self.max_epochs)
        raise Stopped

    monkeypatch.setattr(pyrocell.infer.trainer.Trainer, "fit", stop)
    with pytest.raises(Stopped):
        model.train()
    kind = type(model)
    assert seen["lr"] == kind.default_lr and seen["max_epochs"] == model.max_epochs_cap
    if not kind.full_batch:
        assert seen["batch_size"] == kind.default_batch_size
    stops = kind.default_early_stopping and len(model.validation_indices) > 0
    assert seen["early_stopping"] == stops


def test_w13_no_option_is_dropped_on_the_way(tmp_path):
    """Given to the constructor, an option is there after saving, loading and mapping a query."""
    case = CASES["SCVI-latent-library"]
    model = case.trained
    model.save(tmp_path / "model")
    query = case.data()
    query.obs["batch"] = "new"
    for other in (SCVI.load(tmp_path / "model"), SCVI.load_query_data(query, tmp_path / "model")):
        assert other.constructor == model.constructor
        assert other.constructor["use_observed_lib_size"] is False
        assert hasattr(other, "library_encoder")


@pytest.mark.parametrize("name", ["SCVI", "TOTALVI", "PEAKVI", "SCANVI"])
def test_w14_comparisons_leave_no_column_behind(name):
    model = CASES[name].trained
    adata = model.dataset.adata
    before = adata.copy()
    verb = "differential_accessibility" if name == "PEAKVI" else "differential_expression"
    getattr(model, verb)(groupby="label")
    model.differential_abundance(sample_key="batch")
    model.diagnose()
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    pd.testing.assert_frame_equal(adata.var, before.var)
    for part in ("obsm", "varm", "layers", "uns", "obsp"):
        assert list(getattr(adata, part)) == list(getattr(before, part))


def test_w15_a_file_holds_the_parameters_of_its_own_model_alone(tmp_path):
    from safetensors import safe_open

    one, other = CASES["SCVI"].trained, CASES["PoissonFactors"].trained
    one.save(tmp_path / "one")
    with safe_open(tmp_path / "one" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert not names & set(other.module.state_dict())
    assert any("encoder" in name for name in names)


def test_w16_terms_of_the_loss_are_kept_apart():
    """The adversary and the classifier are terms beside the bound, and adding them changes none of its own."""
    for name in ("SCANVI", "TOTALVI"):
        model = CASES[name].trained
        cells = model.dataset.cells(np.arange(20))
        with model.asking(seed=1):
            plain = model.elbo()(cells)
        with model.asking(seed=1):
            full = model.elbo()(cells, with_extra=True)
        if name == "SCANVI":
            assert set(full.extra) == {"classification"}
        torch.testing.assert_close(full.elbo, plain.elbo)
        torch.testing.assert_close(full.reconstruction, plain.reconstruction)
        torch.testing.assert_close(full.loss, plain.loss + sum(full.extra.values()))


# ------------------------------------------------------------------------------------- crashes in public calls


@pytest.mark.parametrize("name", PUBLIC)
def test_c1_every_model_and_its_set_up_can_be_looked_at(name):
    model = CASES[name].trained
    assert repr(model).startswith(f"{type(model).__name__}(") and "trained for" in repr(model)
    assert str(model.data) in repr(model)
    assert model.data.setup


@pytest.mark.parametrize("name", SCVIS)
def test_c2_c3_every_question_of_scvi_with_several_draws(name):
    model = CASES[name].trained
    assert model.get_normalized_expression(n_samples=2, return_mean=False).shape[0] == 2
    assert np.isfinite(model.get_marginal_ll(n_samples=3))
    assert model.posterior_predictive_sample(n_samples=2).shape[0] == 2
    assert model.get_feature_correlation_matrix(n_samples=2).shape == (30, 30)
    assert "mean" in model.get_likelihood_parameters(n_samples=2)
    assert len(model.differential_expression(groupby="label", group1="label_0")) == 30
    assert model.posterior_predictive_check(n_samples=2).features.notna().any(axis=None)


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_c4_correlations_of_totalvi_are_of_the_data_asked_about(kind):
    model = CASES["TOTALVI"].trained
    given = CASES["TOTALVI"].data()[:60].copy()
    options = {"correlation_type": kind, "n_samples": 1}
    whole = model.get_feature_correlation_matrix(**options)
    some = model.get_feature_correlation_matrix(given, **options)
    assert whole.shape == some.shape == (42, 42)
    assert not np.allclose(whole, some)
    np.testing.assert_allclose(np.diag(some), 1, rtol=1e-5)


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_c4_every_kind_of_dispersion_of_totalvi_predicts(likelihood):
    options = {"gene_dispersion": "gene-label", "gene_likelihood": likelihood}
    case = ModelCase(
        TOTALVI,
        masked_proteins,
        {"batch_key": "batch", "labels_key": "label"} | PROTEINS,
        SMALL | options | {"empirical_protein_background_prior": False},
    )
    model = case.train(case.make())
    assert model.posterior_predictive_sample(n_samples=2).shape == (2, 160, 42)
    assert {"mean", "theta", "proteins_mean"} <= set(model.get_likelihood_parameters())
    assert len(model.differential_expression(groupby="label", group1="label_0")) == 42


def test_c6_some_proteins_by_name():
    model = CASES["TOTALVI"].trained
    names = model.data.names("proteins")[3:1:-1]
    some = model.get_protein_foreground_probability(protein_list=names)
    assert list(some) == names
    np.testing.assert_allclose(some, model.get_protein_foreground_probability()[names], rtol=1e-5)


def test_c10_noise_may_be_kept_among_the_types():
    model = CASES["SpatialStereoscope"].trained
    kept, left = model.get_proportions(keep_noise=True), model.get_proportions()
    assert kept.shape == (160, 4) and left.shape == (160, 3)
    np.testing.assert_allclose(kept.sum(axis=1), 1, rtol=1e-5)


def test_c11_a_pyro_model_stops_early_and_answers_for_some_cells():
    adata = small_data()
    BatchVAE.setup_anndata(adata, batch_key="batch")
    model = BatchVAE(adata, **SMALL)
    model.train(8, early_stopping=True, n_epochs_kl_warmup=1, plan=TrainingPlan(patience=1))
    assert model.history["elbo_validation"].notna().any()
    factors = CASES["PoissonFactors"].trained
    assert isinstance(factors, PoissonFactors)
    assert factors.get_latent_representation(indices=[5, 1]).shape == (2, 3)


def test_c12_covariates_may_be_text_numbers_or_truth_values():
    adata = synthetic_iid(n_cells=40, n_genes=12, n_proteins=0, n_regions=0)
    text = np.where(np.arange(40) % 3 == 0, "a", "b")
    adata.obs["site"], adata.obs["kit"], adata.obs["old"] = text, np.arange(40) % 4, np.arange(40) % 5 == 0
    SCVI.setup_anndata(adata, batch_key="site", categorical_covariate_keys=["kit", "old"])
    model = SCVI(adata, n_hidden=8, n_latent=2)
    model.train(1, batch_size=128)
    assert model.data.names("batch") == ["a", "b"] and np.isfinite(model.get_elbo())


def test_c13_sizes_of_cells_in_open_chromatin():
    sizes = CASES["PEAKVI"].trained.get_library_size_factors()
    assert len(sizes) == 160 and np.isfinite(np.asarray(sizes, dtype=float)).all()


@pytest.mark.parametrize("name", PUBLIC)
def test_c18_positions_may_be_of_any_kind(name):
    model = CASES[name].trained
    if model.observed_site is None:
        return
    kinds = ([4, 2], (4, 2), np.array([4, 2], dtype=np.int32), np.array([4, 2], dtype=np.uint8))
    answers = [model.posterior(model.observed_site, indices=kind) for kind in kinds]
    assert all(np.array_equal(answers[0], other) for other in answers[1:])
