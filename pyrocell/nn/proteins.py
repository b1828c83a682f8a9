"""Networks for proteins measured beside RNA: what is background, what is signal, and which of the two a count is."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyrocell.nn.covariates import Covariates, InjectedLinear, gather_codes, indicators
from pyrocell.nn.decoders import ProfileDecoder
from pyrocell.nn.features import FeatureLinear
from pyrocell.nn.mlp import MLP

__all__ = ["ProteinDecoder", "ProteinOutput", "SkipDecoder"]

_LOG_BACKGROUND_LIMIT = 15.0
_SMALLEST_SD = 1e-8
_OPEN_GATE = 0.5
"""Initial bias of the foreground: with the gate of a relu shut for all cells, it would never learn to open."""
_MOSTLY_BACKGROUND = 2.0
"""Initial bias of the logit of the background: signal is what the data speak for."""


class SkipDecoder(ProfileDecoder):
    """A profile decoder whose output layer sees the latent too, beside the hidden layer.

    Parameters
    ----------
    n_latent, n_genes, n_hidden, n_batch, n_layers, covariates, heads, profile
        As in :class:`~pyrocell.nn.ProfileDecoder`.
    dropout
        Dropout in the hidden layers.
    """

    def __init__(
        self,
        n_latent: int,
        n_genes: int,
        n_hidden: int = 128,
        n_batch: int = 1,
        *,
        n_layers: int = 1,
        dropout: float = 0.0,
        covariates: Covariates | None = None,
        heads: Collection[Literal["dispersion", "zero_inflation"]] = (),
        profile: Literal["softmax", "softplus", "identity"] = "softmax",
    ) -> None:
        super().__init__(
            n_latent,
            n_genes,
            n_hidden,
            n_batch,
            n_layers=n_layers,
            covariates=covariates,
            heads=heads,
            profile=profile,
        )
        self.mlp = MLP(
            n_latent,
            n_hidden,
            n_hidden=n_hidden,
            n_layers=n_layers,
            dropout=dropout,
            covariates=self.mlp.covariates,
        )
        for name, part in list(self.named_children()):
            if isinstance(part, FeatureLinear):
                setattr(self, name, FeatureLinear(n_hidden + n_latent, n_genes))

    def hidden(
        self,
        z: Tensor,
        batch: Tensor | None = None,
        categorical: Tensor | None = None,
        continuous: Tensor | None = None,
    ) -> Tensor:
        """Return the last hidden layer and the latent, shape (..., B, n_hidden + n_latent)."""
        return torch.cat([super().hidden(z, batch, categorical, continuous), z], dim=-1)


class ProteinOutput(NamedTuple):
    """What a :class:`ProteinDecoder` says of cells; each of shape (..., B, n_proteins)."""

    background_mean: Tensor
    """Mean of the log background, log counts."""
    background_sd: Tensor
    """Standard deviation of the log background."""
    log_fold: Tensor
    """Log of the foreground over the background, at least 0."""
    background_logits: Tensor
    """Logit of the probability that a count is background."""


class ProteinDecoder(nn.Module):
    """Decode a latent into background, foreground and their odds for each protein.

    Three small networks, each with the latent and the covariates in the output layer too. A protein that was not
    measured in a batch has no data to learn that batch's offsets from; it is decoded with those of the batch in which
    most cells have it. ``n_measured`` says so.

    Parameters
    ----------
    n_latent
        Dimension of the latent.
    n_measured
        Cells of each batch in which each protein was measured, shape (n_batch, n_proteins).
    n_hidden, n_layers, dropout
        As in :class:`~pyrocell.nn.MLP`.
    covariates
        The covariates to condition on beside the batch, one-hot.
    """

    n_measured: Tensor

    def __init__(
        self,
        n_latent: int,
        n_measured: Tensor,
        n_hidden: int = 128,
        *,
        n_layers: int = 1,
        dropout: float = 0.0,
        covariates: Covariates | None = None,
    ) -> None:
        super().__init__()
        n_batch, n_proteins = n_measured.shape
        self.register_buffer("n_measured", n_measured)
        self.covariates = (covariates or Covariates()).with_batch(n_batch)
        self.hidden, self.outputs = nn.ModuleDict(), nn.ModuleDict()
        for part, heads in _PARTS.items():
            self.hidden[part] = MLP(
                n_latent,
                n_hidden,
                n_hidden=n_hidden,
                n_layers=n_layers,
                dropout=dropout,
                covariates=self.covariates,
            )
            for head in heads:
                self.outputs[head] = InjectedLinear(
                    n_hidden + n_latent, n_proteins, covariates=self.covariates, first=False
                )
        with torch.no_grad():
            self.outputs["fold"].bias.fill_(_OPEN_GATE)  # type: ignore[operator]
            self.outputs["mixing"].bias.fill_(_MOSTLY_BACKGROUND)  # type: ignore[operator]

    @torch.no_grad()
    def start_background(self, mean: Tensor, sd: Tensor) -> None:
        """Let the log background start where its prior is, not at one count; both of shape (n_proteins,)."""
        self.outputs["mean"].bias.copy_(mean)  # type: ignore[operator]
        self.outputs["sd"].bias.copy_(sd.expm1().log())  # type: ignore[operator]

    @cached_property
    def is_incomplete(self) -> bool:
        """Whether some protein was measured in no cell of some batch that has cells with others."""
        return len(self.n_measured) > 1 and bool((self.n_measured == 0).any())

    def donors(self) -> Tensor:
        """Batch that each protein is decoded with in each batch, shape (n_batch, n_proteins)."""
        own = torch.arange(len(self.n_measured), device=self.n_measured.device)[:, None]
        return torch.where(self.n_measured > 0, own, self.n_measured.argmax(0))

    def of_batch(self, table: Tensor, batch: Tensor) -> Tensor:
        """Return each cell's row of a table by batch and protein, at the batch that each protein is decoded with.

        Parameters
        ----------
        table
            Shape (n_batch, n_proteins), or (M, 1, n_batch, n_proteins) for draws.
        batch
            Batch of each cell, int64, shape (B,).
        """
        donors = self.donors()
        rows = table.take_along_dim(donors.expand(table.shape), dim=-2)
        chosen = indicators(batch, len(donors)).to(table.dtype)
        return (chosen.unsqueeze(-2) @ rows).squeeze(-2)

    def background(
        self,
        z: Tensor,
        batch: Tensor | None = None,
        categorical: Tensor | None = None,
        continuous: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the log background; arguments as in :meth:`forward`."""
        mean, sd = self._decode("background", z, batch, categorical, continuous)
        mean = mean.clamp(-_LOG_BACKGROUND_LIMIT, _LOG_BACKGROUND_LIMIT)
        return mean, functional.softplus(sd) + _SMALLEST_SD

    def forward(
        self,
        z: Tensor,
        batch: Tensor | None = None,
        categorical: Tensor | None = None,
        continuous: Tensor | None = None,
    ) -> ProteinOutput:
        """Decode.

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
        """
        given = (z, batch, categorical, continuous)
        return ProteinOutput(*self.background(*given), *self.foreground(*given))

    def foreground(
        self,
        z: Tensor,
        batch: Tensor | None = None,
        categorical: Tensor | None = None,
        continuous: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return log fold over the background and logit of being background; arguments as in :meth:`forward`."""
        (fold,) = self._decode("foreground", z, batch, categorical, continuous)
        (logits,) = self._decode("mixing", z, batch, categorical, continuous)
        return torch.log1p(functional.relu(fold)), logits

    def _decode(
        self,
        part: str,
        z: Tensor,
        batch: Tensor | None,
        categorical: Tensor | None,
        continuous: Tensor | None,
    ) -> list[Tensor]:
        own, *others = gather_codes(self.covariates, batch, categorical)
        measured, own = self.n_measured.sum(1), own.to(self.n_measured.device)
        batches = torch.arange(len(measured), device=measured.device)
        anywhere = torch.where(measured > 0, batches, measured.argmax())
        seen = torch.cat([self.hidden[part](z, [anywhere[own], *others], continuous), z], dim=-1)
        return [self._output(self.outputs[head], seen, [own, *others], continuous) for head in _PARTS[part]]

    def _output(
        self, layer: nn.Module, seen: Tensor, codes: list[Tensor], continuous: Tensor | None
    ) -> Tensor:
        """Apply an output layer, and put the donor's offset where the batch has none of its own."""
        out: Tensor = layer(seen, codes, continuous)
        if len(self.n_measured) == 1:
            return out
        offsets: Tensor = layer.table[: len(self.n_measured)]  # type: ignore[index]
        return out + functional.embedding(codes[0], offsets.gather(0, self.donors()) - offsets)


_PARTS = {"background": ("mean", "sd"), "foreground": ("fold",), "mixing": ("mixing",)}
