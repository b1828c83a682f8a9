"""Rows of counts whose mean is a share of a size: the loop that takes the softmax along gives what float64 gives."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pyrocell.distributions import CountDistribution, NonZeros, SoftmaxMean, threads
from pyrocell.distributions.compiled import BLOCK
from tests.distributions.families import CASES, Case

CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def numbers(low: float, high: float, *shape: int, seed: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def counts(n_cells: int, n_genes: int, largest: float = 12.0) -> Tensor:
    """Counts at 8 % of the places; the first cell has none, the second has a large one and one that is not whole."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randint(1, 1 + int(largest), (n_cells, n_genes), generator=generator)
    x = (x * (torch.rand((n_cells, n_genes), generator=generator) < 0.08)).float()
    x[0] = 0.0
    x[1, 0], x[1, -1] = 2.5, 1e5
    return x


def parameters(n_cells: int, n_genes: int, theta_shape: tuple[int, ...] | None = None) -> dict[str, Tensor]:
    return {
        "logits": 6.0 * numbers(-1.0, 1.0, n_cells, n_genes, seed=1),
        "log_size": numbers(5.0, 9.0, n_cells, 1, seed=2),
        "log_theta": 3.0 * numbers(-1.0, 1.0, *(theta_shape or (n_genes,)), seed=3),
        "zi_logits": 6.0 * numbers(-1.0, 1.0, n_cells, n_genes, seed=4),
    }


def taken(case: Case, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v for name, v in given.items() if name in ("logits", "log_size", *case.names)}


def build(case: Case, given: dict[str, Tensor], *, plain: bool = False) -> CountDistribution:
    """Make the distribution from logits and sizes, or (``plain``) from the log means themselves."""
    mean = SoftmaxMean(given["logits"], given["log_size"])
    return case.build([mean.log_mean if plain else mean, *(given[name] for name in case.names[1:])])  # type: ignore[list-item]


