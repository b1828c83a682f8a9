"""Log-probabilities of counts and their closed-form gradients.

On the CPU, gamma functions are what costs, and most counts are zeros: float32 counts are scored by compiled loops that
evaluate them at non-zeros alone. On other devices they cost next to nothing, and finding the non-zeros would make the
host wait: there, and in float64, every entry is scored by one formula, in arrays of fixed sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pyrocell.distributions import compiled, profiles
from pyrocell.distributions.compiled import LOG_RATIO_LIMIT, LOG_THETA_RANGE
from pyrocell.distributions.counts import NonZeros, working_dtype
from pyrocell.distributions.gamma import large_log_rising
from pyrocell.distributions.operators import as_operator
from pyrocell.distributions.shapes import aligned
from pyrocell.distributions.softmax_mean import SoftmaxMean
from pyrocell.distributions.threads import in_parts

__all__ = [
    "LOG_RATIO_LIMIT",
    "LOG_THETA_RANGE",
    "Family",
    "negative_binomial",
    "poisson",
    "score_counts",
    "zero_inflated",
]

_LOG_2 = math.log(2.0)


@dataclass(frozen=True)
class Family:
    """A likelihood of counts, as functions of its parameters (each (n_samples or 1, n_rows or 1, n_columns)).

    Attributes
    ----------
    compiled : callable
        Operator that scores float32 counts on the CPU, with zero inflation where there is one parameter more; see
        `_operator_of`.
    of_softmax : callable
        The same for rows of counts whose mean is a share of a size; see `_operator_of_softmax`.
    everywhere : callable
        (counts, parameters) -> log P(x) of every count and its derivative in each parameter, in the working
        precision, each (n_samples, n_rows, n_columns). The counts are (1, n_rows, n_columns).
    """

    compiled: Callable[..., list[Tensor]]
    of_softmax: Callable[..., list[Tensor]]
    everywhere: Callable[[Tensor, Sequence[Tensor]], list[Tensor]]


def _operator_of(loop: Callable[..., None]) -> Callable[..., list[Tensor]]:
    """Make an operator of a loop over rows, see `pyrocell.distributions.compiled.negative_binomial`.

    It takes where each row begins among the non-zeros (one more than rows), their columns and the counts there, the
    parameters, and whether to sum the last dimension and whether slopes are wanted. It returns log-probabilities, and
    slopes if they are. What nobody asked for is written into one row, again and again.
    """

    def score(
        bounds: Tensor,
        cols: Tensor,
        values: Tensor,
        parameters: list[Tensor],
        *,
        sum_last: bool,
        learns: bool,
    ) -> list[Tensor]:
        like = parameters[0]
        row = (1, 1, like.shape[-1])
        value = like.new_empty(row if sum_last else like.shape)
        sums = like.new_empty(like.shape[:-1] if sum_last else (0, 0))
        slopes = [like.new_empty(like.shape if learns else row) for _ in parameters]
        _run(loop, (bounds, cols, values), parameters, [value, sums], slopes)
        return [sums if sum_last else value, *(slopes if learns else [])]

    arguments = (
        "Tensor bounds, Tensor cols, Tensor values, Tensor[] parameters, *, bool sum_last, bool learns"
    )
    return as_operator(f"{loop.__name__}({arguments}) -> Tensor[]", score)


def _operator_of_softmax(loop: Callable[..., None]) -> Callable[..., list[Tensor]]:
    """Make an operator of a loop that takes the softmax along, see `profiles.negative_binomial_of_profile`.

    Arguments and results are those of `_operator_of`, with logits and log size in place of the log mean; the last
    dimension is always summed.
    """

    def score(
        bounds: Tensor, cols: Tensor, values: Tensor, parameters: list[Tensor], *, learns: bool
    ) -> list[Tensor]:
        like = parameters[0]
        sums, in_size = like.new_empty(like.shape[:-1]), like.new_empty((*like.shape[:-1], 1))
        slopes = [like.new_empty(like.shape if learns else (1, 1, like.shape[-1])) for _ in parameters]
        slopes[1] = in_size
        _run(loop, (bounds, cols, values), parameters, [sums], slopes)
        return [sums, *(slopes if learns else [])]

    arguments = "Tensor bounds, Tensor cols, Tensor values, Tensor[] parameters, *, bool learns"
    return as_operator(f"{loop.__name__}({arguments}) -> Tensor[]", score)


def _run(
    loop: Callable[..., None],
    index: tuple[Tensor, Tensor, Tensor],
    parameters: Sequence[Tensor],
    results: Sequence[Tensor],
    slopes: Sequence[Tensor],
) -> None:
    """Run a loop on threads, by samples or by the rows of the only one, each writing to places of its own."""
    bounds, cols, values = (part.numpy() for part in (*index[:2], index[2].to(torch.float64)))
    read, written, learned = ([x.detach().numpy() for x in xs] for xs in (parameters, results, slopes))
    # Along the first dimension that varies, parts are C-contiguous, too: for others, loops would be compiled anew.
    axis = 0 if len(read[0]) > 1 else 1
    n = read[0].shape[
        axis
    ]  # where it is one, there are no parts; arrays of another length are for all of them

    def work(start: int, stop: int) -> None:
        def part(x: np.ndarray) -> np.ndarray:
            return x if x.shape[axis] != n else x[start:stop] if axis == 0 else x[:, start:stop]

        def own(x: np.ndarray) -> np.ndarray:
            return part(x) if x.shape[axis] == n else np.empty_like(x)  # a row that nobody asked for

        of_rows = bounds if axis == 0 else bounds[start : stop + 1]
        outcome = (*map(own, written), tuple(map(own, learned)))
        loop((of_rows, cols, values), tuple(map(part, read)), *outcome)

    in_parts(work, n, n_numbers=read[0].size)


def _negative_binomial_everywhere(counts: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Score by spec form (1.2), whose summands cancel: hence the working precision."""
    x = counts.to(working_dtype(counts.device))
    log_mean, log_theta = (parameter.to(x.dtype) for parameter in parameters)
    phi = log_theta.clamp(*LOG_THETA_RANGE)
    theta = phi.exp()
    log_ratio = log_mean - phi
    log_ratio = torch.where(x > 0, log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), log_ratio)
    log_share, log_rest = functional.logsigmoid(log_ratio), functional.logsigmoid(-log_ratio)
    rising, slope = large_log_rising(x, theta, parameters[0].dtype)
    value = torch.addcmul(rising - torch.lgamma(x + 1.0), theta, log_rest)
    value = value.addcmul_(x, torch.where(x > 0, log_share, 0.0))  # a mean of 0 has no finite logarithm
    mean_slope = torch.addcmul(x, log_share.exp_(), x + theta, value=-1.0)
    return [value, mean_slope, (slope + log_rest).mul_(theta).sub_(mean_slope)]


