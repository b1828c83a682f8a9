"""Loss and gradients of a training step on the CPU, recorded once as a list of torch's operations, then replayed.

Of a step of a small network, Pyro's traces, distributions, modules and autograd take as long as the arithmetic, only to
arrive at the same operations each time. A tape is these operations alone, forward and backward, as straight-line code.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyrocell import settings
from pyrocell.errors import PyrocellWarning, TrainingError, list_some
from pyrocell.infer.elbo import Elbo, ElboTerms, Population
from pyrocell.infer.operations import ShapesAreFixed, simplify

__all__ = ["PlainStep", "TapedStep", "recorded_at_once"]

Outputs = Sequence[Any]  # tensors, and None for a parameter that the loss does not depend on


@dataclass
class _When:
    """When a step is worth recording: that takes as long as some fifty, and saves a quarter of each or more."""

    steps_before: int = 3
    """Plain steps before one is recorded, so that what is made or compiled once is not on the tape."""
    steps_to_come: int = 250


_when = _When()

_INTERVAL = 128
"""Most replays between two comparisons of a tape: these cost two steps each."""


@contextmanager
def recorded_at_once() -> Iterator[None]:
    """Record the second step of its kind, however short the training: for tests."""
    before = replace(_when)
    _when.steps_before, _when.steps_to_come = 1, 0
    try:
        yield
    finally:
        _when.steps_before, _when.steps_to_come = before.steps_before, before.steps_to_come


class PlainStep:
    """Loss and gradients of a minibatch, by Pyro and autograd.

    Parameters
    ----------
    elbo
        The objective.
    products
        Gives the context in which the networks' products are computed.
    device
        Where that is.
    """

    def __init__(
        self, elbo: Elbo, products: Callable[[], AbstractContextManager[object]], device: torch.device
    ) -> None:
        self.elbo, self.products, self.device = elbo, products, device

    def __call__(self, cells: Population, weight: float, steps_left: int = 0) -> ElboTerms:
        """Evaluate the bound, and leave its gradients in the parameters, which hold none.

        Parameters
        ----------
        cells
            Minibatch.
        weight
            KL weight.
        steps_left
            Steps to come, this one among them.

        Raises
        ------
        TrainingError
            If the loss depends on no parameter.
        """
        # As a tape has it. Elsewhere it stays a number: a tensor would have to be sent there.
        terms = self.bound(cells, _as_tensor(weight) if self.device.type == "cpu" else weight)
        if not terms.loss.requires_grad:
            raise TrainingError(
                "The loss depends on no parameter; give the model or its guide something to learn."
            )
        terms.loss.backward()
        return terms

    def bound(self, cells: Population, weight: float | Tensor) -> ElboTerms:
        """Evaluate the bound alone; arguments as in a call, but for the weight: a tape needs it as a tensor."""
        with self.products():
            return self.elbo(cells, weight, with_extra=True)


class TapedStep:
    """The same from tapes, one for each kind of minibatch (their sizes), bit for bit.

    A tape is compared with a plain step on the minibatch of the day: after 1, 2, 4, ..., 128 replays, then after every
    128, and at the last step. It must give the same bits of loss, terms, gradients, running statistics and random
    state. Where it does not, or a step cannot be recorded (its shapes depend on values, or Python reads or counts
    something), plain steps are taken from then on; the log says why, and a warning if replayed steps may have been
    other than the model's.

    Parameters
    ----------
    plain
        The plain step.
    module
        Holder of all parameters and running statistics.
    undo
        Brings running statistics back to where they were before the step.
    """

    def __init__(self, plain: PlainStep, module: torch.nn.Module, undo: Callable[[], None]) -> None:
        self.plain, self.module, self.undo = plain, module, undo
        self.works = True
        self._tapes: dict[Hashable, _Tape] = {}
        self._seen: Counter[Hashable] = Counter()
        self._last: Callable[[], Any] = lambda: None

    def __call__(self, cells: Any, weight: float, steps_left: int = 0) -> ElboTerms:
        """Evaluate the bound, and leave its gradients in the parameters; see `PlainStep`.

        A minibatch is replayed that has ``parts()`` and ``of_parts()``, as `pyrocell.data.Cells` does.
        """
        kept = cells is self._last()  # what was computed of it is kept with it; a tape would compute it again
        self._last = weakref.ref(cells)
        if kept or not self.works or not hasattr(cells, "of_parts"):
            return self.plain(cells, weight)
        kind, parts = cells.parts()
        self._seen[kind] += 1
        tape = self._tapes.get(kind)
        try:
            if tape is not None:
                return self._replayed(tape, cells, parts, weight, steps_left)
            expected = steps_left * self._seen[kind] / self._seen.total()
            if self._seen[kind] > _when.steps_before and expected >= _when.steps_to_come:
                self._tapes[kind] = self._recorded(cells, parts, weight)
        except _Unfit as reason:
            self.works = False
            settings.logger.info("training steps are not replayed from a tape: %s", reason)
        return self.plain(cells, weight)

    def _recorded(self, cells: Any, parts: list[Tensor], weight: float) -> _Tape:
        """Run a step to note its operations, and leave no trace of it."""
        state, values = _State(self.module), self._python_values()
        try:
            tape = _record(self.plain, self.module, cells, parts, weight)
        except Exception as error:  # whatever a model does; its own errors come again in the plain step
            raise _Unfit(_first_line(error)) from error
        finally:
            state.restore()
        changed = [name for name, value in self._python_values().items() if values.get(name) != value]
        if changed:
            raise _Unfit(f"a step changes Python's values {list_some(name for _, name in changed)}")
        return tape

    def _python_values(self) -> dict[tuple[int, str], Any]:
        """Return numbers and texts that parts of the model hold as attributes: on a tape, they do not change."""
        owners = [*self.module.modules(), self.plain.elbo.owner]
        return {
            (id(owner), name): value
            for owner in owners
            for name, value in getattr(owner, "__dict__", {}).items()
            if isinstance(value, bool | int | float | str)
        }

    def _replayed(
        self, tape: _Tape, cells: Any, parts: list[Tensor], weight: float, steps_left: int
    ) -> ElboTerms:
        tape.n_replays += 1
        if _is_due(tape.n_replays) or steps_left == 1:
            return self._compared(tape, cells, parts, weight)
        try:
            return tape.play(parts, weight)
        except Exception as error:
            self.undo()
            raise _Unfit(_first_line(error)) from error

    def _compared(self, tape: _Tape, cells: Any, parts: list[Tensor], weight: float) -> ElboTerms:
        """Replay a tape, then take the plain step from the same state, which is the one that counts."""
        before, values = _State(self.module), self._python_values()
        try:
            played = [*tape.play(parts, weight).tensors(), *(p.grad for p in tape.parameters)]
            after = _State(self.module)
        except Exception as error:
            raise _Unfit(_first_line(error)) from error
        finally:
            before.restore()
            _put_gradients(tape.parameters, [None] * len(tape.parameters))
        terms = self.plain(cells, weight)
        found = [*terms.tensors(), *(p.grad for p in tape.parameters)]
        same = _same(played, found) and after == _State(self.module)
        if not same or values != self._python_values():
            self.works = False
            _tell_of_difference(tape.n_replays)
        return terms


def _is_due(n_replays: int) -> bool:
    return n_replays & (n_replays - 1) == 0 or n_replays % _INTERVAL == 0


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _tell_of_difference(n_replays: int) -> None:
    if n_replays == 1:
        settings.logger.info("training steps are not replayed from a tape: it gave other numbers than they")
        return
    warnings.warn(
        f"Model and guide compute something else than when a training step was recorded: after {n_replays} replays the "
        "two differ. Plain steps are taken from now on, but some before may have used the old code. If they change "
        "with time, train again with TrainingPlan(record_step=False), or keep what changes in a buffer.",
        PyrocellWarning,
        stacklevel=2,
    )


class _Unfit(Exception):
    """A step cannot be recorded, or its tape not be replayed."""


class _State:
    """Running statistics and random state."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._buffers = list(module.buffers())
        self.values = [buffer.clone() for buffer in self._buffers]
        self.random = torch.get_rng_state()

    def restore(self) -> None:
        for buffer, value in zip(self._buffers, self.values, strict=True):
            buffer.copy_(value)
        torch.set_rng_state(self.random)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _State)
            and torch.equal(self.random, other.random)
            and _same(self.values, other.values)
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass
class _Tape:
    """Straight-line code from the tensors of a minibatch to terms of the bound and gradients."""

    code: Callable[..., Outputs]
    inputs: list[int]
    """Which of the minibatch's tensors are read."""
    like: ElboTerms
    """Names of the terms."""
    parameters: list[torch.nn.Parameter]
    n_replays: int = 0

    @torch.no_grad()
    def play(self, parts: list[Tensor], weight: float) -> ElboTerms:
        found = self.code(_as_tensor(weight), *(parts[i] for i in self.inputs))
        n_terms = len(found) - len(self.parameters)
        _put_gradients(self.parameters, found[n_terms:])
        return self.like.of_tensors(found[:n_terms])


