"""A small autoencoder of counts, with all that a training step may hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions import Normal
from torch import nn

from pyrocell.data import Cells
from pyrocell.distributions import NegativeBinomial, NonZeros, log1p_counts
from pyrocell.nn.products import linear

N_CELLS, N_GENES, N_LATENT = 70, 12, 3


class Autoencoder(nn.Module):
    """Counts of a few genes, with all that a step may hold: sparse input, running statistics, dropout, draws."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.weight = nn.Parameter(torch.randn(N_GENES, 8) * 0.3)
            self.bias = nn.Parameter(torch.zeros(8))
            self.hidden = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
            self.location = nn.Linear(8, N_LATENT)
            self.decode = nn.Linear(N_LATENT, N_GENES)
            self.log_theta = nn.Parameter(torch.zeros(N_GENES))
        self.calls: list[None] = []

    def seen(self, counts: torch.Tensor) -> torch.Tensor:
        return log1p_counts(counts)

    def model(self, cells: Any) -> None:
        with pyro.plate("cells", cells.n_total, subsample=cells.rows, dim=-1):
            z = pyro.sample("z", Normal(torch.zeros(N_LATENT), 1.0).to_event(1))
            log_mean = self.decode(z).log_softmax(-1) + cells.library.log()
            counts = NegativeBinomial(log_mean=log_mean, log_theta=self.log_theta).to_event(1)
            pyro.sample("x", counts, obs=cells.counts)

    def guide(self, cells: Any) -> None:
        self.calls.append(None)
        with pyro.plate("cells", cells.n_total, subsample=cells.rows, dim=-1):
            hidden = self.hidden(linear(self.seen(cells.counts), self.weight, self.bias))
            pyro.sample("z", Normal(self.location(hidden), 0.5).to_event(1))


def counts() -> np.ndarray:
    return np.random.default_rng(5).poisson(0.1, (N_CELLS, N_GENES)) + np.eye(N_CELLS, N_GENES, dtype=int)


def cells_of(rows: np.ndarray) -> Cells:
    chosen = counts()[rows].astype(np.float32)
    there = np.nonzero(chosen)
    index = NonZeros.of_entries(*there, chosen[there], n_rows=len(rows), n_columns=N_GENES)
    library = torch.from_numpy(chosen.sum(1, keepdims=True) + 1.0)
    return Cells({"counts": index, "library": library}, torch.from_numpy(rows), N_CELLS)


def minibatches(rng: np.random.Generator | None) -> Iterator[Cells]:
    order = np.arange(N_CELLS) if rng is None else rng.permutation(N_CELLS)
    for start in range(0, N_CELLS, 20):
        yield cells_of(order[start : start + 20])
