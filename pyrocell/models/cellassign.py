"""CellAssign: cell types told from marker genes that are known beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import pyro
import torch
from pyro.distributions import Categorical, Normal, constraints
from pyro.nn import PyroParam
from torch import nn
from torch.nn import functional

from pyrocell.data import Categories, Category, Cells, Continuous, Counts, SizeFactor
from pyrocell.distributions import NegativeBinomial
from pyrocell.errors import QueryError, SetupError
from pyrocell.infer.effects import lazy_deterministic
from pyrocell.infer.plan import TrainingPlan
from pyrocell.models.asking import Question
from pyrocell.models.base import CellModel
from pyrocell.models.labels import probability_table
from pyrocell.models.markers import MarkerCounts, checked_markers
from pyrocell.nn import Covariates, LinearEffects

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["CellAssign"]

UNASSIGNED = "unassigned"
_SUMMED: Any = {"enumerate": "parallel"}
_FIRST_STEP = 1.0  # log fold changes start this far above their least value
_LEAST_SD = (
    0.1  # a free mean and a free spread have their joint maximum at spread 0, where all effects are alike
)
_LARGEST_LOG_MEAN = 12.0
_N_CENTRES = 10
_LEAST_THETA = 1e-3


class CellAssign(CellModel):
    """Mixture of cell types told from marker genes, with a negative binomial likelihood and no network.

    Per cell n, marker gene g and type c, where m_gc says whether g is a marker of c::

        z_n          ~ Categorical(pi)                                   type of the cell
        delta_gc     ~ LogNormal(mean, sd), at least min_log_fold        log fold change of a marker in its type
        log mu_ng    = log size_n + beta_g + beta_g(batch_n, covariates_n) + m_gz delta_gz
        x_ng         ~ NB(mu_ng, theta_ng)

    theta depends on whether the gene is a marker of the type, or on mu. The types are summed over, exactly; pi, beta,
    delta and theta are point estimates, mean and sd of delta among them.

    Parameters
    ----------
    adata
        Raw counts, set up with ``CellAssign.setup_anndata``. They may have other genes than the markers, and should:
        the size of a cell is its total over all genes unless a size factor is given.
    cell_type_markers
        Genes by cell types: 1 where the gene is a marker of the type, else 0. Genes are matched by name.
    unassigned
        Whether there is a further type, ``"unassigned"``, without any marker: cells of none of the types.
    min_log_fold
        Least natural logarithm of the fold change of a marker in its type: 2 is 7.4 times.
    dispersion
        ``"gene-marker"``: each gene has an inverse dispersion for the types that it is a marker of, and another for the
        rest. ``"mean"``: one smooth function of the expected count for all genes, as published.

    Raises
    ------
    SetupError
        If the table of markers or an option is impossible; the message names the genes or types.
    DataError
        If the data lack markers, cells have no count of any marker, or the counts cannot be used.

    Notes
    -----
    Fields: ``counts`` (of the markers), ``size_factor`` (by default the total over all genes), ``batch``,
    ``categorical_covariates``, ``continuous_covariates``.

    Sites: ``z`` (code of the type), ``delta`` (n_types, n_genes: natural log fold change, the same for all cells),
    ``mu`` (n_genes, expected counts), ``x`` (n_genes, counts).

    When not to use it: where the types are not known beforehand or have no markers that set them apart; where a type
    that is abundant in the data is missing from the table and shares markers with one that is in it; or where labelled
    cells of the same kind are at hand, from which `SCANVI` learns more than a list of genes says.

    Departures from the original: the exact marginal likelihood is maximised, not the expected joint one, which rewards
    certainty; starting values come from the counts, so that the scale of size factors means nothing; each gene has
    dispersions of its own; pi has a flat prior in place of Dirichlet(0.01), which rewards empty types; the spread of
    delta is at least 0.1.

    References
    ----------
    A. W. Zhang, C. O'Flanagan, E. A. Chavez, J. L. P. Lim, et al. Probabilistic cell-type assignment of single-cell
    RNA-seq for tumor microenvironment profiling. Nature Methods 16, 1007-1015 (2019).
    https://doi.org/10.1038/s41592-019-0529-1
    """

    counts = Counts()
    size_factor = SizeFactor(total_of=counts)
    batch = Category(optional=True)
    categorical_covariates = Categories()
    continuous_covariates = Continuous()

    kl_warmup_cap = 0
    default_lr = 0.03
    default_batch_size = 2048
    default_early_stopping = True
    # Steps shrink before the end: minibatches of few cells would leave their noise in the estimates.
    # Patience is long, since an epoch of fewer cells than a minibatch is one step.
    default_plan = TrainingPlan(
        eps=1e-8, weight_decay=0.0, patience=100, lr_plateau=True, lr_factor=0.3, lr_patience=50
    )

    fold: Any  # read as tensors, assigned as PyroParam
    fold_sd: Any

    def __init__(
        self,
        adata: AnnData,
        cell_type_markers: pd.DataFrame,
        *,
        unassigned: bool = False,
        min_log_fold: float = 2.0,
        dispersion: Literal["gene-marker", "mean"] = "gene-marker",
    ) -> None:
        _check_options(min_log_fold, dispersion)
        markers = checked_markers(cell_type_markers, UNASSIGNED)
        super().__init__(adata, features={"counts": list(markers.index)})
        self._require_sizes(markers)
        self.types = [*markers.columns, UNASSIGNED] if unassigned else list(markers.columns)
        self.min_log_fold, self.dispersion = min_log_fold, dispersion
        counts = MarkerCounts.of(self.dataset, markers)
        self.is_marker = torch.tensor(markers.reindex(columns=self.types, fill_value=False).to_numpy().T)
        self.marker_at = self.is_marker.flatten().nonzero()[:, 0]
        n_types, n_genes = self.is_marker.shape

        first = min_log_fold + _FIRST_STEP
        self.type_logits = nn.Parameter(torch.zeros(n_types))
        # Not all alike, where their mean would start at the optimum and their spread at 0.
        steps = _FIRST_STEP * (0.1 * torch.randn(int(self.is_marker.sum()))).exp()
        self.fold = PyroParam(min_log_fold + steps, constraints.greater_than(min_log_fold))
        self.fold_mean = nn.Parameter(torch.tensor(math.log(first)))
        self.fold_sd = PyroParam(torch.tensor(1.0), constraints.greater_than(_LEAST_SD))
        # With as many cells of each type, this and the first fold changes give each gene the rate that it has.
        above = torch.log1p(self.is_marker.float().mean(0) * math.expm1(first))
        covariates = Covariates(
            sizes=tuple(self.data.sizes("categorical_covariates")),
            n_continuous=self.data.size("continuous_covariates"),
        )
        self.base = LinearEffects(counts.rate.log() - above, covariates.with_batch(self.data.size("batch")))
        if dispersion == "mean":
            self.centres = torch.linspace(0.0, counts.largest, _N_CENTRES)
            self.log_weights = nn.Parameter(torch.zeros(_N_CENTRES))
        else:
            self.log_theta = nn.Parameter(torch.zeros(2, n_genes))

    def _require_sizes(self, markers: pd.DataFrame) -> None:
        """Refuse to take a total over the markers alone for the size of a cell."""
        if not self.data.has("size_factor") and set(self.data.names("size_factor")) <= set(markers.index):
            raise SetupError(
                f"The data have no other genes than the {len(markers)} markers: their total says which type a cell is, "
                "not how deep it was sequenced. Give data with all genes, or name a column with totals over all genes: "
                "setup_anndata(adata, size_factor_key=...)."
            )

    def model(self, cells: Cells) -> None:
        """Generate counts of the markers from a type."""
        nothing = self.fold.new_zeros(self.is_marker.numel())  # by positions: a mask would make a device wait
        delta = nothing.index_copy(0, self.marker_at, self.fold).view_as(self.is_marker)
        lazy_deterministic("delta", lambda: delta, event_dim=2)
        pyro.factor("shrinkage", Normal(self.fold_mean, self.fold_sd).log_prob(self.fold.log()).sum())
        with self.plate(cells):
            z = pyro.sample("z", Categorical(logits=self.type_logits), infer=_SUMMED)
            base = self.base(cells.batch, cells.categorical_covariates, cells.continuous_covariates)
            log_mean = _size(cells).log() + base + functional.embedding(z, delta)
            log_mean = log_mean.clamp(max=_LARGEST_LOG_MEAN)
            lazy_deterministic("mu", log_mean.exp, event_dim=1)
            x = NegativeBinomial(log_mean=log_mean, log_theta=self._log_theta(log_mean, z))
            pyro.sample("x", x.to_event(1), obs=cells.counts)

    def guide(self, cells: Cells) -> None:
        """Draw nothing: types are summed over in the model, and the rest are point estimates."""

    def _log_theta(self, log_mean: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if self.dispersion == "gene-marker":
            elsewhere, as_marker = self.log_theta
            return functional.embedding(z, torch.where(self.is_marker, as_marker, elsewhere))
        # Beyond the last centre the sum would vanish: there it stays as it is at that centre.
        mean = log_mean.exp().clamp(max=self.centres[-1])
        sharpness = 0.5 / (self.centres[1] - self.centres[0]).square()
        theta = torch.full_like(mean, _LEAST_THETA)
        for weight, centre in zip(self.log_weights.exp(), self.centres, strict=True):
            theta = theta + weight * torch.exp(-sharpness * (mean - centre).square())
        return theta.log()

    def predict(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        soft: bool = True,
        min_probability: float = 0.0,
        batch_size: int | None = None,
    ) -> pd.DataFrame | pd.Series:
        """Tell the type of each cell: the exact posterior given the fitted parameters.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        soft
            Return the probability of every type; otherwise the likeliest type.
        min_probability
            For ``soft=False``: cells whose likeliest type has a lower probability are ``"unassigned"``.

        Returns
        -------
        DataFrame or Series
            Probabilities of cells by types, or with ``soft=False`` the type of each cell.
        """
        if not 0 <= min_probability <= 1 or (soft and min_probability > 0):
            raise QueryError(
                f"min_probability is {min_probability} with soft={soft}; expected a probability, and soft=False: it "
                "says which cells get no label."
            )
        question = Question(self, adata, indices, batch_size=batch_size)
        with self.asking():
            drawer = self.drawer()
            table = probability_table(
                question, lambda cells: drawer.class_probabilities(cells)["z"], self.types
            )
        if soft:
            return table
        labels = table.idxmax(axis=1).rename("cell_type")
        return labels.where(table.max(axis=1) >= min_probability, UNASSIGNED)

    def get_marker_effects(self) -> pd.DataFrame:
        """Return delta, the natural log fold change of each marker in its types: genes by types, 0 elsewhere."""
        values = self.posterior("delta")
        return pd.DataFrame(values.T, index=self.data.names("counts"), columns=self.types)

    def get_type_proportions(self) -> pd.Series:
        """Return pi, the fitted share of each type among the cells that the model was trained on."""
        self.require_trained()
        pi = self.type_logits.detach().softmax(-1).cpu().numpy()
        return pd.Series(pi, index=self.types, name="proportion")


def _size(cells: Cells) -> torch.Tensor:
    """Size of each cell, shape (B, 1): the field tells a total where no column was given."""
    assert cells.size_factor is not None
    return cells.size_factor


def _check_options(min_log_fold: float, dispersion: str) -> None:
    if not 0 <= min_log_fold < _LARGEST_LOG_MEAN:
        raise SetupError(
            f"min_log_fold is {min_log_fold}; expected a natural log fold change from 0 to {_LARGEST_LOG_MEAN:g}, such "
            "as 2 (7.4 times)."
        )
    if dispersion not in ("gene-marker", "mean"):
        raise SetupError(f"dispersion is {dispersion!r}; expected 'gene-marker' or 'mean'.")
