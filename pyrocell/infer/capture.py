"""A training step recorded once as a CUDA graph, then replayed: Python, Pyro and launches cost nothing per step."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from pyrocell import settings
from pyrocell.infer.elbo import Elbo, Population
from pyrocell.infer.guard import FiniteGuard
from pyrocell.infer.tally import Tally

__all__ = ["StepGraphs", "can_be_recorded"]

_STEPS_BEFORE = 3
"""Plain steps with minibatches of one size before it is recorded: they make the optimizer's state and pay start-ups."""


def can_be_recorded(optimizer: torch.optim.Optimizer) -> bool:
    """Say whether an optimizer's step can be recorded, and skipped where a gradient is not finite.

    Parameters
    ----------
    optimizer
        Its parameters must lie on CUDA, and its step must take the flag of torch's gradient scaler (fused Adam's does).
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    on_cuda = bool(parameters) and all(p.device.type == "cuda" for p in parameters)
    return on_cuda and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


class StepGraphs:
    """The recorded steps of a training, one for each size of minibatch.

    A step that was recorded does what the plain one does, in place: gradients, optimizer, running statistics, sums. One
    difference: where the loss or a gradient is not finite, the optimizer is told so on the device, and the host learns
    of it when the epoch ends. A model that cannot be recorded, since its step waits for the host somewhere, is trained
    by plain steps; the log says why.

    Parameters
    ----------
    elbo
        The objective.
    optimizer
        One that `can_be_recorded`.
    guard
        Watch over gradients and running statistics.
    tally
        What the epoch adds up.
    """

    def __init__(
        self, elbo: Elbo, optimizer: torch.optim.Optimizer, guard: FiniteGuard, tally: Tally
    ) -> None:
        self.elbo, self.optimizer, self.guard, self.tally = elbo, optimizer, guard, tally
        self.works = True
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._seen: Counter[int] = Counter()
        self._pool: Any = None
        self._weight = torch.zeros((), device=tally.device)
        self._rates = [torch.zeros((), device=tally.device) for _ in optimizer.param_groups]

    def replay(self, cells: Population, weight: float, autocast: AbstractContextManager[object]) -> bool:
        """Take one step if it is recorded, or can be; else say no.

        Parameters
        ----------
        cells
            Minibatch whose cells lie on the device (`pyrocell.data.resident.Selection`).
        weight
            KL weight.
        autocast
            Precision of the products, for recording.
        """
        # Before a first step was taken there are no averages of gradients, and recording would not fill them.
        if not self.works or not self.tally.sites or not hasattr(cells, "home"):
            return False
        size = len(cells)
        if size not in self._graphs:
            self._seen[size] += 1
            if self._seen[size] <= _STEPS_BEFORE or not self._record(cells, autocast):
                return False
        self._rates_on_device()
        graph, rows = self._graphs[size]
        rows.copy_(cells.rows)
        self._weight.fill_(weight)
        graph.replay()
        return True

    def end_epoch(self) -> None:
        """Give the learning rates back to the host, where schedules change them."""
        for group in self.optimizer.param_groups:
            group["lr"] = float(group["lr"])

    def _rates_on_device(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.fill_(float(group["lr"]))
                group["lr"] = rate
            group["capturable"] = True

    def _record(self, cells: Any, autocast: AbstractContextManager[object]) -> bool:
        static, graph = cells.of(cells.rows.clone()), torch.cuda.CUDAGraph()
        try:
            self._rehearse(static, autocast)
            self._rates_on_device()
            with torch.cuda.graph(graph, pool=self._pool):
                self._step(static, autocast)
        except RuntimeError as error:
            self.works = False
            _free_generator(self.tally.device)
            reason = str(error).splitlines()[0]
            settings.logger.info("the training step cannot be recorded as a CUDA graph: %s", reason)
            return False
        finally:
            self.optimizer.found_inf = None  # type: ignore[attr-defined]
        self._pool = graph.pool()
        self._graphs[len(cells)] = graph, static.rows
        return True

    def _rehearse(self, cells: Any, autocast: AbstractContextManager[object]) -> None:
        """Go through loss and gradient once, and raise where the host would wait: an attempt to record would break.

        Random numbers and running statistics are left as they were.
        """
        self.guard.remember()
        try:
            with torch.random.fork_rng([self.tally.device]), _no_waiting(), autocast:
                self.elbo(cells.load(), self._weight, with_extra=True).loss.backward()
        finally:
            self.guard.undo()

    def _step(self, cells: Any, autocast: AbstractContextManager[object]) -> None:
        self.guard.remember()
        with autocast:
            terms = self.elbo(cells.load(), self._weight, with_extra=True)
        terms.loss.backward()
        finite = self.guard.is_finite(terms.loss)
        self.optimizer.found_inf = 1.0 - finite.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.guard.undo_unless(finite)
        self.tally.add_on_device(terms, finite)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise a RuntimeError where the host waits for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this check a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _free_generator(device: torch.device) -> None:
    """Give the device's generator a fresh copy of its state: that of a recording which failed stays locked."""
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())
