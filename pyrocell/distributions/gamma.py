"""log Gamma(x + theta) - log Gamma(theta), and its slope in theta, without cancellation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyrocell.distributions.counts import working_dtype

__all__ = ["large_log_rising", "log_rising", "log_rising_change", "rising_and_slope"]

_SHIFT = 8
# Stirling's series at z >= 8, highest power first: the first term left out is below 1e-11.
_LGAMMA_TAIL = (-1 / 1680, 1 / 1260, -1 / 360, 1 / 12)  # in 1/z, 1/z^3, ...
_DIGAMMA_TAIL = (-1 / 240, 1 / 252, -1 / 120, 1 / 12)  # in 1/z^2, 1/z^4, ...


def log_rising(counts: Tensor, theta: Tensor) -> Tensor:
    """Compute log[theta (theta + 1) ... (theta + x - 1)] = log Gamma(x + theta) - log Gamma(theta).

    Accurate for any theta > 0, however large: nothing cancels. Differentiable in ``theta``.

    Parameters
    ----------
    counts : Tensor
        x >= 0, whole or not.
    theta : Tensor
        Positive; broadcasts with ``counts``.

    Returns
    -------
    Tensor
        In the dtype of ``theta``; computed in float64 where the device has it.
    """
    result: Tensor = _LogRising.apply(counts, theta)
    return result


class _LogRising(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, counts: Tensor, theta: Tensor) -> Tensor:
        dtype = working_dtype(theta.device)
        value, slope = rising_and_slope(counts.to(dtype), theta.to(dtype))
        ctx.save_for_backward(slope)
        ctx.theta_shape, ctx.theta_dtype = theta.shape, theta.dtype
        return value.to(theta.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (slope,) = ctx.saved_tensors
        return None, (slope * grad).sum_to_size(ctx.theta_shape).to(ctx.theta_dtype)


def rising_and_slope(counts: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the logarithm of the rising factorial and its derivative in theta, for any counts >= 0.

    The first eight factors are taken as they are; from z = theta + 8 on, Stirling's series is
    differenced by hand, so that large terms never meet.
    """
    value, slope = _first_factors(counts, theta)
    low = theta + _SHIFT
    high = low + counts
    growth = torch.log1p(counts / low)
    lgamma_tail, digamma_tail = _tails(low, high)
    value.add_((low - 0.5) * growth).add_(counts * (high.log() - 1.0)).add_(lgamma_tail)
    slope.add_(growth).add_(0.5 * counts / (low * high)).sub_(digamma_tail)
    return value, slope


def _first_factors(counts: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    steps = torch.arange(_SHIFT, dtype=theta.dtype, device=theta.device)
    low = theta.unsqueeze(-1) + steps
    high = low + counts.unsqueeze(-1)
    slope = (counts.unsqueeze(-1) / (low * high)).sum(-1)
    # the ratio of all eight may underflow in float32: the logarithm is taken of two halves
    halves = (low / high).unflatten(-1, (2, _SHIFT // 2)).prod(-1)
    return halves.log_().sum(-1), slope


def _tails(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the tails of Stirling's series for lgamma and digamma at ``high`` minus at ``low``."""
    inverse = torch.stack(torch.broadcast_tensors(high, low)).reciprocal_()
    square = inverse.square()
    lgamma_high, lgamma_low = _polynomial(square, _LGAMMA_TAIL).mul_(inverse)
    digamma_high, digamma_low = _polynomial(square, _DIGAMMA_TAIL).mul_(square)
    return lgamma_high - lgamma_low, digamma_high - digamma_low


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    result = x * coefficients[0]
    for coefficient in coefficients[1:-1]:
        result.add_(coefficient).mul_(x)
    return result.add_(coefficients[-1])


def log_rising_change(counts: Tensor, theta: Tensor, by: Tensor) -> Tensor:
    """Compute log_rising(counts, theta) - log_rising(counts, theta + by), to all digits however small it is.

    It is the log-probability that ``counts`` trials all fail, and the two terms are equal to the last digit where that
    is all but sure. So every difference is taken inside of a log1p; ``counts`` and ``by`` may change places.

    Parameters
    ----------
    counts, by : Tensor
        At least 0.
    theta : Tensor
        Positive.

    Returns
    -------
    Tensor
        Not above 0, in the dtype of the arguments; differentiable in all three.
    """
    steps = torch.arange(_SHIFT, dtype=theta.dtype, device=theta.device)
    product = counts * by
    low = theta.unsqueeze(-1) + steps
    first = -product.unsqueeze(-1) / ((low + by.unsqueeze(-1)) * (low + counts.unsqueeze(-1)))
    z = theta + _SHIFT
    both = z + counts + by
    rest = (z - 0.5) * torch.log1p(product / (z * both)) - by * torch.log1p(counts / (z + by))
    rest = rest + counts * torch.log1p(-by / both)
    tails = _tail(z + counts) - _tail(z) + _tail(z + by) - _tail(both)
    return torch.log1p(first).sum(-1) + rest + tails


def _tail(z: Tensor) -> Tensor:
    """Compute the tail of Stirling's series for lgamma."""
    inverse = z.reciprocal()
    square, total = inverse * inverse, torch.zeros_like(z)
    for coefficient in _LGAMMA_TAIL:
        total = total * square + coefficient
    return total * inverse


def large_log_rising(counts: Tensor, theta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute the same as :func:`rising_and_slope`, to the digits that a result in ``dtype`` can keep.

    For results in float32, float64 gamma functions have digits to spare, in a tenth of the operations.
    """
    if dtype == theta.dtype:
        return rising_and_slope(counts, theta)
    high = counts + theta
    return torch.lgamma(high) - torch.lgamma(theta), torch.digamma(high) - torch.digamma(theta)
