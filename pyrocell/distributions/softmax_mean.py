"""Means of counts that are shares of a cell's size, kept as logits until somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from pyrocell.distributions.shapes import broadcast

__all__ = ["SoftmaxMean"]


class SoftmaxMean:
    """Log mean of counts, given as logits of a profile that sums to one, and a log size.

    log mean = log_softmax(logits) + log_size. A distribution of counts that is given one as its log mean (or log rate)
    scores rows of float32 counts on the CPU by one loop over logits, size and counts, softmax included; elsewhere, and
    for whoever asks, the log mean is computed.

    Parameters
    ----------
    logits : Tensor
        Shape (..., n_genes); the softmax is over the last dimension.
    log_size : Tensor
        Natural logarithm of the expected sum of a row of counts, shape (..., 1) or (). Broadcasts with the logits.
    log_rho : callable, optional
        Where log_softmax(logits) is had from, if somebody keeps it.

    Raises
    ------
    ValueError
        If the logits have no dimension, or the last one of ``log_size`` is not 1.
    """

    def __init__(
        self, logits: Tensor, log_size: Tensor, *, log_rho: Callable[[], Tensor] | None = None
    ) -> None:
        if logits.ndim == 0 or (log_size.ndim and log_size.shape[-1] != 1):
            raise ValueError(
                f"logits and log_size have shapes {tuple(logits.shape)} and {tuple(log_size.shape)}; give logits of"
                " (..., n_genes), and one size a row: (..., 1)"
            )
        self.logits, self.log_size = logits, log_size
        self._log_rho = log_rho

    @cached_property
    def shape(self) -> torch.Size:
        """Shape of the log mean."""
        return broadcast(self.logits.shape, self.log_size.shape)

    @cached_property
    def log_mean(self) -> Tensor:
        """The log mean, computed when first asked for; broadcast shape of logits and log size."""
        log_rho = self.logits.log_softmax(-1) if self._log_rho is None else self._log_rho()
        return log_rho + self.log_size

    def to(self, dtype: torch.dtype, device: torch.device | None) -> SoftmaxMean:
        """Give the same in another precision or place."""
        parts = self.logits, self.log_size
        logits, log_size = (part.to(dtype=dtype, device=device) for part in parts)
        same = logits is self.logits and log_size is self.log_size
        return self if same else SoftmaxMean(logits, log_size)
