"""The decoder of proteins, the decoder with a skip connection, and the adversary."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyrocell.nn import (
    Adversary,
    Covariates,
    FeatureLinear,
    ProteinDecoder,
    SkipDecoder,
    reverse_gradient,
    select_features,
)

# Three batches: the second lacks the last protein, the third lacks all.
N_MEASURED = torch.tensor([[50, 50, 50, 50], [80, 80, 80, 0], [0, 0, 0, 0]])


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return ProteinDecoder(5, N_MEASURED, 8, covariates=Covariates((3,), 1)).eval()


def decode(decoder, batch, z=None):
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)) if z is None else z
    codes = torch.full((6,), batch), torch.zeros(6, 1, dtype=torch.int64), torch.zeros(6, 1)
    return decoder(z, *codes)


def test_foreground_is_never_below_background(decoder):
    out = decode(decoder, 0)
    assert all(part.shape == (6, 4) for part in out)
    assert (out.log_fold >= 0).all() and (out.background_sd > 0).all()
    draws = decode(decoder, 0, torch.randn(3, 6, 5))
    assert draws.log_fold.shape == (3, 6, 4)


def test_it_starts_open_and_with_background(decoder):
    out = decode(decoder, 0)
    assert (out.log_fold > 0).float().mean() > 0.5
    assert (out.background_logits > 0).all()
    decoder.start_background(torch.tensor([1.0, 2.0, 3.0, 30.0]), torch.full((4,), 0.05))
    assert decoder.outputs["mean"].bias.tolist() == [1.0, 2.0, 3.0, 30.0]
    out = decode(decoder, 0)
    assert (out.background_mean <= 15).all()
    torch.testing.assert_close(
        nn.functional.softplus(decoder.outputs["sd"].bias), torch.full((4,), 0.05), rtol=1e-4, atol=0
    )


def test_what_a_batch_lacks_is_decoded_as_where_most_cells_have_it(decoder):
    assert decoder.donors().tolist() == [[0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    first, second, third = (decode(decoder, batch) for batch in range(3))
    for name in first._fields:
        a, b, c = (getattr(out, name) for out in (first, second, third))
        torch.testing.assert_close(b, c)  # nothing was measured in the third: it is the second in all
        assert not torch.allclose(a[:, :3], b[:, :3])


def test_offsets_of_absent_proteins_take_no_part(decoder):
    out = sum(part.sum() for part in decode(decoder, 1))
    out.backward()
    for head in decoder.outputs.values():
        table = head.table.grad[:3]
        assert table[1, 3] == 0 and table[0, 3] != 0 and table[1, 0] != 0
    before = decode(decoder, 1)
    with torch.no_grad():
        for head in decoder.outputs.values():
            head.table[1, 3] += 5.0
    for name, part in zip(before._fields, decode(decoder, 1), strict=True):
        torch.testing.assert_close(part, getattr(before, name))


def test_a_row_of_a_table_for_each_cell(decoder):
    table = torch.arange(12.0).view(3, 4)
    batch = torch.tensor([2, 0, 1])
    expected = torch.tensor([[4.0, 5, 6, 3], [0, 1, 2, 3], [4, 5, 6, 3]])
    assert torch.equal(decoder.of_batch(table, batch), expected)
    draws = torch.stack([table, table + 100])[:, None]
    assert torch.equal(decoder.of_batch(draws, batch), torch.stack([expected, expected + 100]))


def test_one_batch_needs_no_offsets():
    decoder = ProteinDecoder(5, torch.tensor([[9, 9]]), 8)
    assert decoder.outputs["mean"].table is None
    assert decoder(torch.randn(4, 5)).log_fold.shape == (4, 2)


def test_the_latent_reaches_the_output_layer():
    decoder = SkipDecoder(3, 7, 4, heads=["zero_inflation"], dropout=0.2).eval()
    with torch.no_grad():
        decoder.mlp.layers[0].linear.weight.zero_()
    out = decoder.heads(torch.randn(5, 3))
    assert not torch.allclose(out.log_rho[0], out.log_rho[1])
    assert not torch.allclose(out.zi_logits[0], out.zi_logits[1])
    torch.testing.assert_close(out.log_rho.exp().sum(-1), torch.ones(5))


def test_a_selection_can_be_meant_for_one_field():
    layers = nn.ModuleList([FeatureLinear(2, 5), FeatureLinear(2, 3, field="proteins")])
    x = torch.randn(4, 2)
    with select_features(layers, [0, 2], "proteins"):
        assert [layer(x).shape[1] for layer in layers] == [5, 2]
    with select_features(layers, [4], "counts"):
        assert [layer(x).shape[1] for layer in layers] == [1, 3]


def test_a_reversed_gradient():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = reverse_gradient(x, 0.5)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert torch.equal(x.grad, -0.5 * 2 * x)


def test_the_adversary_learns_what_the_latent_unlearns():
    torch.manual_seed(0)
    batch = torch.randint(0, 2, (200,))
    noise, offset = torch.randn(200, 3), nn.Parameter(torch.tensor([2.0, 0.0, 0.0]))
    adversary = Adversary(3, 2, dropout=0.0)
    latent_of = lambda: noise + batch[:, None] * offset  # noqa: E731
    alone = torch.optim.Adam(adversary.parameters(), lr=0.02)
    for _ in range(60):
        alone.zero_grad()
        adversary(latent_of().detach(), batch).backward()
        alone.step()
    informed = float(adversary(latent_of(), batch).detach())
    assert informed < 0.5
    alone.zero_grad()
    adversary(latent_of(), batch).backward()
    assert offset.grad[0] > 0  # a step of descent takes the offset down
    reversed_, given = [p.grad.clone() for p in adversary.parameters()], latent_of().detach()
    alone.zero_grad()
    nn.functional.cross_entropy(adversary.logits(adversary.mlp(given)), batch).backward()
    for one, p in zip(reversed_, adversary.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)  # the classifier itself learns as any other
