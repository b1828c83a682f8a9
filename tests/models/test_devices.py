"""Every model on an accelerator: the same numbers as on the CPU. Run with ``pytest -m gpu`` where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyrocell import settings
from pyrocell.infer.effects import AtMean
from pyrocell.infer.plan import TrainingPlan
from pyrocell.testing.asking import answers
from tests.models.test_contract import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Draws come from the device's own generator; these answers need none.
WITHOUT_DRAWS = ("get_latent_representation", "get_library_size_factors", "get_latent_library_size")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(settings, "progress", False)


def gradients(model, device):
    """Loss and gradients of one minibatch with every latent at its mean, on a device."""
    dataset = model.require_data(None)
    model.module.to(device).eval()
    model.module.zero_grad()
    cells = next(dataset.minibatches(np.arange(64), 64, device=device, n_total=dataset.n_cells))
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
    model.train(3, batch_size=64, device="cuda")
    assert np.isfinite(model.history["elbo_train"]).all() and not model.history["skipped_steps"].any()
    assert {p.device.type for p in model.module.parameters()} == {"cuda"}
    there = answers(model)
    assert all(np.isfinite(values).all() for values in there.values())
    model.module.to("cpu")
    here = answers(model)
    for verb in WITHOUT_DRAWS:
        if verb in here:
            np.testing.assert_allclose(there[verb], here[verb], rtol=1e-3, atol=1e-4, err_msg=verb)


def test_a_model_trained_there_is_loaded_here(tmp_path):
    case = CASES["SCVI"]
    model = case.make()
    model.train(2, device="cuda")
    latent = model.get_latent_representation()
    model.save(tmp_path / "model")
    again = case.model_class.load(tmp_path / "model", case.data(), device="cpu")
    np.testing.assert_allclose(again.get_latent_representation(), latent, rtol=1e-3, atol=1e-4)


def test_bfloat16_products_keep_the_likelihood_in_float32():
    model = CASES["SCVI"].make()
    model.train(3, batch_size=64, device="cuda", plan=TrainingPlan(precision="bfloat16"))
    assert np.isfinite(model.history["elbo_train"]).all()
