"""Networks from a latent to the logits of labels."""

from __future__ import annotations

from torch import Tensor, nn

from pyrocell.nn.mlp import MLP

__all__ = ["Classifier"]


class Classifier(nn.Module):
    """Logits of labels: an MLP with one linear head, or a linear map alone.

    Parameters
    ----------
    n_in
        Width of the input.
    n_labels
        Number of labels.
    n_hidden
        Width of the layers.
    n_layers
        Number of hidden layers; 0 for a linear classifier.
    dropout, batch_norm
        As in :class:`~pyrocell.nn.MLP`.
    """

    def __init__(
        self,
        n_in: int,
        n_labels: int,
        n_hidden: int = 128,
        *,
        n_layers: int = 1,
        dropout: float = 0.1,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.hidden: MLP | None = None
        if n_layers > 0:
            self.hidden = MLP(
                n_in, n_hidden, n_hidden=n_hidden, n_layers=n_layers, dropout=dropout, batch_norm=batch_norm
            )
        self.logits = nn.Linear(n_hidden if n_layers > 0 else n_in, n_labels)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (..., B, n_labels).

        Parameters
        ----------
        x
            Input, shape (..., B, n_in).
        """
        logits: Tensor = self.logits(x if self.hidden is None else self.hidden(x))
        return logits
