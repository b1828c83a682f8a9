"""The four count families behind one face, and the test matrix of the specification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrocell.distributions import (
    CountDistribution,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
    ZeroInflatedPoisson,
)
from tests.distributions import references


@dataclass(frozen=True)
class Case:
    make: type[CountDistribution]
    names: tuple[str, ...]
    dense: Callable[..., Tensor]

    def build(self, parameters: list[Tensor]) -> CountDistribution:
        return self.make(**dict(zip(self.names, parameters, strict=True)))


CASES = {
    "nb": Case(NegativeBinomial, ("log_mean", "log_theta"), references.dense_nb),
    "zinb": Case(ZeroInflatedNegativeBinomial, ("log_mean", "log_theta", "zi_logits"), references.dense_zinb),
    "poisson": Case(Poisson, ("log_rate",), references.dense_poisson),
    "zip": Case(ZeroInflatedPoisson, ("log_rate", "zi_logits"), references.dense_zip),
}

N_CELLS, N_GENES = 64, 200


def sparse_counts(dtype: torch.dtype = torch.float32) -> Tensor:
    """64 x 200 at 5 % density, small and large counts, one row of zeros, one row with a count of 5000."""
    generator = torch.Generator().manual_seed(7)
    counts = torch.randint(1, 13, (N_CELLS, N_GENES), generator=generator)
    counts *= torch.rand((N_CELLS, N_GENES), generator=generator) < 0.05
    counts[3] = 0
    counts[5, 17] = 5000
    return counts.to(dtype)


def parameters_of(case: Case, dtype: torch.dtype, theta_shape: tuple[int, ...] = (N_GENES,)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    shapes = {"log_theta": theta_shape}
    return [draw(*shapes.get(name, (N_CELLS, N_GENES))) for name in case.names]
