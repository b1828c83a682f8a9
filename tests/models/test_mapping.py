"""Queries mapped onto a reference: what is new learns, the reference does not move, what is absent is said."""

from __future__ import annotations

import warnings

import mudata
import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from anndata import AnnData
from pyro.distributions import Normal
from scipy import sparse
from scipy.stats import rankdata
from torch import nn

import pyrocell
from pyrocell import SCVI, TrainingPlan
from pyrocell.data import Category, Counts, synthetic_iid
from pyrocell.distributions import Poisson
from pyrocell.errors import (
    DataError,
    NotTrainedError,
    PyrocellWarning,
    QueryError,
    SetupError,
    TrainingError,
)
from pyrocell.infer.freezing import frozen_besides
from pyrocell.infer.landmarks import Landmarks
from pyrocell.nn import MLP, Covariates, InjectedLinear
from pyrocell.nn.growth import inherit
from pyrocell.testing import CHECKS
from pyrocell.testing.asking import state_of
from tests.models.test_contract import CASES
from tests.models.zoo import BatchVAE, NoLatent, PoissonFactors
from tests.test_docs import python_blocks, run

N_GENES = 30
SMALL = {"n_hidden": 16, "n_latent": 4}
KEYS = {
    "batch_key": "batch",
    "categorical_covariate_keys": ["donor", "chemistry"],
    "continuous_covariate_keys": ["age"],
}


def cells(seed: int, batches: list[str], n_cells: int = 150, n_genes: int = N_GENES):
    """Cells in which the covariate ``chemistry`` has one level in the reference (seed 0), two in a query."""
    adata = synthetic_iid(
        n_cells=n_cells, n_genes=n_genes, n_batches=len(batches), label_effect=0.5, seed=seed
    )
    adata.obs["batch"] = [batches[int(name[-1])] for name in adata.obs["batch"].astype(str)]
    adata.obs["chemistry"] = ["v2", "v3"][:1] * n_cells if seed == 0 else ["v2", "v3"] * (n_cells // 2)
    adata.obs_names = [f"{seed}-{name}" for name in adata.obs_names]
    return adata


def fit(model, max_epochs=3, **options):
    model.train(max_epochs, device="cpu", batch_size=64, **options)
    return model


@pytest.fixture(autouse=True)
def _no_bar(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)


def make_reference(batches=("r0", "r1"), keys=KEYS, **options):
    adata = cells(0, list(batches))
    SCVI.setup_anndata(adata, **keys)
    return fit(SCVI(adata, **SMALL, **options))


@pytest.fixture(scope="module")
def reference():
    before, pyrocell.settings.progress = pyrocell.settings.progress, False
    yield make_reference(keys={"batch_key": "batch", "continuous_covariate_keys": ["age"]})
    pyrocell.settings.progress = before


@pytest.fixture
def query():
    return cells(1, ["r0", "q1"])


# the reference does not move, what is new learns


OPTIONS = {
    "one-hot": {},
    "encode-covariates": {"encode_covariates": True, "n_layers": 2},
    "embedding": {"encode_covariates": True, "batch_representation": "embedding"},
    "gene-batch": {"dispersion": "gene-batch", "use_observed_lib_size": False, "gene_likelihood": "nb"},
}
PLANS = {
    "adam": TrainingPlan(weight_decay=0.1),
    "adamw": TrainingPlan(optimizer="adamw", weight_decay=0.1, max_grad_norm=1.0),
    "own": TrainingPlan(
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.1)
    ),
}


@pytest.mark.parametrize("n_reference", [1, 2])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_reference_does_not_move_and_new_categories_learn(options, n_reference):
    batches = ["r0", "r1"][:n_reference]
    model = make_reference(batches, **OPTIONS[options])
    before, latent = state_of(model), model.get_latent_representation()
    expression = model.get_normalized_expression(return_numpy=True)
    mapped = SCVI.load_query_data(cells(1, ["r0", "q1", "q2"]), model)
    start = state_of(mapped)
    fit(mapped, plan=PLANS["adam"])

    own = cells(0, batches)
    np.testing.assert_array_equal(mapped.get_latent_representation(own), latent)
    np.testing.assert_allclose(
        mapped.get_normalized_expression(own, return_numpy=True), expression, atol=1e-6
    )
    for name, value in state_of(model).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    moved = {name for name, value in state_of(mapped).items() if not np.array_equal(value, start[name])}
    assert moved == set(mapped.trainable), "what is new learns, and nothing else"
    assert mapped.mapping["new_categories"] == {"batch": ["q1", "q2"], "chemistry": ["v3"]}


