"""What a network is told about each cell besides its main input, and the linear layer that takes it in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyrocell.distributions import NonZeros
from pyrocell.nn.products import linear

__all__ = ["Covariates", "InjectedLinear", "gather_codes", "indicators"]


def indicators(codes: Tensor, n_levels: int) -> Tensor:
    """Say of each level whether it is a cell's: `torch.nn.functional.one_hot`, which first reads the codes, as bool.

    Parameters
    ----------
    codes
        Whole numbers from 0 to ``n_levels - 1``, shape (...). Others, which the schema refuses, are no level's.
    n_levels
        Number of levels.

    Returns
    -------
    Tensor
        Shape (..., n_levels).
    """
    return codes.unsqueeze(-1) == torch.arange(n_levels, device=codes.device)


@dataclass(frozen=True)
class Covariates:
    """Describe the covariates of a network: how many levels each has, and how they enter.

    Parameters
    ----------
    sizes
        Number of levels of each categorical covariate. A covariate of one level carries no information and is
        dropped entirely: it costs no weight.
    n_continuous
        Number of continuous covariates.
    embedding_dim
        Width of a learned table for the *first* categorical covariate (the experimental batch), which then
        enters the first layer only. ``None`` keeps it one-hot, as the others always are.
    inject
        Whether one-hot and continuous covariates enter every layer, or only the first.
    """

    sizes: tuple[int, ...] = ()
    n_continuous: int = 0
    embedding_dim: int | None = None
    inject: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(int(size) for size in self.sizes))
        if any(size < 1 for size in self.sizes):
            raise ValueError(f"every covariate needs at least one level, got sizes {self.sizes}")
        if self.n_continuous < 0:
            raise ValueError(f"n_continuous must not be negative, got {self.n_continuous}")
        if self.embedding_dim is not None and self.embedding_dim < 1:
            raise ValueError(f"embedding_dim must be a positive number or None, got {self.embedding_dim}")

    def with_batch(self, n_batch: int) -> Covariates:
        """Put the experimental batch in front, as the first categorical covariate."""
        return replace(self, sizes=(n_batch, *self.sizes))

    @property
    def embedded(self) -> bool:
        """Whether the first covariate is looked up in a learned table."""
        return self.embedding_dim is not None and bool(self.sizes) and self.sizes[0] > 1

    @property
    def one_hot(self) -> tuple[int, ...]:
        """Positions of the covariates that enter one-hot: more than one level, not embedded."""
        first = 1 if self.embedded else 0
        return tuple(i for i, size in enumerate(self.sizes) if size > 1 and i >= first)


def gather_codes(
    covariates: Covariates, batch: Tensor | None = None, categorical: Tensor | None = None
) -> list[Tensor]:
    """Line up batch and other categorical covariates, one tensor of codes for each of ``covariates.sizes``.

    Parameters
    ----------
    covariates
        The description, whose first covariate is the batch.
    batch
        Batch of each cell, int64, shape (B,). May be left out when there is one batch only.
    categorical
        The other covariates, int64, shape (B, R). May be left out when there are none.

    Raises
    ------
    ValueError
        If a covariate that the network was built for is missing, or one is given that it was not built for.
    """
    n_other = len(covariates.sizes) - 1
    given = 0 if categorical is None else categorical.shape[-1]
    if given != n_other:
        raise ValueError(f"the network takes {n_other} categorical covariates beside the batch, got {given}")
    if batch is None:
        if covariates.sizes[0] > 1:
            raise ValueError(f"the network knows {covariates.sizes[0]} batches: give the batch of each cell")
        batch = torch.zeros(1, dtype=torch.int64)
    return [batch] if categorical is None else [batch, *categorical.unbind(-1)]


class InjectedLinear(nn.Module):
    """A linear layer on an input with covariates concatenated to it, without building the concatenation.

    A one-hot vector times a weight matrix is one of its columns, so the one-hot columns are kept as rows of
    ``table`` and looked up; the weights of the continuous columns are ``slope``. Values, and the law of the
    initial weights (the default of torch for the full number of inputs), are those of ``Linear`` on the
    concatenation.

    Parameters
    ----------
    n_in, n_out
        Width of the input without covariates, and of the output. Without any input (``n_in=0``) there is no
        ``weight``: the layer is the sum of the effects of the covariates.
    covariates
        What is concatenated.
    first
        Whether this is the first layer of its network, the only one that an embedding enters.
    """

    def __init__(
        self, n_in: int, n_out: int, *, covariates: Covariates | None = None, first: bool = True
    ) -> None:
        super().__init__()
        covariates = covariates or Covariates()
        if not (first or covariates.inject):
            covariates = Covariates()
        self.covariates = covariates
        self.one_hot = covariates.one_hot
        sizes = [covariates.sizes[i] for i in self.one_hot]
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        n_levels, n_continuous = sum(sizes), covariates.n_continuous
        n_embedded = (covariates.embedding_dim or 0) if covariates.embedded and first else 0
        self.fan_in = n_in + n_levels + n_continuous + n_embedded
        self.weight = nn.Parameter(torch.empty(n_in, n_out)) if n_in else None
        self.bias = nn.Parameter(torch.empty(n_out))
        self.table = nn.Parameter(torch.empty(n_levels, n_out)) if n_levels else None
        self.slope = nn.Parameter(torch.empty(n_out, n_continuous)) if n_continuous else None
        self.embedding: nn.Embedding | None = None
        self.embedding_weight: nn.Parameter | None = None
        if n_embedded:
            self.embedding = nn.Embedding(covariates.sizes[0], n_embedded)
            self.embedding_weight = nn.Parameter(torch.empty(n_out, n_embedded))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from U(-b, b), b = 1/sqrt(inputs with covariates), and embeddings from N(0, 1)."""
        bound = 1.0 / math.sqrt(max(1, self.fan_in))
        for weight in (self.weight, self.bias, self.table, self.slope, self.embedding_weight):
            if weight is not None:
                nn.init.uniform_(weight, -bound, bound)
        if self.embedding is not None:
            self.embedding.reset_parameters()

    def dense_weight(self) -> Tensor:
        """Weight (n_out, fan_in) of the equivalent ``Linear`` on [input, one-hots, continuous, embedding]."""
        parts = [
            None if self.weight is None else self.weight.T,
            None if self.table is None else self.table.T,
            self.slope,
            self.embedding_weight,
        ]
        return torch.cat([part for part in parts if part is not None], dim=1)

    def forward(
        self, x: Tensor | NonZeros, codes: Sequence[Tensor] = (), continuous: Tensor | None = None
    ) -> Tensor:
        """Transform ``x``; covariates broadcast over its leading dimensions.

        Parameters
        ----------
        x
            Input, shape (..., B, n_in), or the index of its non-zeros.
        codes
            One int64 tensor of shape (B,) for each categorical covariate, dropped ones included; may be empty
            when all are dropped.
        continuous
            Continuous covariates, shape (B, n_continuous).

        Returns
        -------
        Tensor
            Shape (..., B, n_out).
        """
        out = self.bias if self.weight is None else linear(x, self.weight, self.bias)
        needs_codes = self.table is not None or self.embedding is not None
        if needs_codes and len(codes) != len(self.covariates.sizes):
            raise ValueError(
                f"expected codes of {len(self.covariates.sizes)} categorical covariates, got {len(codes)}"
            )
        if self.table is not None:
            for i, offset in zip(self.one_hot, self.offsets, strict=True):
                size = self.covariates.sizes[i]
                out = out + functional.embedding(codes[i], self.table[offset : offset + size])
        if self.slope is not None:
            if continuous is None:
                raise ValueError(f"expected {self.covariates.n_continuous} continuous covariates, got none")
            out = out + functional.linear(continuous.to(out.dtype), self.slope)
        if self.embedding is not None and self.embedding_weight is not None:
            out = out + functional.linear(self.embedding(codes[0]), self.embedding_weight)
        return out
