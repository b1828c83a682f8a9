"""The checks of isolation see the defects that they are for."""

from __future__ import annotations

import random

import numpy as np
import pandas as pd
import pyro
import pytest
import torch

from pyrocell.data import synthetic_iid
from pyrocell.infer.trainer import Trainer
from pyrocell.testing import ModelCase, run_check
from pyrocell.testing.questions import difference, is_answer
from tests.models.zoo import BatchVAE

LIFE = "a whole life leaves nothing behind"
RELOAD = "save and load give identical answers"
IN_TURN = "models trained in turn equal each alone"


def small_data():
    return synthetic_iid(n_cells=100, n_genes=8, n_proteins=0, n_regions=0, seed=0)


def broken(check, body, match):
    """Run a check on a model with a defect."""
    model_class = type("Broken", (BatchVAE,), body | {"__doc__": "A model with a defect."})
    case = ModelCase(
        model_class, small_data, {"batch_key": "batch"}, {"n_hidden": 4, "n_latent": 2}, max_epochs=2
    )
    with pytest.raises(AssertionError, match=match):
        run_check(check, case)


def verb(name, before=None, after=None):
    """Override a verb by one that does something more."""
    plain = getattr(BatchVAE, name)

    def run(self, *args, **kwargs):
        if before is not None:
            before(self)
        answer = plain(self, *args, **kwargs)
        return answer if after is None else after(self, answer)

    run.__doc__ = plain.__doc__
    return {name: run}


@pytest.mark.parametrize(
    ("name", "defect", "match"),
    [
        ("get_elbo", lambda model: torch.manual_seed(12345), "get_elbo changed .*torch's global generator"),
        ("get_elbo", lambda model: np.random.rand(), "get_elbo changed .*NumPy's global generator"),  # noqa: NPY002
        ("get_elbo", lambda model: random.random(), "get_elbo changed .*Python's global generator"),
        ("train", lambda model: random.seed(0), "train changed .*Python's global generator"),
        ("save", lambda model: torch.rand(1), "save changed .*torch's global generator"),
        ("get_elbo", lambda model: pyro.param("leak", torch.ones(1)), "get_elbo changed .*parameter store"),
        ("get_elbo", lambda model: torch.set_grad_enabled(False), "get_elbo changed .*gradients"),
        ("get_elbo", lambda model: pyro.enable_validation(False), "get_elbo changed .*settings of Pyro"),
    ],
)  # fmt: skip
def test_what_is_moved_outside_is_named(name, defect, match):
    before = np.random.get_state(), torch.get_rng_state(), random.getstate()  # noqa: NPY002
    try:
        broken(LIFE, verb(name, before=defect), match)
    finally:
        pyro.clear_param_store()
        pyro.enable_validation(True)
        torch.set_grad_enabled(True)
        np.random.set_state(before[0])  # noqa: NPY002
        torch.set_rng_state(before[1])
        random.setstate(before[2])


def write_a_column(model):
    model.dataset.adata.obs["mine"] = 1


def change_a_count(model):
    model.dataset.adata.X.data[-1] += 1


def write_a_record(model):
    model.dataset.adata.uns["_model"] = {"seed": 0}


@pytest.mark.parametrize("defect", [write_a_column, change_a_count, write_a_record])
def test_data_that_are_changed_are_noticed(defect):
    broken(LIFE, verb("get_marginal_ll", before=defect), "the data of the user were changed")


def test_text_that_becomes_categories_while_saving_is_noticed(monkeypatch):
    """What writing an AnnData does to it, without the stand-in."""
    case = ModelCase(
        BatchVAE, text_data, {"batch_key": "batch"}, {"n_hidden": 4, "n_latent": 2}, max_epochs=1
    )
    run_check(LIFE, case)
    monkeypatch.setattr("pyrocell.models.saving.write_data", lambda data, path: data.write(path))
    with pytest.raises(AssertionError, match=r"the data of the user were changed.*obs"):
        run_check(LIFE, case)


def text_data():
    adata = small_data()
    adata.obs["lane"] = [f"lane {i % 2}" for i in range(adata.n_obs)]
    return adata


def test_data_that_are_kept_are_noticed():
    kept = []
    broken(
        LIFE,
        verb("get_elbo", before=lambda model: kept.append(model.dataset.adata)),
        "keeps the data after the model is gone",
    )


def test_data_of_a_question_that_are_kept_are_noticed():
    plain = BatchVAE.posterior

    def posterior(self, site, adata=None, **options):
        self.last = adata
        return plain(self, site, adata, **options)

    posterior.__doc__ = plain.__doc__
    broken(LIFE, {"posterior": posterior}, "keeps data that it was asked about")


