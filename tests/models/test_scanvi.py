"""SCANVI: the bound against a sum written out, labels at the edges, the start from SCVI, and recovery of labels."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from pyro import poutine
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

import pyrocell
from pyrocell import SCANVI, SCVI
from pyrocell.data import synthetic_iid
from pyrocell.data.simulate import simulate_scvi
from pyrocell.errors import DataError, NotTrainedError, PyrocellWarning, SetupError
from pyrocell.infer.calibration import calibration_error
from pyrocell.models.labels import ClassifierOptions

LABELS = {"labels_key": "type", "unlabeled_category": "Unknown"}
SMALL = {"n_hidden": 16, "n_latent": 4}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)


def hidden(adata, column, every=3):
    """Labels of one cell in ``every``; the rest unknown."""
    adata.obs["type"] = np.where(
        np.arange(adata.n_obs) % every == 0, adata.obs[column].astype(str), "Unknown"
    )
    return adata


def small_data():
    return hidden(synthetic_iid(n_cells=150, n_genes=30, label_effect=1.0, seed=1), "label")


def make(adata=None, model_class=SCANVI, **options):
    adata = small_data() if adata is None else adata
    model_class.setup_anndata(adata, batch_key="batch", **LABELS)
    return model_class(adata, **(SMALL | options))


@pytest.fixture(scope="module")
def trained():
    before, pyrocell.settings.progress = pyrocell.settings.progress, False
    model = make()
    model.train(40, lr=1e-2, batch_size=32)
    pyrocell.settings.progress = before
    return model


# ------------------------------------------------------------------------------------------------ the objective


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_bound_is_the_sum_over_labels_written_out(trained, weight):
    """Spec: U_n for unlabelled cells, S_n with log(1/C) for labelled ones; y, u and z warm up alike."""
    cells = trained.dataset.cells(np.arange(40))
    with trained.asking(seed=4):
        loss = trained.elbo()(cells, weight).loss
    with trained.asking(seed=4):
        trace = poutine.trace(poutine.enum(trained.guide, first_available_dim=-2)).get_trace(cells)
        z, u, q_z = trace.nodes["z"]["value"], trace.nodes["u"]["value"], trace.nodes["z"]["fn"]
        out = trained.decoder.heads(z, cells.batch, cells.categorical_covariates, cells.continuous_covariates)
        likelihood = trained._likelihood(cells, out, cells.library.log()).log_prob(cells.counts).sum(-1)
        q = trained.classifier(z).softmax(-1)
        terms = []
        for label in range(3):
            y = torch.full((40,), label)
            log_ratio = trained.z_prior(u[label], y).log_prob(z)
            normal = torch.distributions.Normal(torch.zeros(4), torch.ones(4))
            kl_u = torch.distributions.kl_divergence(trained.u_encoder(z, y).base_dist, normal).sum(-1)
            terms.append(log_ratio - kl_u)
        terms = torch.stack(terms, -1)
        unlabelled = (q * (terms - q.log())).sum(-1)
        labelled = terms.gather(-1, cells.label[:, None]).squeeze(-1)
        within = torch.where(cells.is_labeled, labelled, unlabelled) - np.log(3)
        exact = -(likelihood + weight * (within - q_z.log_prob(z)))
    assert loss.item() == pytest.approx(exact.mean().item(), rel=1e-5)


def test_counts_are_decoded_once(trained, monkeypatch):
    shapes = []
    heads = trained.decoder.heads
    monkeypatch.setattr(trained.decoder, "heads", lambda z, *rest: shapes.append(z.shape) or heads(z, *rest))
    with trained.asking():
        trained.elbo()(trained.dataset.cells(np.arange(20)))
    assert shapes == [(20, 4)]


def classification(model, rows):
    """The classifier's term for some cells, without dropout and batch statistics."""
    cells = model.dataset.cells(rows)
    with model.asking(), torch.no_grad():
        guide = poutine.trace(model.guide).get_trace(cells).nodes
        return model.extra_terms(cells, guide)["classification"].item()


