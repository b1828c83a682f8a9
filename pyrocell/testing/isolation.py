"""Promises about what lies outside a model: other models, the user's random numbers, the user's data."""

from __future__ import annotations

import gc
import os
import random
import signal
import tempfile
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch

from pyrocell import settings
from pyrocell.data.slots import is_mudata
from pyrocell.infer.plan import TrainingPlan
from pyrocell.testing.asking import assert_same, state_of
from pyrocell.testing.containers import parts_of
from pyrocell.testing.questions import difference, questions

if TYPE_CHECKING:
    from pyrocell.models.base import CellModel
    from pyrocell.testing.cases import ModelCase

__all__ = ["check_interleaved", "check_life", "check_reload"]

_PARTS = ("X", "layers", "obs", "var", "obsm", "varm", "obsp", "varp", "uns")
_OWN = "pyrocell"  # the one record in ``uns``


def check_reload(case: ModelCase) -> None:
    """Save and load a model: every verb gives the same answer to the bit, and no other model notices."""
    model = case.trained
    told, known, stream = case.told, state_of(model), model.stream.state.clone()
    adata = model.require_data(None).adata
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder, overwrite=True)
        again = type(model).load(folder, adata)
        again.save(folder, overwrite=True)
        twice = type(model).load(folder, adata)
    for verb, ask in questions(again, case.arguments).items():
        found = difference(told[verb], ask(), verb)
        assert found is None, f"after reload {found}"
    assert difference(model.history, again.history) is None, "the history differs after reload"
    assert again.manifest() == model.manifest(), "the manifest differs after reload"
    for one in (again, twice):
        case.train(one, max_epochs=1)
    assert_same(state_of(again), state_of(twice))
    assert_same(known, state_of(model))
    assert torch.equal(stream, model.stream.state), "another model moved the random numbers of this one"


def check_interleaved(case: ModelCase) -> None:
    """Train two models interleaved: both equal each alone, to the last bit.

    First in turn, one step of one and one of the other. Then all of one within a step of the other, between its
    gradient and its update, where whatever they share would show.
    """
    alone = [case.make(seed=seed) for seed in (1, 2)]
    for model in alone:
        for _ in range(_N_STEPS):
            _train_steps(case, model, 1)
    in_turn = [case.make(seed=seed) for seed in (1, 2)]
    for _ in range(_N_STEPS):
        for model in in_turn:
            _train_steps(case, model, 1)
    for model, other in zip(alone, in_turn, strict=True):
        _assert_equal(model, other)
    alone = [case.make(seed=seed) for seed in (1, 2)]
    for model in alone:
        _train_steps(case, model, _N_STEPS)
    one, two = (case.make(seed=seed) for seed in (1, 2))
    left = [lambda: _train_steps(case, two, _N_STEPS)]
    _train_steps(case, one, _N_STEPS, lambda: left.pop()() if left else None)
    _assert_equal(alone[0], one)
    _assert_equal(alone[1], two)


def _assert_equal(one: CellModel, two: CellModel) -> None:
    assert_same(state_of(one), state_of(two))
    assert torch.equal(one.stream.state, two.stream.state), "the random numbers to come differ"


_N_STEPS = 3


def _train_steps(
    case: ModelCase, model: CellModel, n_steps: int, between: Callable[[], None] = lambda: None
) -> None:
    """Take some steps of all cells each, and do something in the middle of each."""

    class Adam(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            between()
            return super().step(closure)

    plan = TrainingPlan(optimizer=lambda groups: Adam(groups, lr=1e-3))
    n_cells = model.require_data(None).n_cells
    case.train(model, max_epochs=n_steps, batch_size=n_cells, n_epochs_kl_warmup=2, plan=plan)


def check_life(case: ModelCase) -> None:
    """Lead a model through its whole life: nothing outside of it changes, and nothing of the data is kept."""
    data = case.make_data()
    before, outside = _copy_of(data), _Outside()
    (case.model_class.setup_mudata if is_mudata(data) else case.model_class.setup_anndata)(data, **case.setup)
    outside.compare("set-up")
    model = case.make(data)
    outside.compare("the constructor")
    case.train(model, max_epochs=1)
    outside.compare("train")
    for verb, ask in questions(model, case.arguments).items():
        if not verb.startswith("add_"):  # these write into the data, as they are asked to
            ask()
            outside.compare(verb)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder, save_anndata=True)
        outside.compare("save")
        again = case.model_class.load(folder)
    outside.compare("load")
    if case.setup.get("batch_key") is not None and hasattr(case.model_class, "load_query_data"):
        case.model_class.load_query_data(data, again)
        outside.compare("load_query_data")
    found = difference(before, _copy_of(data), "the data")
    assert found is None, f"the data of the user were changed: {found}"
    _check_released(data, again)
    watched = weakref.ref(data), weakref.ref(model)
    del data, model, ask
    gc.collect()
    assert all(ref() is None for ref in watched), "something keeps the data after the model is gone"


def _check_released(data: Any, other: CellModel) -> None:
    """Ask another model about data once: it does not keep them."""
    copied = data.copy()
    other.posterior(str(other.observed_site or other.mapping_site), copied, indices=None)
    watched = weakref.ref(copied)
    del copied
    gc.collect()
    assert watched() is None, "a model keeps data that it was asked about"


class _Outside:
    """What belongs to the user and to the process."""

    def __init__(self) -> None:
        self.before = self.now()

    def now(self) -> dict[str, Any]:
        return {
            "torch's global generator": torch.get_rng_state(),
            "NumPy's global generator": list(np.random.get_state()),
            "Python's global generator": random.getstate(),
            "the global parameter store": sorted(pyro.get_param_store().keys()),
            "the handlers of Pyro": len(pyro.poutine.runtime._PYRO_STACK),
            "the settings of Pyro": pyro.settings.get(),
            "the settings of pyrocell": [settings.seed, settings.device, settings.progress],
            "torch's default type": str(torch.get_default_dtype()),
            "torch's gradients": torch.is_grad_enabled(),
            "torch's threads": torch.get_num_threads(),
            "NumPy's errors": np.geterr(),
            "the signals": [str(signal.getsignal(one)) for one in (signal.SIGINT, signal.SIGTERM)],
            "the folder of the process": os.getcwd(),
        }

    def compare(self, what: str) -> None:
        found = difference(self.before, self.now(), "")
        assert found is None, f"{what} changed {found}"


def _copy_of(data: Any) -> dict[str, Any]:
    """Copy everything that data hold, but for the record of the set-up."""
    parts = {name: _parts_of(part, _PARTS) for name, part in parts_of(data).items()}
    if is_mudata(data):
        parts["of all"] = _parts_of(data, _PARTS[2:])
    return parts


def _parts_of(part: Any, names: tuple[str, ...]) -> dict[str, Any]:
    copied = part.copy()
    found = {name: getattr(copied, name) for name in names}
    found = {
        name: value if not hasattr(value, "keys") or hasattr(value, "columns") else dict(value)
        for name, value in found.items()
    }
    found["uns"].pop(_OWN, None)
    return found