def _as_tensor(weight: float) -> Tensor:
    return torch.tensor(weight, dtype=torch.float32)


def _put_gradients(parameters: Sequence[torch.nn.Parameter], grads: Outputs) -> None:
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad


def _same(some: Outputs, others: Outputs) -> bool:
    return len(some) == len(others) and all(
        a is b if a is None or b is None else _same_bits(a, b) for a, b in zip(some, others, strict=True)
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _record(
    plain: PlainStep, module: torch.nn.Module, cells: Any, parts: list[Tensor], weight: float
) -> _Tape:
    # These take a second to import.
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    parameters = [p for p in module.parameters() if p.requires_grad]
    others = [*module.parameters(), *module.buffers()]
    seen: list[ElboTerms] = []

    def step(weight: Any, *parts: Tensor) -> list[Tensor | None]:
        with ShapesAreFixed():
            terms = plain.bound(cells.of_parts(parts), weight)
            grads = torch.autograd.grad(terms.loss, parameters, allow_unused=True)
            seen.append(terms.of_tensors([term.detach() for term in terms.tensors()]))
            return [*seen[0].tensors(), *_laid_out(grads, parameters, [*others, *parts])]

    # make_fx notes the shape of each result as a fake tensor. Without a mode that is there it makes one each time, and
    # that takes longer than all else.
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        recorded = make_fx(step, tracing_mode="real")(_as_tensor(weight), *parts)
    inputs = simplify(recorded, may_write=module.buffers())
    return _Tape(recorded.forward, inputs, seen[0], parameters)


def _laid_out(grads: Outputs, parameters: Sequence[Tensor], others: list[Tensor]) -> list[Tensor | None]:
    """Give each gradient memory of its own, laid out as its parameter is, as autograd does."""
    taken = {other.untyped_storage().data_ptr() for other in others}
    found: list[Tensor | None] = []
    for grad, parameter in zip(grads, parameters, strict=True):
        if grad is not None:
            place = grad.untyped_storage().data_ptr()
            if place in taken or grad.stride() != parameter.stride():
                grad = torch.empty_like(parameter).copy_(grad)
            taken.add(place)
        found.append(grad)
    return found
