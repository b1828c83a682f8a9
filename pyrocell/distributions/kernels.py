"""Log-probabilities of counts and their closed-form gradients: dense terms for zeros, gamma functions at non-zeros.

On the CPU, gamma functions are what costs, and most counts are zeros. On other devices they cost next to nothing, and
finding the non-zeros would make the host wait: there every entry is scored by one formula, in arrays of fixed sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pyrocell.distributions.counts import NonZeros, RankedCounts, working_dtype
from pyrocell.distributions.gamma import large_log_rising, small_log_rising
from pyrocell.distributions.shapes import aligned

__all__ = [
    "LOG_RATIO_LIMIT",
    "LOG_THETA_RANGE",
    "Family",
    "negative_binomial",
    "poisson",
    "score_counts",
    "zero_inflated",
]

LOG_THETA_RANGE = (-16.0, 20.0)
"""log theta is held in this range (gradients pass straight through): theta in [1.1e-7, 4.8e8]."""

LOG_RATIO_LIMIT = 40.0
"""At non-zero counts log(mean / theta) is held within +-40 (gradients pass straight through)."""

_BLOCK = 1 << 17
"""Elements that are handled at a time on CPU: enough for several threads."""

_LOG_2 = math.log(2.0)


@dataclass(frozen=True)
class Family:
    """A likelihood of counts, as two functions of its parameters (each (n_samples or 1, n_rows or 1, n_columns)).

    Attributes
    ----------
    zeros : callable
        (parameters, out) -> None: writes log P(0), and where ``out`` has more than one tensor its derivative in
        each parameter, into ``out``, each (n_samples, n_rows, n_columns).
    seen : callable
        (non-zero counts, parameters) -> log P(x) there and its derivative in each parameter, each
        (n_samples or 1, n_nonzero).
    everywhere : callable
        (counts, parameters) -> log P(x) of every count and its derivative in each parameter, in the working
        precision, each (n_samples, n_rows, n_columns). The counts are (1, n_rows, n_columns).
    """

    zeros: Callable[[Sequence[Tensor], list[Tensor]], None]
    seen: Callable[[RankedCounts, Sequence[Tensor]], list[Tensor]]
    everywhere: Callable[[Tensor, Sequence[Tensor]], list[Tensor]]


def _negative_binomial_zeros(parameters: Sequence[Tensor], out: list[Tensor]) -> None:
    log_mean, log_theta = parameters
    log_theta = log_theta.clamp(*LOG_THETA_RANGE)
    minus_theta = log_theta.exp().neg_()
    # No clamp of the ratio: theta * softplus tends to the mean itself, down to mean 0.
    zero, *slopes = out
    torch.sub(log_mean, log_theta, out=zero)
    share = torch.sigmoid(zero, out=slopes[0]) if slopes else torch.sigmoid(zero)
    _softplus_(zero, share).mul_(minus_theta)
    if slopes:
        mean_slope, theta_slope = slopes
        torch.sub(zero, mean_slope.mul_(minus_theta), out=theta_slope)


def _negative_binomial_seen(ranked: RankedCounts, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Score every non-zero as log P(x) = x eta + (1 + x / theta) log P(0) + finite sum - log x!, then amend.

    Nothing cancels in this form while x is small, so the precision of the parameters is enough.
    """
    log_mean, log_theta = parameters
    log_theta = log_theta.clamp(*LOG_THETA_RANGE)
    counts, eta = ranked.values.to(log_mean.dtype), ranked.take(log_mean)
    theta = ranked.take(log_theta.exp())
    log_ratio = (eta - ranked.take(log_theta)).clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    share = torch.sigmoid(log_ratio)  # mean / (mean + theta)
    up = _softplus_(log_ratio, share)
    both = counts + theta
    mean_slope = counts - share.mul_(both)
    value = (counts * eta).sub_(both * up)
    theta_slope = (1.0 - up.mul_(theta)).sub_(mean_slope)

    some = theta.index_select(1, ranked.several[ranked.n_large :])
    rising, rising_slope = small_log_rising(ranked, some)
    rising = rising - ranked.log_factorial[ranked.n_large :]
    large = _negative_binomial_large(ranked, log_mean, log_theta)
    for seen, add, replaced in zip(
        (value, mean_slope, theta_slope), (rising, None, rising_slope), large, strict=True
    ):
        ranked.amend(seen, add=add, large=replaced)
    return [value, mean_slope, theta_slope]