negative_binomial = Family(
    _operator_of(compiled.negative_binomial),
    _operator_of_softmax(profiles.negative_binomial_of_profile),
    _negative_binomial_everywhere,
)
"""NB(x | mean, theta) in (log mean, log theta)."""


def _poisson_everywhere(counts: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    x = counts.to(working_dtype(counts.device))
    log_rate = parameters[0].to(x.dtype)
    rate = log_rate.exp()
    return [torch.where(x > 0, x * log_rate, 0.0) - rate - torch.lgamma(x + 1.0), x - rate]


poisson = Family(
    _operator_of(compiled.poisson), _operator_of_softmax(profiles.poisson_of_profile), _poisson_everywhere
)
"""Poisson(x | rate) in log rate."""


def zero_inflated(base: Family) -> Family:
    """Give the likelihood that is zero with probability sigmoid(last parameter), else ``base``."""

    def everywhere(counts: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        *inner, zi_logits = parameters
        value, *slopes = base.everywhere(counts, inner)
        logits, is_zero = zi_logits.to(value.dtype), counts == 0
        zero, not_zi = value.clone(), torch.sigmoid(-logits)
        owned = torch.sigmoid(zero - logits)
        _inflate_zero_(zero, logits, not_zi, owned)
        value = torch.where(is_zero, zero, value - functional.softplus(logits))
        slopes = [torch.where(is_zero, slope * owned, slope) for slope in slopes]
        return [value, *slopes, torch.where(is_zero, not_zi - owned, not_zi - 1.0)]

    return Family(base.compiled, base.of_softmax, everywhere)


def _inflate_zero_(zero: Tensor, zi_logits: Tensor, not_zi: Tensor, owned: Tensor) -> None:
    """Replace ``zero`` by log P(0) = log[zi + (1 - zi) e^zero].

    The difference of two softplus loses all digits as the result tends to 0. So: while P(0) > 1/2, it is
    log1p(-(1 - zi)(1 - e^zero)); below, the larger of the two exponents is taken out,
    max + log[(1 - zi) / max(owned, 1 - owned)]. Each is held at log(1/2) outside of its half, and they are
    added: on CPU, selecting by a mask costs more than the second logarithm.
    """
    near = torch.expm1(zero).mul_(not_zi).clamp_(min=-0.5).log1p_()
    far = 1.0 - owned
    torch.maximum(far, owned, out=far)
    torch.div(not_zi, far, out=far)
    # -0.6 is never reached while P(0) < 1/2; it keeps the logarithm finite when zi tends to 1
    far.sub_(1.0).clamp_(min=-0.6).log1p_().add_(torch.maximum(zero, zi_logits, out=zero))
    torch.add(near, far.add_(_LOG_2).clamp_(max=0.0), out=zero)


def score_counts(
    family: Family,
    parameters: Sequence[Tensor | SoftmaxMean],
    value: Tensor,
    *,
    batch_shape: torch.Size,
    sum_last: bool,
) -> Tensor:
    """Compute log-probabilities of counts in one differentiable step.

    Parameters
    ----------
    family : Family
        The likelihood.
    parameters : sequence of Tensor or SoftmaxMean
        Its parameters; each broadcasts to ``batch_shape``. The first one is the log mean.
    value : Tensor
        Counts; broadcasts with ``batch_shape``.
    batch_shape : torch.Size
        Shape of the distribution.
    sum_last : bool
        Whether to sum over the last dimension.

    Returns
    -------
    Tensor
        Broadcast shape of ``value`` and ``batch_shape``, without its last dimension if that was summed.
    """
    value, shape, full, n_outer = aligned(value, batch_shape)
    mean, others = parameters[0], cast("Sequence[Tensor]", parameters[1:])
    score: Callable[..., list[Tensor]] = partial(family.compiled, sum_last=sum_last)
    blocks = []
    if isinstance(mean, SoftmaxMean):
        if sum_last and _is_looped(mean.logits, value) and mean.logits.shape[-1] == full[-1] > 0:
            score = family.of_softmax
            blocks.append(_blocks(mean.log_size, torch.Size((*full[:-1], 1)), n_outer))
            mean = mean.logits
        else:
            mean = mean.log_mean
    blocks.insert(0, _blocks(mean.expand(full), full, n_outer))
    blocks.extend(_blocks(other, full, n_outer) for other in others)
    looped = _is_looped(mean, value)
    counts = NonZeros.of(value) if looped else value.reshape(1, -1, full[-1])
    call = _Call(score if looped else family.everywhere, counts, sum_last, torch.is_grad_enabled())
    result: Tensor = _Score.apply(call, *blocks)
    return result.reshape(shape[:-1] if sum_last else shape)


def _is_looped(mean: Tensor, value: Tensor) -> bool:
    return value.device.type == "cpu" and mean.dtype == torch.float32


def _blocks(parameter: Tensor, full: torch.Size, n_outer: int) -> Tensor:
    """View a parameter as (outer or 1, rows or 1, columns), expanding a group of dimensions only if it varies."""
    if n_outer == 0 and len(full) == 2 and parameter.shape == full:
        return parameter.unsqueeze(0).contiguous()  # the usual minibatch
    shape = (1,) * (len(full) - parameter.ndim) + tuple(parameter.shape)
    groups = [(0, n_outer), (n_outer, len(full) - 1)]
    target: list[int] = []
    flat: list[int] = []
    for start, stop in groups:
        varies = any(size != 1 for size in shape[start:stop])
        sizes = full[start:stop] if varies else (1,) * (stop - start)
        target.extend(sizes)
        flat.append(math.prod(sizes))
    return parameter.expand(*target, full[-1]).reshape(*flat, full[-1]).contiguous()


@dataclass(frozen=True)
class _Call:
    score: Callable[..., list[Tensor]]
    counts: NonZeros | Tensor
    sum_last: bool
    grad_mode: bool


class _Score(torch.autograd.Function):
    """Keep the slopes, so that backward is a product and a reduction per parameter."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *parameters: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[1:]
        learns = call.grad_mode and any(wanted)
        if isinstance(call.counts, NonZeros):
            index = call.counts.bounds, call.counts.cols, call.counts.values
            value, *slopes = call.score(*index, parameters, learns=learns)
        else:
            found = call.score(call.counts, parameters)
            value, *slopes = (values.to(parameters[0].dtype) for values in (found if learns else found[:1]))
            value = value.sum(-1) if call.sum_last else value
        ctx.sum_last, ctx.shapes = call.sum_last, [parameter.shape for parameter in parameters]
        ctx.save_for_backward(*(slope for slope, needed in zip(slopes, wanted, strict=False) if needed))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        return None, *(
            _chain(next(saved), grad, shape, sum_last=ctx.sum_last) if needed else None
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        )


def _chain(slope: Tensor, grad: Tensor, shape: torch.Size, *, sum_last: bool) -> Tensor:
    """Multiply slopes (outer, rows, columns) by the incoming gradient and reduce to the parameter's shape."""
    if sum_last and shape[0] == shape[1] == 1:
        return torch.mv(slope.flatten(0, 1).T, grad.reshape(-1)).view(shape)
    return (slope * (grad.unsqueeze(-1) if sum_last else grad)).sum_to_size(shape)
