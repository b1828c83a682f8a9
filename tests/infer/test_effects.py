"""Effects and random streams: early exit, lazy values, and generators that are given back."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Normal
from pyro.poutine.runtime import _PYRO_STACK

from pyrocell.infer.effects import Record, lazy_deterministic, run_until
from pyrocell.infer.streams import RandomStream, seeded


def _program(log):
    with pyro.plate("cells", 3, dim=-1):
        pyro.sample("a", Normal(0.0, 1.0))
        lazy_deterministic("b", lambda: log.append("b") or torch.ones(3, 2), event_dim=1)
        log.append("after b")
        pyro.sample("c", Normal(0.0, 1.0))


def test_run_stops_at_the_last_site_asked_for():
    log = []
    with poutine.trace() as tracer, Record(["b"]):
        run_until(_program, ["a", "b"], log)
    assert log == ["b"]
    assert "b" in tracer.trace.nodes and "c" not in tracer.trace.nodes
    assert _PYRO_STACK == []


def test_errors_pass_through_and_leave_a_clean_stack():
    with pytest.raises(ZeroDivisionError):
        run_until(lambda: 1 // 0, ["a"])
    assert _PYRO_STACK == []


def test_lazy_values_cost_nothing_while_training():
    log = []
    with poutine.trace() as tracer:
        _program(log)
    assert log == ["after b"] and "b" not in tracer.trace.nodes


def test_only_wanted_values_are_computed():
    log = []
    with Record(["other"]):
        _program(log)
    assert log == ["after b"]


def test_stream_is_the_models_own():
    before = torch.get_rng_state()
    one, two = RandomStream(1), RandomStream(1)
    with one.active():
        first = torch.randn(3)
    torch.manual_seed(99)
    with one.active():
        second = torch.randn(3)
    with two.active():
        both = torch.randn(6)
    torch.set_rng_state(before)
    assert torch.equal(torch.cat([first, second]), both)


def test_global_generator_is_given_back_also_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), RandomStream(3).active():
        torch.randn(5)
        raise KeyError
    with seeded(4) as rng:
        torch.randn(2)
        rng.random()
    assert torch.equal(before, torch.get_rng_state())


def test_seeded_blocks_repeat():
    with seeded(5) as rng:
        first = (torch.randn(2), rng.random())
    with seeded(5) as rng:
        second = (torch.randn(2), rng.random())
    assert torch.equal(first[0], second[0]) and first[1] == second[1]
