"""The product of an input and a weight matrix, by the fastest exact way that the input and the machine allow."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from pyrocell.distributions import NonZeros

__all__ = ["linear"]

_LARGE = 2**22
"""Multiplications from which oneDNN's start-up is repaid."""


def linear(x: Tensor | NonZeros, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute ``x @ weight + bias`` in the precision of the input.

    On the CPU, counts that carry the index of their non-zeros are read at these alone, and large products are
    oneDNN's where the processor has AVX-512 and is not Intel's: the library that torch uses otherwise runs at half its
    speed on processors of other makers than its own, and is the faster one there.

    Parameters
    ----------
    x
        Input, shape (..., n_in), or the index of its non-zeros.
    weight
        Shape (n_in, n_out): one row per input.
    bias
        Shape (n_out,).

    Returns
    -------
    Tensor
        Shape (..., n_out).
    """
    by_torch = weight.device.type != "cpu" or torch.is_autocast_enabled("cpu")
    nonzeros = None if by_torch else _nonzeros(x, weight)
    if nonzeros is not None:
        counted: Tensor = _LinearOfCounts.apply(nonzeros, weight)
        return counted + bias
    if isinstance(x, NonZeros):
        x = x.dense(weight.dtype)
    if not by_torch and _is_large(x, weight) and not _is_intel() and _has_onednn():
        flat: Tensor = _OneDnnLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
        return flat.view(*x.shape[:-1], -1)
    return functional.linear(x, weight.T, bias)


def _is_large(x: Tensor, weight: Tensor) -> bool:
    fits = x.dtype == weight.dtype == torch.float32 and weight.is_contiguous()
    return fits and x.numel() * weight.shape[1] >= _LARGE


def _nonzeros(x: Tensor | NonZeros, weight: Tensor) -> NonZeros | None:
    if isinstance(x, Tensor):
        if x.ndim != 2 or x.requires_grad or x.dtype != weight.dtype or x.device.type != "cpu":
            return None
        known = NonZeros.known(x)
    else:
        known = x
    if known is None or not known.are_few or known.n_columns != len(weight):
        return None  # another width would pass unseen; torch's own product refuses it
    return known


class _LinearOfCounts(torch.autograd.Function):
    """Weighted sums of rows of the weight, and backward of the incoming gradient: two embedding bags."""

    @staticmethod
    def forward(ctx: Any, nonzeros: NonZeros, weight: Tensor) -> Tensor:
        ctx.nonzeros = nonzeros
        return _weighted_sums(weight, nonzeros.cols, nonzeros.row_starts, nonzeros.values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        by_column = ctx.nonzeros.by_column
        return None, _weighted_sums(grad.contiguous(), by_column.rows, by_column.starts, by_column.values)


def _weighted_sums(table: Tensor, index: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    weights = weights.to(table.dtype)
    return functional.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weights)


class _OneDnnLinear(torch.autograd.Function):
    """oneDNN multiplies by a transposed second matrix, strided or not; only the first must lie row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight.T, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _onednn(grad, weight) if wanted[0] else None,
            _onednn(x.T, grad.T) if wanted[1] else None,
            grad.sum(0) if wanted[2] else None,
        )


def _onednn(x: Tensor, transposed: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, transposed, bias, "none", [], "")
    return out


@cache
def _is_intel() -> bool:
    """Whether the processor is of the maker of MKL, torch's usual library."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            told = lines.read(4096)
    except OSError:  # not Linux
        told = platform.processor()
    return "GenuineIntel" in told


@cache
def _has_onednn() -> bool:
    """Whether oneDNN's product is there and right: torch does not promise that operator to anyone but its compiler."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        return torch.equal(_onednn(x, weight, torch.ones(4)), x @ weight.T + 1.0)
    except (AttributeError, RuntimeError, TypeError):
        return False
