"""A mixture of a few normals whose parts come as a sequence, each of a shape of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size

from pyrocell.distributions.shapes import broadcast

__all__ = ["NormalMixture"]

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


class NormalMixture(TorchDistribution):
    """Normal mixture; each component keeps the shape it was given with, such as one mean for all cells.

    Parameters
    ----------
    log_weights : sequence of Tensor
        Log of the weight of each component; the weights sum to one.
    means, sds : sequence of Tensor
        Mean and standard deviation of each component. All tensors broadcast to the batch shape.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real
    has_rsample = False

    def __init__(self, log_weights: Sequence[Tensor], means: Sequence[Tensor], sds: Sequence[Tensor]) -> None:
        self.log_weights, self.means, self.sds = list(log_weights), list(means), list(sds)
        self._scored: tuple[Tensor, Tensor] | None = None
        shape = broadcast(*(part.shape for part in [*self.log_weights, *self.means, *self.sds]))
        super().__init__(shape, validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Any:
        """Give the same distribution over a larger batch; no parameter is copied."""
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        new._batch_shape = torch.empty(()).expand(self.batch_shape).expand(torch.Size(batch_shape)).shape
        return new

    def scores(self, value: Tensor) -> Tensor:
        """Compute log weight plus log density of each component, components first."""
        if self._scored is None or self._scored[0] is not value:
            self._scored = value, self._score(value)
        return self._scored[1]

    def _score(self, value: Tensor) -> Tensor:
        shape = broadcast(self.batch_shape, value.shape)
        parts = [
            (log_weight - sd.log() - 0.5 * ((value - mean) / sd).square()).expand(shape)
            for log_weight, mean, sd in zip(self.log_weights, self.means, self.sds, strict=True)
        ]
        return torch.stack(parts) - _HALF_LOG_TWO_PI

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute the log density."""
        return self.scores(value).logsumexp(0)

    def log_weights_given(self, value: Tensor) -> list[Tensor]:
        """Compute the log of each component's posterior weight, given a value of the mixture."""
        scores = self.scores(value)
        return list((scores - scores.logsumexp(0)).unbind(0))

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture."""
        parts = zip(self.log_weights, self.means, strict=True)
        return sum((weight.exp() * mean for weight, mean in parts), torch.zeros(())).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Variance of the mixture."""
        parts = zip(self.log_weights, self.means, self.sds, strict=True)
        squares = [w.exp() * (sd.square() + (mean - self.mean).square()) for w, mean, sd in parts]
        return sum(squares, torch.zeros(())).expand(self.batch_shape)

    @torch.no_grad()
    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw a component for each entry, and a value from it."""
        shape = self._extended_shape(sample_shape)
        weights = torch.stack([part.expand(shape) for part in self.log_weights]).exp()
        below = torch.rand(shape, device=weights.device) * weights.sum(0) > weights.cumsum(0)[:-1]
        component = below.sum(0, keepdim=True)
        mean, sd = (
            torch.stack([part.expand(shape) for part in parts]).gather(0, component)[0]
            for parts in (self.means, self.sds)
        )
        return mean + sd * torch.randn_like(mean)
