"""Networks from measured features to a posterior over a latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyrocell.distributions import NonZeros, log1p_counts
from pyrocell.nn.covariates import Covariates, gather_codes
from pyrocell.nn.mlp import MLP

__all__ = ["GaussianEncoder"]

# Bounds of the log variance: outside them exp() leads to infinities or to a posterior of no width.
_LOG_VARIANCE_LIMIT = 12.0


class GaussianEncoder(nn.Module):
    """Amortised Gaussian posterior: an MLP with one linear head for the mean and one for the log variance.

    Parameters
    ----------
    n_in
        Number of measured features.
    n_latent
        Dimension of the latent.
    n_hidden
        Width of the layers.
    n_batch
        Number of experimental batches to condition on; 1 for none.
    n_layers, dropout, batch_norm, layer_norm
        As in :class:`~pyrocell.nn.MLP`.
    covariates
        The covariates to condition on beside the batch.
    transform
        Applied to the input first; ``None`` for an input that is ready. Only `log1p_counts` gets an index of
        non-zeros as such, any other the dense counts.
    """

    reads_nonzeros: ClassVar[bool] = True
    smallest_variance: ClassVar[float] = 1e-4
    activation: ClassVar[type[nn.Module]] = nn.ReLU

    def __init__(
        self,
        n_in: int,
        n_latent: int,
        n_hidden: int = 128,
        *,
        n_batch: int = 1,
        n_layers: int = 1,
        dropout: float = 0.1,
        batch_norm: bool = True,
        layer_norm: bool = False,
        covariates: Covariates | None = None,
        transform: Callable[[Any], Any] | None = torch.log1p,
    ) -> None:
        super().__init__()
        self.n_latent = n_latent
        self.transform = transform
        self.mlp = MLP(
            n_in,
            n_hidden,
            n_hidden=n_hidden,
            n_layers=n_layers,
            dropout=dropout,
            batch_norm=batch_norm,
            layer_norm=layer_norm,
            covariates=(covariates or Covariates()).with_batch(n_batch),
            activation=self.activation,
        )
        self.mean = nn.Linear(n_hidden, n_latent)
        self.log_variance = nn.Linear(n_hidden, n_latent)

    def forward(
        self,
        x: Tensor | NonZeros,
        batch: Tensor | None = None,
        categorical: Tensor | None = None,
        continuous: Tensor | None = None,
    ) -> dist.TorchDistribution:
        """Encode cells.

        Parameters
        ----------
        x
            Measured features, shape (..., B, n_in), or the index of their non-zeros (`Cells.as_input`, which saves the
            dense array); counts, unless built with ``transform=None``.
        batch
            Batch of each cell, int64, shape (B,).
        categorical
            Other categorical covariates, int64, shape (B, R).
        continuous
            Continuous covariates, shape (B, P).

        Returns
        -------
        TorchDistribution
            Normal of event shape (n_latent,) and batch shape (..., B).
        """
        codes = gather_codes(self.mlp.covariates, batch, categorical)
        if isinstance(x, NonZeros) and self.transform not in (None, log1p_counts):
            x = x.dense()
        hidden = self.mlp(x if self.transform is None else self.transform(x), codes, continuous)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        if mean.dtype in (torch.float16, torch.bfloat16):
            mean, log_variance = mean.float(), log_variance.float()
        variance = (
            log_variance.clamp(-_LOG_VARIANCE_LIMIT, _LOG_VARIANCE_LIMIT).exp() + self.smallest_variance
        )
        # Not validated: that would wait for the device at every step; the trainer watches for bad values.
        return dist.Normal(mean, variance.sqrt(), validate_args=False).to_event(1)
