"""Poisson counts, and the same with extra zeros."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size

from pyrocell.distributions import kernels
from pyrocell.distributions.base import CountDistribution, as_log, as_reals, exactly_one, poisson_draw
from pyrocell.distributions.kernels import Family
from pyrocell.distributions.softmax_mean import SoftmaxMean

__all__ = ["Poisson", "ZeroInflatedPoisson"]


class Poisson(CountDistribution):
    """Counts whose mean and variance are ``rate``.

    Parameters
    ----------
    rate : Tensor or float, optional
        Expected counts (0 allowed).
    log_rate : Tensor, float or SoftmaxMean, optional
        Its natural logarithm, instead: saves a pass over the minibatch.
    validate_args : bool, optional
        Check parameters and counts (off unless True).

    Raises
    ------
    ValueError
        If both or neither are given; with ``validate_args``, on NaN and on values that are not counts.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"log_rate": constraints.real}
    parameter_names: ClassVar[tuple[str, ...]] = ("log_rate",)
    family: ClassVar[Family] = kernels.poisson
    _rate: Tensor | None

    def __init__(
        self,
        rate: Tensor | float | None = None,
        *,
        log_rate: Tensor | float | SoftmaxMean | None = None,
        validate_args: bool | None = None,
    ) -> None:
        exactly_one(self, {"rate": rate, "log_rate": log_rate})
        self._set_parameters((self._to_log(*as_reals(rate, log_rate)),), validate_args=validate_args)

    def _to_log(self, rate: Tensor | None, log_rate: Tensor | SoftmaxMean | None) -> Tensor | SoftmaxMean:
        self._rate = rate  # kept: a rate of exactly 0 has no logarithm
        if rate is not None:
            return as_log(rate)
        assert log_rate is not None
        return log_rate

    @cached_property
    def log_rate(self) -> Tensor:
        """Natural logarithm of the rate, before any zero inflation."""
        return self._log_mean_of_softmax()

    @property
    def rate(self) -> Tensor:
        """Expected counts of the Poisson itself, before any zero inflation."""
        rate = self.log_rate.exp() if self._rate is None else self._rate
        return rate.expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """Expected counts."""
        return self.rate

    @property
    def variance(self) -> Tensor:
        """Variance of the counts."""
        return self.rate

    @torch.no_grad()
    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw counts; rates are lowered to 1e8."""
        return poisson_draw(self.rate.expand(self._extended_shape(sample_shape)))

    def _natural_parameters(self) -> dict[str, Tensor]:
        return {"mean": self.rate}


class ZeroInflatedPoisson(Poisson):
    """Zero with probability sigmoid(``zi_logits``), else Poisson.

    Parameters
    ----------
    rate, log_rate : Tensor or float, optional
        As in :class:`Poisson`.
    zi_logits : Tensor or float
        Logit of the probability of an extra zero; broadcasts with the rate.
    validate_args : bool, optional
        Check parameters and counts.

    Raises
    ------
    ValueError
        As in :class:`Poisson`.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "log_rate": constraints.real,
        "zi_logits": constraints.real,
    }
    parameter_names: ClassVar[tuple[str, ...]] = ("log_rate", "zi_logits")
    family: ClassVar[Family] = kernels.zero_inflated(kernels.poisson)
    zi_logits: Tensor

    def __init__(
        self,
        rate: Tensor | float | None = None,
        *,
        zi_logits: Tensor | float,
        log_rate: Tensor | float | SoftmaxMean | None = None,
        validate_args: bool | None = None,
    ) -> None:
        exactly_one(self, {"rate": rate, "log_rate": log_rate})
        *rates, zi = as_reals(rate, log_rate, zi_logits)
        assert zi is not None
        self._set_parameters((self._to_log(*rates), zi), validate_args=validate_args)

    @property
    def zi_probs(self) -> Tensor:
        """Probability of an extra zero."""
        return torch.sigmoid(self.zi_logits)

    @property
    def mean(self) -> Tensor:
        """Expected counts of the mixture."""
        return torch.sigmoid(-self.zi_logits) * self.rate

    @property
    def variance(self) -> Tensor:
        """Variance of the counts of the mixture."""
        return self.mean * (1.0 + self.rate * self.zi_probs)

    @torch.no_grad()
    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw counts: Poisson draws, each kept with probability 1 - zi_probs."""
        counts = super().sample(sample_shape)
        return counts * torch.bernoulli(torch.sigmoid(-self.zi_logits).expand(counts.shape))

    def _natural_parameters(self) -> dict[str, Tensor]:
        return {**super()._natural_parameters(), "zi_probs": self.zi_probs}
