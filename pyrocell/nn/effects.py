"""What batch and covariates add to a feature, without a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyrocell.nn.covariates import Covariates, InjectedLinear, gather_codes

__all__ = ["LinearEffects"]


class LinearEffects(nn.Module):
    """A value of each feature, and what each batch and covariate adds to it; nothing before training.

    Parameters
    ----------
    start
        Value of each feature to start from, shape (n_features,).
    covariates
        The covariates, the batch first.
    """

    def __init__(self, start: Tensor, covariates: Covariates) -> None:
        super().__init__()
        self.covariates = covariates
        self.linear = InjectedLinear(0, len(start), covariates=covariates)
        with torch.no_grad():
            for parameter in self.linear.parameters():
                parameter.zero_()
            self.linear.bias.copy_(start)

    def forward(
        self, batch: Tensor, categorical: Tensor | None = None, continuous: Tensor | None = None
    ) -> Tensor:
        """Return the value of each feature in each cell.

        Parameters
        ----------
        batch
            Batch of each cell, int64, shape (B,).
        categorical, continuous
            The other covariates, shape (B, R) and (B, P).

        Returns
        -------
        Tensor
            Shape (B, n_features), or (n_features,) where there are no covariates.
        """
        codes = gather_codes(self.covariates, batch, categorical)
        effects: Tensor = self.linear(batch, codes, continuous)
        return effects
