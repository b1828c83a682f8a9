"""Every model on an accelerator: the same numbers as on the CPU. Run with ``pytest -m gpu`` where there is one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyro
import pytest
import torch

from pyrocell import settings
from pyrocell.data import synthetic_iid
from pyrocell.distributions import NegativeBinomial, StandardNormal
from pyrocell.errors import PyrocellWarning
from pyrocell.infer.capture import StepGraphs
from pyrocell.infer.effects import AtMean
from pyrocell.infer.plan import TrainingPlan
from pyrocell.testing.asking import answers, has_gaussian_posterior
from tests.models.test_contract import CASES
from tests.models.zoo import BatchVAE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Draws come from the device's own generator; these answers need none.
WITHOUT_DRAWS = ("get_latent_representation", "get_library_size_factors", "get_latent_library_size")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(settings, "progress", False)


def in_minibatches(model):
    return {} if model.full_batch else {"batch_size": 64}


def gradients(model, device):
    """Loss and gradients of one minibatch with every latent at its mean, on a device."""
    dataset = model.require_data(None)
    model.module.to(device).eval()
    model.module.zero_grad()
    n_cells = dataset.n_cells if model.full_batch else 64
    cells = next(dataset.minibatches(np.arange(n_cells), n_cells, device=device, n_total=dataset.n_cells))
    with model.running(), AtMean():
        loss = model.elbo()(cells).loss
    loss.backward()
    # A copy: a gradient moves with its parameter.
    found = {name: p.grad.cpu().clone() for name, p in model.module.named_parameters() if p.grad is not None}
    model.module.to("cpu")
    return loss.detach().cpu(), found


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_the_cpu(name):
    model = CASES[name].make()
    (loss, slopes), (there, slopes_there) = gradients(model, "cpu"), gradients(model, "cuda")
    torch.testing.assert_close(there, loss, rtol=1e-5, atol=1e-5)
    assert slopes.keys() == slopes_there.keys()
    for part, slope in slopes.items():
        scale = slope.abs().max().clamp_min(1e-6)
        torch.testing.assert_close(slopes_there[part] / scale, slope / scale, rtol=0, atol=2e-3, msg=part)


@pytest.mark.parametrize("name", CASES)
def test_training_and_queries_run(name):
    case = CASES[name]
    model = case.make()
    model.train(3, device="cuda", **in_minibatches(model))
    assert np.isfinite(model.history["elbo_train"]).all() and not model.history["skipped_steps"].any()
    assert {p.device.type for p in model.module.parameters()} == {"cuda"}
    there = answers(model)
    assert all(np.isfinite(values).all() for values in there.values())
    model.module.to("cpu")
    here = answers(model)
    for verb in WITHOUT_DRAWS if has_gaussian_posterior(model) else ():
        if verb in here:
            np.testing.assert_allclose(there[verb], here[verb], rtol=1e-3, atol=1e-4, err_msg=verb)


@pytest.fixture
def recorded(monkeypatch):
    """Sizes of the minibatches whose steps were recorded."""
    sizes, record = [], StepGraphs._record

    def watched(self, cells, autocast):
        done = record(self, cells, autocast)
        sizes.append(len(cells) if done else "refused")
        return done

    monkeypatch.setattr(StepGraphs, "_record", watched)
    return sizes


def trained(name, seed=0, **options):
    case = CASES[name]
    model = case.make(seed=seed)
    plan = dataclasses.replace(model.default_plan, **options)
    model.train(6, device="cuda", plan=plan, early_stopping=False, **in_minibatches(model))
    return model


@pytest.mark.parametrize("name", [name for name in CASES if name != "PoissonFactors"])
def test_recorded_steps_are_the_plain_ones(name, recorded):
    once, plain = trained(name), trained(name, record_step=False)
    assert recorded and "refused" not in recorded, recorded
    n_train = len(once.train_indices)
    assert set(recorded) == ({n_train} if once.full_batch else {64, n_train % 64} - {0})
    losses = once.history["elbo_train"].to_numpy(), plain.history["elbo_train"].to_numpy()
    # Without draws they agree to rounding; with draws, recorded steps have random numbers of their own.
    np.testing.assert_allclose(*losses, rtol=1e-5 if name == "NoLatent" else 0.02)
    assert losses[0][-1] < losses[0][0] or name == "Tangram-constrained"  # the filter takes longer to decide


@pytest.mark.parametrize(
    "plan",
    [TrainingPlan(lr_plateau=True, lr_patience=1, lr_factor=0.1), TrainingPlan(lr_decay=1.0)],
    ids=["plateau", "decay"],
)
def test_a_learning_rate_that_falls_reaches_the_recorded_step(plan, recorded):
    model = CASES["SCVI"].make()
    model.train(40, batch_size=64, n_epochs_kl_warmup=0, lr=0.05, device="cuda", plan=plan)
    assert recorded and model.history["lr"].iloc[-1] < model.history["lr"].iloc[0]
    assert np.isfinite(model.history["elbo_train"]).all()


class Spoiled(BatchVAE):
    """One cell of the data, and it alone, has no finite likelihood."""

    def model(self, cells):
        with self.plate(cells):
            z = pyro.sample("z", StandardNormal(self.encoder.n_latent))
            rho = pyro.deterministic("rho", self.decoder(z, cells.batch), event_dim=1)
            pyro.factor("spoiled", torch.where(cells.rows == 5, torch.nan, 0.0))
            pyro.sample("x", NegativeBinomial(cells.library * rho, self.theta).to_event(1), obs=cells.counts)


def test_recorded_steps_skip_what_is_not_finite(recorded, caplog):
    adata = synthetic_iid(n_cells=400, n_genes=30, seed=0)
    Spoiled.setup_anndata(adata, batch_key="batch")
    model = Spoiled(adata)
    with pytest.warns(PyrocellWarning, match="steps were skipped"):
        model.train(8, batch_size=32, train_size=1.0, device="cuda")
    assert recorded
    assert (model.history["skipped_steps"] == 1).all()
    assert np.isfinite(model.history["elbo_train"]).all()
    assert all(bool(p.isfinite().all()) for p in model.module.parameters())
    assert "spoiled" in caplog.text


class Waiting(BatchVAE):
    """Asks the device for a number in each step."""

    def model(self, cells):
        assert float(cells.counts.sum()) > 0
        super().model(cells)


def test_what_cannot_be_recorded_is_trained_by_plain_steps(recorded, caplog):
    adata = synthetic_iid(n_cells=400, n_genes=30, seed=0)
    Waiting.setup_anndata(adata, batch_key="batch")
    model = Waiting(adata)
    with caplog.at_level("INFO", logger="pyrocell"):
        model.train(4, batch_size=32, device="cuda")
    assert recorded == ["refused"] and "cannot be recorded" in caplog.text
    assert np.isfinite(model.history["elbo_train"]).all()


def test_data_that_do_not_fit_are_sent_minibatch_by_minibatch(recorded, monkeypatch):
    monkeypatch.setattr("pyrocell.data.resident._SHARE", 0.0)
    model = trained("SCVI")
    assert not recorded and np.isfinite(model.history["elbo_train"]).all()


def test_a_model_trained_there_is_loaded_here(tmp_path):
    case = CASES["SCVI"]
    model = case.make()
    model.train(2, device="cuda")
    latent = model.get_latent_representation()
    model.save(tmp_path / "model")
    again = case.model_class.load(tmp_path / "model", case.data(), device="cpu")
    np.testing.assert_allclose(again.get_latent_representation(), latent, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "tfloat32"])
def test_fast_products_keep_the_likelihood_in_float32(precision):
    model = CASES["SCVI"].make()
    model.train(3, batch_size=64, device="cuda", plan=TrainingPlan(precision=precision))
    assert np.isfinite(model.history["elbo_train"]).all()
