"""Promises about training that goes another way: a step that is not finite, a request to end, steps from a tape."""

from __future__ import annotations

import signal
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyrocell.infer.tape import recorded_at_once
from pyrocell.testing.asking import assert_same, state_of
from pyrocell.testing.questions import difference

if TYPE_CHECKING:
    from pyrocell.models.base import CellModel
    from pyrocell.testing.cases import ModelCase

__all__ = ["check_bad_step", "check_resume", "check_tapes"]


def check_bad_step(case: ModelCase) -> None:
    """Spoil one gradient: the step is skipped, counted and named, and nothing of it stays."""
    model = case.make()
    name, seen = _watch(model, lambda n, gradient: gradient * float("nan") if n == 1 else gradient)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = case.train(model).history
    assert len(seen) > 1, "one step is too few to see the next one"
    assert history["skipped_steps"].tolist() == [1] + [0] * (len(history) - 1), "the step was not counted"
    told = [str(one.message) for one in caught]
    assert any(name in text and "1 training step was skipped" in text for text in told), (
        f"no warning names {name}: {told}"
    )
    broken = [key for key, value in state_of(model).items() if not np.isfinite(value).all()]
    assert not broken, f"the step has left something in {broken}"
    _check_no_trace(case)


def _check_no_trace(case: ModelCase) -> None:
    """Let the only step of a training be a bad one: parameters, running statistics and optimizer are as before."""
    model, optimizers = case.make(), []

    def make_optimizer(groups: Any) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.Adam(groups, lr=0.1))
        return optimizers[-1]

    _watch(model, lambda n, gradient: gradient * float("nan"))
    before = state_of(model)
    plan = replace(case.model_class.default_plan, optimizer=make_optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the step, which is seen above
        n_cells = model.require_data(None).n_cells
        history = case.train(model, max_epochs=1, batch_size=n_cells, plan=plan).history
    assert history["skipped_steps"].tolist() == [1], "there was another step"
    found = difference(before, state_of(model), "the state")
    assert found is None, f"a step that was skipped has left something: {found}"
    assert not optimizers[-1].state, "a step that was skipped is in the averages of the optimizer"


def check_resume(case: ModelCase) -> None:
    """End a training by SIGTERM in the middle of an epoch, and resume it: it equals one that nobody disturbed."""
    if threading.current_thread() is not threading.main_thread():
        return  # signals reach the main thread alone
    whole = case.make()
    _, steps = _watch(whole, lambda n, gradient: gradient)
    case.train(whole)
    last = len(steps) // len(whole.history) + 1  # the first step of the second epoch

    def end(n: int, gradient: torch.Tensor) -> torch.Tensor:
        if n == last:
            signal.raise_signal(signal.SIGTERM)
        return gradient

    with tempfile.TemporaryDirectory() as folder:
        cut, again = case.make(), case.make()
        _watch(cut, end)
        plan = replace(case.model_class.default_plan, checkpoint=folder)
        before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            case.train(cut, plan=plan)
        except SystemExit:
            pass
        else:
            raise AssertionError("a request to end was ignored")
        finally:
            signal.signal(signal.SIGTERM, before)
        assert cut.is_trained and len(cut.history) == 1, "the model is not usable after an interruption"
        case.train(again, resume=folder)
    assert_same(state_of(whole), state_of(again))
    one, two = (model.history.drop(columns="seconds") for model in (whole, again))
    assert difference(one, two) is None, "the history differs after resuming"


def _watch(model: CellModel, change: Callable[[int, torch.Tensor], torch.Tensor]) -> tuple[str, list[None]]:
    """Put something between a parameter and its gradient, which is told the number of the step, from 1 on."""
    name, parameter = next(iter(model.module.named_parameters()))
    seen: list[None] = []

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        seen.append(None)
        return change(len(seen), gradient)

    parameter.register_hook(hook)
    return name, seen


def check_tapes(case: ModelCase) -> None:
    """Train with and without tapes: parameters and running statistics agree to the bit."""
    plans = [replace(case.model_class.default_plan, record_step=record) for record in (False, True)]
    with recorded_at_once():
        plain, taped = (case.train(case.make(), 2, plan=plan) for plan in plans)
    assert_same(state_of(plain), state_of(taped))
