"""Transcription, splicing and degradation of RNA: the two equations solved, and where a cell is on the curve."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyrocell.nn.mlp import MLP

__all__ = ["KineticDecoder", "Rates", "divided_difference", "induction", "repression"]

_SMALL = 0.5
"""Below this, (1 - exp(-x)) / x is a series: float32 cancels in its slope."""

_CLOSEST = 1e-3
"""The rate that transcription changes with is kept this far from the splicing rate, where the solution has a gap."""

_CONCENTRATIONS = (1e-3, 1e4)


class Rates(NamedTuple):
    """Rates of each gene, shape (n_genes,), per unit of time."""

    alpha: Tensor
    """Transcription, in abundance per time; with a ramp, what it tends to."""
    beta: Tensor
    """Splicing."""
    gamma: Tensor
    """Degradation."""
    alpha_start: Tensor | None = None
    """Transcription at time zero, where it changes in time."""
    kappa: Tensor | None = None
    """How fast it changes."""


def divided_difference(beta: Tensor, gamma: Tensor, time: Tensor) -> Tensor:
    """Compute (exp(-gamma t) - exp(-beta t)) / (beta - gamma), also where the rates are equal.

    Parameters
    ----------
    beta, gamma
        Rates, in either order.
    time
        Time since the start, at least 0.
    """
    slower, gap = torch.minimum(beta, gamma), (beta - gamma).abs()
    return (-slower * time).exp() * time * _mean_decay(gap * time)


def _mean_decay(x: Tensor) -> Tensor:
    """Compute (1 - exp(-x)) / x for x >= 0."""
    small = x.clamp_max(_SMALL)
    series = 1 - small / 2 * (
        1 - small / 3 * (1 - small / 4 * (1 - small / 5 * (1 - small / 6 * (1 - small / 7))))
    )
    large = x.clamp_min(_SMALL)
    return torch.where(x < _SMALL, series, -torch.expm1(-large) / large)


def induction(rates: Rates, time: Tensor) -> tuple[Tensor, Tensor]:
    """Return unspliced and spliced RNA at a time after transcription began, from none of either.

    Parameters
    ----------
    rates
        Rates of each gene.
    time
        Time since the start, shape (..., n_genes).
    """
    alpha, beta, gamma = rates[:3]
    difference = divided_difference(beta, gamma, time)
    u = alpha / beta * -torch.expm1(-beta * time)
    s = alpha / gamma * -torch.expm1(-gamma * time) - alpha * difference
    if rates.alpha_start is None or rates.kappa is None:
        return u, s
    kappa = torch.where((rates.kappa - beta).abs() < _CLOSEST, beta + _CLOSEST, rates.kappa)
    missing = alpha - rates.alpha_start
    lag = beta * missing / (kappa - beta) * (difference - divided_difference(kappa, gamma, time))
    return u - missing * divided_difference(kappa, beta, time), s - lag


def repression(start: tuple[Tensor, Tensor], rates: Rates, time: Tensor) -> tuple[Tensor, Tensor]:
    """Return unspliced and spliced RNA at a time after transcription stopped.

    Parameters
    ----------
    start
        Unspliced and spliced RNA when it stopped.
    rates
        Rates of each gene.
    time
        Time since then, shape (..., n_genes).
    """
    (u, s), beta, gamma = start, rates.beta, rates.gamma
    later = s * (-gamma * time).exp() + beta * u * divided_difference(beta, gamma, time)
    return u * (-beta * time).exp(), later


class KineticDecoder(nn.Module):
    """Decode a latent into each gene's progress through induction and repression, and its likely states.

    Parameters
    ----------
    n_latent
        Dimension of the latent.
    n_genes
        Number of genes.
    n_hidden, n_layers
        Width and number of the hidden layers.
    linear
        Progress is a sigmoid of a weighted sum of the latent, one weight for each gene and dimension; repression runs
        against induction.
    """

    def __init__(
        self, n_latent: int, n_genes: int, n_hidden: int = 256, *, n_layers: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        self.n_genes, self.linear = n_genes, linear
        self.states = _layers(n_latent, n_hidden, n_layers)
        self.concentrations = nn.Linear(n_hidden, 4 * n_genes)
        if linear:
            self.weights = nn.Linear(n_latent, n_genes, bias=False)
            self.norm = nn.BatchNorm1d(n_genes, eps=1e-3, momentum=0.01, affine=False)
            self.log_slope = nn.Parameter(torch.zeros(n_genes))
            self.offset = nn.Parameter(torch.zeros(n_genes))
        else:
            self.progress = _layers(n_latent, n_hidden, n_layers)
            self.times = nn.Linear(n_hidden, 2 * n_genes)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return how far each gene is through induction, and through repression: fractions, (..., B, n_genes)."""
        if not self.linear:
            up, down = self.times(self.progress(z)).sigmoid().chunk(2, -1)
            return up, down
        weighted = self.weights(z)
        learned = self.norm.running_mean, self.norm.running_var
        several = self.training and weighted[..., 0].numel() > 1  # one cell has no variance
        flat = functional.batch_norm(
            weighted.reshape(-1, self.n_genes), *learned, training=several, momentum=0.01, eps=1e-3
        )
        return flat.view_as(weighted).sigmoid(), (-self.log_slope.exp() * weighted - self.offset).sigmoid()

    def concentration(self, z: Tensor) -> Tensor:
        """Return the concentrations of the four states of each gene, shape (..., B, n_genes, 4)."""
        raw: Tensor = self.concentrations(self.states(z))
        return functional.softplus(raw.view(*raw.shape[:-1], self.n_genes, 4)).clamp(*_CONCENTRATIONS)


def _layers(n_in: int, n_hidden: int, n_layers: int) -> MLP:
    return MLP(n_in, n_hidden, n_hidden=n_hidden, n_layers=n_layers, dropout=0.0, layer_norm=True)
