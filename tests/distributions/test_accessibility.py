"""ScaledBernoulli against 80-digit references, finite differences, and the shapes that Pyro expects."""

from __future__ import annotations

import itertools

import mpmath as mp
import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyrocell.distributions import NonZeros, ScaledBernoulli, attach_nonzeros
from pyrocell.distributions import accessibility as module
from tests.distributions.references import worst_relative_error

LOGITS = [-80.0, -30.0, -4.0, -0.3, 0.0, 2.0, 9.0, 25.0, 79.0]
FACTORS = [-60.0, -5.0, 0.0, 1.0, 12.0, 60.0]


def sigmoid(logit: float) -> mp.mpf:
    return 1 / (1 + mp.exp(-mp.mpf(logit)))


def log_prob(x: float, *logits: float) -> mp.mpf:
    p = mp.fprod(sigmoid(logit) for logit in logits)
    return mp.log(p) if x else mp.log1p(-p)


def points(*axes: list[float], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(torch.tensor(list(itertools.product(*axes)), dtype=dtype).T.contiguous())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)], ids=str)
def test_values_over_the_extreme_grid(dtype: torch.dtype, tolerance: float) -> None:
    x, *logits = points([0, 1], LOGITS, FACTORS, FACTORS, dtype=dtype)
    got = ScaledBernoulli(logits[0], depth_logits=logits[1], region_logits=logits[2]).log_prob(x)
    expected = [log_prob(*point) for point in zip(x.tolist(), *(t.tolist() for t in logits), strict=True)]
    kept = torch.tensor([abs(float(e)) > 1e-30 for e in expected])  # smaller ones are below float32's range
    assert worst_relative_error(got[kept], [e for e, k in zip(expected, kept, strict=True) if k]) <= tolerance
    assert (got[~kept].abs() < 1e-30).all() and (got <= 0).all()


@pytest.mark.parametrize("given", [(), ("depth_logits",), ("region_logits",)], ids=str)
def test_a_factor_left_out_is_one(given: tuple[str, ...]) -> None:
    x, *logits = points([0, 1], LOGITS, FACTORS)
    got = ScaledBernoulli(logits[0], **dict.fromkeys(given, logits[1])).log_prob(x)
    logits = logits[: 1 + len(given)]
    expected = [log_prob(*point) for point in zip(x.tolist(), *(t.tolist() for t in logits), strict=True)]
    kept = torch.tensor([abs(float(e)) > 1e-30 for e in expected])
    assert worst_relative_error(got[kept], [e for e, k in zip(expected, kept, strict=True) if k]) <= 2e-6


def test_gradients_over_the_extreme_grid() -> None:
    """They neither vanish nor overflow: a one seen at p = e^-140 still pulls with weight one."""
    x, *logits = points([0, 1], LOGITS, FACTORS, FACTORS)
    logits = [logit.requires_grad_() for logit in logits]
    fn = ScaledBernoulli(logits[0], depth_logits=logits[1], region_logits=logits[2])
    got = torch.autograd.grad(fn.log_prob(x).sum(), logits)
    for row, value in enumerate(x.tolist()):
        here = [logit[row].item() for logit in logits]
        p = mp.fprod(sigmoid(logit) for logit in here)
        strength = mp.mpf(1) if value else -p / (1 - p)
        for slope, logit in zip(got, here, strict=True):
            expected = float(strength * sigmoid(-logit))
            assert slope[row].item() == pytest.approx(expected, rel=1e-5, abs=1e-30)


