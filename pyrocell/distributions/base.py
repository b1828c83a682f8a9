"""What the count distributions share: parameters kept unexpanded, and row sums in one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, overload

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import constraints

from pyrocell.distributions.kernels import Family, score_counts
from pyrocell.distributions.shapes import broadcast
from pyrocell.distributions.softmax_mean import SoftmaxMean

__all__ = [
    "MEAN_FLOOR",
    "CountDistribution",
    "RowSum",
    "as_log",
    "as_reals",
    "binomial_draw",
    "exactly_one",
    "log_gamma_draw",
    "poisson_draw",
    "standard_gamma",
]

MEAN_FLOOR = 1e-30
"""Means and dispersions given on the natural scale are raised to this: at mean 0, log and its gradient stay finite."""

RATE_CEILING = 1e8
"""Poisson rates are lowered to this when counts are drawn."""


class CountDistribution(TorchDistribution):
    """Base of the distributions of counts.

    A subclass names its parameters in ``parameter_names`` (the first one is a log mean) and its
    likelihood in ``family``. Parameters keep the shapes they were given with: a dispersion per gene is
    never copied for each cell. Checks of parameters and counts (for NaN, negative and broken counts) cost
    as much as the likelihood itself, so they are made only with ``validate_args=True``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.nonnegative_integer
    parameter_names: ClassVar[tuple[str, ...]]
    family: ClassVar[Family]
    has_rsample = False
    _validate_args = False
    _softmax_mean: SoftmaxMean | None = None

    def _set_parameters(
        self, parameters: Sequence[Tensor | SoftmaxMean], *, validate_args: bool | None
    ) -> None:
        for name, parameter in zip(self.parameter_names, parameters, strict=True):
            # The property of this name computes it when it is asked for.
            if isinstance(parameter, SoftmaxMean):
                self._softmax_mean = parameter
            else:
                setattr(self, name, parameter)
        shape = broadcast(*(parameter.shape for parameter in parameters))
        super().__init__(shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Any:
        """Give the same distribution over a larger batch; no parameter is copied."""
        new = self._get_checked_instance(type(self), _instance)
        # also checks that this batch expands to the one asked for
        shape = torch.empty(()).expand(self.batch_shape).expand(torch.Size(batch_shape)).shape
        new.__dict__.update(self.__dict__)
        new._batch_shape = shape
        return new

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        """Read the rightmost batch dimensions as event: log-probabilities are row sums, in one step."""
        n = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        if n < 0:
            raise ValueError(
                f"to_event({n}): {type(self).__name__} has no event dimensions to undo; give n >= 0"
            )
        return RowSum(self, n) if n else self

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute the log-probability of each count, broadcast shape of ``value`` and the batch."""
        return self._score(value, sum_last=False)

    def row_log_prob(self, value: Tensor) -> Tensor:
        """Compute log-probabilities summed over the last dimension."""
        return self._score(value, sum_last=True)

    def _score(self, value: Tensor, *, sum_last: bool) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        mean, *others = self.parameter_names
        first = getattr(self, mean) if self._softmax_mean is None else self._softmax_mean
        parameters = [first, *(getattr(self, name) for name in others)]
        return score_counts(self.family, parameters, value, batch_shape=self.batch_shape, sum_last=sum_last)

    def _log_mean_of_softmax(self) -> Tensor:
        assert self._softmax_mean is not None
        return self._softmax_mean.log_mean

    @property
    def parameters_table(self) -> dict[str, Tensor]:
        """Parameters on their natural scale, by the names that users know, each of the batch shape."""
        return {name: tensor.expand(self.batch_shape) for name, tensor in self._natural_parameters().items()}

    def _natural_parameters(self) -> dict[str, Tensor]:
        raise TypeError(f"{type(self).__name__} does not name its natural parameters")


class RowSum(dist.Independent):
    """A count distribution whose rightmost batch dimensions are events; scores rows in one step."""

    base_dist: CountDistribution

    def log_prob(self, value: Tensor) -> Tensor:
        """Compute the log-probability of each event."""
        return sum_rightmost(self.base_dist.row_log_prob(value), self.reinterpreted_batch_ndims - 1)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Any:
        """Read more (or, if negative, fewer) rightmost dimensions as event."""
        more = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        return self.base_dist.to_event(self.reinterpreted_batch_ndims + more)

    @property
    def parameters_table(self) -> dict[str, Tensor]:
        """Parameters on their natural scale, by the names that users know."""
        return self.base_dist.parameters_table


@overload
def as_reals(*values: Tensor | float | None) -> list[Tensor | None]: ...


@overload
def as_reals(*values: Tensor | float | SoftmaxMean | None) -> list[Any]: ...


def as_reals(*values: Tensor | float | SoftmaxMean | None) -> list[Any]:
    """Bring parameters to one floating dtype, float32 at least, and one device; None stays None.

    Half precision is raised because log-probabilities of counts do not fit in it.
    """
    tensors = [tensor for value in values for tensor in _tensors_of(value)]
    dtype = torch.float32 if tensors else torch.get_default_dtype()
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    spread = [tensor for tensor in tensors if tensor.ndim] or tensors
    device = spread[0].device if spread else None

    def as_real(value: Tensor | float | SoftmaxMean) -> Tensor | SoftmaxMean:
        if isinstance(value, SoftmaxMean):
            return value.to(dtype, device)
        return torch.as_tensor(value, dtype=dtype, device=device)

    return [None if value is None else as_real(value) for value in values]


def _tensors_of(value: Tensor | float | SoftmaxMean | None) -> list[Tensor]:
    if isinstance(value, SoftmaxMean):
        return [value.logits, value.log_size]
    return [value] if isinstance(value, Tensor) else []


def as_log(natural: Tensor) -> Tensor:
    """Take the logarithm of a positive parameter; zeros are raised to a floor where the gradient is zero."""
    return natural.clamp(min=MEAN_FLOOR).log()


def exactly_one(owner: object, given: Mapping[str, object]) -> str:
    """Give the name of the one argument that is not None; raise if there are none or several."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(
            f"{type(owner).__name__} was given {' and '.join(names) or 'none'} of {', '.join(given)}; give exactly one"
        )
    return names[0]


def standard_gamma(concentration: Tensor) -> Tensor:
    """Draw from Gamma(concentration, 1), on the CPU for devices without that kernel."""
    place = _sampling_device(concentration)
    return torch._standard_gamma(concentration.to(place)).to(concentration.device)


def log_gamma_draw(concentration: Tensor) -> Tensor:
    """Draw the logarithm of a Gamma(concentration, 1): finite where the draw itself underflows to 0."""
    uniform = torch.rand_like(concentration).clamp_(min=torch.finfo(concentration.dtype).tiny)
    return standard_gamma(concentration + 1.0).log() + uniform.log() / concentration


def poisson_draw(rate: Tensor) -> Tensor:
    """Draw from Poisson(min(rate, 1e8)), on the CPU for devices without that kernel."""
    rate = rate.clamp(max=RATE_CEILING)
    return torch.poisson(rate.to(_sampling_device(rate))).to(rate.device)


def binomial_draw(total_count: Tensor, probability: Tensor) -> Tensor:
    """Draw from Binomial(total_count, probability), on the CPU for devices without that kernel."""
    place = _sampling_device(probability)
    return torch.binomial(total_count.to(place), probability.to(place)).to(probability.device)


def _sampling_device(x: Tensor) -> torch.device:
    return x.device if x.device.type in ("cpu", "cuda") else torch.device("cpu")
