"""The output layer over features, of which a query may compute only some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["FeatureLinear", "select_features"]

_BLOCK = 1024


class FeatureLinear(nn.Linear):
    """A linear layer with one output per feature; within :func:`select_features`, for the chosen ones only.

    Parameters
    ----------
    n_in
        Width of the input.
    n_features
        Number of features.
    """

    def __init__(self, n_in: int, n_features: int) -> None:
        super().__init__(n_in, n_features)
        self.selected: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        """Map (..., n_in) to (..., n_features), or to (..., n_selected)."""
        if self.selected is None:
            return functional.linear(h, self.weight, self.bias)
        return functional.linear(h, self.weight[self.selected], self.bias[self.selected])

    def log_softmax(self, h: Tensor) -> Tensor:
        """Log-softmax over *all* features, at the chosen ones; float32 or wider."""
        if self.selected is None:
            return functional.log_softmax(_at_least_float32(self(h)), dim=-1)
        return _at_least_float32(self(h)) - self._log_normaliser(h)

    def softmax(self, h: Tensor) -> Tensor:
        """Softmax over *all* features, at the chosen ones; float32 or wider."""
        if self.selected is None:
            return functional.softmax(_at_least_float32(self(h)), dim=-1)
        return self.log_softmax(h).exp()

    def _log_normaliser(self, h: Tensor) -> Tensor:
        """Log of the sum over all features of exp(output), shape (..., 1), a block of features at a time."""
        parts = [
            _at_least_float32(functional.linear(h, weight, bias)).logsumexp(-1)
            for weight, bias in zip(self.weight.split(_BLOCK), self.bias.split(_BLOCK), strict=True)
        ]
        return torch.stack(parts, dim=-1).logsumexp(-1, keepdim=True)


def _at_least_float32(x: Tensor) -> Tensor:
    # Sums over thousands of features lose too much in half precision.
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@contextmanager
def select_features(module: nn.Module, index: Tensor | Sequence[int] | None) -> Iterator[None]:
    """Let every :class:`FeatureLinear` within ``module`` compute only the chosen features.

    Selections nest: the inner one holds, counted in all features, and the outer one comes back when it ends.

    Parameters
    ----------
    module
        The network, itself a feature layer or with feature layers somewhere within.
    index
        Positions of the features wanted, in the order wanted; ``None`` for all.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, FeatureLinear)]
    before = [layer.selected for layer in layers]
    chosen = None if index is None else torch.as_tensor(index, dtype=torch.int64)
    for layer in layers:
        _check_positions(chosen, layer.out_features)
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
