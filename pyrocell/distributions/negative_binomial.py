"""Negative binomial counts, and the same with extra zeros."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size

from pyrocell.distributions import kernels
from pyrocell.distributions.base import (
    CountDistribution,
    as_log,
    as_reals,
    exactly_one,
    poisson_draw,
    standard_gamma,
)
from pyrocell.distributions.kernels import Family
from pyrocell.distributions.softmax_mean import SoftmaxMean

__all__ = ["NegativeBinomial", "ZeroInflatedNegativeBinomial"]

_MEAN_CEILING = 1e30


class NegativeBinomial(CountDistribution):
    """Counts with mean ``mean`` and variance ``mean + mean^2 / theta``.

    w ~ Gamma(theta, rate theta / mean), x | w ~ Poisson(w).

    Give one of the two parameters of each kind: (``mean`` or ``log_mean``) and (``theta`` or
    ``log_theta``); or ``total_count`` (another name of theta) with ``logits`` = log mean - log theta. The
    logarithms are what the likelihood uses: given directly, they save two passes over the minibatch.

    log theta is held in [-16, 20] and log(mean / theta) within 40 of zero, gradients passing straight through:
    inverse dispersions between 1.1e-7 and 4.8e8 are exact, and beyond the upper end the distribution is
    Poisson for any count that can be measured.

    Parameters
    ----------
    mean, theta : Tensor or float, optional
        Mean in counts (0 allowed) and inverse dispersion, positive. Shapes broadcast; a theta of shape
        (n_genes,) stays so.
    log_mean, log_theta : Tensor or float, optional
        Their natural logarithms; that of the mean may be a :class:`SoftmaxMean`.
    total_count, logits : Tensor or float, optional
        The other parameterisation, as in torch.
    validate_args : bool, optional
        Check parameters and counts (off unless True: the checks cost as much as the likelihood).

    Raises
    ------
    ValueError
        If a parameter is given twice or not at all; with ``validate_args``, on NaN and on values that
        are not counts.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "log_mean": constraints.real,
        "log_theta": constraints.real,
    }
    parameter_names: ClassVar[tuple[str, ...]] = ("log_mean", "log_theta")
    family: ClassVar[Family] = kernels.negative_binomial
    log_theta: Tensor
    _mean: Tensor | None

    def __init__(
        self,
        mean: Tensor | float | None = None,
        theta: Tensor | float | None = None,
        *,
        log_mean: Tensor | float | SoftmaxMean | None = None,
        log_theta: Tensor | float | None = None,
        total_count: Tensor | float | None = None,
        logits: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        exactly_one(self, {"mean": mean, "log_mean": log_mean, "logits": logits})
        exactly_one(self, {"theta": theta, "log_theta": log_theta, "total_count": total_count})
        theta = total_count if theta is None else theta
        values = as_reals(mean, theta, log_mean, log_theta, logits)
        self._set_parameters(self._to_logs(*values), validate_args=validate_args)

    def _to_logs(
        self,
        mean: Tensor | None,
        theta: Tensor | None,
        log_mean: Tensor | SoftmaxMean | None,
        log_theta: Tensor | None,
        logits: Tensor | None,
    ) -> tuple[Tensor | SoftmaxMean, Tensor]:
        self._mean = mean  # kept: a mean of exactly 0 has no logarithm
        if log_theta is None:
            assert theta is not None
            log_theta = as_log(theta)
        if mean is not None:
            log_mean = as_log(mean)
        elif log_mean is None:
            assert logits is not None
            log_mean = logits + log_theta
        return log_mean, log_theta

    @cached_property
    def log_mean(self) -> Tensor:
        """Natural logarithm of the mean, before any zero inflation."""
        return self._log_mean_of_softmax()

    @property
    def theta(self) -> Tensor:
        """Inverse dispersion, as the likelihood uses it (held in range)."""
        return self.log_theta.clamp(*kernels.LOG_THETA_RANGE).exp()

    @property
    def count_mean(self) -> Tensor:
        """Mean of the negative binomial itself, before any zero inflation."""
        mean = self.log_mean.exp() if self._mean is None else self._mean
        return mean.expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """Expected counts."""
        return self.count_mean

    @property
    def variance(self) -> Tensor:
        """Variance of the counts."""
        mean = self.count_mean
        return mean + mean.square() / self.theta

    @torch.no_grad()
    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw counts: a gamma rate, lowered to 1e8, then Poisson; a mean of 0 gives 0."""
        shape = self._extended_shape(sample_shape)
        theta = self.theta.expand(shape)
        scale = self.count_mean.clamp(max=_MEAN_CEILING) / theta
        return poisson_draw(standard_gamma(theta) * scale)

    def _natural_parameters(self) -> dict[str, Tensor]:
        return {"mean": self.count_mean, "theta": self.theta}


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """Zero with probability sigmoid(``zi_logits``), else negative binomial.

    Positive ``zi_logits`` mean "probably dropped out". The mean and variance are those of the mixture;
    ``count_mean`` is the mean of the negative binomial alone.

    Parameters
    ----------
    mean, theta, log_mean, log_theta, total_count, logits : Tensor or float, optional
        As in :class:`NegativeBinomial`.
    zi_logits : Tensor or float
        Logit of the probability of an extra zero; broadcasts with the others.
    validate_args : bool, optional
        Check parameters and counts.

    Raises
    ------
    ValueError
        As in :class:`NegativeBinomial`.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        **NegativeBinomial.arg_constraints,
        "zi_logits": constraints.real,
    }
    parameter_names: ClassVar[tuple[str, ...]] = ("log_mean", "log_theta", "zi_logits")
    family: ClassVar[Family] = kernels.zero_inflated(kernels.negative_binomial)
    zi_logits: Tensor

    def __init__(
        self,
        mean: Tensor | float | None = None,
        theta: Tensor | float | None = None,
        *,
        zi_logits: Tensor | float,
        log_mean: Tensor | float | SoftmaxMean | None = None,
        log_theta: Tensor | float | None = None,
        total_count: Tensor | float | None = None,
        logits: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        exactly_one(self, {"mean": mean, "log_mean": log_mean, "logits": logits})
        exactly_one(self, {"theta": theta, "log_theta": log_theta, "total_count": total_count})
        theta = total_count if theta is None else theta
        *values, zi = as_reals(mean, theta, log_mean, log_theta, logits, zi_logits)
        assert zi is not None
        self._set_parameters((*self._to_logs(*values), zi), validate_args=validate_args)

    @property
    def zi_probs(self) -> Tensor:
        """Probability of an extra zero."""
        return torch.sigmoid(self.zi_logits)

    @property
    def mean(self) -> Tensor:
        """Expected counts of the mixture."""
        return torch.sigmoid(-self.zi_logits) * self.count_mean

    @property
    def variance(self) -> Tensor:
        """Variance of the counts of the mixture."""
        mean = self.count_mean
        return self.mean * (1.0 + mean * (self.zi_probs + 1.0 / self.theta))

    @torch.no_grad()
    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw counts: negative binomial draws, each kept with probability 1 - zi_probs."""
        counts = super().sample(sample_shape)
        return counts * torch.bernoulli(torch.sigmoid(-self.zi_logits).expand(counts.shape))

    def _natural_parameters(self) -> dict[str, Tensor]:
        return {**super()._natural_parameters(), "zi_probs": self.zi_probs}