def test_an_answer_that_is_not_in_the_file_is_noticed():
    asked = {}

    def differs(model, answer):
        return answer + asked.setdefault(id(model), len(asked))

    broken(RELOAD, verb("get_elbo", after=differs), "after reload get_elbo")


def test_a_model_that_loading_moves_is_noticed():
    """One object for all models of the class: what a second one learns, the first one has."""
    shared = torch.nn.Parameter(torch.ones(8))
    plain = BatchVAE.__init__

    def init(self, adata, n_latent=2, n_hidden=4):
        plain(self, adata, n_latent, n_hidden)
        self.shared = shared

    def model(self, cells):
        with self.plate(cells):
            z = pyro.sample("z", pyro.distributions.Normal(torch.zeros(2), 1.0).to_event(1))
            rho = pyro.deterministic("rho", self.decoder(z, cells.batch), event_dim=1)
            rates = pyro.distributions.Poisson(cells.library * rho * self.shared.exp())
            pyro.sample("x", rates.to_event(1), obs=cells.counts)

    broken(RELOAD, {"__init__": init, "model": model}, "differs")
    broken(IN_TURN, {"__init__": init, "model": model}, "differs")


def test_random_numbers_that_two_models_share_are_noticed():
    """A stream of the class: training one moves the numbers that the other draws."""
    stream = torch.Generator().manual_seed(0)
    plain = BatchVAE.model

    def model(self, cells):
        for parameter in self.decoder.parameters():
            parameter.data += 1e-3 * torch.randn((), generator=stream)
        plain(self, cells)

    broken(IN_TURN, {"model": model}, "differs")


def test_training_that_depends_on_more_than_is_saved_is_noticed():
    """A count of steps that is no part of the parameters: a resumed training begins at nought again."""
    plain = BatchVAE.model

    def model(self, cells):
        steps = self.__dict__.setdefault("steps", [])
        steps.append(0)
        pyro.factor("penalty", -1e-3 * len(steps) * self.theta.sum())
        plain(self, cells)

    broken("an interrupted training resumes to the bit", {"model": model}, "differs")


def test_a_bad_step_that_leaves_running_statistics_is_noticed(monkeypatch):
    monkeypatch.setattr("pyrocell.infer.guard.FiniteGuard.undo", lambda self: None)
    broken("a step that is not finite leaves no trace", {}, "has left something")


def test_a_bad_step_that_the_optimizer_remembers_is_noticed(monkeypatch):
    """Its gradient is set to zero and the step taken: parameters stay, averages do not."""
    plain = Trainer._step

    def step(self, cells, weight):
        before = self.snapshot()
        plain(self, cells, weight)
        if self.progress.bad_in_a_row:
            for parameter in self.guard.parameters:
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.module.load_state_dict(before)

    monkeypatch.setattr(Trainer, "_step", step)
    broken("a step that is not finite leaves no trace", {}, "averages of the optimizer")


@pytest.mark.parametrize(
    ("table", "answers"),
    [
        ({"a": [1.0, 2.0], "b": [1.0, np.nan]}, True),
        ({"a": [1.0, np.nan], "b": [np.nan, np.nan]}, False),
        ({"a": [1.0, 2.0], "b": [np.nan, np.nan]}, False),
        ({"a": [1.0, np.inf]}, False),
        ({"a": ["x", "y"]}, True),
        ({"a": []}, False),
    ],
)
def test_a_table_of_hardly_any_numbers_is_no_answer(table, answers):
    assert is_answer(pd.DataFrame(table)) == answers


def test_a_bad_step_that_is_taken_is_noticed(monkeypatch):
    monkeypatch.setattr("pyrocell.infer.guard.FiniteGuard.is_finite", lambda self, loss: loss.isfinite())
    broken("a step that is not finite leaves no trace", {}, "the step was not counted")


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (np.array([1.0, np.nan]), np.array([1.0, 2.0])),
        (np.float32([1]), np.float64([1])),
        ({"a": [1, (2, np.nan)]}, {"a": [1, (2, 3.0)]}),
        ({"a": 1}, {"b": 1}),
        ([1], [1, 2]),
        (small_data().X, small_data().X * 2),
        (small_data().obs, small_data().obs.iloc[::-1]),
        (small_data().obs["age"], small_data().obs["age"] + 1e-12),
        (small_data().obs_names, small_data().obs_names[::-1]),
        (torch.zeros(2), torch.zeros(3)),
        (ModelCase(BatchVAE, small_data), ModelCase(BatchVAE, small_data, max_epochs=4)),
        (1, 1.0),
        ("a", "b"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_difference_is_found(one, two):
    assert difference(one, one, "this") is None
    assert difference(one, two, "this").startswith("this")
