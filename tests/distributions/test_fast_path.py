"""The sparse fast path gives what the dense formula gives, in every arrangement of shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyrocell.distributions import NegativeBinomial, NonZeros, attach_nonzeros, elementary
from tests.distributions.families import CASES, Case, parameters_of, sparse_counts


def assert_same_rows(case: Case, parameters: list[Tensor], x: Tensor) -> None:
    """Row sums against the elementwise path, and against gamma functions everywhere in float64."""
    rows = case.build(parameters).to_event(1).log_prob(x)
    torch.testing.assert_close(rows, case.build(parameters).log_prob(x).sum(-1), rtol=1e-6, atol=0)
    exact = case.dense(x.double(), *(parameter.double() for parameter in parameters)).sum(-1)
    torch.testing.assert_close(rows.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("theta_shape", [(200,), (64, 200), (1,), (64, 1)], ids=str)
def test_rows_equal_the_dense_formula(case: Case, theta_shape: tuple[int, ...]) -> None:
    assert_same_rows(case, parameters_of(case, torch.float32, theta_shape), sparse_counts())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_rows_and_elements_have_the_same_gradients(case: Case) -> None:
    x, parameters = sparse_counts(), parameters_of(case, torch.float32)
    rows = torch.autograd.grad(case.build(parameters).to_event(1).log_prob(x).sum(), parameters)
    elements = torch.autograd.grad(case.build(parameters).log_prob(x).sum(), parameters)
    for one, other in zip(rows, elements, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("theta_shape", [(200,), (64, 200), (3, 64, 200), (3, 1, 200), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_leading_monte_carlo_draws(case: Case, theta_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Parameters (M, B, G) against counts (B, G): the index of non-zeros is shared between draws."""
    x = sparse_counts(dtype)
    parameters = parameters_of(case, dtype, theta_shape)
    draws = [
        (parameter + torch.arange(3.0, dtype=dtype)[:, None, None]).detach().requires_grad_()
        if parameter.shape == x.shape and name != "log_theta"
        else parameter
        for name, parameter in zip(case.names, parameters, strict=True)
    ]
    exact = [draw.detach().double().requires_grad_() for draw in draws]
    got, expected = case.build(draws).to_event(1).log_prob(x), case.dense(x.double(), *exact).sum(-1)
    assert got.shape == (3, 64)
    single = dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-6 if single else 1e-10, atol=0)
    weights = torch.rand(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for one, other in zip(
        torch.autograd.grad((got * weights).sum(), draws),
        torch.autograd.grad((expected * weights).sum(), exact),
        strict=True,
    ):
        tolerance = 1e-5 if single else 1e-9
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


def test_many_draws_of_counts_for_one_set_of_parameters() -> None:
    case, x = CASES["zinb"], torch.stack([sparse_counts(), sparse_counts().flip(0)])
    assert_same_rows(case, parameters_of(case, torch.float32), x)


def test_counts_that_broadcast() -> None:
    case = CASES["nb"]
    parameters = parameters_of(case, torch.float64)
    for shape in [(1, 200), (200,), (64, 1), ()]:
        x = torch.full(shape, 2.0, dtype=torch.float64)
        if shape[-1:] == (200,):
            x[..., ::3] = 0
        torch.testing.assert_close(
            case.build(parameters).log_prob(x), case.dense(x, *parameters), rtol=1e-11, atol=0
        )
    scalar = NegativeBinomial(3.0, 2.0)
    assert scalar.log_prob(torch.tensor(4.0)).shape == ()
    assert scalar.log_prob(torch.tensor([0.0, 4.0]))[1] == scalar.log_prob(torch.tensor(4.0))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_layouts_that_are_not_contiguous(case: Case) -> None:
    x, parameters = sparse_counts(), parameters_of(case, torch.float32)
    turned = [p.detach().T.contiguous().T if p.ndim == 2 else p.detach() for p in parameters]
    expected = case.build(parameters).to_event(1).log_prob(x)
    torch.testing.assert_close(case.build(turned).to_event(1).log_prob(x.T.contiguous().T), expected)


@pytest.mark.parametrize("shape", [(0, 200), (64, 0)])
def test_empty_minibatches(shape: tuple[int, int]) -> None:
    log_mean = torch.zeros(shape, requires_grad=True)
    rows = (
        NegativeBinomial(log_mean=log_mean, theta=torch.ones(shape[1]))
        .to_event(1)
        .log_prob(torch.zeros(shape))
    )
    assert rows.shape == shape[:1]
    assert torch.autograd.grad(rows.sum(), log_mean)[0].shape == shape


def test_all_zeros_and_no_zeros() -> None:
    case = CASES["zinb"]
    parameters = parameters_of(case, torch.float32)
    for x in (torch.zeros(64, 200), sparse_counts() + 1):
        assert_same_rows(case, parameters, x)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.float64, torch.bfloat16], ids=str
)
def test_counts_of_any_type(dtype: torch.dtype) -> None:
    case = CASES["nb"]
    parameters = parameters_of(case, torch.float32)
    x = sparse_counts().clamp(max=200)
    got = case.build(parameters).to_event(1).log_prob(x.to(dtype))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, case.build(parameters).to_event(1).log_prob(x))


