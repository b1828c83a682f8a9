"""Whether a region is seen open: a Bernoulli whose probability is a product of factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import constraints
from torch.nn import functional
from torch.types import _size

from pyrocell.distributions.base import CountDistribution, as_reals
from pyrocell.distributions.counts import NonZeros
from pyrocell.distributions.operators import as_operator
from pyrocell.distributions.shapes import aligned

__all__ = ["ScaledBernoulli"]

_LARGEST_LOGIT = 80.0
"""sigmoid(-80) is the last round number that float32 holds with all its digits."""

_BLOCK = 1 << 17
"""Elements that are handled at a time on CPU: their temporaries stay in the cache."""

_LOG_2 = math.log(2.0)
_ALWAYS = math.inf
"""Logit of a factor that is left out."""


class ScaledBernoulli(CountDistribution):
    """One with probability accessibility * depth * region factor, else zero; each factor given as a logit.

    Values other than zero count as one. Neither the log-probability nor its gradient saturates: with p the product,
    log p is a sum of log-sigmoids, and 1 - p a sum of positive terms, in which nothing cancels.

    Parameters
    ----------
    logits : Tensor or float
        Logit of the probability that the region is accessible, shape (..., n_cells, n_regions). Where a zero is
        scored, logits above 80 count as 80 (the gradient passes straight through).
    depth_logits : Tensor or float, optional
        Logit of the probability that an accessible region is seen in the cell, such as (n_cells, 1); left out: 1.
    region_logits : Tensor or float, optional
        Logit of the probability that the region is seen where it is accessible, such as (n_regions,); left out: 1.
    validate_args : bool, optional
        Check parameters and values (off unless True).

    Raises
    ------
    ValueError
        With ``validate_args``, on NaN and on values that are not 0 or 1.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "logits": constraints.real,
        "depth_logits": constraints.real,
        "region_logits": constraints.real,
    }
    support = constraints.boolean  # type: ignore[assignment]
    parameter_names: ClassVar[tuple[str, ...]] = ("logits", "depth_logits", "region_logits")
    logits: Tensor
    depth_logits: Tensor
    region_logits: Tensor

    def __init__(
        self,
        logits: Tensor | float,
        *,
        depth_logits: Tensor | float | None = None,
        region_logits: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        given = as_reals(logits, depth_logits, region_logits)
        first = given[0]
        assert first is not None
        self._given = [name for name, p in zip(self.parameter_names, given, strict=True) if p is not None]
        filled = [first.new_full((), _ALWAYS) if p is None else p for p in given]
        self._set_parameters(filled, validate_args=validate_args)

    def _score(self, value: Tensor, *, sum_last: bool) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value, shape, full, n_outer = aligned(value, self.batch_shape)
        logits = self.logits.expand(full).reshape(_grouped(full, n_outer)).contiguous()
        factors = [_thin(getattr(self, name), full, n_outer) for name in self._given[1:]]
        ones = NonZeros.of(value) if value.device.type == "cpu" else value.reshape(-1, full[-1]) != 0
        call = _Call(ones, sum_last, torch.is_grad_enabled())
        result: Tensor = _Score.apply(call, logits, *factors)
        return result.reshape(shape[:-1] if sum_last else shape)

    @property
    def probs(self) -> Tensor:
        """Probability of a one."""
        product = torch.sigmoid(self.logits)
        for name in self._given[1:]:
            product = product * torch.sigmoid(getattr(self, name))
        return product.expand(self.batch_shape)

    @property
    def mean(self) -> Tensor:
        """Probability of a one."""
        return self.probs

    @property
    def variance(self) -> Tensor:
        """Variance, p (1 - p)."""
        factors = [getattr(self, name) for name in self._given[1:]]
        return self.probs * _unseen(self.logits, factors).expand(self.batch_shape)

    @torch.no_grad()
    def sample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008
        """Draw zeros and ones."""
        return torch.bernoulli(self.probs.expand(self._extended_shape(sample_shape)))

    def _natural_parameters(self) -> dict[str, Tensor]:
        names = {"logits": "accessibility", "depth_logits": "depth", "region_logits": "region_factor"}
        return {
            "mean": self.probs,
            **{names[name]: torch.sigmoid(getattr(self, name)) for name in self._given},
        }


def _unseen(logits: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Compute 1 - p as the sum of the chances to fail at each factor after passing those before it."""
    passed, failed = torch.sigmoid(logits), torch.sigmoid(-logits)
    for factor in factors:
        failed = failed + passed * torch.sigmoid(-factor)
        passed = passed * torch.sigmoid(factor)
    return failed


def _grouped(full: torch.Size, n_outer: int) -> tuple[int, int, int]:
    return math.prod(full[:n_outer]), math.prod(full[n_outer:-1]), full[-1]


def _thin(parameter: Tensor, full: torch.Size, n_outer: int) -> Tensor:
    """View a factor as (outer or 1, rows or 1, columns or 1), expanding a group of dimensions only if it varies."""
    shape = (1,) * (len(full) - parameter.ndim) + tuple(parameter.shape)
    target: list[int] = []
    flat: list[int] = []
    for start, stop in ((0, n_outer), (n_outer, len(full) - 1), (len(full) - 1, len(full))):
        varies = any(size != 1 for size in shape[start:stop])
        sizes = full[start:stop] if varies else (1,) * (stop - start)
        target.extend(sizes)
        flat.append(math.prod(sizes))
    return parameter.expand(*target).reshape(flat)


@dataclass(frozen=True)
class _Call:
    ones: NonZeros | Tensor
    """Index of the ones, or (on other devices than the CPU, where nothing is searched) their mask."""
    sum_last: bool
    grad_mode: bool


class _Score(torch.autograd.Function):
    """Score zeros everywhere and ones where they are; keep the slopes in log p and in the logits for backward."""

    @staticmethod
    def forward(ctx: Any, call: _Call, logits: Tensor, *factors: Tensor) -> Tensor:
        asked = {"sum_last": call.sum_last, "learns": call.grad_mode and any(ctx.needs_input_grad)}
        if isinstance(call.ones, Tensor):
            out, *slopes = _score_all(call.ones, logits, factors, **asked)
        else:
            out, *slopes = score_ones(call.ones.parts(), logits, factors, **asked)
        ctx.sum_last, ctx.n_factors = call.sum_last, len(factors)
        ctx.save_for_backward(*slopes, *factors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        in_log_p, in_logits, *factors = ctx.saved_tensors
        wide = grad.unsqueeze(-1) if ctx.sum_last else grad
        wanted = ctx.needs_input_grad
        return (
            None,
            in_logits * wide if wanted[1] else None,
            *(
                _reduce(in_log_p, grad, factor.shape, sum_last=ctx.sum_last) * torch.sigmoid(-factor)
                if needed
                else None
                for factor, needed in zip(factors, wanted[2:], strict=True)
            ),
        )


def _score_all(
    ones: NonZeros | Tensor, logits: Tensor, factors: Sequence[Tensor], *, sum_last: bool, learns: bool
) -> list[Tensor]:
    """Return log-probabilities, and their slopes in log p and in the logits, if wanted."""
    n_samples, n_rows, _ = logits.shape
    out = logits.new_empty((n_samples, n_rows) if sum_last else logits.shape)
    slopes = [torch.empty_like(logits) for _ in range(2)] if learns else []
    for sample, rows, seen in _blocks(ones, logits):
        parts = [_part(factor, sample, rows) for factor in factors]
        into = [slope[sample, rows] for slope in slopes]
        value = _score_block(logits[sample, rows], parts, seen, into)
        out[sample, rows] = value.sum(-1) if sum_last else value
    return [out, *slopes]


def _score_ones(
    ones: list[Tensor], logits: Tensor, factors: list[Tensor], *, sum_last: bool, learns: bool
) -> list[Tensor]:
    index = NonZeros.of_parts(ones, logits.shape[2])
    return _score_all(index, logits, factors, sum_last=sum_last, learns=learns)


score_ones = as_operator(
    "score_ones(Tensor[] ones, Tensor logits, Tensor[] factors, *, bool sum_last, bool learns) -> Tensor[]",
    _score_ones,
)
"""The same as one operation, from the parts of the index of the ones: blocks and shortcuts depend on values."""


@dataclass(frozen=True)
class _Seen:
    """The ones of one block: their place in the flattened block, their row and their column."""

    flat: Tensor
    rows: Tensor
    cols: Tensor


def _blocks(ones: NonZeros | Tensor, logits: Tensor) -> Iterator[tuple[int, slice, _Seen | Tensor]]:
    """Cut the work into some rows of one sample at a time (on other devices than CPU: all rows)."""
    n_samples, n_rows, n_columns = logits.shape
    if isinstance(ones, Tensor):
        yield from ((sample, slice(n_rows), ones) for sample in range(n_samples))
        return
    step = max(1, _BLOCK // max(1, n_columns))
    one_block = step >= n_rows
    starts = [] if one_block else ones.row_starts.tolist()
    for start in range(0, n_rows, step):
        first = 0 if one_block else starts[start]
        last = len(ones) if start + step >= n_rows else starts[start + step]
        seen = _Seen(
            ones.flat[first:last] - start * n_columns,
            ones.rows[first:last] - start,
            ones.cols[first:last],
        )
        for sample in range(n_samples):
            yield sample, slice(start, min(start + step, n_rows)), seen


def _part(factor: Tensor, sample: int, rows: slice) -> Tensor:
    of_sample = factor[sample if factor.shape[0] > 1 else 0]
    return of_sample[rows] if of_sample.shape[0] > 1 else of_sample


def _score_block(logits: Tensor, factors: list[Tensor], seen: _Seen | Tensor, slopes: list[Tensor]) -> Tensor:
    """Return log-probabilities (rows, columns); write their slopes in log p and in the logits, if asked for."""
    passed, failed = torch.sigmoid(logits), torch.sigmoid(-logits.clamp(max=_LARGEST_LOGIT))
    closed = failed  # probability that the region is not accessible
    if factors:
        through, lost = torch.sigmoid(factors[0]), torch.sigmoid(-factors[0])
        for factor in factors[1:]:
            lost = lost + through * torch.sigmoid(-factor)
            through = through * torch.sigmoid(factor)
        failed = torch.addcmul(failed, passed, lost)
        passed = passed * through
    value = _log1m(passed, failed)
    if isinstance(seen, Tensor):
        log_p = sum(map(functional.logsigmoid, factors), functional.logsigmoid(logits))
        value = torch.where(seen, log_p, value)
    else:
        value.view(-1)[seen.flat] = _log_p(logits, factors, seen)
    if slopes:
        in_log_p, in_logits = slopes
        torch.div(passed, failed, out=in_log_p).neg_()
        if isinstance(seen, Tensor):
            in_log_p.masked_fill_(seen, 1.0)
        else:
            in_log_p.view(-1)[seen.flat] = 1.0
        torch.mul(in_log_p, closed, out=in_logits)
    return value


def _log1m(p: Tensor, q: Tensor) -> Tensor:
    """Compute log(1 - p) given q = 1 - p, from the smaller of the two, which alone has all its digits."""
    value = torch.clamp(p, max=0.5).neg_().log1p_()
    if p.device.type == "cpu" and not bool((p > 0.5).any()):
        return value  # the usual case of sparse data
    return value.add_((q * 2.0).clamp_(max=1.0).log_())


def _log_p(logits: Tensor, factors: list[Tensor], seen: _Seen) -> Tensor:
    """Compute log p at the ones."""
    total = functional.logsigmoid(logits.reshape(-1).index_select(0, seen.flat))
    for factor in factors:
        if factor.shape[1] == 1:
            total = total + functional.logsigmoid(factor).reshape(-1).expand(len(logits))[seen.rows]
        elif factor.shape[0] == 1:
            total = total + functional.logsigmoid(factor).reshape(-1)[seen.cols]
        else:
            total = total + functional.logsigmoid(factor.reshape(-1)[seen.flat])
    return total


def _reduce(slope: Tensor, grad: Tensor, shape: torch.Size, *, sum_last: bool) -> Tensor:
    """Multiply slopes (outer, rows, columns) by the incoming gradient and reduce to the factor's shape."""
    if sum_last and shape[2] == 1:
        return (slope.sum(-1) * grad).unsqueeze(-1).sum_to_size(shape)
    if sum_last and shape[0] == shape[1] == 1:
        return torch.mv(slope.view(-1, shape[2]).T, grad.reshape(-1)).view(shape)
    return (slope * (grad.unsqueeze(-1) if sum_last else grad)).sum_to_size(shape)