def _negative_binomial_large(ranked: RankedCounts, log_mean: Tensor, log_theta: Tensor) -> tuple[Tensor, ...]:
    """Score counts above 4, whose summands cancel, in the working precision: spec form (1.2)."""
    counts = ranked.counts[: ranked.n_large]
    phi = ranked.take_large(log_theta)
    theta = phi.exp()
    log_ratio = (ranked.take_large(log_mean) - phi).clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    tail = log_ratio.abs().neg_().exp_().log1p_()
    share = torch.sigmoid(log_ratio)
    theta_up = theta * (log_ratio.clamp(min=0.0) + tail)
    rising, slope = large_log_rising(counts, theta, log_mean.dtype)
    value = (
        rising
        - ranked.log_factorial[: ranked.n_large]
        - theta_up
        - counts * (tail - log_ratio.clamp(max=0.0))
    )
    mean_slope = counts - share * (counts + theta)
    return value, mean_slope, theta * slope - theta_up - mean_slope


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


negative_binomial = Family(_negative_binomial_zeros, _negative_binomial_seen, _negative_binomial_everywhere)
"""NB(x | mean, theta) in (log mean, log theta)."""


def _poisson_zeros(parameters: Sequence[Tensor], out: list[Tensor]) -> None:
    torch.exp(parameters[0], out=out[0]).neg_()
    for slope in out[1:]:
        slope.copy_(out[0])


def _poisson_seen(ranked: RankedCounts, parameters: Sequence[Tensor]) -> list[Tensor]:
    (log_rate,) = parameters
    counts, eta = ranked.values.to(log_rate.dtype), ranked.take(log_rate)
    rate = eta.exp()
    value, slope = counts * eta - rate, counts - rate
    n_large = ranked.n_large
    eta, counts = ranked.take_large(log_rate), ranked.counts[:n_large]
    rate = eta.exp()
    large = counts * eta - rate - ranked.log_factorial[:n_large]
    ranked.amend(value, add=-ranked.log_factorial[n_large:], large=large)
    ranked.amend(slope, add=None, large=counts - rate)
    return [value, slope]


