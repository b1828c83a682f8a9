"""Counts that are either background or signal: a mixture of two negative binomials."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional
from torch.types import _size

from pyrocell.distributions.base import (
    CountDistribution,
    as_log,
    as_reals,
    exactly_one,
    poisson_draw,
    standard_gamma,
)
from pyrocell.distributions.counts import working_dtype
from pyrocell.distributions.gamma import log_rising
from pyrocell.distributions.kernels import LOG_THETA_RANGE
from pyrocell.distributions.shapes import broadcast

__all__ = ["NegativeBinomialMixture"]

_MEAN_CEILING = 1e30


class NegativeBinomialMixture(CountDistribution):
    """Background with probability sigmoid(``background_logits``), else foreground; both negative binomial.

    Counts of antibodies: every cell binds some unspecifically (background), and cells that have the protein bind
    more (foreground). The two components share the inverse dispersion theta, so that both need one evaluation of the
    gamma functions. Which component is the higher one is for the model to say: a decoder should give
    ``log_foreground = log_background + something positive``.

    Everything is computed in float64 where the device has it: panels have tens of proteins, not thousands.
    log theta is held in [-16, 20], gradients passing straight through.

    Parameters
    ----------
    background, foreground, theta : Tensor or float, optional
        Means of the components in counts, and inverse dispersion; shapes broadcast.
    log_background, log_foreground, log_theta : Tensor or float, optional
        Their natural logarithms, instead.
    background_logits : Tensor or float
        Logit of the probability that a count is background.
    validate_args : bool, optional
        Check parameters and counts (off unless True).

    Raises
    ------
    ValueError
        If a parameter is given twice or not at all; with ``validate_args``, on NaN and on values that are not counts.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "log_background": constraints.real,
        "log_foreground": constraints.real,
        "log_theta": constraints.real,
        "background_logits": constraints.real,
    }
    parameter_names: ClassVar[tuple[str, ...]] = (
        "log_background",
        "log_foreground",
        "log_theta",
        "background_logits",
    )
    log_background: Tensor
    log_foreground: Tensor
    log_theta: Tensor
    background_logits: Tensor

    def __init__(
        self,
        background: Tensor | float | None = None,
        foreground: Tensor | float | None = None,
        theta: Tensor | float | None = None,
        *,
        background_logits: Tensor | float,
        log_background: Tensor | float | None = None,
        log_foreground: Tensor | float | None = None,
        log_theta: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        natural = {"background": background, "foreground": foreground, "theta": theta}
        logs = {"background": log_background, "foreground": log_foreground, "theta": log_theta}
        for name in natural:
            exactly_one(self, {name: natural[name], f"log_{name}": logs[name]})
        *values, logits = as_reals(*natural.values(), *logs.values(), background_logits)
        assert logits is not None
        parameters = [_log_of(*pair) for pair in zip(values[:3], values[3:], strict=True)]
        self._set_parameters([*parameters, logits], validate_args=validate_args)

    @property
    def theta(self) -> Tensor:
        """Inverse dispersion, as the likelihood uses it (held in range)."""
        return self.log_theta.clamp(*LOG_THETA_RANGE).exp()

    @property
    def background_probability(self) -> Tensor:
        """Probability of the background component, before the count is seen."""
        return torch.sigmoid(self.background_logits).expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """Expected counts of the mixture."""
        background, foreground = self.log_background.exp(), self.log_foreground.exp()
        return self.background_probability * background + self._foreground_probability * foreground

    @property
    def variance(self) -> Tensor:
        """Variance of the counts of the mixture."""
        means = self.log_background.exp(), self.log_foreground.exp()
        weights = self.background_probability, self._foreground_probability
        within: Tensor = sum(w * (m + m.square() / self.theta) for w, m in zip(weights, means, strict=True))  # type: ignore[assignment]
        return within + weights[0] * weights[1] * (means[1] - means[0]).square()

    @property
    def _foreground_probability(self) -> Tensor:
        return torch.sigmoid(-self.background_logits).expand(self.batch_shape)  # 1 - sigmoid loses digits

    def foreground_responsibility(self, value: Tensor) -> Tensor:
        """Return the probability that a count is foreground, given the count itself.

        Parameters
        ----------
        value : Tensor
            Counts; broadcasts with the batch.
        """
        background, foreground = self._components(value)
        return torch.sigmoid(foreground - background).to(self.log_background.dtype)

    def _score(self, value: Tensor, *, sum_last: bool) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        background, foreground = self._components(value)
        counts, theta = value.to(background.dtype), _held(self._working(self.log_theta)).exp()
        gammas = log_rising(counts, theta) - torch.lgamma(counts + 1.0)
        log_prob = (gammas + torch.logaddexp(background, foreground)).to(self.log_background.dtype)
        log_prob = log_prob.expand(broadcast(self.batch_shape, value.shape))
        return log_prob.sum(-1) if sum_last else log_prob

    def _components(self, value: Tensor) -> list[Tensor]:
        """Log of weight times probability of each component, without the gamma functions that they share."""
        phi, logits = _held(self._working(self.log_theta)), self._working(self.background_logits)
        counts, theta = value.to(phi.dtype), phi.exp()
        parts = []
        for log_mean, logit in ((self.log_background, logits), (self.log_foreground, -logits)):
            ratio = self._working(log_mean) - phi
            kernel = -theta * _softplus(ratio) - counts * _softplus(-ratio)
            parts.append(functional.logsigmoid(logit) + kernel)
        return parts

    def _working(self, parameter: Tensor) -> Tensor:
        return parameter.to(working_dtype(parameter.device))

    @torch.no_grad()
    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw counts: a component for each entry, a gamma rate, lowered to 1e8, then Poisson."""
        shape = self._extended_shape(sample_shape)
        is_background = torch.bernoulli(self.background_probability.expand(shape)).bool()
        log_mean = torch.where(is_background, self.log_background, self.log_foreground)
        theta = self.theta.expand(shape)
        return poisson_draw(standard_gamma(theta) * (log_mean.exp().clamp(max=_MEAN_CEILING) / theta))

    def _natural_parameters(self) -> dict[str, Tensor]:
        return {
            "mean": self.mean,
            "theta": self.theta,
            "background": self.log_background.exp(),
            "foreground": self.log_foreground.exp(),
            "background_probability": self.background_probability,
        }


def _log_of(natural: Tensor | None, log: Tensor | None) -> Tensor:
    if log is not None:
        return log
    assert natural is not None
    return as_log(natural)


def _held(log_theta: Tensor) -> Tensor:
    """Hold log theta in range, gradients passing straight through."""
    return log_theta + (log_theta.clamp(*LOG_THETA_RANGE) - log_theta).detach()


def _softplus(x: Tensor) -> Tensor:
    # torch's own softplus is the identity above 20, which is good for float32 only
    return torch.logaddexp(x, torch.zeros_like(x))