@pytest.mark.parametrize("class_weights", [None, "balanced"])
def test_the_classifier_term_is_unbiased_over_minibatches(class_weights):
    """Minibatches with any number of labelled cells, also none, average to the mean over all labelled cells."""
    model = make(classifier=ClassifierOptions(class_weights=class_weights, weight=7.0))
    model.train(2)
    parts = [classification(model, rows) for rows in np.split(np.arange(150), 15)]
    whole = classification(model, np.arange(150))
    assert np.mean(parts) == pytest.approx(whole, rel=1e-5)
    cells = model.dataset.cells(np.arange(150))
    log_p = np.log(model.predict(soft=True).to_numpy())[np.arange(150), cells.label]
    known = cells.is_labeled.numpy()
    loss = pd.Series(-log_p[known]).groupby(cells.label.numpy()[known])
    expected = loss.mean().mean() if class_weights else -log_p[known].mean()
    assert whole == pytest.approx(7.0 * expected, rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_how_much_of_the_classifier_reaches_the_encoder(share):
    model = make(classifier=ClassifierOptions(encoder_gradient=share))
    cells = model.dataset.cells(np.arange(60))
    gradients = {}
    for name, reach in (("this", share), ("all", 1.0)):
        model.options = ClassifierOptions(encoder_gradient=reach)
        model.module.eval()
        with model.running(), model.stream.active():
            guide = poutine.trace(model.guide).get_trace(cells).nodes
            loss = model.extra_terms(cells, guide)["classification"]
        parameters = [model.encoder.mean.weight, model.classifier.logits.weight]
        gradients[name] = torch.autograd.grad(loss, parameters, allow_unused=True)
    encoder = gradients["this"][0] if share else torch.zeros(())
    assert torch.allclose(encoder, share * gradients["all"][0], rtol=1e-4, atol=1e-8)
    assert gradients["all"][0].abs().sum() > 0
    assert torch.allclose(gradients["this"][1], gradients["all"][1])


def test_history_has_the_classifier_and_validation_is_the_bound_alone():
    model = make()
    model.train(3, train_size=0.8)
    history = model.history
    assert (history["classification_train"] > 0).all()
    total = history["reconstruction_train"] + history["kl_local_train"] + history["kl_global_train"]
    assert np.allclose(history["elbo_train"], total)
    assert "classification_validation" not in history


# ------------------------------------------------------------------------------------------------ answers


def test_predictions_are_named_and_do_not_look_at_labels(trained):
    adata = trained.dataset.adata
    soft = trained.predict(soft=True)
    assert list(soft.columns) == ["label_0", "label_1", "label_2"] and list(soft.index) == list(
        adata.obs_names
    )
    assert np.allclose(soft.sum(1), 1.0, atol=1e-5)
    assert (trained.predict() == soft.idxmax(axis=1)).all()
    some = trained.predict(indices=[7, 2], batch_size=1)
    assert list(some.index) == list(adata.obs_names[[7, 2]])
    assert (some == trained.predict().iloc[[7, 2]]).all()
    blind = adata.copy()
    del blind.obs["type"]
    pd.testing.assert_frame_equal(trained.predict(blind, soft=True), soft)
    hit = trained.predict() == adata.obs["label"].astype(str)
    assert hit[adata.obs["type"] == "Unknown"].mean() > 0.9


def test_known_labels_are_kept_in_draws(trained):
    y = trained.posterior("y", n_samples=50, return_mean=False)
    cells = trained.dataset.cells(np.arange(150))
    known = cells.is_labeled.numpy()
    assert (y[:, known] == cells.label.numpy()[known]).all()
    assert y[:, ~known].std(0).max() > 0


def test_queries_of_scvi(trained):
    few = {
        "idx1": np.arange(8),
        "idx2": np.arange(8, 16),
    }  # importance weights ask for the evidence of each cell
    for weights in ("uniform", "importance"):
        options = pyrocell.DifferentialOptions(weights=weights)
        table = trained.differential_expression(**few, mode="change", options=options)
        assert len(table) == 30 and np.isfinite(table["lfc_mean"]).all()
    assert trained.get_normalized_expression(transform_batch="batch_1", n_samples=2).shape == (150, 30)
    assert trained.get_marginal_ll(n_samples=20, return_mean=False).shape == (150,)


def test_dispersion_follows_the_label_also_where_it_is_drawn():
    model = make(dispersion="gene-label")
    model.train(25)
    assert model.log_theta.shape == (3, 30)
    theta = model.get_likelihood_parameters(n_samples=1)["theta"]
    y = model.dataset.cells(np.arange(150)).label.numpy()
    known = model.dataset.cells(np.arange(150)).is_labeled.numpy()
    expected = model.log_theta.exp().detach().numpy()[y]
    assert np.allclose(theta[known], expected[known], rtol=1e-4)
    per_label = {tuple(row) for row in np.round(theta[:, :2], 5).tolist()}
    assert len(per_label) <= 3


def test_untrained_models_predict_nothing():
    with pytest.raises(NotTrainedError):
        make().predict()


# ------------------------------------------------------------------------------------------------ start from SCVI


def test_starts_from_scvi_without_a_new_set_up():
    adata = small_data()
    SCVI.setup_anndata(adata, batch_key="batch")
    scvi = SCVI(adata, **SMALL, gene_likelihood="nb")
    with pytest.raises(NotTrainedError):
        SCANVI.from_scvi_model(scvi, "Unknown", "type")
    scvi.train(3)
    record = {key: str(value) for key, value in adata.uns.items()}
    model = SCANVI.from_scvi_model(scvi, "Unknown", "type", classifier=ClassifierOptions(n_layers=0))
    assert {key: str(value) for key, value in adata.uns.items()} == record
    old, new = scvi.module.state_dict(), model.module.state_dict()
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    assert model.constructor["gene_likelihood"] == "nb" and model.data.names("batch") == scvi.data.names(
        "batch"
    )
    assert model.data.names("label") == ["label_0", "label_1", "label_2"]
    assert not model.is_trained
    assert (model.max_epochs_cap, model.kl_warmup_cap) != (SCANVI.max_epochs_cap, SCANVI.kl_warmup_cap)
    model.train(2)
    assert (model.history["kl_weight"] == 1).all(), "SCVI has warmed up already"


def test_starts_from_scvi_on_some_of_its_cells():
    """Batches keep the codes that SCVI knows them by, also where one is absent."""
    adata = small_data()
    SCVI.setup_anndata(adata, batch_key="batch")
    scvi = SCVI(adata, **SMALL)
    scvi.train(2)
    part = adata[(adata.obs["batch"] == "batch_1").to_numpy()].copy()
    model = SCANVI.from_scvi_model(scvi, "Unknown", "type", part)
    assert model.data.names("batch") == ["batch_0", "batch_1"]
    assert (model.dataset.cells(np.arange(10)).batch == 1).all()
    model.train(1)
    assert model.predict().shape == (part.n_obs,)


def test_what_cannot_start_is_refused():
    adata = small_data()
    SCVI.setup_anndata(adata, batch_key="batch")
    scvi = SCVI(adata, **SMALL, latent_distribution="ln")
    scvi.train(1)
    with pytest.raises(SetupError, match="latent_distribution"):
        SCANVI.from_scvi_model(scvi, "Unknown", "type")
    plain = SCVI(adata, **SMALL)
    plain.train(1)
    with pytest.raises(SetupError, match="labels_key='tipe'.*'type'"):
        SCANVI.from_scvi_model(plain, "Unknown", "tipe")


# ------------------------------------------------------------------------------------------------ labels at the edges


def relabelled(values):
    adata = small_data()
    adata.obs["type"] = values
    return adata


def test_labels_that_are_all_unknown_are_refused():
    with pytest.raises(DataError, match="'type'.*'Unknown'.*all 150 cells"):
        make(relabelled("Unknown"))


def test_one_label_only_is_refused():
    with pytest.raises(DataError, match="1 category.*'T'.*at least 2"):
        make(relabelled(np.where(np.arange(150) % 2, "T", "Unknown")))


def test_unused_category_and_one_labelled_cell():
    values = pd.Categorical(["A"] + ["B"] * 40 + ["Unknown"] * 109, categories=["A", "never", "Unknown", "B"])
    model = make(relabelled(values), classifier=ClassifierOptions(class_weights="balanced"))
    model.train(2, batch_size=32)
    assert list(model.predict(soft=True).columns) == ["A", "B"]
    assert np.isfinite(model.predict(soft=True)).all(axis=None)
    assert model.history["skipped_steps"].sum() == 0


def test_all_cells_labelled():
    adata = small_data()
    adata.obs["type"] = adata.obs["label"]
    with pytest.warns(PyrocellWarning, match="'Unknown' does not occur"):
        model = make(adata)
    model.train(2)
    assert np.isfinite(model.history["elbo_train"]).all()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("weight", 0.0),
        ("class_weights", "even"),
        ("n_layers", -1),
        ("dropout", 1.0),
        ("encoder_gradient", 2.0),
    ],
)
def test_impossible_options_are_named(option, value):
    with pytest.raises(SetupError, match=f"{option} is {value!r}; expected"):
        ClassifierOptions(**{option: value})


