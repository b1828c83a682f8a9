"""The three ways to multiply give one result, forward and backward."""

from __future__ import annotations

import pytest
import torch

from pyrocell.distributions import NonZeros, attach_nonzeros, log1p_counts
from pyrocell.nn import products
from pyrocell.nn.products import linear

N_IN, N_OUT = 300, 140


@pytest.fixture
def counts() -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.poisson(torch.full((128, N_IN), 0.08))
    x[3] = 0  # a cell without counts
    x[:, [0, 7, N_IN - 1]] = 0  # features never seen
    return x


def gradients(x, weight, bias, grad):
    x, weight, bias = (t.detach().clone().requires_grad_(t.requires_grad) for t in (x, weight, bias))
    out = linear(x, weight, bias)
    out.backward(grad)
    return out.detach(), x.grad, weight.grad, bias.grad


def textbook(x, weight, bias, grad):
    x, weight, grad = x.detach().double(), weight.detach().double(), grad.double()
    return x @ weight + bias.double(), grad @ weight.T, x.T @ grad, grad.sum(0)


def parameters() -> tuple[torch.Tensor, ...]:
    weight, bias = torch.randn(N_IN, N_OUT), torch.randn(N_OUT)
    return weight.requires_grad_(), bias.requires_grad_(), torch.randn(128, N_OUT)


@pytest.mark.parametrize("transform", [lambda x: x, log1p_counts], ids=["counts", "log1p"])
def test_counts_are_read_at_their_non_zeros(counts, transform, monkeypatch):
    attach_nonzeros(counts, *counts.nonzero(as_tuple=True), counts[counts != 0])
    x = transform(counts)
    weight, bias, grad = parameters()
    out = linear(x, weight, bias)
    monkeypatch.setattr(torch.nn.functional, "embedding_bag", None)  # used up: a second call would fail
    with pytest.raises(TypeError, match="not callable"):
        linear(x, weight, bias)
    monkeypatch.undo()
    out.backward(grad)
    expected, _, weight_grad, bias_grad = textbook(x, weight, bias, grad)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), weight_grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad.double(), bias_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("are_few", [True, False])
def test_an_index_gives_what_its_counts_give(counts, are_few):
    attach_nonzeros(counts, *counts.nonzero(as_tuple=True), counts[counts != 0])
    index = NonZeros.of(counts)
    index.are_few = are_few
    weight, bias, grad = parameters()
    gradients = []
    for x in (counts, index):
        out = linear(x, weight, bias)
        gradients.append([out, *torch.autograd.grad(out, [weight, bias], grad)])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.nn.functional.linear(counts, weight.T, bias)
        for x in (counts, index):
            assert linear(x, weight, bias).dtype == torch.bfloat16
            assert torch.equal(linear(x, weight, bias), plain)


@pytest.mark.parametrize("n_in", [N_IN - 1, N_IN + 1])
def test_counts_of_another_width_are_refused(counts, n_in):
    attach_nonzeros(counts, *counts.nonzero(as_tuple=True), counts[counts != 0])
    for x in (counts, NonZeros.of(counts)):
        with pytest.raises(RuntimeError, match=f"{N_IN} and {n_in}x{N_OUT}"):
            linear(x, torch.zeros(n_in, N_OUT), torch.zeros(N_OUT))


def test_counts_whose_gradient_is_wanted_get_it(counts):
    attach_nonzeros(counts, *counts.nonzero(as_tuple=True), counts[counts != 0])
    counts.requires_grad_()
    weight, bias, grad = parameters()
    (found,) = torch.autograd.grad(linear(counts, weight, bias), counts, grad)
    torch.testing.assert_close(found, grad @ weight.T)


def test_dense_counts_take_the_dense_way(counts):
    dense, weight = counts + 1, torch.zeros(N_IN, N_OUT)
    attach_nonzeros(dense, *dense.nonzero(as_tuple=True), dense.flatten())
    assert products._nonzeros(dense, weight) is None
    assert products._nonzeros(counts, weight) is None  # nobody knows where its non-zeros lie
    NonZeros.of(counts)
    assert products._nonzeros(counts, weight) is None  # nor how many there were when they were read
    attach_nonzeros(counts, *counts.nonzero(as_tuple=True), counts[counts != 0])
    assert products._nonzeros(counts, weight) is not None
    counts[0, 1] = 5  # the index is out of date
    assert products._nonzeros(counts, weight) is None


@pytest.mark.parametrize("leading", [(), (3,)])
def test_large_products(leading, monkeypatch):
    torch.manual_seed(1)
    x = torch.randn(*leading, 128, N_IN, requires_grad=True)
    weight, bias, _ = parameters()
    grad = torch.randn(*leading, 128, N_OUT)
    monkeypatch.setattr(products, "_is_intel", lambda: False)
    found = gradients(x, weight, bias, grad)
    monkeypatch.setattr(products, "_has_onednn", lambda: False)
    plain = gradients(x, weight, bias, grad)
    flat = textbook(x.reshape(-1, N_IN), weight, bias, grad.reshape(-1, N_OUT))
    for one, other, exact in zip(found, plain, flat, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.double().reshape(exact.shape), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not products._has_onednn(), reason="no oneDNN with AVX-512 on this processor")
def test_large_products_are_onednns(monkeypatch):
    calls = []
    real = products._onednn
    monkeypatch.setattr(products, "_onednn", lambda *a: calls.append(a) or real(*a))
    x, weight = torch.randn(128, N_IN), torch.randn(N_IN, N_OUT)
    monkeypatch.setattr(products, "_is_intel", lambda: True)
    linear(x, weight, torch.zeros(N_OUT))
    assert not calls, "MKL is the faster one on processors of its maker"
    monkeypatch.setattr(products, "_is_intel", lambda: False)
    linear(x, weight, torch.zeros(N_OUT))
    assert len(calls) == 1
    linear(x[:4], weight, torch.zeros(N_OUT))  # small
    linear(x.double(), weight.double(), torch.zeros(N_OUT).double())
    linear(x, torch.randn(N_OUT, N_IN).T, torch.zeros(N_OUT))  # a layout that it is slow at
    assert len(calls) == 1


def test_a_missing_operator_means_torchs_own_product(monkeypatch):
    def gone(*_):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(products, "_onednn", gone)
    assert products._has_onednn.__wrapped__() is False


def test_no_gradient_is_computed_that_nobody_wants():
    weight, bias, grad = parameters()
    x = torch.randn(128, N_IN)
    out = linear(x, weight.detach(), bias)
    out.backward(grad)
    torch.testing.assert_close(bias.grad, grad.sum(0))
    assert weight.grad is None


def test_autocast_rounds_as_torch_does():
    weight, bias, _ = parameters()
    x = torch.randn(128, N_IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