@pytest.mark.parametrize("plan", PLANS)
def test_no_optimizer_moves_the_rows_of_the_reference(plan):
    model = make_reference(encode_covariates=True)
    mapped = fit(SCVI.load_query_data(cells(1, ["r0", "q1"]), model), plan=PLANS[plan])
    for name, new in mapped.trainable.items():
        old, now = model.module.state_dict()[name], mapped.module.state_dict()[name]
        assert new.any() and not new.all()
        if old.shape[0] == 2 + 4:  # two batches, four donors; one chemistry was dropped
            rows = [0, 1, 3, 4, 5, 6]
            np.testing.assert_array_equal(now[rows], old, err_msg=name)
        assert not torch.equal(now[new], torch.zeros_like(now[new]))


def test_training_anew_goes_on_from_the_query_alone(reference, query):
    mapped = fit(SCVI.load_query_data(query, reference))
    latent = mapped.get_latent_representation(cells(0, ["r0", "r1"]))
    fit(mapped)
    assert len(mapped.history) == 6
    np.testing.assert_array_equal(mapped.get_latent_representation(cells(0, ["r0", "r1"])), latent)


def test_unfrozen_the_reference_moves(reference, query):
    mapped = SCVI.load_query_data(query, reference, frozen=False)
    own = cells(0, ["r0", "r1"])
    fit(mapped)
    assert np.abs(mapped.get_latent_representation(own) - reference.get_latent_representation()).max() > 1e-4
    assert mapped.mapping["frozen"] is False


def test_new_batches_start_as_an_average_one(reference, query):
    mapped = SCVI.load_query_data(query, reference)
    table = mapped.module.state_dict()["decoder.mlp.layers.0.linear.table"]
    torch.testing.assert_close(table[2], table[:2].mean(0))


def test_mapping_helps_a_shifted_query():
    """The decoder learns the query's own shift: its cells are explained better than with an average batch."""
    model = make_reference(keys={"batch_key": "batch"})
    fit(model, 30)
    shifted = cells(1, ["q0"], 300)
    counts = shifted.X.toarray()
    counts[:, :10] *= 4
    shifted.X = sparse.csr_matrix(counts)
    mapped = SCVI.load_query_data(shifted, model)
    fit(mapped, 1, lr=0.0)
    before = mapped.get_reconstruction_error()
    fit(mapped, 30, lr=0.02)
    assert mapped.get_reconstruction_error() < before - 1


def test_a_query_without_anything_new_answers_at_once(reference):
    mapped = SCVI.load_query_data(cells(1, ["r0", "r1"]), reference)
    assert mapped.is_trained and mapped.trainable == {}
    assert mapped.get_latent_representation().shape == (150, 4)
    with pytest.raises(TrainingError, match="nothing to learn.*frozen=False"):
        fit(mapped)


def test_a_query_with_something_new_must_be_trained(reference, query):
    with pytest.raises(NotTrainedError):
        SCVI.load_query_data(query, reference).get_latent_representation()


def test_a_mapped_query_may_be_a_reference(reference, query):
    second = fit(SCVI.load_query_data(query, reference))
    latent = second.get_latent_representation()
    third = fit(SCVI.load_query_data(cells(2, ["q1", "s0"]), second))
    assert third.data.names("batch") == ["r0", "r1", "q1", "s0"]
    np.testing.assert_array_equal(third.get_latent_representation(query), latent)


# features


def test_the_order_of_features_and_further_ones_change_nothing(reference, query):
    wide = cells(1, ["r0", "q1"], n_genes=N_GENES)
    further = wide[:, ::-1].copy()
    further.var_names = [f"further-{i}" for i in range(N_GENES)]
    import anndata

    both = anndata.concat([further, wide[:, ::-1]], axis=1, merge="first")
    straight, other = (fit(SCVI.load_query_data(data, reference)) for data in (query, both))
    np.testing.assert_array_equal(straight.get_latent_representation(), other.get_latent_representation())
    for name, value in state_of(straight).items():
        np.testing.assert_array_equal(value, state_of(other)[name], err_msg=name)


