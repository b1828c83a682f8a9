"""An adversary: a classifier that a latent is trained to confuse, by one optimizer in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyrocell.nn.mlp import MLP

__all__ = ["Adversary", "reverse_gradient"]


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grad, None


def reverse_gradient(x: Tensor, strength: float = 1.0) -> Tensor:
    """Return ``x`` as it is; its gradient on the way back is multiplied by ``-strength``.

    Parameters
    ----------
    x
        Any tensor.
    strength
        How strongly what comes before is pushed against what comes after; 0 cuts the gradient.

    Notes
    -----
    Y. Ganin, V. Lempitsky. Unsupervised domain adaptation by backpropagation. ICML 2015.
    """
    reversed_: Tensor = _Reverse.apply(x, strength)
    return reversed_


class Adversary(nn.Module):
    """Guess a category from a latent, while the latent learns to give nothing away.

    The classifier lowers the cross-entropy that :meth:`forward` returns. The latent, behind a reversed gradient,
    raises it: at best the guess is as good as chance, which is the confusion that is wanted. (To be told wrong
    categories instead would reward mistakes made with confidence.)

    Parameters
    ----------
    n_latent
        Dimension of the latent.
    n_categories
        Number of categories.
    n_hidden, n_layers, dropout
        As in :class:`~pyrocell.nn.MLP`.
    """

    def __init__(
        self, n_latent: int, n_categories: int, n_hidden: int = 32, *, n_layers: int = 2, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.mlp = MLP(n_latent, n_hidden, n_hidden=n_hidden, n_layers=n_layers, dropout=dropout)
        self.logits = nn.Linear(n_hidden, n_categories)

    def forward(self, z: Tensor, category: Tensor) -> Tensor:
        """Return the mean cross-entropy of the guesses, in nats per cell.

        Parameters
        ----------
        z
            Latent, shape (B, n_latent).
        category
            Category of each cell, int64, shape (B,).
        """
        return functional.cross_entropy(self.logits(self.mlp(reverse_gradient(z))), category)
