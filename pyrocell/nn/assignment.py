"""Rows assigned softly to places, block by block: beside the logits, nothing of rows by places is held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["assign", "cosine_similarity", "density_divergence"]

# A block of this many logits, and what is made of it, stay in the processor's cache.
_BLOCK_NUMBERS = 2**20
_FLOOR = 1e-8

Rows = slice | Tensor


def assign(
    logits: Tensor,
    values: Tensor,
    *,
    weights: Tensor,
    scale: Tensor | None = None,
    rows: Tensor | None = None,
    block_size: int | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hand out the values of each row over the places, in the shares that a softmax of its logits says.

    Sums and gradients are made of some rows at a time; the gradient makes the shares of a block anew. So a block of
    rows by places is held beside the logits and their gradient, and the block size changes results by rounding alone.

    Parameters
    ----------
    logits
        Shape (n_rows, n_places).
    values
        What each row hands out, shape (n_rows, n_values); constants.
    weights
        How much each row counts, shape (n_rows,).
    scale
        What the values of each row, but not its mass, are multiplied by, shape (n_rows, 1); constants.
    rows
        Row of the logits for each row of the values; by default they lie in the same order.
    block_size
        Rows at once; by default as many as fit into the processor's cache.
    with_entropy
        Whether to compute the entropy of the shares.

    Returns
    -------
    Tensor, Tensor, Tensor
        Values that each place gets, shape (n_places, n_values); mass that it gets, shape (n_places,); entropy of the
        shares in nats, summed over the rows, a scalar (0 unless asked for).
    """
    size = max(1, _BLOCK_NUMBERS // logits.shape[1]) if block_size is None else block_size
    got, mass, entropy = _Assign.apply(logits, weights, values, scale, rows, size, with_entropy)
    return got, mass, entropy


class _Assign(torch.autograd.Function):
    """Sums of weighted values, of the weights and of the entropy, and their gradient, by blocks of rows."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        values, scale, rows, size, with_entropy = rest
        ctx.save_for_backward(logits, weights, values, scale, rows)
        ctx.size, ctx.with_entropy = size, with_entropy
        got, mass = (values.new_zeros(logits.shape[1], *shape) for shape in ((values.shape[1],), ()))
        entropy, factor = values.new_zeros(()), _factor(weights, scale)
        for block, there in _blocks(len(values), size, rows):
            shares = logits[there].softmax(1)
            mass.addmv_(shares.T, weights[block])
            if with_entropy:
                entropy -= (shares * logits[there].log_softmax(1)).sum()
            got.addmm_(
                shares.mul_(factor[block]).T, values[block]
            )  # rows of shares, in the cache, not of values
        return got, mass, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_got: Tensor, of_mass: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits, weights, values, scale, rows = ctx.saved_tensors
        of_logits = torch.empty_like(logits) if rows is None else torch.zeros_like(logits)
        of_weights = torch.empty_like(weights) if ctx.needs_input_grad[1] else None
        factor = _factor(weights, scale)
        for block, there in _blocks(len(values), ctx.size, rows):
            with torch.enable_grad():
                part = logits[there].detach().requires_grad_()
                shares = part.softmax(1)
            slope = values[block] @ of_got.T
            if of_weights is not None:
                scaled = slope if scale is None else slope * scale[block]
                of_weights[block] = ((scaled + of_mass) * shares.detach()).sum(1)
            slope.mul_(factor[block]).addr_(weights[block], of_mass)
            if ctx.with_entropy:
                slope -= of_entropy * part.detach().log_softmax(
                    1
                )  # what is the same for all places has no effect
            of_logits[there] = torch.autograd.grad(shares, part, slope)[0]
        return of_logits, of_weights, *[None] * 5


def _factor(weights: Tensor, scale: Tensor | None) -> Tensor:
    """Return what the values of each row are multiplied by, shape (n_rows, 1)."""
    return weights[:, None] if scale is None else weights[:, None] * scale


def _blocks(n_rows: int, size: int, rows: Tensor | None) -> Iterator[tuple[slice, Rows]]:
    """Yield the places of some rows among the values, and among the logits."""
    for start in range(0, n_rows, size):
        block = slice(start, start + size)
        yield block, block if rows is None else rows[block]


def cosine_similarity(one: Tensor, two: Tensor, dim: int) -> Tensor:
    """Return the cosine of the angle between two sets of vectors that lie along ``dim``; 0 for one of no length."""
    lengths = one.norm(dim=dim) * two.norm(dim=dim)
    return (one * two).sum(dim) / lengths.clamp_min(_FLOOR)


def density_divergence(target: Tensor, found: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of a density from a target density, in nats.

    Parameters
    ----------
    target, found
        Shares of each place, shape (n_places,), each summing to one.
    """
    return (target * ((target + _FLOOR).log() - (found + _FLOOR).log())).sum()
