"""The standard normal prior of a latent vector."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.kl import register_kl

from pyrocell.distributions.shapes import broadcast

__all__ = ["StandardNormal"]

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


class _UnitNormal(dist.Normal):
    """Normal(0, 1) that never touches its location and scale, so that it scores values of any device."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        shape = broadcast(self.batch_shape, value.shape)
        return (-0.5 * value.square() - _HALF_LOG_TWO_PI).expand(shape)


def StandardNormal(n: int, *, device: torch.device | str | None = None) -> Any:
    """Give Normal(0, 1) for a vector of ``n`` independent values: the prior of a latent vector.

    Values of any device can be scored, and divergences from a Normal of any device taken; ``device`` only
    says where prior draws are made.

    Parameters
    ----------
    n : int
        Length of the vector.
    device : torch.device or str, optional
        Where draws are made; torch's default device otherwise.
    """
    zero, one = torch.zeros((), device=device), torch.ones((), device=device)
    return _UnitNormal(zero, one, validate_args=False).expand([n]).to_event(1)


@register_kl(torch.distributions.Normal, _UnitNormal)
def _kl_normal_unit(p: Any, q: Any) -> Tensor:
    variance = p.scale.square()
    kl = 0.5 * (variance + p.loc.square() - 1.0) - p.scale.log()
    return kl.expand(broadcast(p.batch_shape, q.batch_shape))
