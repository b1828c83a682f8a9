"""Networks from a latent to what is expected of each feature."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyrocell.distributions.softmax_mean import SoftmaxMean
from pyrocell.nn.covariates import Covariates, gather_codes
from pyrocell.nn.features import FeatureLinear
from pyrocell.nn.mlp import MLP

__all__ = ["DecoderOutput", "ProfileDecoder"]

# Below this, log(softplus(x)) equals x to float32 precision, and computing it the long way underflows.
_SOFTPLUS_IS_EXP = -15.0


class DecoderOutput:
    """Everything that a :class:`ProfileDecoder` says of cells; each of shape (..., B, n_genes).

    Parameters
    ----------
    log_rho
        Log of the expression profile (natural); with ``profile="identity"``, the unconstrained value. None if logits
        are given.
    log_theta
        Log inverse dispersion of each gene in each cell, when built with the head ``"dispersion"``.
    zi_logits
        Logit of the probability of a structural zero, when built with the head ``"zero_inflation"``.
    logits
        What the profile is the softmax of, if it is one of all features.
    """

    def __init__(
        self,
        log_rho: Tensor | None,
        log_theta: Tensor | None = None,
        zi_logits: Tensor | None = None,
        *,
        logits: Tensor | None = None,
    ) -> None:
        self.log_theta, self.zi_logits, self.logits = log_theta, zi_logits, logits
        if log_rho is not None:
            self.log_rho = log_rho

    @cached_property
    def log_rho(self) -> Tensor:
        """Log of the expression profile; of a softmax, computed when first asked for."""
        assert self.logits is not None
        return functional.log_softmax(self.logits, dim=-1)

    def log_mean(self, log_size: Tensor) -> Tensor | SoftmaxMean:
        """Return the log mean of counts, for their distribution: that of the profile plus the log size.

        Parameters
        ----------
        log_size
            Log size of each cell (natural), shape (B, 1), or with leading dimensions.

        Returns
        -------
        Tensor or SoftmaxMean
            Shape (..., B, n_genes).
        """
        if self.logits is None:
            return self.log_rho + log_size
        return SoftmaxMean(self.logits, log_size, log_rho=self._log_rho)

    def _log_rho(self) -> Tensor:
        return self.log_rho


class ProfileDecoder(nn.Module):
    """Decode a latent into an expression profile over features, and on request dispersion and zero inflation.

    Only what is asked for is built, and inside :func:`~pyrocell.nn.select_features` only the chosen features
    are computed; a softmax profile is still normalised over all features.

    Parameters
    ----------
    n_latent
        Dimension of the latent.
    n_genes
        Number of features.
    n_hidden
        Width of the layers.
    n_batch
        Number of experimental batches.
    n_layers, batch_norm, layer_norm
        As in :class:`~pyrocell.nn.MLP`; there is no dropout.
    covariates
        The covariates to condition on beside the batch; its ``embedding_dim`` speaks of the batch.
    heads
        Which of ``"dispersion"`` and ``"zero_inflation"`` to build beside the profile.
    profile
        ``"softmax"`` for a profile that sums to one, ``"softplus"`` for a positive one (with an external size
        factor), ``"identity"`` for an unconstrained one.
    """

    def __init__(
        self,
        n_latent: int,
        n_genes: int,
        n_hidden: int = 128,
        n_batch: int = 1,
        *,
        n_layers: int = 1,
        batch_norm: bool = True,
        layer_norm: bool = False,
        covariates: Covariates | None = None,
        heads: Collection[Literal["dispersion", "zero_inflation"]] = (),
        profile: Literal["softmax", "softplus", "identity"] = "softmax",
    ) -> None:
        super().__init__()
        if profile not in ("softmax", "softplus", "identity"):
            raise ValueError(f"profile must be 'softmax', 'softplus' or 'identity', got {profile!r}")
        unknown = set(heads) - {"dispersion", "zero_inflation"}
        if unknown:
            raise ValueError(f"heads may hold 'dispersion' and 'zero_inflation', got {sorted(unknown)}")
        self.n_latent, self.n_genes, self.profile = n_latent, n_genes, profile
        self.mlp = MLP(
            n_latent,
            n_hidden,
            n_hidden=n_hidden,
            n_layers=n_layers,
            dropout=0.0,
            batch_norm=batch_norm,
            layer_norm=layer_norm,
            covariates=(covariates or Covariates()).with_batch(n_batch),
        )
        self.scale = FeatureLinear(n_hidden, n_genes)
        self.dispersion = FeatureLinear(n_hidden, n_genes) if "dispersion" in heads else None
        self.zero_inflation = FeatureLinear(n_hidden, n_genes) if "zero_inflation" in heads else None

    def forward(
        self,
        z: Tensor,
        batch: Tensor | None = None,
        categorical: Tensor | None = None,
        continuous: Tensor | None = None,
    ) -> Tensor:
        """Return the expression profile rho.

        Parameters
        ----------
        z
            Latent, shape (..., B, n_latent).
        batch
            Batch of each cell, int64, shape (B,). Covariates broadcast over leading dimensions of ``z``.
        categorical
            Other categorical covariates, int64, shape (B, R).
        continuous
            Continuous covariates, shape (B, P).

        Returns
        -------
        Tensor
            Shape (..., B, n_genes): a fraction for ``"softmax"``, positive for ``"softplus"``.
        """
        hidden = self.hidden(z, batch, categorical, continuous)
        if self.profile == "softmax":
            return self.scale.softmax(hidden)
        value: Tensor = self.scale(hidden)
        return value if self.profile == "identity" else functional.softplus(value)

    def log_profile(
        self,
        z: Tensor,
        batch: Tensor | None = None,
        categorical: Tensor | None = None,
        continuous: Tensor | None = None,
    ) -> Tensor:
        """Return log rho (natural), computed in the log domain; arguments as in :meth:`forward`."""
        return self._log_profile(self.hidden(z, batch, categorical, continuous))

    def heads(
        self,
        z: Tensor,
        batch: Tensor | None = None,
        categorical: Tensor | None = None,
        continuous: Tensor | None = None,
    ) -> DecoderOutput:
        """Return the profile and the other heads built, from one pass; arguments as in :meth:`forward`."""
        hidden = self.hidden(z, batch, categorical, continuous)
        whole = self.profile == "softmax" and self.scale.selected is None
        return DecoderOutput(
            None if whole else self._log_profile(hidden),
            None if self.dispersion is None else self.dispersion(hidden),
            None if self.zero_inflation is None else self.zero_inflation(hidden),
            logits=self.scale.logits(hidden) if whole else None,
        )

    def hidden(
        self,
        z: Tensor,
        batch: Tensor | None = None,
        categorical: Tensor | None = None,
        continuous: Tensor | None = None,
    ) -> Tensor:
        """Return the last hidden layer, shape (..., B, n_hidden); arguments as in :meth:`forward`."""
        hidden: Tensor = self.mlp(z, gather_codes(self.mlp.covariates, batch, categorical), continuous)
        return hidden

    def _log_profile(self, hidden: Tensor) -> Tensor:
        if self.profile == "softmax":
            return self.scale.log_softmax(hidden)
        value: Tensor = self.scale(hidden)
        return value if self.profile == "identity" else _log_softplus(value)


def _log_softplus(x: Tensor) -> Tensor:
    # Both branches are finite everywhere: torch.where would pass on the NaN gradient of the branch not taken.
    return torch.where(x < _SOFTPLUS_IS_EXP, x, functional.softplus(x.clamp_min(_SOFTPLUS_IS_EXP)).log())