def test_logits_beyond_the_limit() -> None:
    logits = torch.tensor([-200.0, 200.0, -200.0, 200.0], requires_grad=True)
    value = ScaledBernoulli(logits).log_prob(torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert value.tolist() == pytest.approx([0.0, 0.0, -200.0, -80.0], abs=1e-4)
    assert torch.autograd.grad(value.sum(), logits)[0].tolist() == pytest.approx([0, 0, 1, -1], abs=1e-6)


SHAPES = [((6, 1), (5,)), ((6, 5), (6, 5)), ((), (1,)), ((3, 6, 1), (3, 1, 5)), ((6, 1), (6, 1))]


@pytest.mark.parametrize(("depth_shape", "region_shape"), SHAPES, ids=str)
@pytest.mark.parametrize("samples", [(), (3,)], ids=str)
@pytest.mark.parametrize("rows", [False, True], ids=["elements", "rows"])
@pytest.mark.parametrize("block", [1 << 17, 12], ids=["one block", "blocks"])
def test_shapes_sums_and_finite_differences(
    depth_shape: tuple[int, ...],
    region_shape: tuple[int, ...],
    samples: tuple[int, ...],
    rows: bool,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul_(2).requires_grad_()

    logits, depth, region = draw(*samples, 6, 5), draw(*depth_shape), draw(*region_shape)
    x = torch.bernoulli(torch.full((6, 5), 0.4, dtype=torch.float64), generator=generator)

    def score(*parameters: Tensor) -> Tensor:
        a, d, r = parameters
        fn = ScaledBernoulli(a, depth_logits=d, region_logits=r)
        return fn.to_event(1).log_prob(x) if rows else fn.log_prob(x)

    p = torch.sigmoid(logits) * torch.sigmoid(depth) * torch.sigmoid(region)
    expected = torch.where(x == 1, p.log(), (-p).log1p())
    torch.testing.assert_close(score(logits, depth, region), expected.sum(-1) if rows else expected)
    assert torch.autograd.gradcheck(score, (logits, depth, region))


def test_only_the_asked_gradients_are_computed() -> None:
    x = torch.bernoulli(torch.full((6, 5), 0.4))
    logits, depth = torch.randn(6, 5), torch.randn(6, 1, requires_grad=True)
    value = ScaledBernoulli(logits, depth_logits=depth).to_event(1).log_prob(x)
    assert torch.autograd.grad(value.sum(), depth)[0].shape == (6, 1)
    with torch.no_grad():
        assert not ScaledBernoulli(logits, depth_logits=depth).log_prob(x).requires_grad


def test_a_known_index_of_ones_is_used_and_counts_are_read_as_ones() -> None:
    x = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    logits = torch.tensor([[0.3, -0.2], [1.0, 0.4]])
    expected = ScaledBernoulli(logits).log_prob((x > 0).float())
    torch.testing.assert_close(ScaledBernoulli(logits).log_prob(x), expected)
    lied = attach_nonzeros(torch.zeros(2, 2), [0], [0], [1.0])
    assert (
        ScaledBernoulli(logits).log_prob(lied)[0, 0]
        == ScaledBernoulli(logits).log_prob(torch.ones(2, 2))[0, 0]
    )
    assert len(NonZeros.of(lied)) == 1


def test_moments_and_draws() -> None:
    logits, depth, region = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5]]), torch.tensor([1.0, 3.0])
    fn = ScaledBernoulli(logits, depth_logits=depth, region_logits=region)
    p = torch.sigmoid(logits) * torch.sigmoid(depth) * torch.sigmoid(region)
    torch.testing.assert_close(fn.mean, p)
    torch.testing.assert_close(fn.variance, p * (1 - p))
    table = fn.parameters_table
    assert set(table) == {"mean", "accessibility", "depth", "region_factor"}
    torch.testing.assert_close(table["depth"], torch.sigmoid(depth).expand(1, 2))
    torch.manual_seed(3)
    draws = fn.sample((200_000,))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    assert ((draws.mean(0) - p).abs() < 4 * (p * (1 - p) / 200_000).sqrt()).all()
    assert set(ScaledBernoulli(logits).parameters_table) == {"mean", "accessibility"}


def test_shapes_masks_and_plates_of_pyro() -> None:
    fn = ScaledBernoulli(torch.randn(4, 3), depth_logits=torch.randn(4, 1), region_logits=torch.randn(3))
    assert (fn.batch_shape, fn.event_shape, fn.has_rsample) == ((4, 3), (), False)
    x = fn.sample()
    rows = fn.to_event(1).log_prob(x)
    wide = fn.expand((2, 4, 3))
    assert wide.sample().shape == (2, 4, 3)
    torch.testing.assert_close(wide.log_prob(x)[1], fn.log_prob(x))
    mask = torch.tensor([True, False, True, False])

    def model() -> None:
        with pyro.plate("cells", 4), poutine.mask(mask=mask):
            pyro.sample("x", fn.to_event(1), obs=x)

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], torch.where(mask, rows, 0.0))
    assert fn.log_prob(torch.tensor(1.0)).shape == (4, 3)
    assert fn.to_event(2).log_prob(x).shape == ()


def test_a_nan_is_never_hidden_and_checks_are_made_on_request() -> None:
    nan = torch.tensor([[0.0, float("nan")], [0.0, 0.0]])
    assert ScaledBernoulli(nan).to_event(1).log_prob(torch.zeros(2, 2)).isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match=r"[Ee]xpected"):
        ScaledBernoulli(nan, validate_args=True)
    with pytest.raises(ValueError, match=r"[Ee]xpected"):
        ScaledBernoulli(torch.zeros(2), validate_args=True).log_prob(torch.tensor([0.0, 2.0]))
