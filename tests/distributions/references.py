"""High-precision references for the likelihoods of counts, and the formulas that the fast path must reproduce."""

from __future__ import annotations

import mpmath as mp
import torch
from torch import Tensor

mp.mp.dps = 80


def log_nb(x: float, mean: mp.mpf, theta: mp.mpf) -> mp.mpf:
    gammas = mp.loggamma(x + theta) - mp.loggamma(theta) - mp.loggamma(mp.mpf(x) + 1)
    share = x * mp.log(mean / (mean + theta)) if x else mp.mpf(0)
    return gammas - theta * mp.log1p(mean / theta) + share


def log_poisson(x: float, rate: mp.mpf) -> mp.mpf:
    return x * mp.log(rate) - rate - mp.loggamma(mp.mpf(x) + 1)


def inflate(x: float, log_p: mp.mpf, zi_logit: float) -> mp.mpf:
    zi = 1 / (1 + mp.exp(-mp.mpf(zi_logit)))
    return mp.log(zi + (1 - zi) * mp.exp(log_p)) if x == 0 else mp.log(1 - zi) + log_p


def log_beta_binomial(k: float, n: float, alpha: mp.mpf, beta: mp.mpf) -> mp.mpf:
    def log_beta(a: mp.mpf, b: mp.mpf) -> mp.mpf:
        return mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)

    return mp.log(mp.binomial(n, k)) + log_beta(k + alpha, n - k + beta) - log_beta(alpha, beta)


def worst_relative_error(got: Tensor, expected: list[mp.mpf]) -> float:
    pairs = zip(got.tolist(), expected, strict=True)
    return max(float(abs((mp.mpf(value) - reference) / reference)) for value, reference in pairs)


def exactly(x: Tensor) -> list[mp.mpf]:
    """Read floats as the exact numbers that they are."""
    return [mp.mpf(value) for value in x.tolist()]


def dense_nb(x: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    """Spec (1.2) with gamma functions everywhere, differentiable by autograd."""
    theta, ratio = log_theta.exp(), log_mean - log_theta
    gammas = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return gammas - theta * _softplus(ratio) - x * _softplus(-ratio)


def dense_zinb(x: Tensor, log_mean: Tensor, log_theta: Tensor, zi_logits: Tensor) -> Tensor:
    return _inflate(x, dense_nb(x, log_mean, log_theta), zi_logits)


def dense_poisson(x: Tensor, log_rate: Tensor) -> Tensor:
    return x * log_rate - log_rate.exp() - torch.lgamma(x + 1)


def dense_zip(x: Tensor, log_rate: Tensor, zi_logits: Tensor) -> Tensor:
    return _inflate(x, dense_poisson(x, log_rate), zi_logits)


def _inflate(x: Tensor, log_p: Tensor, zi_logits: Tensor) -> Tensor:
    zero = _softplus(log_p - zi_logits) - _softplus(-zi_logits)
    return torch.where(x == 0, zero, log_p - _softplus(zi_logits))


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))
