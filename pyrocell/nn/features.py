"""The output layer over features, of which a query may compute only some."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyrocell.nn.normaliser import largest_and_sum
from pyrocell.nn.products import linear

__all__ = ["FeatureLinear", "select_features"]

_BLOCK = 2**20


class FeatureLinear(nn.Module):
    """A linear layer with one output per feature; within :func:`select_features`, for the chosen ones only.

    Weights start as those of torch's ``Linear``.

    Parameters
    ----------
    n_in
        Width of the input.
    n_features
        Number of features.
    field
        Field of the data that the features belong to: a selection may be meant for one field alone.
    """

    def __init__(self, n_in: int, n_features: int, *, field: str = "counts") -> None:
        super().__init__()
        self.field = field
        bound = 1.0 / math.sqrt(n_in)
        self.weight = nn.Parameter(torch.empty(n_in, n_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n_features).uniform_(-bound, bound))
        self.selected: Tensor | None = None

    @property
    def n_features(self) -> int:
        """Number of features, chosen or not."""
        return len(self.bias)

    def forward(self, h: Tensor) -> Tensor:
        """Map (..., n_in) to (..., n_features), or to (..., n_selected)."""
        if self.selected is None:
            return linear(h, self.weight, self.bias)
        return linear(h, self.weight[:, self.selected], self.bias[self.selected])

    def logits(self, h: Tensor) -> Tensor:
        """Return what the softmax is of, at the chosen features; float32 or wider."""
        return _at_least_float32(self(h))

    def log_softmax(self, h: Tensor) -> Tensor:
        """Log-softmax over *all* features, at the chosen ones; float32 or wider."""
        if self.selected is None:
            return functional.log_softmax(self.logits(h), dim=-1)
        largest, total = self._normaliser(h)
        return (self.logits(h) - largest) - total.log()

    def softmax(self, h: Tensor) -> Tensor:
        """Softmax over *all* features, at the chosen ones; float32 or wider."""
        if self.selected is None:
            return functional.softmax(self.logits(h), dim=-1)
        largest, total = self._normaliser(h)
        return (self.logits(h) - largest).exp() / total

    def _normaliser(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest output m, and the sum over all features of exp(output - m), shape (..., 1) each.

        Some cells at a time: cells by features are never stored.
        """
        flat = h.reshape(-1, h.shape[-1])
        parts = flat.split(max(1, _BLOCK // self.n_features))
        found = [largest_and_sum(_at_least_float32(linear(part, self.weight, self.bias))) for part in parts]
        largest, total = (torch.cat(halves).view(*h.shape[:-1], 1) for halves in zip(*found, strict=True))
        return largest, total


def _at_least_float32(x: Tensor) -> Tensor:
    # Sums over thousands of features lose too much in half precision.
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@contextmanager
def select_features(
    module: nn.Module, index: Tensor | Sequence[int] | None, field: str | None = None
) -> Iterator[None]:
    """Let every :class:`FeatureLinear` within ``module``, or those of one field, compute only the chosen features.

    Selections nest: the inner one holds, counted in all features, and the outer one comes back when it ends.

    Parameters
    ----------
    module
        The network, itself a feature layer or with feature layers somewhere within.
    index
        Positions of the features wanted, in the order wanted; ``None`` for all.
    field
        Restrict only the layers whose features belong to this field; ``None`` for all layers.
    """
    layers = [
        layer
        for layer in module.modules()
        if isinstance(layer, FeatureLinear) and field in (None, layer.field)
    ]
    before = [layer.selected for layer in layers]
    chosen = None if index is None else torch.as_tensor(index, dtype=torch.int64)
    for layer in layers:
        _check_positions(chosen, layer.n_features)
    try:
        for layer in layers:
            layer.selected = None if chosen is None else chosen.to(layer.weight.device)
        yield
    finally:
        for layer, selected in zip(layers, before, strict=True):
            layer.selected = selected


def _check_positions(index: Tensor | None, n_features: int) -> None:
    if index is None or not index.numel():
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= n_features:
        raise ValueError(
            f"feature positions run from 0 to {n_features - 1}, got positions from {low} to {high}"
        )
