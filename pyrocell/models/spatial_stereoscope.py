"""SpatialStereoscope: how much of each cell type lies in every spot of a tissue."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import pyro
import torch
from pyro.infer.autoguide import AutoDelta
from torch.nn import functional

from pyrocell import settings
from pyrocell.data import Cells, Counts, Schema, read_setup
from pyrocell.distributions import StandardNormal
from pyrocell.errors import DataError, PyrocellWarning, QueryError, SetupError, list_some
from pyrocell.infer.effects import lazy_deterministic
from pyrocell.models.base import CellModel
from pyrocell.models.rna_stereoscope import MEAN_FLOOR, POINTS, RNAStereoscope, check_unit, sums_of_cells

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["SpatialStereoscope"]


class _PointsFromZero(AutoDelta):
    """Point estimates that start at the mean of their priors, not at draws from them."""

    def __init__(self, model: Callable[..., None], create_plates: Callable[..., pyro.plate]) -> None:
        super().__init__(
            model, init_loc_fn=lambda site: torch.zeros(site["fn"].shape()), create_plates=create_plates
        )


class SpatialStereoscope(CellModel):
    """Cell types in each spot of a tissue, given their profiles, with a negative binomial likelihood.

    Per spot s, gene g and type z, and for noise in place of a type::

        log_abundance_s   flat prior                                  (n_types + 1)
        log_gene_factor_g ~ Normal(0, 1), noise_g ~ Normal(0, 1)      the same for all spots
        abundance_sz      = exp(log_abundance_sz), times library_s    number of cells, were all their RNA captured
        proportions_sz    = abundance_sz / sum_z abundance_sz         without the noise
        mu_sg             = gene_factor_g * sum_z abundance_sz * profile_zg + abundance_s,noise * softplus(noise_g)
        x_sg              ~ NB(mu_sg, theta = mu_sg / exp(logits_g))  as in `RNAStereoscope`

    Profiles and logits are those of the reference and stay as they are. All else is a point estimate: the mode.

    Parameters
    ----------
    adata
        Raw counts of spots, set up with ``SpatialStereoscope.setup_anndata``.
    profiles
        Types by genes: expected counts in a cell of each type. They must have all genes of the data; see
        `from_rna_model`, which takes the shared ones.
    logits
        Logits of each gene, by name.

    Raises
    ------
    SetupError
        If the profiles are no positive numbers, or do not fit the logits.
    DataError
        If the counts cannot be used, or there are genes without a profile, or fewer genes than types.

    Notes
    -----
    Fields: ``counts``.

    Sites: ``log_abundance`` (n_types + 1, log ratio to equal parts of the spot), ``log_gene_factor`` and ``noise``
    (n_genes, no unit, the same for all spots), ``abundance`` (n_types, cells), ``proportions`` (n_types, fraction of
    cells), ``mu`` (n_genes, expected counts), ``x`` (n_genes, counts).

    When not to use it: where spots hold a single cell (tell its type instead), where the reference lacks types of the
    tissue, or for states within a type: each type has one profile.

    Departures from the original: proportions are of cells, not of transcripts (``unit="transcripts"`` gives these);
    gene factors have a prior, and an average cell keeps its number of counts under them; the prior counts once for all
    spots; parameters are on the log scale, and start at equal parts of each spot's counts.

    References
    ----------
    A. Andersson, J. Bergenstrahle, M. Asp, L. Bergenstrahle, et al. Single-cell and spatial transcriptomics enables
    probabilistic inference of cell type topography. Communications Biology 3, 565 (2020).
    https://doi.org/10.1038/s42003-020-01247-y
    """

    counts = Counts()

    automatic_guide = _PointsFromZero
    default_lr = 0.05
    default_batch_size = 1024
    default_plan = POINTS

    def __init__(self, adata: AnnData, profiles: pd.DataFrame, logits: pd.Series) -> None:
        super().__init__(adata)
        genes = self.data.names("counts")
        _check_reference(profiles, logits, genes)
        self.types = [str(name) for name in profiles.index]
        self.profiles = torch.tensor(profiles[genes].to_numpy(dtype=np.float32))
        self.logits = torch.tensor(logits[genes].to_numpy(dtype=np.float32))
        average = self.profiles.mean(0)
        self.size, self.average = average.sum(), average / average.sum()

    @classmethod
    def from_rna_model(cls, spatial_adata: AnnData, rna_model: RNAStereoscope) -> SpatialStereoscope:
        """Make a model of spots from a fitted reference, over the genes that both have.

        Parameters
        ----------
        spatial_adata
            Raw counts of spots, set up with ``SpatialStereoscope.setup_anndata``. Their other genes are left aside.
        rna_model
            A trained `RNAStereoscope`. It is copied from, and not kept.

        Returns
        -------
        SpatialStereoscope
            To be trained.

        Raises
        ------
        DataError
            If fewer genes are shared than there are types, or a spot has no counts over these.

        Warns
        -----
        PyrocellWarning
            If less than half of the genes of the smaller data are shared.
        """
        if not isinstance(rna_model, RNAStereoscope):
            raise SetupError(
                f"rna_model is of type {type(rna_model).__name__}; expected a trained RNAStereoscope."
            )
        profiles, logits = rna_model.get_profiles(), rna_model.get_logits()
        setup = read_setup(spatial_adata, cls.__name__)
        # Of a gene without any count in the reference nothing is known.
        known, given = profiles.columns[rna_model.average.cpu().numpy() > 0], spatial_adata.var_names
        shared = given.isin(known)
        _check_shared(profiles.columns, given, given[shared], len(profiles))
        schema = Schema.freeze(spatial_adata[:, shared], cls.fields, setup)
        genes = schema.names("counts")
        reference = {"profiles": profiles[genes], "logits": logits[genes]}
        model: SpatialStereoscope = cls.build((spatial_adata,), reference, seed=settings.seed, schema=schema)
        return model

    def model(self, cells: Cells) -> None:
        """Generate the counts of each spot from all types and noise."""
        n_types, n_genes = self.profiles.shape
        log_factor = pyro.sample("log_gene_factor", StandardNormal(n_genes))
        noise = pyro.sample("noise", StandardNormal(n_genes))
        with self.plate(cells):
            part = pyro.sample("log_abundance", StandardNormal(n_types + 1).mask(False))
            abundance = part.exp() * (cells.library / (self.size * (n_types + 1)))
            of_types = abundance[..., :-1]
            lazy_deterministic("abundance", lambda: of_types, event_dim=1)
            lazy_deterministic("proportions", lambda: of_types / of_types.sum(-1, keepdim=True), event_dim=1)
            mean = of_types @ self.profiles * self._factor(log_factor)
            mean = mean + abundance[..., -1:] * self._noise_profile(noise)
            lazy_deterministic("mu", lambda: mean, event_dim=1)
            log_mean = mean.clamp_min(MEAN_FLOOR).log()
            pyro.sample("x", sums_of_cells(log_mean, self.logits), obs=cells.counts)

    def _factor(self, log_factor: torch.Tensor) -> torch.Tensor:
        """Gene factors under which an average cell keeps its number of counts: their common scale is that of cells."""
        return (log_factor - (log_factor + self.average.log()).logsumexp(-1, keepdim=True)).exp()

    def _noise_profile(self, noise: torch.Tensor) -> torch.Tensor:
        """Return the counts in a cell of noise: where all genes are alike, as many as in an average cell."""
        return functional.softplus(noise) * (self.size / (math.log(2) * self.average.numel()))

    def get_proportions(
        self,
        adata: AnnData | None = None,
        *,
        indices: Sequence[int] | np.ndarray | None = None,
        keep_noise: bool = False,
        unit: Literal["cells", "transcripts"] = "cells",
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Return how much of each spot is of each type; rows sum to one.

        Parameters
        ----------
        adata, indices, batch_size
            Which spots, and how many at once.
        keep_noise
            Count the noise as one more type, in the column ``noise_term``.
        unit
            ``"cells"``: of the cells (noise counts as so many average cells); ``"transcripts"``: of the expected
            counts of the spot.

        Returns
        -------
        DataFrame
            Spots by types.
        """
        check_unit(unit)
        log_abundance = self.posterior("log_abundance", adata, indices=indices, batch_size=batch_size)
        log_size = self._log_counts_of_parts() if unit == "transcripts" else 0.0
        parts = torch.from_numpy(log_abundance).double() + log_size
        values = (parts if keep_noise else parts[:, :-1]).softmax(-1).numpy()
        columns = [*self.types, "noise_term"] if keep_noise else self.types
        spots = self.require_data(adata).obs_names
        return pd.DataFrame(values, index=spots if indices is None else spots[indices], columns=columns)

    def get_scale_for_ct(self, y: str | Sequence[str]) -> pd.DataFrame:
        """Return what one cell of a type would give in the tissue: expected counts of each gene.

        Parameters
        ----------
        y
            A type, or several; one may be named more than once.

        Returns
        -------
        DataFrame
            Types in the order asked for, by genes.
        """
        wanted = [y] if isinstance(y, str) else [str(name) for name in y]
        if unknown := [name for name in wanted if name not in self.types]:
            raise QueryError(
                f"The model has no types {list_some(unknown)}; it has {list_some(self.types, 20)}."
            )
        factor, _ = self._per_gene()
        values = (self.profiles * factor)[[self.types.index(name) for name in wanted]]
        return pd.DataFrame(values.cpu().numpy(), index=wanted, columns=self.data.names("counts"))

    def get_gene_factors(self) -> pd.Series:
        """Return how much better each gene is seen in the spots than in the reference, all of an average cell alike."""
        factor, _ = self._per_gene()
        return pd.Series(factor.cpu().numpy(), index=self.data.names("counts"), name="gene_factor")

    def _per_gene(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gene factors, and the profile of the noise."""
        log_factor, noise = (
            torch.as_tensor(self.posterior(site, indices=[0]), device=self.device)
            for site in ("log_gene_factor", "noise")
        )
        return self._factor(log_factor), self._noise_profile(noise)

    def _log_counts_of_parts(self) -> torch.Tensor:
        """Log counts of one cell of each type, and of noise, in the tissue."""
        factor, noise = self._per_gene()
        counts = torch.cat([(self.profiles * factor).sum(1), noise.sum().reshape(1)])
        return counts.double().log().cpu()


def _check_shared(known: pd.Index, given: pd.Index, shared: pd.Index, n_types: int) -> None:
    """Refuse data whose genes are others, with the numbers and some names."""
    sides = (("the reference", known), ("the spots", given))
    others = [(side, len(names), list(names[~names.isin(shared)])) for side, names in sides]
    found = f"{len(shared)} genes are shared: " + ", ".join(
        f"{len(rest)} of the {n} of {side} are not, such as {list_some(rest, 3)}"
        for side, n, rest in others
        if rest
    )
    if len(shared) < n_types:
        raise DataError(
            f"Only {found}. {n_types} cell types need at least as many shared genes with counts. Are the names of "
            "another kind (symbols, Ensembl)? Rename var_names of one of them, or fit the reference on more genes."
        )
    if len(shared) < min(len(known), len(given)) / 2:
        warnings.warn(f"{found}. Only the shared ones are used.", PyrocellWarning, stacklevel=3)


def _check_reference(profiles: pd.DataFrame, logits: pd.Series, genes: Sequence[str]) -> None:
    """Refuse profiles that cannot explain the data, by name."""
    for name, index in (("profiles", profiles.columns), ("logits", logits.index)):
        if missing := sorted(set(genes) - set(index)):
            raise DataError(
                f"{len(missing)} of the {len(genes)} genes of the spots are not in {name}: {list_some(missing)}. Make "
                "the model with SpatialStereoscope.from_rna_model, which takes the shared genes, or select them."
            )
    values = profiles[list(genes)].to_numpy(dtype=float)
    wrong = ~(np.isfinite(values).all(1) & (values >= 0).all(1) & (values.sum(1) > 0))
    wrong |= profiles.index.duplicated()
    if wrong.any() or not np.isfinite(logits[list(genes)]).all():
        raise SetupError(
            f"profiles or logits cannot be used: a type is named twice, or values are missing, negative, or all zero; "
            f"types with such profiles: {list_some(profiles.index[wrong])}. Expected counts of each gene in a cell of "
            "each type, as RNAStereoscope.get_profiles gives them, and its get_logits."
        )
