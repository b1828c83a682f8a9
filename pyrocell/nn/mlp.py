"""The one multilayer perceptron of the library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from pyrocell.distributions import NonZeros
from pyrocell.nn.covariates import Covariates, InjectedLinear

__all__ = ["MLP"]


class _CellNorm(nn.BatchNorm1d):
    """Batch normalisation over cells that takes leading dimensions and a single cell."""

    def __init__(self, n_features: int) -> None:
        super().__init__(n_features, eps=1e-3, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., B, F) over everything but the last dimension."""
        if self.training and (x.dim() == 1 or x.shape[-2] == 1):
            # One cell has no variance: normalise it by what was learned so far, and learn nothing from it.
            flat = x.reshape(-1, x.shape[-1])
            learned = (self.running_mean, self.running_var, self.weight, self.bias)
            return functional.batch_norm(flat, *learned, training=False, eps=self.eps).view_as(x)
        if x.dim() == 2:
            return super().forward(x)
        return super().forward(x.reshape(-1, x.shape[-1])).view_as(x)


class _Layer(nn.Module):
    """Linear with covariates, then normalisation, activation and dropout, each where asked for."""

    def __init__(self, linear: InjectedLinear, after: Sequence[nn.Module]) -> None:
        super().__init__()
        self.linear = linear
        self.after = nn.Sequential(*after)

    def forward(self, x: Tensor | NonZeros, codes: Sequence[Tensor], continuous: Tensor | None) -> Tensor:
        out: Tensor = self.after(self.linear(x, codes, continuous))
        return out


class MLP(nn.Module):
    """Fully connected layers: linear with covariates, batch norm, layer norm, activation, dropout.

    Parameters
    ----------
    n_in, n_out
        Width of the input (without covariates) and of the last layer.
    n_hidden
        Width of the layers in between.
    n_layers
        Number of layers, at least one.
    dropout
        Probability of dropping a unit in training.
    batch_norm
        Whether to normalise over cells (momentum 0.01, epsilon 1e-3). In training, a minibatch of one cell is
        normalised by the running statistics, and leading Monte-Carlo dimensions share their statistics.
    layer_norm
        Whether to normalise over units, without learned scale.
    covariates
        What enters besides the input, and whether into every layer.
    activation
        Makes the activation of a layer.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        n_hidden: int = 128,
        n_layers: int = 1,
        dropout: float = 0.1,
        batch_norm: bool = True,
        layer_norm: bool = False,
        covariates: Covariates | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"an MLP has at least one layer, got n_layers={n_layers}")
        self.covariates = covariates or Covariates()
        self.n_in, self.n_out = n_in, n_out
        widths = [n_in, *[n_hidden] * (n_layers - 1), n_out]
        self.layers = nn.ModuleList()
        for i, (width_in, width) in enumerate(pairwise(widths)):
            linear = InjectedLinear(width_in, width, covariates=self.covariates, first=i == 0)
            after: list[nn.Module] = [_CellNorm(width)] if batch_norm else []
            after += [nn.LayerNorm(width, elementwise_affine=False)] if layer_norm else []
            after += [activation()]
            after += [nn.Dropout(dropout)] if dropout > 0 else []
            self.layers.append(_Layer(linear, after))

    def forward(
        self, x: Tensor | NonZeros, codes: Sequence[Tensor] = (), continuous: Tensor | None = None
    ) -> Tensor:
        """Run the layers.

        Parameters
        ----------
        x
            Input, shape (..., B, n_in), or the index of its non-zeros.
        codes
            One int64 tensor of shape (B,) for each categorical covariate; they broadcast over leading axes.
        continuous
            Continuous covariates, shape (B, n_continuous).

        Returns
        -------
        Tensor
            Shape (..., B, n_out).
        """
        first, *others = self.layers
        out: Tensor = first(x, codes, continuous)
        for layer in others:
            out = layer(out, codes, continuous)
        return out

    @property
    def embedding(self) -> Tensor | None:
        """The learned table of the first covariate, shape (levels, embedding_dim), or None."""
        first: InjectedLinear = self.layers[0].linear  # type: ignore[assignment]
        table = first.embedding
        return None if table is None else table.weight