# ------------------------------------------------------------------------------------------------ recovery


def simulated(seed, n_cells=3000, n_genes=150, n_labels=5):
    """Classes 5.7 standard deviations apart; a tenth of the cells labelled, a hundredth of those of the last class."""
    adata = simulate_scvi(n_cells, n_genes, n_latent=n_labels, n_clusters=n_labels, n_batches=1, seed=seed)
    rng = np.random.default_rng(seed)
    label = rng.integers(n_labels, size=n_cells)
    z = 2.0 * np.eye(n_labels)[label] + 0.5 * rng.normal(size=(n_cells, n_labels))
    truth = adata.uns["truth"]
    logits = 4.0 * np.tanh(z @ truth["W1"]) @ truth["W2"] + truth["intercept"]
    rho = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    theta = adata.var["theta"].to_numpy()
    mean = adata.obs["library"].to_numpy()[:, None] * rho
    adata.X = sparse.csr_matrix(rng.poisson(rng.gamma(theta, mean / theta)).astype(np.float32))
    adata.obs["cluster"] = [f"cluster_{c}" for c in label]
    known = rng.random(n_cells) < np.where(label == n_labels - 1, 0.01, 0.1)
    adata.obs["type"] = np.where(known, adata.obs["cluster"], "Unknown")
    return adata


