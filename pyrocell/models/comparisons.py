"""Verbs that compare groups of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from pyrocell.errors import QueryError, list_some
from pyrocell.infer.abundance import abundance_scores, sample_log_densities
from pyrocell.infer.comparison import Comparison, compare_groups
from pyrocell.infer.differential import differential, joined_tables
from pyrocell.infer.scale_sampler import DifferentialOptions
from pyrocell.models.asking import Question
from pyrocell.models.chosen import chosen_cells
from pyrocell.models.queries import Queries
from pyrocell.models.roles import needs
from pyrocell.models.sampling import PopulationSampler, raw_summaries

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Comparisons"]

CellSet = Sequence[int] | np.ndarray | str | None


class Comparisons(Queries):
    """Mix-in of `CellModel`: differential expression and abundance."""

    expression_effect: Literal["log2_ratio", "difference"] = "log2_ratio"

    @needs("expression_site")
    def differential_expression(
        self,
        adata: AnnData | None = None,
        groupby: str | None = None,
        *,
        group1: str | Sequence[str] | None = None,
        group2: str | None = None,
        idx1: CellSet = None,
        idx2: CellSet = None,
        mode: Literal["change", "vanilla"] = "change",
        delta: float | None = 0.25,
        batch_correction: bool = False,
        fdr_target: float = 0.05,
        options: DifferentialOptions | None = None,
    ) -> pd.DataFrame:
        """Compare expression between groups of cells, gene by gene.

        A positive log fold change means higher in ``group1``. A model with several kinds of features (genes and
        proteins) compares all of them in one table, false calls counted over all.

        Parameters
        ----------
        adata
            Data to ask about; by default the model's own.
        groupby
            Column of ``adata.obs`` with the groups.
        group1
            Group or groups to compare; by default every group in turn.
        group2
            Group to compare with; by default all other cells ("rest").
        idx1, idx2
            Sets of cells instead of groups: positions, a mask, or a query of ``adata.obs`` such as
            ``"cell_type == 'B' and lane == '1'"``. Without ``idx2``, all other cells.
        mode
            ``"change"``: the probability that the fold change is at least ``delta``; ``"vanilla"``: which is higher.
        delta
            Smallest log2 fold change of interest; None learns it from the data.
        batch_correction
            Compare both groups as if measured in each batch in turn.
        fdr_target
            Expected proportion of false calls in the column ``is_de_fdr_...``.
        options
            Everything else: draws, pseudocount, importance weights, credible intervals, batches of each side.

        Returns
        -------
        DataFrame
            One row for each gene and comparison; the columns are defined in the guide "Differential expression". With
            several kinds of features, the column ``modality`` has the field of each: ``"counts"``, ``"proteins"``.

        Raises
        ------
        QueryError
            If a group does not exist or has no cells, or the cells to compare were given twice or not at all.
        """
        question = Question(self, adata, None)
        return self._differential(
            question,
            self._comparisons(question, groupby, (group1, group2), (idx1, idx2)),
            self.expression_sites,
            mode=mode,
            effect=self.expression_effect,
            delta=delta,
            batch_correction=batch_correction,
            fdr_target=fdr_target,
            options=options or DifferentialOptions(seed=self.stream.seed),
        )

    def _differential(
        self,
        question: Question,
        comparisons: list[Comparison],
        sites: Mapping[str, str],
        *,
        mode: Literal["change", "vanilla"],
        effect: Literal["log2_ratio", "difference"],
        delta: float | None,
        batch_correction: bool,
        fdr_target: float,
        options: DifferentialOptions,
    ) -> pd.DataFrame:
        """Hand sites, each over the features of a field, to the differential engine."""
        if batch_correction and not self.data.has("batch"):
            raise QueryError(
                "batch_correction=True, but the model knows no batches. Set up the data with batch_key= and train a "
                "model with them, or leave batch_correction out."
            )
        latent_means = self._latent_means(question) if options.filter_outlier_cells else None
        batches = [{"batch": name} for name in self.data.names("batch")] if batch_correction else None
        tables = {}
        for site, field in sites.items():
            fixed = self.pseudocounts.get(field) if options.pseudocount is None else None
            tables[field] = differential(
                PopulationSampler(question.over(field), self, site),
                comparisons,
                mode=mode,
                effect=options.effect or effect,
                delta=delta,
                batches=batches,
                fdr_target=fdr_target,
                raw=raw_summaries(question, comparisons),
                latent_means=latent_means,
                options=options if fixed is None else replace(options, pseudocount=fixed),
            )
        return joined_tables(tables, fdr_target)

    def _comparisons(
        self,
        question: Question,
        groupby: str | None,
        groups: tuple[str | Sequence[str] | None, str | None],
        cells: tuple[CellSet, CellSet],
    ) -> list[Comparison]:
        obs = question.dataset.obs
        by_cells = any(given is not None for given in cells)
        by_groups = any(given is not None for given in (groupby, *groups))
        if by_cells == by_groups or (cells[0] is None and groupby is None):
            raise QueryError(
                "Give either groupby= (with group1=, group2=) or idx1= (with idx2=), and not both."
            )
        if groupby is not None:
            if groupby not in obs:
                raise QueryError(
                    f"groupby={groupby!r} is no column of adata.obs; it has {list_some(obs.columns, 20)}."
                )
            return compare_groups(obs[groupby], group1=groups[0], group2=groups[1])
        one = _cell_set(cells[0], obs, "idx1")
        two = np.setdiff1d(np.arange(len(obs)), one) if cells[1] is None else _cell_set(cells[1], obs, "idx2")
        names = ("idx1", "rest" if cells[1] is None else "idx2")
        return [Comparison(" vs ".join(names), *names, one, two)]

    def _latent_means(self, question: Question) -> np.ndarray:
        with self.asking():
            moments = question.latent_moments(str(self.latent_site))
        if moments is None:
            raise QueryError(
                "filter_outlier_cells needs a latent with a Gaussian posterior; this model has none."
            )
        return moments[0]

    @needs("latent_site")
    def differential_abundance(
        self,
        adata: AnnData | None = None,
        *,
        sample_key: str,
        samples1: Sequence[str] | None = None,
        samples2: Sequence[str] | None = None,
        kernel: Literal["normal", "student"] = "normal",
        indices: Sequence[int] | np.ndarray | None = None,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Say at each cell which samples are dense there.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        sample_key
            Column of ``adata.obs`` with the sample of each cell.
        samples1, samples2
            Two sets of samples to compare: adds the column ``log_ratio``, positive where the first set is denser.
        kernel
            ``"normal"``, or the smoother ``"student"``.

        Returns
        -------
        DataFrame
            Cells by samples: log of the density of each sample's cells at each cell's latent (natural log).

        Raises
        ------
        QueryError
            If the column or a sample does not exist.
        """
        question = Question(self, adata, indices, batch_size=batch_size)
        obs = question.dataset.obs
        if sample_key not in obs:
            raise QueryError(
                f"sample_key={sample_key!r} is no column of adata.obs; it has {list_some(obs.columns, 20)}."
            )
        if (samples1 is None) != (samples2 is None):
            raise QueryError("Give both samples1= and samples2= to compare them, or neither.")
        column = obs[sample_key].iloc[question.rows]
        samples = pd.Categorical(
            column.astype(str).where(column.notna())
        )  # a cell without a sample is in none
        with self.asking():
            moments = question.latent_moments(str(self.latent_site))
        if moments is None:
            raise QueryError(
                "differential_abundance needs a latent with a Gaussian posterior; this model has none."
            )
        densities = sample_log_densities(*moments, np.asarray(samples.codes), kernel=kernel)
        names = [str(name) for name in samples.categories]
        table = pd.DataFrame(densities, index=question.dataset.obs_names[question.rows], columns=names)
        if samples1 is not None and samples2 is not None:
            sides = [_positions(chosen, names, sample_key) for chosen in (samples1, samples2)]
            table["log_ratio"] = abundance_scores(densities, *sides)
        return table


def _cell_set(cells: Any, obs: pd.DataFrame, name: str) -> np.ndarray:
    if not isinstance(cells, str):
        return chosen_cells(cells, len(obs))
    hint = "Write it such as \"cell_type == 'B' and lane == '1'\", column names with spaces in backticks."
    try:
        mask = obs.eval(cells)
    except Exception as error:  # pandas raises many kinds for a query that does not parse
        raise QueryError(f"{name}={cells!r} is no query of adata.obs: {error}. {hint}") from error
    if not isinstance(mask, pd.Series) or not pd.api.types.is_bool_dtype(mask.dtype):
        raise QueryError(f"{name}={cells!r} does not say true or false of each cell. {hint}")
    return np.flatnonzero(mask.fillna(value=False).to_numpy(dtype=bool))


def _positions(chosen: Sequence[str], names: list[str], key: str) -> list[int]:
    if isinstance(chosen, str):
        raise QueryError(f"Samples were given as the single string {chosen!r}; give a list of names.")
    missing = [name for name in chosen if str(name) not in names]
    if missing:
        raise QueryError(
            f"There are no samples {list_some(missing)} in {key!r}; it has {list_some(names, 20)}."
        )
    return [names.index(str(name)) for name in chosen]
