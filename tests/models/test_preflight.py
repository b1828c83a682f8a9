"""Odd and wrong input, to every model: it trains with finite loss and parameters, or is refused before it starts.

What is odd about an input is in ``oddities.py``. Single oddities are gone through in full by the slow tests, with all
containers and types of numbers; the default ones draw combinations of them.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import pyrocell
from pyrocell import SCVI
from tests.models.oddities import CONTAINERS, DTYPES, MODELS, ODDITIES, attempt, good, judge
from tests.models.test_contract import CASES

# The same examples on every run: a test that fails now and then is looked at by nobody.
SAME = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate],  # an example is small as it is, and shrinking it trains hundreds of models
    "report_multiple_bugs": False,
}

INPUTS = {
    "name": st.sampled_from(MODELS),
    "oddities": st.lists(st.sampled_from(sorted(ODDITIES)), max_size=2, unique=True).map(tuple),
    "container": st.sampled_from(sorted(CONTAINERS)),
    "dtype": st.sampled_from(DTYPES),
    "how": st.sampled_from(["memory", "view", "backed"]),
    "seed": st.integers(0, 100),
}


def try_one(name, oddities, container, dtype, how, seed):
    outcome = attempt(name, oddities, container=container, dtype=dtype, how=how, seed=seed)
    judge(name, oddities, outcome)


@settings(max_examples=20, **SAME)
@given(**INPUTS)
def test_odd_input(name, oddities, container, dtype, how, seed):
    try_one(name, oddities, container, dtype, how, seed)


@pytest.mark.slow
@settings(max_examples=150, **SAME)
@given(**INPUTS)
def test_more_odd_input(name, oddities, container, dtype, how, seed):
    try_one(name, oddities, container, dtype, how, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_oddity(name):
    outcomes = [attempt(name, oddities) for oddities in [(), *((oddity,) for oddity in ODDITIES)]]
    assert outcomes[0].trained
    for oddity, outcome in zip(ODDITIES, outcomes[1:], strict=True):
        judge(name, (oddity,), outcome)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["memory", "view", "backed"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_and_type(container, how):
    for dtype in DTYPES:
        assert attempt("SCVI", (), container=container, dtype=dtype, how=how).trained, dtype


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 100, 20))
def test_a_hundred_seeds_of_a_default_run(first, monkeypatch):
    """As a user runs it, with every default but the length (20 epochs): no step is skipped, nothing is NaN."""
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")
    broken = []
    for seed in range(first, first + 20):
        monkeypatch.setattr(pyrocell.settings, "seed", seed)
        adata = good("SCVI")
        SCVI.setup_anndata(adata, batch_key="batch")
        model = SCVI(adata)
        model.train(20)
        latent = model.get_latent_representation()
        finite = np.isfinite(model.history["elbo_train"]).all() and np.isfinite(latent).all()
        if not finite or model.history["skipped_steps"].sum():
            broken.append(seed)
    assert broken == []


def test_every_public_model_is_tried():
    public = {
        case.model_class for case in CASES.values() if case.model_class.__module__.startswith("pyrocell")
    }
    assert {CASES[name].model_class for name in MODELS} == public


def test_one_cell_with_a_parameter_of_its_own():
    """The cells that a model is tried out on when it is made are no more than there are."""
    assert attempt("Tangram", ("one cell",)).trained


def test_a_refusal_that_names_nothing_is_no_refusal():
    """The judge of this suite itself: it must not pass whatever happens."""
    wrong = attempt("SCVI", ("NaN",))
    judge("SCVI", ("NaN",), wrong)
    wrong.message = "Something is wrong."
    with pytest.raises(AssertionError, match="Something is wrong"):
        judge("SCVI", ("NaN",), wrong)
    with pytest.raises(AssertionError, match="SCVI refuses"):
        judge("SCVI", ("a constant gene",), wrong)
    wrong.trained = True
    with pytest.raises(AssertionError, match="trained on"):
        judge("SCVI", ("NaN",), wrong)