def fit(adata, model_class=SCANVI, seed=0, epochs=40, **options):
    before, pyrocell.settings.seed = pyrocell.settings.seed, seed
    model_class.setup_anndata(adata, **LABELS)
    model = model_class(adata, gene_likelihood="nb", n_hidden=64, **options)
    pyrocell.settings.seed = before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train(epochs, lr=3e-3)
    return model


def recovery(model, adata):
    blind = (adata.obs["type"] == "Unknown").to_numpy()
    soft, truth = model.predict(soft=True)[blind], adata.obs["cluster"].astype(str)[blind]
    hit = (soft.idxmax(axis=1) == truth).to_numpy()
    codes = soft.columns.get_indexer(truth)
    rare = (truth == "cluster_4").to_numpy()
    return {
        "accuracy": hit.mean(),
        "recall of the rare class": hit[rare].mean(),
        "calibration error": calibration_error(soft.to_numpy(), codes),
    }


def failures(found):
    right = {
        "accuracy": found["accuracy"] >= 0.95,
        "recall of the rare class": found["recall of the rare class"] >= 0.8,
        "calibration error": found["calibration error"] <= 0.05,
    }
    return [name for name, holds in right.items() if not holds]


class ReadsUnlabelled(SCANVI):
    """Defect: the code of unlabelled cells, which means nothing, is taken for a label."""

    def guide(self, cells):
        super().guide(cells.replace(is_labeled=torch.ones_like(cells.is_labeled)))

    def extra_terms(self, cells, guide):
        return super().extra_terms(cells.replace(is_labeled=torch.ones_like(cells.is_labeled)), guide)


class Doubtful(SCANVI):
    """Defect: probabilities are those of logits that are five times too small."""

    def _probabilities(self, cells):
        logits = super()._probabilities(cells).log()
        return (logits / 5).softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_recovery(seed):
    adata = simulated(seed)
    found = recovery(fit(adata, seed=seed), adata)
    assert not failures(found), found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defect", "caught_by"),
    [
        (ReadsUnlabelled, {"accuracy", "recall of the rare class"}),
        (Doubtful, {"calibration error"}),
    ],
)
def test_defects_are_caught(defect, caught_by):
    adata = simulated(0)
    assert caught_by <= set(failures(recovery(fit(adata, defect), adata)))


@pytest.mark.slow
def test_labels_without_meaning_do_not_leak():
    """Labels in random order: held-out ones are guessed at chance, and the latent stays that of SCVI."""
    adata = simulated(0)
    truth = adata.obs["cluster"].to_numpy()
    known = np.flatnonzero(adata.obs["type"] != "Unknown")
    shuffled = np.random.default_rng(1).permutation(truth)
    adata.obs["type"] = "Unknown"
    adata.obs.loc[adata.obs_names[known], "type"] = shuffled[known]
    model = fit(adata)
    blind = (adata.obs["type"] == "Unknown").to_numpy()
    assert (model.predict()[blind] == shuffled[blind]).mean() <= 1 / 5 + 0.05

    SCVI.setup_anndata(adata)
    scvi = SCVI(adata, gene_likelihood="nb", n_hidden=64)
    scvi.train(40, lr=3e-3)
    ours, theirs = (
        adjusted_rand_score(
            truth, KMeans(5, n_init=5, random_state=0).fit_predict(m.get_latent_representation())
        )
        for m in (model, scvi)
    )
    assert ours >= theirs - 0.05
