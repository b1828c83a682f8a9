"""Small models with known answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro.distributions import Normal
from torch import nn


@dataclass
class ToyCells:
    """The least that the engine asks of a minibatch."""

    x: torch.Tensor
    rows: torch.Tensor
    n_total: int

    def __len__(self) -> int:
        return len(self.rows)

    def load(self) -> ToyCells:
        return self

    def replace(self, **changes: Any) -> ToyCells:
        return replace(self, **changes)


def toy_cells(x: torch.Tensor, rows: Any = None) -> ToyCells:
    rows = torch.arange(len(x)) if rows is None else torch.as_tensor(rows)
    return ToyCells(x[rows], rows, len(x))


def plate(cells: ToyCells) -> pyro.plate:
    return pyro.plate("cells", cells.n_total, subsample=cells.rows, dim=-1)


def toy_minibatches(x: torch.Tensor, size: int) -> Any:
    def one_epoch(rng: np.random.Generator | None) -> Iterator[ToyCells]:
        order = np.arange(len(x)) if rng is None else rng.permutation(len(x))
        for start in range(0, len(x), size):
            yield toy_cells(x, order[start : start + size])

    return one_epoch


class Conjugate(nn.Module):
    """z ~ Normal(mu, 1), x ~ Normal(z, 1): p(x) = Normal(mu, sqrt 2), p(z | x) = Normal((x + mu) / 2, sqrt 1/2)."""

    def __init__(self, mu: float = 0.0, *, exact: bool = True) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(mu))
        self.slope = nn.Parameter(torch.tensor(0.5 if exact else 0.0))
        self.shift = nn.Parameter(torch.tensor(mu / 2 if exact else 0.0))
        self.log_sd = nn.Parameter(torch.tensor(0.5).log() / 2)

    def model(self, cells: ToyCells) -> None:
        with plate(cells):
            z = pyro.sample("z", Normal(self.mu.expand(len(cells)), 1.0))
            pyro.sample("x", Normal(z, 1.0), obs=cells.x)

    def guide(self, cells: ToyCells) -> None:
        with plate(cells):
            pyro.sample("z", Normal(self.slope * cells.x + self.shift, self.log_sd.exp()))

    def log_evidence(self, x: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(self.mu, 2**0.5).log_prob(x)
