"""The network that reads DNA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyrocell.nn import DnaTower
from pyrocell.nn.dna import length_after, reverse_complement, shifted


def codes(n=5, length=48, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(5, size=(n, length), dtype=np.uint8))


def tower(**options):
    torch.manual_seed(0)
    return DnaTower(48, 4, **({"n_filters": 6, "n_blocks": 2, "growth": 1.5, "n_last": 5} | options))


def in_float64(net, sequences):
    """The network in evaluation, written out with NumPy: the mean over both strands."""
    turned = np.where(sequences < 4, 3 - sequences.numpy().astype(int), 4)[:, ::-1]
    return (one_strand(net, sequences.numpy()) + one_strand(net, turned)) / 2


def one_strand(net, sequences):
    state = {name: value.numpy().astype(np.float64) for name, value in net.state_dict().items()}

    def norm(x, name, affine=True):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scaled = (x - mean) / np.sqrt(var + 1e-3)
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"] if affine else scaled

    def act(x):
        return x / (1 + np.exp(-1.702 * x))

    table = np.vstack([np.eye(4), np.full(4, 0.25)])
    found = []
    for row in sequences:
        x = table[row]  # places by channels
        for i, block in enumerate(net.blocks):
            weight = state[f"blocks.{i}.conv.weight"]  # out, in, kernel
            side = weight.shape[2] // 2
            x = np.pad(x if i == 0 else act(x), ((side, side), (0, 0)))
            x = np.array([
                [sum(weight[o, :, k] @ x[p + k] for k in range(weight.shape[2])) for o in range(len(weight))]
                for p in range(len(x) - 2 * side)
            ])  # fmt: skip
            x = norm(x, f"blocks.{i}.norm")
            before = (block.pool - 1) // 2
            padded = np.pad(x, ((before, before), (0, 0)), constant_values=-np.inf)
            n_windows = (len(padded) - block.pool) // block.pool + 1
            x = np.array([padded[w * block.pool : (w + 1) * block.pool].max(0) for w in range(n_windows)])
        dense = act(x.T.ravel()) @ state["dense.weight"].T
        found.append(norm(act(norm(dense, "norm")), "standard", affine=False))
    return np.array(found)


def test_the_network_is_what_is_written():
    net = tower()
    for i in range(3):
        net(codes(8, seed=i))  # statistics other than 0 and 1
    net.eval()
    np.testing.assert_allclose(net(codes()).detach().numpy(), in_float64(net, codes()), rtol=1e-4, atol=1e-5)


def test_the_usual_size():
    assert [length_after(1344, n) for n in range(7)] == [448, 224, 112, 56, 28, 14, 7]
    net = DnaTower(1344)
    assert [block.conv.out_channels for block in net.blocks] == [288, 288, 323, 362, 406, 456, 512, 256]
    assert net.dense.in_features == 7 * 256
    assert all(block.conv.bias is None for block in net.blocks) and net.dense.bias is None


def test_too_short_sequences():
    with pytest.raises(ValueError, match="48 bases are enough for 4 blocks, not for 5"):
        tower(n_blocks=5)
    assert tower(n_blocks=4)(codes()).shape == (5, 4)


def test_the_other_strand_and_shifts():
    row = torch.tensor([[0, 1, 4, 3, 3]], dtype=torch.uint8)  # ACNTT
    assert reverse_complement(row).tolist() == [[0, 0, 4, 2, 3]]  # AANGT
    assert torch.equal(reverse_complement(reverse_complement(codes())), codes())
    assert shifted(row, 2).tolist() == [[4, 4, 0, 1, 4]]
    assert shifted(row, -1).tolist() == [[1, 4, 3, 3, 4]]
    assert torch.equal(shifted(row, 0), row)


def test_training_sees_both_strands_and_all_shifts(monkeypatch):
    net, seen = tower(dropout=0.0), []
    monkeypatch.setattr(net, "_embed", lambda c: seen.append(c) or c)
    wanted = [shifted(strand, n) for strand in (codes(), reverse_complement(codes())) for n in range(-3, 4)]
    for _ in range(300):
        net(codes())
    times = [sum(torch.equal(one, other) for other in seen) for one in wanted]
    assert sum(times) == 300 and min(times) > 5
    net.eval()
    seen.clear()
    monkeypatch.setattr(net, "_embed", lambda c: seen.append(c) or c.float())
    net(codes())
    assert torch.equal(torch.stack(seen), torch.stack([codes(), reverse_complement(codes())]))


def test_both_strands_of_a_sequence_have_one_embedding():
    net = tower()
    net(codes(20))
    net.eval()
    torch.testing.assert_close(net(reverse_complement(codes())), net(codes()))


def test_embeddings_have_mean_zero_and_variance_one():
    net = tower(dropout=0.0)
    out = net(codes(400))
    np.testing.assert_allclose(out.mean(0).detach(), 0, atol=1e-5)
    # The epsilon of 0.001 counts where a dimension hardly varies.
    assert (out.var(0) > 0.5).all() and (out.var(0) < 1.01).all()


def test_one_sequence_and_many(monkeypatch):
    net = tower()
    net(codes(20))
    before = net.norm.running_mean.clone()
    assert torch.isfinite(net(codes(1))).all() and torch.equal(net.norm.running_mean, before)
    net.eval()
    whole = net(codes(30))
    monkeypatch.setattr("pyrocell.nn.dna._AT_ONCE", 7)
    torch.testing.assert_close(net(codes(30)), whole)