def _poisson_everywhere(counts: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    x = counts.to(working_dtype(counts.device))
    log_rate = parameters[0].to(x.dtype)
    rate = log_rate.exp()
    return [torch.where(x > 0, x * log_rate, 0.0) - rate - torch.lgamma(x + 1.0), x - rate]


poisson = Family(_poisson_zeros, _poisson_seen, _poisson_everywhere)
"""Poisson(x | rate) in log rate."""


def zero_inflated(base: Family) -> Family:
    """Give the likelihood that is zero with probability sigmoid(last parameter), else ``base``."""

    def zeros(parameters: Sequence[Tensor], out: list[Tensor]) -> None:
        *inner, zi_logits = parameters
        zero, *slopes = out
        base.zeros(inner, [zero, *slopes[:-1]])
        not_zi = zi_logits.neg().sigmoid_()
        owned = slopes[-1] if slopes else torch.empty_like(zero)  # probability that a zero is the base's own
        torch.sub(zero, zi_logits, out=owned).sigmoid_()
        _inflate_zero_(zero, zi_logits, not_zi, owned)
        for slope in slopes[:-1]:
            slope.mul_(owned)
        owned.neg_().add_(not_zi)

    def seen(ranked: RankedCounts, parameters: Sequence[Tensor]) -> list[Tensor]:
        *inner, zi_logits = parameters
        value, *slopes = base.seen(ranked, inner)
        logits = ranked.take(zi_logits)
        zi = torch.sigmoid(logits)
        return [value - _softplus_(logits, zi), *slopes, zi.neg_()]

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

    return Family(zeros, seen, everywhere)


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


def _softplus_(x: Tensor, sigmoid: Tensor) -> Tensor:
    """Replace ``x`` by softplus(x) = max(x, 0) - log1p(-sigmoid(-|x|)), given sigmoid(x).

    On CPU a sigmoid takes a third of the time of an exponential.
    """
    tail = 1.0 - sigmoid
    torch.minimum(sigmoid, tail, out=tail).neg_().log1p_()
    return x.clamp_(min=0.0).sub_(tail)


def score_counts(
    family: Family, parameters: Sequence[Tensor], value: Tensor, *, batch_shape: torch.Size, sum_last: bool
) -> Tensor:
    """Compute log-probabilities of counts in one differentiable step.

    Parameters
    ----------
    family : Family
        The likelihood.
    parameters : sequence of Tensor
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
    mean, *others = parameters
    blocks = [_blocks(mean.expand(full), full, n_outer), *(_blocks(other, full, n_outer) for other in others)]
    counts = NonZeros.of(value).ranked if value.device.type == "cpu" else value.reshape(1, -1, full[-1])
    result: Tensor = _Score.apply(_Call(family, counts, sum_last, torch.is_grad_enabled()), *blocks)
    return result.reshape(shape[:-1] if sum_last else shape)


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
    family: Family
    counts: RankedCounts | Tensor
    sum_last: bool
    grad_mode: bool


class _Score(torch.autograd.Function):
    """Keep the slopes, so that backward is a product and a reduction per parameter."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *parameters: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[1:]
        n_dense = 1 + len(parameters) if call.grad_mode and any(wanted) else 1
        if isinstance(call.counts, Tensor):
            found = call.family.everywhere(call.counts, parameters)[:n_dense]
            value, *slopes = (values.to(parameters[0].dtype) for values in found)
        else:
            value, *slopes = _join(call.family, call.counts, parameters, n_dense)
        ctx.sum_last, ctx.shapes = call.sum_last, [parameter.shape for parameter in parameters]
        ctx.save_for_backward(*(slope for slope, needed in zip(slopes, wanted, strict=False) if needed))
        return value.sum(-1) if call.sum_last else value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        return None, *(
            _chain(next(saved), grad, shape, sum_last=ctx.sum_last) if needed else None
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        )


def _join(family: Family, ranked: RankedCounts, parameters: Sequence[Tensor], n_dense: int) -> list[Tensor]:
    """Score zeros everywhere, then put the non-zeros in their places."""
    dense = [torch.empty_like(parameters[0]) for _ in range(n_dense)]
    _zeros_by_blocks(family, parameters, dense)
    for everywhere, seen in zip(dense, family.seen(ranked, parameters), strict=False):
        ranked.put(everywhere, seen)
    return dense


def _zeros_by_blocks(family: Family, parameters: Sequence[Tensor], out: list[Tensor]) -> None:
    """Call ``family.zeros`` some rows at a time: its temporaries then stay small, in memory and cache."""
    n_samples, n_rows, n_columns = out[0].shape
    step = max(1, _BLOCK // max(1, n_samples * n_columns))
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        part = [parameter if parameter.shape[1] == 1 else parameter[:, rows] for parameter in parameters]
        family.zeros(part, [target[:, rows] for target in out])


def _chain(slope: Tensor, grad: Tensor, shape: torch.Size, *, sum_last: bool) -> Tensor:
    """Multiply slopes (outer, rows, columns) by the incoming gradient and reduce to the parameter's shape."""
    if sum_last and shape[0] == shape[1] == 1:
        return torch.mv(slope.view(-1, shape[2]).T, grad.reshape(-1)).view(shape)
    return (slope * (grad.unsqueeze(-1) if sum_last else grad)).sum_to_size(shape)