def rows_and_slopes(
    case: Case,
    given: dict[str, Tensor],
    x: Tensor,
    *,
    plain: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Row sums, and slopes of their sum weighted by row in every parameter."""
    leaves = {name: v.detach().to(dtype).requires_grad_() for name, v in taken(case, given).items()}
    rows = build(case, leaves, plain=plain).to_event(1).log_prob(x.to(dtype))
    weights = torch.linspace(0.5, 1.5, rows.numel(), dtype=dtype).view(rows.shape)
    slopes = torch.autograd.grad((rows * weights).sum(), list(leaves.values()))
    return rows.detach(), dict(zip(leaves, slopes, strict=True))


def assert_right(case: Case, given: dict[str, Tensor], x: Tensor, tolerance: float = 1e-6) -> None:
    """Compare with float64; slopes are sums of terms as large as counts and means, and round as they do."""
    rows, slopes = rows_and_slopes(case, given, x)
    exact_rows, exact_slopes = rows_and_slopes(case, given, x, plain=True, dtype=torch.float64)
    torch.testing.assert_close(rows.double(), exact_rows, rtol=tolerance, atol=0.0)
    rho = given["logits"].double().softmax(-1)
    terms = 1.0 + x.double() + rho * given["log_size"].double().exp()
    terms = terms + rho * terms.sum(-1, keepdim=True)
    terms = {"logits": terms, "log_size": terms.sum(-1, keepdim=True)}.get
    for name, exact in exact_slopes.items():
        assert slopes[name].dtype == torch.float32
        own = terms(name, terms("logits"))
        scale = own.expand(torch.broadcast_shapes(own.shape, exact.shape)).sum_to_size(exact.shape)
        assert ((slopes[name].double() - exact).abs() <= tolerance * (scale + exact.abs())).all(), name


@CASE
@pytest.mark.parametrize("n_genes", [1, 7, 8, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 300])
def test_any_number_of_genes(case: Case, n_genes: int) -> None:
    assert_right(case, parameters(9, n_genes), counts(9, n_genes))


@pytest.mark.parametrize("name", ["nb", "zinb"])
@pytest.mark.parametrize("theta_shape", [(300,), (20, 300), (20, 1), (1,), (), (1, 300)], ids=str)
def test_dispersions_of_any_shape(name: str, theta_shape: tuple[int, ...]) -> None:
    given = parameters(20, 300)
    given["log_theta"] = 3.0 * numbers(-1.0, 1.0, *theta_shape, seed=3)
    assert_right(CASES[name], given, counts(20, 300))


@pytest.mark.skipif(threads._region() is None, reason="torch's OpenMP was not found")
@CASE
@pytest.mark.parametrize("theta_shape", [(300,), (3, 20, 300)], ids=str)
def test_rows_are_those_of_one_thread(case: Case, theta_shape: tuple[int, ...], monkeypatch) -> None:
    given = parameters(20, 300, theta_shape)
    monkeypatch.setattr(threads, "_WORTH", 1)
    found = rows_and_slopes(case, given, counts(20, 300))
    monkeypatch.setattr(threads, "_region", lambda: None)
    plain = rows_and_slopes(case, given, counts(20, 300))
    for one, other in zip((found[0], *found[1].values()), (plain[0], *plain[1].values()), strict=True):
        assert torch.equal(one, other)


@CASE
@pytest.mark.parametrize("varies", ["logits", "log_size", "log_theta", "zi_logits"])
def test_leading_dimensions(case: Case, varies: str) -> None:
    """Monte Carlo draws and enumerated labels: the index of non-zeros is shared between them."""
    given, x = parameters(6, 40), counts(6, 40)
    if varies in taken(case, given):
        shape = (3, 1, *((1,) * (2 - given[varies].ndim)), *given[varies].shape)
        given[varies] = given[varies] + torch.arange(3.0).view(3, *(1,) * (len(shape) - 1))
        rows, _ = rows_and_slopes(case, given, x)
        assert rows.shape == (3, 1, 6)
        assert_right(case, given, x)
        more = torch.stack([x, x.flip(0)])  # (2, 6, 40) counts under (3, 1, ...) parameters
        assert_right(case, given, more)


@CASE
@pytest.mark.parametrize("seed", range(4))
def test_from_end_to_end_of_every_range(case: Case, seed: int) -> None:
    n_cells, n_genes = 40, 90
    given = parameters(n_cells, n_genes)
    widths = torch.tensor([0.0, 1.0, 10.0, 80.0, 160.0]).repeat(n_cells // 5)[:, None]
    given["logits"] = widths * numbers(-1.0, 0.0, n_cells, n_genes, seed=seed)
    given["log_size"] = numbers(-80.0, 80.0, n_cells, 1, seed=10 + seed)
    given["log_theta"] = numbers(-16.0, 20.0, n_cells, n_genes, seed=20 + seed)
    given["zi_logits"] = numbers(-90.0, 60.0, n_cells, n_genes, seed=30 + seed)
    given["logits"][5, 3] = 200.0  # takes all
    x = counts(n_cells, n_genes, largest=1e5)
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 0.1] = 1.0
    # Beyond e^60 the log mean is rounded to float32, and the rate with it, in every term.
    assert_right(case, given, x, tolerance=1.5e-5 if case.names[0] == "log_rate" else 1e-6)


@CASE
def test_common_numbers_keep_more_digits_than_a_log_mean_in_float32(case: Case) -> None:
    given, x = parameters(50, 2000), counts(50, 2000)
    given["log_theta"] = numbers(-3.0, 3.0, 2000, seed=3)
    rows, slopes = rows_and_slopes(case, given, x)
    exact, exact_slopes = rows_and_slopes(case, given, x, plain=True, dtype=torch.float64)
    assert ((rows.double() - exact) / exact).abs().max() < 3e-7
    for name, slope in slopes.items():
        error = (slope.double() - exact_slopes[name]).norm() / exact_slopes[name].norm()
        assert error < 5e-7, name


BAD = [
    (name, value)
    for name, value in itertools.product(
        ("logits", "log_size", "log_theta", "zi_logits"), (torch.nan, torch.inf, -torch.inf)
    )
]


@CASE
@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
@pytest.mark.parametrize("column", [0, 5, -1])
def test_what_is_not_finite_is_neither_hidden_nor_spread(
    case: Case, name: str, value: float, column: int
) -> None:
    given, x = parameters(6, 1100, (6, 1100)), counts(6, 1100)
    if name not in taken(case, given):
        return
    given[name][1, 0 if name == "log_size" else column] = value
    rows, slopes = rows_and_slopes(case, given, x)
    plain, plain_slopes = rows_and_slopes(case, given, x, plain=True)
    assert rows.isfinite().equal(plain.isfinite())
    if value != value:
        assert rows[1].isnan()
        assert all(slopes[name][1].isnan().equal(plain_slopes[name][1].isnan()) for name in slopes)
    for one, other in zip(slopes.values(), plain_slopes.values(), strict=True):
        others = [0, 2, 3, 4, 5]
        assert one[others].isfinite().all()
        assert (one[1].isfinite() | ~other[1].isfinite()).all()


@CASE
def test_a_mean_of_zero(case: Case) -> None:
    """A gene that no cell can have, or a cell without anything."""
    given, x = parameters(3, 50), torch.zeros(3, 50)
    x[:, 1] = 2.0
    given["logits"][0, 7:20] = -torch.inf
    rows, _ = rows_and_slopes(case, given, x)
    exact, _ = rows_and_slopes(case, given, x, plain=True, dtype=torch.float64)
    torch.testing.assert_close(rows.double(), exact, rtol=1e-6, atol=0.0)
    given["log_size"][:] = -torch.inf
    assert torch.equal(build(case, given).to_event(1).log_prob(torch.zeros(3, 50)), torch.zeros(3))


@CASE
def test_some_gradients_only(case: Case) -> None:
    given, x = parameters(10, 60), counts(10, 60)
    _, every = rows_and_slopes(case, given, x)
    weights = torch.linspace(0.5, 1.5, 10)
    for name in every:
        alone = taken(case, given) | {name: given[name].clone().requires_grad_()}
        rows = build(case, alone).to_event(1).log_prob(x)
        assert torch.equal(torch.autograd.grad((rows * weights).sum(), alone[name])[0], every[name])


@CASE
def test_without_gradients(case: Case) -> None:
    given, x = parameters(10, 60), counts(10, 60)
    rows, _ = rows_and_slopes(case, given, x)
    learned = {name: v.clone().requires_grad_() for name, v in taken(case, given).items()}
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(build(case, learned).to_event(1).log_prob(x), rows)
    assert torch.equal(build(case, given).to_event(1).log_prob(x), rows)


@CASE
def test_rows_need_no_log_mean_and_all_else_has_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    given, x = parameters(10, 60), counts(10, 60)
    asked: list[int] = []
    log_mean = SoftmaxMean.log_mean.func
    computed = property(lambda self: asked.append(1) or log_mean(self))
    monkeypatch.setattr(SoftmaxMean, "log_mean", computed)
    expected = build(case, given, plain=True)
    asked.clear()
    made = build(case, given)
    assert made.batch_shape == (10, 60)
    torch.testing.assert_close(
        made.to_event(1).log_prob(x), expected.to_event(1).log_prob(x), rtol=2e-6, atol=0
    )
    assert not asked
    assert torch.equal(made.log_prob(x), expected.log_prob(x))  # of single counts
    assert torch.equal(getattr(made, case.names[0]), getattr(expected, case.names[0]))
    for name, value in expected.parameters_table.items():
        assert torch.equal(made.parameters_table[name], value)
    assert torch.equal(made.mean, expected.mean)
    assert torch.equal(made.variance, expected.variance)
    for distribution in (made, made.expand((4, 10, 60))):
        torch.manual_seed(0)
        drawn = distribution.sample()
        torch.manual_seed(0)
        assert torch.equal(drawn, expected.expand(distribution.batch_shape).sample())


@CASE
def test_expanded(case: Case) -> None:
    given, x = parameters(10, 60), counts(10, 60)
    rows, _ = rows_and_slopes(case, given, x)
    made = build(case, given)
    for distribution in (made.expand((3, 10, 60)), made.to_event(1).expand((3, 10)).to_event(0)):
        distribution = distribution if distribution.event_shape else distribution.to_event(1)
        assert torch.equal(distribution.log_prob(x), rows.expand(3, 10))
        assert torch.equal(distribution.log_prob(x.expand(3, 10, 60)), rows.expand(3, 10))
    every = build(case, given).to_event(2).log_prob(x)
    torch.testing.assert_close(every, rows.sum())
    one = {name: v[:1] if name != "log_theta" else v for name, v in given.items()}
    many = build(case, one).to_event(1).log_prob(x)  # one set of parameters for all cells
    torch.testing.assert_close(
        many.double(), rows_and_slopes(case, one, x, plain=True, dtype=torch.float64)[0], rtol=1e-6, atol=0
    )


@CASE
def test_other_precisions(case: Case) -> None:
    given, x = parameters(10, 60), counts(10, 60)
    double = {name: v.double() for name, v in given.items()}
    expected = build(case, double, plain=True).to_event(1).log_prob(x.double())
    assert torch.equal(build(case, double).to_event(1).log_prob(x.double()), expected)
    mixed = double | {"logits": given["logits"]}
    assert build(case, mixed).to_event(1).log_prob(x).dtype == torch.float64
    half = {name: v.to(torch.bfloat16) for name, v in given.items()}
    got = build(case, half).to_event(1).log_prob(x)
    assert got.dtype == torch.float32
    assert torch.equal(
        got, build(case, {name: v.float() for name, v in half.items()}).to_event(1).log_prob(x)
    )


@CASE
def test_checks_of_arguments(case: Case) -> None:
    given, x = parameters(10, 60), counts(10, 60)
    x[1, 0] = 2.0
    arguments = [SoftmaxMean(given["logits"], given["log_size"]), *(given[name] for name in case.names[1:])]
    made = case.make(**dict(zip(case.names, arguments, strict=True)), validate_args=True)
    assert torch.equal(made.to_event(1).log_prob(x), build(case, given).to_event(1).log_prob(x))
    with pytest.raises(ValueError, match="support"):
        made.log_prob(-x)


def test_shapes_that_mean_nothing() -> None:
    with pytest.raises(ValueError, match="one size a row"):
        SoftmaxMean(torch.zeros(3, 5), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="one size a row"):
        SoftmaxMean(torch.zeros(()), torch.zeros(()))


@pytest.mark.parametrize("shape", [(0, 20), (4, 0)])
def test_empty_minibatches(shape: tuple[int, int]) -> None:
    given = {name: v[: shape[0]] if name != "log_theta" else v for name, v in parameters(4, 20).items()}
    given = {name: v if name == "log_size" else v[..., : shape[1]] for name, v in given.items()}
    for case in CASES.values():
        rows, slopes = rows_and_slopes(case, given, torch.zeros(shape))
        assert rows.shape == shape[:1]
        assert slopes["logits"].shape == shape


def test_results_share_no_memory_with_arguments() -> None:
    given, x = parameters(4, 20), counts(4, 20)
    index = NonZeros.of(x)
    inputs = [given["logits"][None], given["log_size"][None], given["log_theta"][None, None]]
    operator = torch.ops.pyrocell.negative_binomial_of_profile.default
    found = operator(index.bounds, index.cols, index.values, inputs, learns=True)
    assert [one.shape for one in found] == [(1, 4), (1, 4, 20), (1, 4, 1), (1, 4, 20)]
    assert not {one.data_ptr() for one in found} & {one.data_ptr() for one in inputs}
