"""Verbs that compare groups of cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from pyrocell.errors import QueryError, list_some
from pyrocell.infer.abundance import abundance_scores, sample_log_densities
from pyrocell.infer.abundance_effects import density_effects, share_effects
from pyrocell.infer.comparison import Comparison
from pyrocell.infer.differential import differential, joined_tables
from pyrocell.infer.scale_sampler import DifferentialOptions, refuse_options_of_others
from pyrocell.models.asking import Question
from pyrocell.models.groups import Asked, CellSet, Groups, asked_comparisons, designed
from pyrocell.models.populations import population_tables
from pyrocell.models.queries import Queries
from pyrocell.models.roles import needs
from pyrocell.models.sampling import PopulationSampler, raw_summaries

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Comparisons"]

Mode = Literal["population", "change", "vanilla"]
Delta = float | Literal["auto"] | None


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
        mode: Mode = "population",
        delta: Delta = "auto",
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
            ``"population"``: how the means of the groups differ, their error from cells or, with
            ``DifferentialOptions(sample_key=...)``, from donors. ``"change"``: how probable it is that a cell of one
            group exceeds a cell of the other by ``delta``; ``"vanilla"``: that it is higher.
        delta
            Smallest log2 fold change of interest: by default 0 in mode ``"population"``, so that signs are called, and
            0.25 in mode ``"change"``; None learns it from the data.
        batch_correction
            Compare both groups as if measured in each batch in turn.
        fdr_target
            Expected proportion of false calls in the column ``is_de_fdr_...``.
        options
            Everything else: replicates and their design, contrasts inside groups, floor, draws, pseudocount, intervals.

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
            Groups(groupby, group1, group2, idx1, idx2),
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
        groups: Groups,
        sites: Mapping[str, str],
        *,
        mode: Mode,
        effect: Literal["log2_ratio", "difference"],
        delta: Delta,
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
        refuse_options_of_others(options, mode)
        comparisons = asked_comparisons(question, groups, options)
        batches = [{"batch": name} for name in self.data.names("batch")] if batch_correction else None
        asked = Asked(effect, _threshold(mode, delta), batches, fdr_target, options)
        if mode == "population":
            comparisons = designed(question, comparisons, groups, options)
            tables = population_tables(self, question, comparisons, sites, asked, groups.column(options))
        else:
            tables = self._cells(mode, question, comparisons, sites, asked)
        return joined_tables(tables, fdr_target, multiplicity=options.multiplicity)

    def _cells(
        self,
        mode: Literal["change", "vanilla"],
        question: Question,
        comparisons: list[Comparison],
        sites: Mapping[str, str],
        asked: Asked,
    ) -> dict[str, pd.DataFrame]:
        """Compare cells with cells."""
        options = asked.options
        latent_means = self._latent_means(question) if options.filter_outlier_cells else None
        tables = {}
        for site, field in sites.items():
            fixed = self.pseudocounts.get(field) if options.pseudocount is None else None
            tables[field] = differential(
                PopulationSampler(question.over(field), self, site),
                comparisons,
                mode=mode,
                effect=options.effect or asked.effect,
                delta=asked.delta,
                batches=asked.batches,
                fdr_target=asked.fdr_target,
                raw=raw_summaries(question, comparisons),
                latent_means=latent_means,
                options=options if fixed is None else replace(options, pseudocount=fixed),
            )
        return tables

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
        groupby: str | None = None,
        kernel: Literal["normal", "student"] = "normal",
        indices: Sequence[int] | np.ndarray | None = None,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Say at each cell which samples are dense there, or compare the shares of groups of cells between samples.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        sample_key
            Column of ``adata.obs`` with the sample of each cell.
        samples1, samples2
            Two sets of samples to compare: adds the column ``log_ratio``, positive where the first set is denser, and,
            with two samples or more in each, what holds between samples: ``effect``, ``effect_error`` and ``lfsr`` (of
            one cell chosen beforehand: neighbours differ together, so it is no error rate over cells).
        groupby
            Column of ``adata.obs`` with cell types (or clusters): compare their shares between the two sets instead.
        kernel
            ``"normal"``, or the smoother ``"student"``.

        Returns
        -------
        DataFrame
            Cells by samples: log of the density of each sample's other cells at each cell's latent (natural log). With
            ``groupby``, one row for each cell type: see `pyrocell.infer.abundance_effects.share_effects`.

        Raises
        ------
        QueryError
            If a column or a sample does not exist, or, with ``groupby``, a set has fewer than two samples.
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
        names = [str(name) for name in samples.categories]
        sides = [_positions(chosen, names, sample_key) for chosen in (samples1 or [], samples2 or [])]
        if groupby is not None:
            return _shares(obs.iloc[question.rows], groupby, samples, sides)
        with self.asking():
            moments = question.latent_moments(str(self.latent_site))
        if moments is None:
            raise QueryError(
                "differential_abundance needs a latent with a Gaussian posterior; this model has none."
            )
        densities = sample_log_densities(*moments, np.asarray(samples.codes), kernel=kernel)
        table = pd.DataFrame(densities, index=question.dataset.obs_names[question.rows], columns=names)
        if samples1 is not None and samples2 is not None:
            table["log_ratio"] = abundance_scores(densities, *sides)
            if min(map(len, sides)) > 1 and not set(sides[0]) & set(sides[1]):
                found = density_effects(densities, *sides)
                table[["effect", "effect_error", "lfsr"]] = np.stack(found, axis=1)
        return table


def _shares(obs: pd.DataFrame, groupby: str, samples: Any, sides: list[list[int]]) -> pd.DataFrame:
    """Compare the shares of the groups of a column between two sets of samples."""
    if groupby not in obs:
        raise QueryError(
            f"groupby={groupby!r} is no column of adata.obs; it has {list_some(obs.columns, 20)}."
        )
    labels = pd.Categorical(obs[groupby])
    known = (labels.codes >= 0) & (samples.codes >= 0)
    counts = np.zeros((len(samples.categories), len(labels.categories)))
    np.add.at(counts, (samples.codes[known], labels.codes[known]), 1.0)
    return share_effects(counts, [str(name) for name in labels.categories], *sides)


def _threshold(mode: Mode, delta: Delta) -> float | None:
    """Smallest effect of interest: signs are asked for of means, and sizes of cells."""
    if isinstance(delta, str):
        if delta != "auto":
            raise QueryError(
                f"delta is {delta!r}; expected a number of at least 0, 'auto', or None to learn it."
            )
        return 0.0 if mode == "population" else 0.25
    return delta


def _positions(chosen: Sequence[str], names: list[str], key: str) -> list[int]:
    if isinstance(chosen, str):
        raise QueryError(f"Samples were given as the single string {chosen!r}; give a list of names.")
    missing = [name for name in chosen if str(name) not in names]
    if missing:
        raise QueryError(
            f"There are no samples {list_some(missing)} in {key!r}; it has {list_some(names, 20)}."
        )
    return [names.index(str(name)) for name in chosen]
