"""Effects of batch and covariates without a network."""

from __future__ import annotations

import torch

from pyrocell.nn import Covariates, LinearEffects


def test_effects_add_up_and_start_at_nothing():
    start, batch = torch.tensor([1.0, -2.0]), torch.tensor([0, 1, 1])
    categorical, continuous = torch.tensor([[2], [0], [1]]), torch.tensor([[0.5], [1.0], [-1.0]])
    layer = LinearEffects(start, Covariates(sizes=(3,), n_continuous=1).with_batch(2))
    assert torch.equal(layer(batch, categorical, continuous), start.expand(3, 2))
    names = {name for name, _ in layer.named_parameters()}
    assert names == {"linear.bias", "linear.table", "linear.slope"}
    with torch.no_grad():
        layer.linear.table.copy_(torch.arange(10.0).reshape(5, 2))
        layer.linear.slope.copy_(torch.tensor([[10.0], [20.0]]))
    table, slope = layer.linear.table, layer.linear.slope
    expected = start + table[batch] + table[2 + categorical[:, 0]] + continuous @ slope.T
    assert torch.allclose(layer(batch, categorical, continuous), expected)
    assert layer.linear.dense_weight().shape == (2, 6)


def test_without_covariates_there_is_one_value():
    layer = LinearEffects(torch.tensor([1.0, -2.0]), Covariates().with_batch(1))
    assert layer(torch.zeros(4, dtype=torch.int64)).tolist() == [1.0, -2.0]
    assert [name for name, _ in layer.named_parameters()] == ["linear.bias"]