def test_half_precision_parameters_are_scored_in_float32() -> None:
    x, case = sparse_counts(), CASES["zinb"]
    halves = [parameter.detach().to(torch.bfloat16) for parameter in parameters_of(case, torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.build(halves).to_event(1).log_prob(x)
    assert got.dtype == torch.float32
    assert torch.equal(got, case.build([half.float() for half in halves]).to_event(1).log_prob(x))


def test_one_index_of_nonzeros_serves_several_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    search = NonZeros.search
    monkeypatch.setattr(NonZeros, "search", lambda x: searches.append(1) or search(x))
    x = sparse_counts()
    for case in CASES.values():
        case.build(parameters_of(case, torch.float32)).to_event(1).log_prob(x)
    assert len(searches) == 1
    known = sparse_counts()
    rows, cols = known.nonzero().T
    attach_nonzeros(known, rows, cols, known[rows, cols])
    CASES["nb"].build(parameters_of(CASES["nb"], torch.float32)).to_event(1).log_prob(known)
    assert len(searches) == 1


def test_functions_compile_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = elementary.numba.njit

    def without_cache(*args: Any, **options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*args, **options)

    monkeypatch.setattr(elementary.numba, "njit", without_cache)
    twice = elementary.compiled(lambda x: x + x)
    assert twice(2.0) == 4.0


PACKAGE = Path(elementary.__file__).parent
ASK = "import numpy as np, elementary; print(elementary.exp(np.float32(1)))"


def in_a_new_process(code: str, **environment: str) -> str:
    """Run code that finds `elementary` alone, without torch, and return what it prints."""
    inherited = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    told = inherited | {"PYTHONPATH": str(PACKAGE)} | environment
    return subprocess.run(
        [sys.executable, "-c", code], check=True, env=told, capture_output=True, text=True
    ).stdout


def test_compiled_code_is_kept_with_the_user_and_not_beside_the_package(tmp_path: Path) -> None:
    """A folder that pip cannot remove hides an installation from source that follows it."""
    before = set(PACKAGE.rglob("*.nb?"))
    in_a_new_process(ASK, XDG_CACHE_HOME=str(tmp_path))
    assert list(tmp_path.glob("pyrocell/compiled-*/**/*.nbc"))
    in_a_new_process(ASK, XDG_CACHE_HOME=str(tmp_path), NUMBA_CACHE_DIR=str(tmp_path / "chosen"))
    assert list(tmp_path.glob("chosen/compiled-*/**/*.nbc"))
    nowhere = tmp_path / "file"
    nowhere.touch()
    assert in_a_new_process(ASK, XDG_CACHE_HOME=str(nowhere)).startswith("2.718")
    assert set(PACKAGE.rglob("*.nb?")) == before


def test_functions_are_there_where_numba_is_turned_off() -> None:
    code = "import elementary; print(elementary.compiled(lambda x: x + x)(2.0))"
    assert in_a_new_process(code, NUMBA_DISABLE_JIT="1").startswith("4.0")


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are those of POSIX")
def test_functions_run_where_the_disk_is_full(tmp_path: Path) -> None:
    limits = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64)); "
    )
    assert in_a_new_process(limits + ASK, XDG_CACHE_HOME=str(tmp_path)).startswith("2.718")
    assert not list(tmp_path.rglob("*.nbc"))


def test_elementary_functions_to_the_last_digits() -> None:
    x = np.linspace(-87, 88, 20001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    np.testing.assert_allclose([elementary.exp(v) for v in x], exact, rtol=2e-7)
    t = exact[exact < 1e38].astype(np.float32)
    np.testing.assert_allclose(
        [elementary.log1p(v, np.float32(1) / (np.float32(1) + v)) for v in t],
        np.log1p(t.astype(np.float64)),
        rtol=2e-7,
    )
    low = x[x <= 0]
    np.testing.assert_allclose(
        [elementary.minus_expm1(v) for v in low], -np.expm1(low.astype(np.float64)), rtol=2e-7
    )
    tiny = -np.logspace(-30, 0, 200).astype(np.float32)
    np.testing.assert_allclose(
        [elementary.minus_expm1(v) for v in tiny], -np.expm1(tiny.astype(float)), rtol=2e-7
    )
    assert elementary.exp(np.float32(-np.inf)) == 0.0
    assert np.isnan(elementary.exp(np.float32(np.nan)))
