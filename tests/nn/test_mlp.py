"""The MLP and its covariates: values, laws of initialisation, shapes and the one-cell minibatch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from pyrocell.nn import MLP, Covariates, InjectedLinear
from pyrocell.nn.covariates import gather_codes


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def one_hot_input(x, codes, sizes, continuous=None, embedding=None):
    """Concatenate as a textbook does."""
    columns = [functional.one_hot(c, k).float() for c, k in zip(codes, sizes, strict=True) if k > 1]
    parts = [x, *columns]
    parts += [] if continuous is None else [continuous]
    parts += [] if embedding is None else [embedding]
    shape = torch.broadcast_shapes(*[part.shape[:-1] for part in parts])
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], dim=-1)


@pytest.mark.parametrize("sizes", [(), (1,), (3,), (3, 1, 2), (2, 4, 5)])
@pytest.mark.parametrize("n_continuous", [0, 2])
def test_injection_equals_concatenation_in_values_and_gradients(sizes, n_continuous):
    layer = InjectedLinear(4, 6, covariates=Covariates(sizes, n_continuous))
    x = torch.randn(5, 7, 4)
    codes = [torch.randint(k, (7,)) for k in sizes]
    continuous = torch.randn(7, n_continuous) if n_continuous else None

    out = layer(x, codes, continuous)
    plain = nn.Linear(layer.fan_in, 6)
    plain.weight.data = layer.dense_weight().detach()
    plain.bias.data = layer.bias.detach()
    expected = plain(one_hot_input(x, codes, sizes, continuous))
    torch.testing.assert_close(out, expected)

    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    parts = [layer.weight.grad.T]
    parts += [] if layer.table is None else [layer.table.grad.T]
    parts += [] if layer.slope is None else [layer.slope.grad]
    torch.testing.assert_close(torch.cat(parts, dim=1), plain.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-4, atol=1e-5)


def test_initial_weights_follow_the_law_of_the_concatenated_linear():
    layer = InjectedLinear(20, 400, covariates=Covariates((10, 6), 4))
    assert layer.fan_in == 40
    bound = 1 / math.sqrt(40)
    for weight in (layer.weight, layer.table, layer.slope, layer.bias):
        assert weight.abs().max() <= bound
        assert weight.abs().max() > 0.97 * bound
        assert abs(weight.std().item() / (bound / math.sqrt(3)) - 1) < 0.1


def test_covariate_of_one_level_costs_nothing():
    layer = InjectedLinear(4, 6, covariates=Covariates((1,)))
    assert layer.table is None
    assert layer.fan_in == 4
    assert layer.dense_weight().shape == (6, 4)


def test_embedding_enters_the_first_layer_only_and_the_others_stay_one_hot():
    covariates = Covariates((30, 2), embedding_dim=5)
    plain = {"batch_norm": False, "dropout": 0, "activation": nn.Identity}
    mlp = MLP(4, 6, n_hidden=8, n_layers=2, covariates=covariates, **plain)
    assert mlp.embedding.shape == (30, 5)
    assert [layer.linear.fan_in for layer in mlp.layers] == [4 + 2 + 5, 8 + 2]
    assert abs(mlp.embedding.std().item() - 1) < 0.25
    x, codes = torch.randn(7, 4), [torch.randint(30, (7,)), torch.randint(2, (7,))]
    first = mlp.layers[0].linear
    full = one_hot_input(x, codes[1:], (2,), embedding=mlp.embedding[codes[0]])
    hidden = functional.linear(full, first.dense_weight(), first.bias)
    second = mlp.layers[1].linear
    expected = functional.linear(one_hot_input(hidden, codes[1:], (2,)), second.dense_weight(), second.bias)
    torch.testing.assert_close(mlp(x, codes), expected)


@pytest.mark.parametrize(("inject", "fan_ins"), [(True, [7, 11, 11]), (False, [7, 8, 8])])
def test_covariates_enter_every_layer_or_only_the_first(inject, fan_ins):
    mlp = MLP(4, 8, n_hidden=8, n_layers=3, covariates=Covariates((3,), inject=inject))
    assert [layer.linear.fan_in for layer in mlp.layers] == fan_ins
    assert mlp(torch.randn(5, 4), [torch.randint(3, (5,))]).shape == (5, 8)


def test_layers_come_in_order_and_normalise():
    mlp = MLP(4, 6, layer_norm=True, dropout=0.2)
    kinds = [type(module).__name__ for module in mlp.layers[0].after]
    assert kinds == ["_CellNorm", "LayerNorm", "ReLU", "Dropout"]
    norm = mlp.layers[0].after[0]
    assert (norm.momentum, norm.eps) == (0.01, 1e-3)
    assert not list(mlp.layers[0].after[1].parameters())
    assert [type(m).__name__ for m in MLP(4, 6, batch_norm=False, dropout=0).layers[0].after] == ["ReLU"]


def test_monte_carlo_dimensions_equal_a_loop_when_queried():
    mlp = MLP(4, 6, n_layers=2, covariates=Covariates((3, 2), 1)).eval()
    mlp.layers[0].after[0].running_mean.normal_()
    x, codes = torch.randn(2, 5, 7, 4), [torch.randint(3, (7,)), torch.randint(2, (7,))]
    continuous = torch.randn(7, 1)
    out = mlp(x, codes, continuous)
    assert out.shape == (2, 5, 7, 6)
    torch.testing.assert_close(out[1, 3], mlp(x[1, 3], codes, continuous))


@pytest.mark.parametrize("shape", [(1, 4), (3, 1, 4), (4,)])
def test_one_cell_trains_on_running_statistics(shape):
    mlp = MLP(4, 6, dropout=0)
    mlp(torch.randn(64, 4))
    norm = mlp.layers[0].after[0]
    before = norm.running_mean.clone(), norm.running_var.clone()
    x = torch.randn(shape)
    trained = mlp(x)
    assert torch.equal(norm.running_mean, before[0])
    assert torch.equal(norm.running_var, before[1])
    torch.testing.assert_close(trained, mlp.eval()(x))
    mlp.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mlp.parameters())


def test_batch_norm_normalises_cells_in_training_and_learns_slowly():
    norm = MLP(4, 3, dropout=0).layers[0].after[0]
    x = torch.randn(500, 3) * 5 + 2
    out = norm(x)
    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(norm.running_mean, 0.01 * x.mean(0))
    stacked = norm(x.view(5, 100, 3))
    torch.testing.assert_close(stacked.view(500, 3), out)


def test_missing_and_superfluous_covariates_are_named():
    mlp = MLP(4, 6, covariates=Covariates((3, 2), 1))
    x, code = torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="2 categorical covariates, got 1"):
        mlp(x, [code], torch.zeros(5, 1))
    with pytest.raises(ValueError, match="1 continuous covariates, got none"):
        mlp(x, [code, code])
    with pytest.raises(ValueError, match="give the batch"):
        gather_codes(Covariates((3,)))
    with pytest.raises(ValueError, match="0 categorical covariates beside the batch, got 2"):
        gather_codes(Covariates((3,)), code, torch.zeros(5, 2, dtype=torch.int64))
    assert len(gather_codes(Covariates((1, 3, 2)), None, torch.zeros(5, 2, dtype=torch.int64))) == 3


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Covariates((0,)), "at least one level"),
        (lambda: Covariates(n_continuous=-1), "n_continuous"),
        (lambda: Covariates((2,), embedding_dim=0), "embedding_dim"),
        (lambda: MLP(4, 6, n_layers=0), "at least one layer"),
    ],
)
def test_impossible_networks_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
