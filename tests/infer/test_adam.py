"""Our Adam is torch's, step by step, whatever happens between the steps."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from pyrocell.infer.adam import Adam

SHAPES = [(40, 3), (3,), (7,)]


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(of: list[torch.nn.Parameter]) -> list[dict[str, object]]:
    return [
        {"params": of[:2], "weight_decay": 0.1, "eps": 0.01},
        {"params": of[2:], "weight_decay": 0.0, "eps": 1e-8},
    ]


def set_gradients(of: list[torch.nn.Parameter], step: int, *, without: int | None = None) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, parameter in enumerate(of):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if i == without else gradient


def assert_same(ours: Adam, theirs: torch.optim.Adam) -> None:
    """Parameters and the whole state, bit for bit."""
    for one, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for p, q in zip(one["params"], other["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)
    torch.testing.assert_close(ours.state_dict()["state"], theirs.state_dict()["state"], rtol=0, atol=0)


@pytest.fixture
def pair() -> tuple[Adam, torch.optim.Adam]:
    return Adam(groups(parameters()), lr=0.1, fused=True), torch.optim.Adam(
        groups(parameters()), lr=0.1, fused=True
    )


def take(pair: tuple[Adam, torch.optim.Adam], steps: range, *, without: int | None = None) -> None:
    for step in steps:
        for optimizer in pair:
            of = [p for group in optimizer.param_groups for p in group["params"]]
            set_gradients(of, step, without=without)
            optimizer.step()


def test_steps_are_those_of_torch(pair: tuple[Adam, torch.optim.Adam]) -> None:
    take(pair, range(5))
    assert pair[0]._gathered is not None  # the direct step was taken
    assert_same(*pair)


def test_rates_may_change_and_gradients_be_missing(pair: tuple[Adam, torch.optim.Adam]) -> None:
    take(pair, range(3))
    for optimizer in pair:
        optimizer.param_groups[1]["lr"] = 0.01
    take(pair, range(3, 5))
    take(pair, range(5, 7), without=0)
    take(pair, range(7, 10))  # one parameter of the first group is two steps behind
    assert not pair[0]._groups()
    assert_same(*pair)


def test_state_is_given_and_taken_over(pair: tuple[Adam, torch.optim.Adam]) -> None:
    take(pair, range(4))
    fresh = tuple(
        type(optimizer)(
            groups(
                [p.detach().clone().requires_grad_() for g in optimizer.param_groups for p in g["params"]]
            ),
            lr=0.1,
            fused=True,
        )
        for optimizer in pair
    )
    for new, old in zip(fresh, pair, strict=True):
        new.load_state_dict(deepcopy(old.state_dict()))  # torch itself copies nothing
    take(fresh, range(4, 8))
    take(pair, range(4, 8))
    assert_same(*fresh)
    assert_same(fresh[0], pair[1])


def test_parameters_may_be_added(pair: tuple[Adam, torch.optim.Adam]) -> None:
    take(pair, range(3))
    for optimizer in pair:
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(4))]})
    take(pair, range(3, 6))
    assert_same(*pair)


def test_a_closure_is_called(pair: tuple[Adam, torch.optim.Adam]) -> None:
    take(pair, range(2))
    losses = []
    for optimizer in pair:
        of = [p for group in optimizer.param_groups for p in group["params"]]

        def closure(of: list[torch.nn.Parameter] = of, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            loss = sum((p.square().sum() for p in of), torch.zeros(()))
            loss.backward()
            return float(loss.detach())

        losses.append(optimizer.step(closure))
    assert losses[0] == losses[1]
    assert_same(*pair)


def test_copies_and_refused_states_keep_the_count_of_steps(pair: tuple[Adam, torch.optim.Adam]) -> None:
    take(pair, range(5))
    copied = deepcopy(pair[0])
    assert {float(state["step"]) for state in copied.state.values()} == {5.0}
    take(pair, range(5, 7))
    with pytest.raises(ValueError, match="parameter group"):
        pair[0].load_state_dict({"state": {}, "param_groups": []})
    assert_same(*pair)


def test_hooks_run_once_a_step(pair: tuple[Adam, torch.optim.Adam]) -> None:
    ran: list[int] = []
    pair[0].register_step_post_hook(lambda *_: ran.append(1))
    take(pair, range(3))
    take(pair, range(3, 5), without=0)
    assert len(ran) == 5