@pytest.mark.parametrize(
    "convert", [sparse.csr_matrix, sparse.csc_matrix, lambda x: sparse.csr_matrix(x).toarray()]
)
def test_absent_features_are_zeros(reference, query, convert):
    keep = [i for i in range(N_GENES) if i not in (3, 7, 20)]
    zeros = query.copy()
    counts = zeros.X.toarray()
    counts[:, [3, 7, 20]] = 0
    zeros.X = sparse.csr_matrix(counts)
    lacking = query[:, keep].copy()
    lacking.X = convert(lacking.X)
    full, short = (fit(SCVI.load_query_data(data, reference)) for data in (zeros, lacking))
    np.testing.assert_array_equal(full.get_latent_representation(), short.get_latent_representation())
    assert short.mapping["absent_features"] == {"counts": list(query.var_names[[3, 7, 20]])}
    assert short.mapping["fraction_absent"] == {"counts": 0.1}
    assert short.get_normalized_expression().shape == (150, N_GENES)
    own = cells(0, ["r0", "r1"])  # has them all, and they are read
    np.testing.assert_array_equal(short.get_latent_representation(own), reference.get_latent_representation())


def test_many_absent_features_are_warned_of_and_most_are_refused(reference, query):
    names = list(query.var_names)
    with pytest.warns(PyrocellWarning, match=r"lacks 9 of the 30 features .* \(30%\)") as found:
        SCVI.load_query_data(query[:, 9:].copy(), reference)
    assert all(name in str(found[0].message) for name in names[:5]) and names[5] not in str(found[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SCVI.load_query_data(query[:, 6:].copy(), reference)
    with pytest.raises(DataError, match=r"lacks 16 of the 30 .* and 11 more.*At most 50%"):
        SCVI.load_query_data(query[:, 16:].copy(), reference)


def test_a_feature_absent_from_other_data_is_still_refused(reference, query):
    mapped = fit(SCVI.load_query_data(query[:, 1:].copy(), reference))
    with pytest.raises(DataError, match=str(query.var_names[5])):
        mapped.get_latent_representation(query[:, [i for i in range(N_GENES) if i != 5]].copy())


def test_bad_counts_of_a_query_are_refused(reference, query):
    query.X = query.X * 0.5
    with pytest.raises(DataError, match="not whole"):
        SCVI.load_query_data(query, reference)


def test_names_that_repeat_are_refused(reference, query):
    query.var_names = [query.var_names[0], *query.var_names[:-1]]
    with pytest.raises(DataError, match="more than once"):
        SCVI.load_query_data(query, reference)


# covariates and labels


def test_continuous_covariates_keep_the_moments_of_the_reference(reference, query):
    query.obs["age"] = query.obs["age"] + 100
    mapped = SCVI.load_query_data(query, reference)
    record = reference.data.record("continuous_covariates")
    found = mapped.require_data(None).cells(np.arange(5)).continuous_covariates[:, 0].numpy()
    expected = (query.obs["age"].to_numpy()[:5] - record["means"][0]) / record["sds"][0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.min() > 3


def test_moments_of_the_library_are_those_of_each_batch():
    model = make_reference(**OPTIONS["gene-batch"])
    adata = cells(1, ["r0", "q1"])
    mapped = SCVI.load_query_data(adata, model)
    torch.testing.assert_close(mapped.library_mean[:2], model.library_mean)
    logs = np.log(np.asarray(adata[adata.obs["batch"] == "q1"].X.sum(1)))
    torch.testing.assert_close(mapped.library_mean[2], torch.tensor([logs.mean()], dtype=torch.float32))
    torch.testing.assert_close(mapped.library_sd[2], torch.tensor([logs.std()], dtype=torch.float32))


def test_a_set_up_of_the_query_holds(reference, query):
    query.obs = query.obs.rename(columns={"batch": "lane", "age": "years"})
    query.layers["raw"] = query.X.copy()
    query.X = query.X * 2
    with pytest.raises(DataError, match=r"no column of them \(batch_key='batch'\).*one new name"):
        SCVI.load_query_data(query, reference)
    SCVI.setup_anndata(query, layer="raw", batch_key="lane", continuous_covariate_keys=["years"])
    mapped = fit(SCVI.load_query_data(query, reference))
    assert mapped.data.names("batch") == ["r0", "r1", "q1"]
    again = cells(1, ["r0", "q1"])
    plain = fit(SCVI.load_query_data(again, reference))
    np.testing.assert_array_equal(mapped.get_latent_representation(), plain.get_latent_representation())


def test_a_query_must_say_its_batch_and_as_many_covariates(reference, query):
    SCVI.setup_anndata(query, continuous_covariate_keys=["age"])
    with pytest.raises(DataError, match=r"'r0', 'r1'.*batch_key"):
        SCVI.load_query_data(query, reference)
    SCVI.setup_anndata(query, batch_key="batch")
    with pytest.raises(DataError, match="names the columns none; the model was made with 'age'"):
        SCVI.load_query_data(query, reference)


def test_a_reference_without_batches_takes_a_query_with_some(query):
    model = make_reference(keys={})
    latent = model.get_latent_representation()
    SCVI.setup_anndata(query, batch_key="batch")
    mapped = fit(SCVI.load_query_data(query, model))
    assert mapped.data.names("batch") == ["all", "q1", "r0"]
    own = cells(0, ["all"])
    np.testing.assert_array_equal(mapped.get_latent_representation(own), latent)


def test_missing_batches_are_refused(reference, query):
    query.obs["batch"] = pd.Series([None, *["q1"] * 149], index=query.obs_names)
    with pytest.raises(DataError, match="batch"):
        SCVI.load_query_data(query, reference)


def test_labels_may_be_absent_unless_the_model_reads_them(query):
    keys = {"batch_key": "batch", "labels_key": "label"}
    unread, read = (make_reference(keys=keys, **more) for more in ({}, {"dispersion": "gene-label"}))
    del query.obs["label"]
    mapped = fit(SCVI.load_query_data(query, unread))
    assert not mapped.data.has("label") and np.isfinite(mapped.get_elbo())
    with pytest.raises(SetupError, match="needs labels"):
        SCVI.load_query_data(query, read)


def test_new_labels_get_a_dispersion_of_their_own(query):
    model = make_reference(keys={"batch_key": "batch", "labels_key": "label"}, dispersion="gene-label")
    query.obs["label"] = np.where(np.arange(150) % 2, "another", query.obs["label"].astype(str))
    mapped = fit(SCVI.load_query_data(query, model))
    assert mapped.log_theta.shape == (4, N_GENES)
    torch.testing.assert_close(mapped.log_theta[:3], model.log_theta)


def test_an_unseen_batch_without_mapping_is_refused(reference, query):
    with pytest.raises(DataError, match=r"'q1'.*load_query_data"):
        reference.get_latent_representation(query)


# files, refusals, roles


def test_neither_the_query_nor_the_reference_are_changed(reference, query):
    before, kept, state = query.copy(), list(reference.data.names("batch")), state_of(reference)
    fit(SCVI.load_query_data(query, reference))
    assert list(query.uns) == list(before.uns) and list(query.obs) == list(before.obs)
    assert abs(query.X - before.X).sum() == 0 and list(query.var_names) == list(before.var_names)
    assert reference.data.names("batch") == kept
    for name, value in state_of(reference).items():
        np.testing.assert_array_equal(value, state[name])
    assert all(p.requires_grad for p in reference.module.parameters())


def test_a_folder_serves_as_reference(reference, query, tmp_path):
    reference.save(tmp_path / "reference", save_anndata=True)
    from_memory, from_file = (
        fit(SCVI.load_query_data(query, source)) for source in (reference, tmp_path / "reference")
    )
    np.testing.assert_array_equal(
        from_memory.get_latent_representation(), from_file.get_latent_representation()
    )


def test_a_saved_query_answers_the_same_and_stays_frozen(reference, query, tmp_path):
    mapped = fit(SCVI.load_query_data(query[:, 1:].copy(), reference))
    mapped.save(tmp_path / "query")
    again = SCVI.load(tmp_path / "query", query)
    np.testing.assert_array_equal(again.get_elbo(return_mean=False).shape, (150,))
    assert again.mapping == mapped.mapping and set(again.trainable) == set(mapped.trainable)
    own = cells(0, ["r0", "r1"])
    np.testing.assert_array_equal(again.get_latent_representation(own), reference.get_latent_representation())
    fit(again, plan=PLANS["adam"])
    np.testing.assert_array_equal(again.get_latent_representation(own), reference.get_latent_representation())
    assert {name for name, p in again.module.named_parameters() if p.requires_grad} == set(mapped.trainable)


def test_a_checkpoint_of_a_query_is_resumed_exactly(reference, query, tmp_path):
    whole = fit(SCVI.load_query_data(query, reference), 4, lr=1e-3, n_epochs_kl_warmup=1)
    plan = TrainingPlan(checkpoint=tmp_path / "checkpoint", checkpoint_every=2)
    broken = fit(SCVI.load_query_data(query, reference), 2, lr=1e-3, n_epochs_kl_warmup=1, plan=plan)
    assert len(broken.history) == 2
    resumed = SCVI.load_query_data(query, reference)
    fit(resumed, 4, lr=1e-3, n_epochs_kl_warmup=1, resume=tmp_path / "checkpoint")
    for name, value in state_of(whole).items():
        np.testing.assert_array_equal(value, state_of(resumed)[name], err_msg=name)


def test_a_reference_must_be_a_fitted_model_of_the_class(reference, query):
    with pytest.raises(SetupError, match=r"is a SCVI.*SCVI\.load_query_data"):
        BatchVAE.load_query_data(query, reference)
    with pytest.raises(SetupError, match="is a int; expected a fitted SCVI"):
        SCVI.load_query_data(query, 3)
    adata = cells(0, ["r0"])
    SCVI.setup_anndata(adata)
    with pytest.raises(NotTrainedError):
        SCVI.load_query_data(query, SCVI(adata, **SMALL))


def test_models_without_a_guide_cannot_map():
    assert not hasattr(PoissonFactors, "load_query_data")
    assert hasattr(NoLatent, "load_query_data") and hasattr(BatchVAE, "load_query_data")


class _BatchMeans(pyrocell.CellModel):
    """Means of each batch, in a parameter whose rows nobody named."""

    counts = Counts()
    batch = Category(optional=True)

    def __init__(self, adata):
        super().__init__(adata)
        self.log_means = nn.Parameter(torch.zeros(self.data.size("batch"), self.data.size("counts")))
        self.offset = nn.Parameter(torch.zeros(1))

    def model(self, cells):
        with self.plate(cells):
            shift = pyro.sample("shift", Normal(0.0, 1.0))
            rate = (self.log_means[cells.batch] + shift.unsqueeze(-1)).exp()
            pyro.sample("x", Poisson(rate).to_event(1), obs=cells.counts)

    def guide(self, cells):
        with self.plate(cells):
            pyro.sample("shift", Normal(self.offset.expand(len(cells)), 0.1))


class _NamedBatchMeans(_BatchMeans):
    """The same, and named."""

    batch_parameters = ("log_means",)


def test_a_parameter_that_grows_must_be_named(query):
    for model_class in (_BatchMeans, _NamedBatchMeans):
        adata = cells(0, ["r0", "r1"])
        model_class.setup_anndata(adata, batch_key="batch")
        model = fit(model_class(adata), 2)
        if model_class is _BatchMeans:
            with pytest.raises(SetupError, match=r"'log_means' has shape \(2, 30\).*batch_parameters"):
                model_class.load_query_data(query, model)
        else:
            mapped = fit(model_class.load_query_data(query, model))
            torch.testing.assert_close(mapped.log_means[:2], model.log_means, rtol=0, atol=0)
            assert set(mapped.trainable) == {"log_means"}


# other models


def test_mapping_of_every_public_model_is_in_the_contract():
    public = {value for name in pyrocell._OBJECTS if isinstance(value := getattr(pyrocell, name), type)}
    models = {value for value in public if issubclass(value, pyrocell.CellModel)} - {pyrocell.CellModel}
    mapped = {case.model_class for case in CASES.values() if "batch_key" in case.setup}
    assert {model for model in models if "batch" in model.fields} <= mapped
    assert "queries are mapped without moving the reference" in CHECKS


def another_batch(case):
    adata = case.make_data()
    adata.obs["batch"] = "another"
    return adata


def test_scanvi_maps_cells_without_labels():
    case = CASES["SCANVI"]
    query = another_batch(case)
    del query.obs["type"]
    mapped = fit(pyrocell.SCANVI.load_query_data(query, case.trained))
    assert not mapped.require_data(None).cells(np.arange(160)).is_labeled.any()
    assert set(mapped.predict()) <= set(case.trained.data.names("label"))
    assert mapped.data.names("label") == case.trained.data.names("label")


def test_scanvi_uses_known_labels_and_refuses_others():
    case = CASES["SCANVI"]
    query = another_batch(case)
    mapped = fit(pyrocell.SCANVI.load_query_data(query, case.trained))
    labelled = mapped.require_data(None).cells(np.arange(160)).is_labeled.numpy()
    np.testing.assert_array_equal(labelled, query.obs["type"] != "Unknown")
    query.obs.loc[query.obs_names[0], "type"] = "a new type"
    with pytest.raises(DataError, match="'a new type'"):
        pyrocell.SCANVI.load_query_data(query, case.trained)


def protein_reference(adata):
    mdata = as_mudata(adata)
    pyrocell.TOTALVI.setup_mudata(
        mdata, modalities={"counts": "rna", "proteins": "protein"}, batch_key="batch"
    )
    model = pyrocell.TOTALVI(mdata, n_hidden=16, n_latent=4)
    return fit(model)


def as_mudata(adata, proteins=slice(None)):
    rna = AnnData(adata.X, obs=adata.obs[[]], var=adata.var[[]])
    names = np.array([f"protein_{i}" for i in range(10)])[proteins]
    protein = AnnData(adata.obsm["protein_expression"][:, proteins], obs=adata.obs[[]])
    protein.var_names = names
    with mudata.set_options(pull_on_update=False):
        mdata = mudata.MuData({"rna": rna, "protein": protein})
    mdata.obs["batch"] = adata.obs["batch"].to_numpy()
    return mdata


def test_totalvi_maps_mudata_with_proteins_that_were_not_measured():
    model = protein_reference(cells(0, ["r0", "r1"]))
    latent = model.get_latent_representation()
    before = state_of(model)
    query = as_mudata(cells(1, ["q0"]), slice(3, None))
    mapped = fit(pyrocell.TOTALVI.load_query_data(query, model))
    assert mapped.mapping["absent_features"] == {
        "counts": [],
        "proteins": ["protein_0", "protein_1", "protein_2"],
    }
    measured = mapped.require_data(None).cells(np.arange(5)).proteins_mask
    assert not measured[:, :3].any() and measured[:, 3:].all()
    own = model.require_data(None).adata
    np.testing.assert_allclose(mapped.get_latent_representation(own), latent, atol=1e-6)
    for name, value in state_of(model).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert all(np.isfinite(value).all() for value in state_of(mapped).values())


def test_a_query_of_another_container_must_be_set_up():
    model = protein_reference(cells(0, ["r0", "r1"]))
    query = cells(1, ["q0"])
    with pytest.raises(SetupError, match="not set up for TOTALVI"):
        pyrocell.TOTALVI.load_query_data(query, model)
    keys = {"protein_expression_obsm_key": "protein_expression", "protein_names_uns_key": "protein_names"}
    pyrocell.TOTALVI.setup_anndata(query, batch_key="batch", **keys)
    assert len(fit(pyrocell.TOTALVI.load_query_data(query, model)).get_latent_representation()) == 150


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks("docs/user_guide/reference_mapping.md")
    names = run([block.replace(".train()", '.train(max_epochs=2, device="cpu")') for block in blocks])
    assert len(names["novelty"]) == len(names["query"]) == len(names["latent"])


# how far a query lies outside


def auroc(score, positive):
    ranks = rankdata(score)
    n = positive.sum()
    return (ranks[positive].sum() - n * (n + 1) / 2) / (n * (~positive).sum())


@pytest.fixture(scope="module")
def left_out():
    """A reference without ``label_2``, a query of another batch with all labels, and which of its cells are new."""
    before, pyrocell.settings.progress = pyrocell.settings.progress, False
    adata = synthetic_iid(n_cells=1000, n_genes=80, n_batches=3, n_labels=4, label_effect=1.0, seed=1)
    is_query, is_new = adata.obs["batch"] == "batch_2", adata.obs["label"] == "label_2"
    own, query = adata[~is_query & ~is_new].copy(), adata[is_query].copy()
    SCVI.setup_anndata(own, batch_key="batch")
    model = SCVI(own, n_hidden=32, n_latent=5, gene_likelihood="nb")
    model.train(60, lr=5e-3, train_size=0.7, device="cpu", batch_size=64)
    mapped = fit(SCVI.load_query_data(query, model))
    pyrocell.settings.progress = before
    return model, mapped, (query.obs["label"] == "label_2").to_numpy()


def test_cells_of_a_type_left_out_of_the_reference_are_found(left_out):
    _, mapped, is_new = left_out
    table = mapped.get_novelty()
    assert list(table.columns) == ["distance", "quantile"] and list(table.index) == list(
        mapped.dataset.obs_names
    )
    assert auroc(table["distance"], is_new) > 0.9 and auroc(table["quantile"], is_new) > 0.9
    assert (table["quantile"][is_new] > 0.95).mean() > 0.8


def test_novelty_is_calibrated_on_known_cells(left_out):
    model, mapped, is_new = left_out
    quantile = mapped.get_novelty().loc[~is_new, "quantile"]
    assert quantile.between(0, 1).all()
    assert 0.35 < quantile.median() < 0.65 and (quantile > 0.95).mean() < 0.12
    held_out = model.get_novelty(indices=model.validation_indices)
    assert abs(held_out["quantile"].mean() - 0.5) < 0.01 and np.isclose(
        held_out["distance"].median(), 1, atol=0.01
    )


def test_novelty_asks_about_any_cells(left_out):
    model, mapped, _ = left_out
    whole = mapped.get_novelty()
    pd.testing.assert_frame_equal(mapped.get_novelty(indices=[5, 2], batch_size=1), whole.iloc[[5, 2]])
    own = model.require_data(None).adata
    pd.testing.assert_frame_equal(mapped.get_novelty(own), model.get_novelty())
    assert not hasattr(NoLatent, "get_novelty")


def test_what_is_kept_of_the_reference_is_saved(left_out, tmp_path):
    model, mapped, _ = left_out
    query = mapped.require_data(None).adata
    model.save(tmp_path / "reference")
    mapped.save(tmp_path / "query")
    again = SCVI.load(tmp_path / "query", query)
    pd.testing.assert_frame_equal(again.get_novelty(), mapped.get_novelty())
    from_file = fit(SCVI.load_query_data(query, tmp_path / "reference"))
    pd.testing.assert_frame_equal(from_file.get_novelty(), mapped.get_novelty())
    without_data = SCVI.load(tmp_path / "reference")
    assert len(without_data.landmarks.latents) == len(model.train_indices)
    seen = model.require_data(None).adata
    pd.testing.assert_frame_equal(without_data.get_novelty(seen), model.get_novelty())


def test_training_forgets_what_was_known_of_the_reference(reference, query, tmp_path):
    reference.save(tmp_path)
    again = SCVI.load(tmp_path, cells(0, ["r0", "r1"]))
    assert again.landmarks is not None
    fit(again, 1)
    assert again.landmarks is None and len(again.get_novelty()) == 150
    unfrozen = fit(SCVI.load_query_data(query, reference, frozen=False))
    with pytest.raises(QueryError, match="mapped with frozen=False"):
        unfrozen.get_novelty()


def test_landmarks_of_a_reference_whose_data_changed_are_not_made_up(tmp_path):
    model = make_reference(keys={"batch_key": "batch"})
    model.dataset.adata.X.data *= 2
    model.save(tmp_path)
    with pytest.raises(QueryError, match="Nothing is known"):
        SCVI.load(tmp_path).get_novelty(cells(0, ["r0", "r1"]))


def test_without_validation_cells_training_cells_stand_for_them():
    adata = cells(0, ["r0"])
    SCVI.setup_anndata(adata)
    model = SCVI(adata, **SMALL)
    fit(model, train_size=1.0)
    assert 0 < model.get_novelty()["quantile"].mean() < 1


def test_the_distance_is_the_mean_to_the_nearest_landmarks():
    grid = np.arange(40, dtype=np.float32)[:, None]
    landmarks = Landmarks.of(grid, grid + 0.25)
    point = np.array([[1e4]], dtype=np.float32)
    np.testing.assert_allclose(landmarks.distance(point), 1e4 - np.arange(25, 40).mean(), rtol=1e-6)
    assert landmarks.quantile(landmarks.distance(point)) == 1
    assert landmarks.quantile(np.array([0.0])) == 0


# parts


def test_inherit_keeps_the_output_for_known_levels():
    old = MLP(5, 3, n_layers=2, dropout=0.0, covariates=Covariates((2, 1, 3), n_continuous=1))
    new = MLP(5, 3, n_layers=2, dropout=0.0, covariates=Covariates((4, 2, 3), n_continuous=1))
    masks = inherit(new, old)
    x, continuous = torch.randn(6, 5), torch.randn(6, 1)
    codes = [torch.arange(6) % 2, torch.zeros(6, dtype=torch.int64), torch.arange(6) % 3]
    old.eval(), new.eval()
    torch.testing.assert_close(new(x, codes, continuous), old(x, codes, continuous), rtol=0, atol=0)
    assert set(masks) == {"layers.0.linear.table", "layers.1.linear.table"}
    expected = torch.tensor([0, 0, 1, 1, 0, 1, 0, 0, 0], dtype=torch.bool)
    for mask in masks.values():
        assert torch.equal(mask, expected[:, None].expand_as(mask))


def test_inherit_of_an_embedding_that_was_dropped():
    old = InjectedLinear(5, 3, covariates=Covariates((1,), embedding_dim=2))
    new = InjectedLinear(5, 3, covariates=Covariates((2,), embedding_dim=2))
    masks = inherit(new, old)
    assert new.embedding.weight.abs().sum() == 0 and new.embedding_weight.abs().sum() > 0
    assert masks["embedding_weight"].all() and masks["embedding.weight"].tolist() == [[False] * 2, [True] * 2]


def test_batch_norm_evaluates_while_frozen_and_hooks_go_away():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    masks = {"0.weight": torch.eye(3, dtype=torch.bool)}
    start = {name: value.clone() for name, value in module.state_dict().items()}

    def step():
        module.train()
        optimizer.zero_grad()
        module(torch.randn(8, 3)).pow(2).sum().backward()
        optimizer.step()

    with frozen_besides(module, optimizer, masks):
        step()
    off_diagonal = ~masks["0.weight"]
    assert not module[0].weight.grad[off_diagonal].any(), "clipping and moments must not see what is frozen"
    assert torch.equal(module[0].weight[off_diagonal], start["0.weight"][off_diagonal])
    assert not torch.equal(module[0].weight, start["0.weight"])
    assert torch.equal(module[1].running_mean, start["1.running_mean"])
    step()
    assert not torch.equal(module[0].weight[off_diagonal], start["0.weight"][off_diagonal])
    assert not torch.equal(module[1].running_mean, start["1.running_mean"])


def test_covariates_of_the_same_names_are_matched_by_name():
    """Whatever their order in the query's set-up."""
    both = {"batch_key": "batch", "continuous_covariate_keys": ["age", "score"]}

    def with_score(seed, batches):
        adata = cells(seed, batches)
        adata.obs["score"] = np.linspace(100.0, 200.0, adata.n_obs)
        return adata

    first = with_score(0, ["r0", "r1"])
    SCVI.setup_anndata(first, **both)
    model = fit(SCVI(first, **SMALL))
    query = with_score(1, ["q0"])
    plain = SCVI.load_query_data(query.copy(), model)
    SCVI.setup_anndata(query, batch_key="batch", continuous_covariate_keys=["score", "age"])
    swapped = SCVI.load_query_data(query, model)
    one, other = (m.require_data(None).cells(np.arange(5)) for m in (plain, swapped))
    assert torch.equal(one.continuous_covariates, other.continuous_covariates)
    query.obs["weight"] = 1.0 * np.arange(query.n_obs)
    SCVI.setup_anndata(query, batch_key="batch", continuous_covariate_keys=["score", "weight"])
    with pytest.raises(DataError, match="'score', 'weight'.*made with 'age', 'score'"):
        SCVI.load_query_data(query, model)


def test_totalvi_learns_the_proteins_of_a_query():
    """A query whose antibodies are four times as efficient: its new entries learn it, and predictions follow."""
    reference = cells(0, ["r0", "r1"])
    model = protein_reference(reference)
    query = cells(1, ["q0"])
    query.obsm["protein_expression"] = 4 * query.obsm["protein_expression"]
    mapped = pyrocell.TOTALVI.load_query_data(as_mudata(query), model)
    assert (mapped.protein_decoder.n_measured[-1] == query.n_obs).all()
    with_reference = mapped.protein_decoder.n_measured[:2]
    assert torch.equal(with_reference, model.protein_decoder.n_measured)
    mapped.train(60, lr=0.02, early_stopping=False)
    efficiency = mapped.log_efficiency.detach()
    assert efficiency[2].mean() > efficiency[:2].mean() + 0.3


def test_totalvi_imputes_the_proteins_of_a_query_that_has_none():
    reference, query = cells(0, ["r0", "r1"]), cells(1, ["q0"])
    keys = {"protein_expression_obsm_key": "protein_expression", "protein_names_uns_key": "protein_names"}
    pyrocell.TOTALVI.setup_anndata(reference, batch_key="batch", **keys)
    model = fit(pyrocell.TOTALVI(reference, n_hidden=16, n_latent=4))
    del query.obsm["protein_expression"]
    mapped = fit(pyrocell.TOTALVI.load_query_data(query, model))
    assert mapped.mapping["fraction_absent"]["proteins"] == 1.0
    assert not mapped.require_data(None).cells(np.arange(4)).proteins_mask.any()
    proteins = mapped.get_protein_expression(transform_batch="r0")
    assert proteins.shape == (query.n_obs, 10) and np.isfinite(proteins.to_numpy()).all()
