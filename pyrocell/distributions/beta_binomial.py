"""Beta-binomial counts of successes among a known number of trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size

from pyrocell.distributions.base import as_reals, binomial_draw, exactly_one, log_gamma_draw
from pyrocell.distributions.counts import working_dtype
from pyrocell.distributions.gamma import log_rising, log_rising_change
from pyrocell.distributions.shapes import broadcast

__all__ = ["BetaBinomial"]

_SHAPE_FLOOR = 1e-8
_DISPERSION_RANGE = (1e-10, 1.0 - 1e-6)


class BetaBinomial(TorchDistribution):
    """Successes among ``total_count`` trials whose success probability is Beta(alpha, beta).

    p ~ Beta(alpha, beta), k | p ~ Binomial(total_count, p). With ``mean`` m and ``dispersion`` g in (0, 1):
    alpha = m (1 - g) / g, beta = (1 - m) (1 - g) / g, and the variance is n m (1 - m) [1 + (n - 1) g].

    The ratio of beta functions is a difference of rising factorials, so that nothing cancels as the
    dispersion tends to 0; alpha and beta are raised to 1e-8, the dispersion is held in [1e-10, 1 - 1e-6].
    Entries without trials contribute exactly 0, whatever the parameters.

    Parameters
    ----------
    total_count : Tensor or int
        Number of trials, whole, >= 0.
    alpha, beta : Tensor or float, optional
        Positive shapes.
    mean, dispersion : Tensor or float, optional
        Success probability and overdispersion, instead.
    validate_args : bool, optional
        Check parameters and counts (off unless True).

    Raises
    ------
    ValueError
        If parameters are given twice or not at all.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "total_count": constraints.nonnegative_integer,
        "alpha": constraints.positive,
        "beta": constraints.positive,
    }
    has_rsample = False
    _validate_args = False

    def __init__(
        self,
        total_count: Tensor | int,
        alpha: Tensor | float | None = None,
        beta: Tensor | float | None = None,
        *,
        mean: Tensor | float | None = None,
        dispersion: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        exactly_one(self, {"alpha": alpha, "mean": mean})
        exactly_one(self, {"beta": beta, "dispersion": dispersion})
        if (alpha is None) != (beta is None):
            raise ValueError(
                "BetaBinomial mixes parameterisations; give alpha and beta, or mean and dispersion"
            )
        alpha, beta, mean, dispersion = as_reals(alpha, beta, mean, dispersion)
        if mean is not None and dispersion is not None:
            alpha, beta = _shapes(mean, dispersion)
        assert alpha is not None
        assert beta is not None
        self.alpha, self.beta = alpha.clamp(min=_SHAPE_FLOOR), beta.clamp(min=_SHAPE_FLOOR)
        self.total_count = torch.as_tensor(total_count, device=(alpha + beta).device)
        shape = broadcast(self.total_count.shape, alpha.shape, beta.shape)
        super().__init__(shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Any:
        """Give the same distribution over a larger batch; no parameter is copied."""
        new = self._get_checked_instance(type(self), _instance)
        shape = torch.empty(()).expand(self.batch_shape).expand(torch.Size(batch_shape)).shape
        new.__dict__.update(self.__dict__)
        new._batch_shape = shape
        return new

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """Whole numbers from 0 to ``total_count``."""
        return constraints.integer_interval(0, self.total_count)

    @property
    def success_probability(self) -> Tensor:
        """Mean success probability."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def dispersion(self) -> Tensor:
        """Overdispersion: 0 is binomial, 1 is all or nothing."""
        return 1.0 / (1.0 + self.alpha + self.beta)

    @property
    def mean(self) -> Tensor:
        """Expected successes."""
        return (self.total_count * self.success_probability).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Variance of the successes."""
        p, n = self.success_probability, self.total_count
        return (n * p * (1.0 - p) * (1.0 + (n - 1.0) * self.dispersion)).expand(self.batch_shape)

    @property
    def parameters_table(self) -> dict[str, Tensor]:
        """Parameters on their natural scale, each of the batch shape."""
        table = {"mean": self.success_probability, "dispersion": self.dispersion}
        return {name: tensor.expand(self.batch_shape) for name, tensor in table.items()}

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute the log-probability of each count of successes."""
        if self._validate_args:
            self._validate_sample(value)
        shape = broadcast(self.batch_shape, value.shape)
        trials = self.total_count.expand(shape).reshape(-1)
        tried = trials.nonzero().squeeze(-1)
        n, k, alpha, beta = (
            tensor.expand(shape).reshape(-1).index_select(0, tried).to(working_dtype(trials.device))
            for tensor in (self.total_count, value, self.alpha, self.beta)
        )
        choose = torch.lgamma(n + 1.0) - torch.lgamma(k + 1.0) - torch.lgamma(n - k + 1.0)
        scored = choose + log_rising(k, alpha) + log_rising(n - k, beta) - log_rising(n, alpha + beta)
        # All or nothing may be all but sure, and then these terms leave no digit of the logarithm.
        all_or_nothing = log_rising_change(
            n, torch.where(k == 0, beta, alpha), torch.where(k == 0, alpha, beta)
        )
        scored = torch.where((k == 0) | (k == n), all_or_nothing, scored)
        dense = torch.zeros(trials.shape, dtype=self.alpha.dtype, device=trials.device)
        return dense.scatter(0, tried, scored.to(dense.dtype)).reshape(shape)

    @torch.no_grad()
    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw successes: a probability for each entry, then a binomial count."""
        shape = self._extended_shape(sample_shape)
        dtype = working_dtype(self.alpha.device)
        alpha, beta = self.alpha.to(dtype).expand(shape), self.beta.to(dtype).expand(shape)
        probability = torch.sigmoid(log_gamma_draw(alpha) - log_gamma_draw(beta))
        total_count = self.total_count.to(dtype).expand(shape).contiguous()
        return binomial_draw(total_count, probability).to(self.alpha.dtype)


def _shapes(mean: Tensor, dispersion: Tensor) -> tuple[Tensor, Tensor]:
    dispersion = dispersion.clamp(*_DISPERSION_RANGE)
    strength = (1.0 - dispersion) / dispersion
    return mean * strength, (1.0 - mean) * strength
