"""Lists of operations: what may be on them, and what is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pyrocell.distributions import NonZeros, log1p_counts
from pyrocell.distributions.counts import order_by_column
from pyrocell.infer.operations import ShapesAreFixed, simplify
from tests.infer.autoencoder import cells_of


def record(function: Callable[..., Any], *inputs: torch.Tensor, may_write: Any = ()) -> tuple[Any, list[int]]:
    from torch.fx.experimental.proxy_tensor import make_fx

    recorded = make_fx(function, tracing_mode="real")(torch.ones(()), *inputs)
    return recorded, simplify(recorded, may_write=may_write)


def names(recorded: Any) -> list[str]:
    return [str(node.target) for node in recorded.graph.nodes if node.op == "call_function"]


def test_dense_counts_that_nobody_reads_are_not_made():
    cells = cells_of(np.arange(10))
    _, parts = cells.parts()

    def read(_: torch.Tensor, *parts: torch.Tensor) -> list[torch.Tensor]:
        again = cells.of_parts(parts)
        return [log1p_counts(again.counts).sum() if dense else NonZeros.of(again.counts).values.sum()]

    dense = True
    assert any("scatter_" in name for name in names(record(read, *parts)[0]))
    dense = False
    recorded, inputs = record(read, *parts)
    assert not any("scatter_" in name or "zeros" in name for name in names(recorded))
    assert inputs == [2]  # rows, flat, values, ...


def test_what_is_written_before_it_is_read_stays():
    def write(_: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        new = torch.zeros(3)
        new.view(3, 1)[:2].add_(x)
        return [new * 2.0]

    recorded, _ = record(write, torch.ones(2, 1))
    assert recorded(torch.ones(()), torch.full((2, 1), 4.0))[0].tolist() == [8.0, 8.0, 0.0]


def test_random_numbers_are_drawn_also_where_nobody_reads_them():
    def draw(_: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        torch.randn(4)
        return [x + torch.rand(2)]

    recorded, _ = record(draw, torch.zeros(2))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = draw(torch.ones(()), torch.zeros(2))[0]
        torch.manual_seed(1)
        assert torch.equal(recorded(torch.ones(()), torch.zeros(2))[0], expected)


def test_results_of_loops_are_multiplied_in_place_where_nobody_else_reads_them():
    bounds, cols = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 0])

    def multiply(factor: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        _, _, ordered = order_by_column(bounds, cols, values, 2)
        return [ordered * factor] if alone else [ordered * factor, ordered]

    alone = True
    recorded, _ = record(multiply, torch.tensor([1.0, 2.0, 3.0]))
    assert "aten.mul_.Tensor" in names(recorded)
    for _ in range(2):
        assert recorded(torch.tensor(2.0), torch.tensor([4.0, 5.0, 6.0]))[0].tolist() == [8.0, 12.0, 10.0]
    alone = False
    assert "aten.mul_.Tensor" not in names(record(multiply, torch.tensor([1.0, 2.0, 3.0]))[0])


def test_running_statistics_may_be_written_and_nothing_else():
    own, other = torch.zeros(2), torch.zeros(2)

    def write(_: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        return [own.add_(x), x]

    recorded, _ = record(write, torch.ones(2), may_write=[own])
    recorded(torch.ones(()), torch.ones(2))
    assert own.tolist() == [2.0, 2.0]
    with pytest.raises(RuntimeError, match="neither new nor a buffer"):
        record(write, torch.ones(2), may_write=[other])
    with pytest.raises(RuntimeError, match="neither new nor a buffer"):
        record(lambda _, x: [x.mul_(2.0)], torch.ones(2))


@pytest.mark.parametrize(
    "choose",
    [lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.unique(), lambda x: x.masked_select(x > 0)],
)
def test_shapes_that_depend_on_values_are_refused(choose):
    x = torch.tensor([1.0, 0.0, 2.0])
    with pytest.raises(RuntimeError, match="depends on values"), ShapesAreFixed():
        choose(x)
    with ShapesAreFixed():
        assert x[torch.tensor([2, 0])].tolist() == [2.0, 1.0]
