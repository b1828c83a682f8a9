"""Verbs of models of chromatin accessibility: which regions are open, and where that differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from pyrocell.data import prototype_cells
from pyrocell.data.filling import Filled, FilledTable, Out
from pyrocell.errors import QueryError
from pyrocell.infer.effects import AtMean
from pyrocell.infer.scale_sampler import DifferentialOptions
from pyrocell.models.asking import Question
from pyrocell.models.comparisons import Comparisons, Delta
from pyrocell.models.groups import CellSet, Groups
from pyrocell.models.queries import Indices, Names
from pyrocell.models.roles import needs

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["Regions"]

_BLOCK = 2**25
"""Values that are held at once where a threshold makes the result sparse: 128 MB."""

_COLUMNS = {
    "proba_de": "prob_da",
    "effect_mean": "effect_size",
    "lfc_mean": "effect_size",
    "scale1": "est_prob1",
    "scale2": "est_prob2",
    "non_zeros_proportion1": "emp_prob1",
    "non_zeros_proportion2": "emp_prob2",
}


class Regions(Comparisons):
    """Mix-in of `CellModel`: accessibility of regions; arguments as in `Queries`."""

    @needs("accessibility_site")
    def get_normalized_accessibility(
        self,
        adata: AnnData | None = None,
        *,
        indices: Indices = None,
        transform_batch: str | Sequence[str] | None = None,
        region_list: Names = None,
        normalize_cells: bool = False,
        normalize_regions: bool = False,
        threshold: float | None = None,
        n_samples: int | None = None,
        return_numpy: bool = False,
        batch_size: int | None = None,
        out: Out = None,
    ) -> FilledTable | sparse.csr_matrix:
        """Return the probability that each region is open in each cell.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        transform_batch
            Decode as if from this batch, or as the average over several; by default each cell's own.
        region_list
            Regions wanted; only these are computed.
        normalize_cells
            Multiply by each cell's depth factor.
        normalize_regions
            Multiply by each region's factor; with both, the result is the probability that the region is *seen* open.
        threshold
            Put probabilities below this to zero, and return a sparse result.
        n_samples
            Average over this many posterior draws; by default the posterior mean of the latent is decoded.
        return_numpy
            Return an array (a SciPy CSR matrix with ``threshold``) instead of a table.
        out
            Where the values go: an array, the path of a zarr array, or a `pyrocell.data.Layer` or ``Obsm``. Not with
            ``threshold``.

        Returns
        -------
        DataFrame, ndarray or csr_matrix
            Cells by regions, probabilities. With ``out``, what was written to.

        Raises
        ------
        QueryError
            If ``threshold`` is no probability, or a region, batch or cell does not exist.
        """
        if threshold is not None and out is not None:
            raise QueryError("threshold gives a sparse matrix, which out cannot take; leave one of them out.")
        if threshold is not None and not 0 < threshold < 1:
            raise QueryError(f"threshold is {threshold!r}; expected a probability between 0 and 1, or None.")
        given = None if transform_batch is None else {"batch": transform_batch}
        question = Question(
            self,
            adata,
            indices,
            given=given,
            features=region_list,
            field=self.accessibility_field,
            batch_size=batch_size,
        )
        factor = self._factor_of_regions(question) if normalize_regions else None
        if threshold is None:
            values = self._accessibility(question, n_samples, factor, by_depth=normalize_cells, out=out)
            return question.answer(values, out, return_numpy=return_numpy)
        parts = []
        for part in _in_parts(question, given):
            values = self._accessibility(part, n_samples, factor, by_depth=normalize_cells)
            parts.append(sparse.csr_matrix(values * (values >= threshold)))
        joined: Any = sparse.vstack(parts, format="csr")
        if return_numpy:
            return joined
        frame: Any = pd.DataFrame
        names = question.dataset.obs_names[question.rows]
        return frame.sparse.from_spmatrix(joined, index=names, columns=question.feature_names)

    def _accessibility(
        self,
        question: Question,
        n_samples: int | None,
        factor: np.ndarray | None,
        *,
        by_depth: bool,
        out: Out = None,
    ) -> Filled:
        """Return the accessibility over draws, or at the posterior mean of the latent, with the factors asked for."""
        depth = str(self.depth_site)
        with self.asking(), AtMean() if n_samples is None else nullcontext():
            return question.array(
                str(self.accessibility_site),
                lambda draws: draws.value,
                n_samples=1 if n_samples is None else n_samples,
                return_mean=True,
                scale=(lambda _, trace: trace[depth].value) if by_depth else None,
                beside=[depth] if by_depth else [],
                finish=None if factor is None else lambda found, _: found * factor,
                out=out,
            )

    def _factor_of_regions(self, question: Question) -> np.ndarray:
        factors = self.get_region_factors() if self.region_site is not None else np.ones(question.n_features)
        return (factors if question.features is None else factors[question.features]).astype(np.float32)

    @needs("region_site")
    def get_region_factors(self) -> np.ndarray:
        """Return the chance that each region is seen where it is open, shape ``(n_regions,)``; 1 where left out."""
        cells = prototype_cells(self.data, 1).to(self.device)
        with self.asking():
            site = str(self.region_site)
            values = self.drawer().block(cells, [site])[0][site].value
        return values.reshape(-1).cpu().numpy()

    @needs("depth_site")
    def get_library_size_factors(
        self, adata: AnnData | None = None, *, indices: Indices = None, batch_size: int | None = None
    ) -> np.ndarray:
        """Return the chance that an open region is seen in each cell, shape ``(n_cells,)``; 1 without a depth model.

        Parameters
        ----------
        adata, indices, batch_size
            Which cells, and how many at once.
        """
        question = Question(self, adata, indices, batch_size=batch_size)
        with self.asking():
            return question.values(str(self.depth_site))[:, 0]

    @needs("accessibility_site")
    def differential_accessibility(
        self,
        adata: AnnData | None = None,
        groupby: str | None = None,
        *,
        group1: str | Sequence[str] | None = None,
        group2: str | None = None,
        idx1: CellSet = None,
        idx2: CellSet = None,
        mode: Literal["population", "change"] = "population",
        delta: Delta = "auto",
        batch_correction: bool = False,
        fdr_target: float = 0.05,
        options: DifferentialOptions | None = None,
    ) -> pd.DataFrame:
        """Compare the probability of being open between groups of cells, region by region.

        A positive effect means more accessible in ``group1``: effects are group 1 minus group 2. Depth and region
        factors do not enter.

        Parameters
        ----------
        adata, groupby, group1, group2, idx1, idx2, batch_correction
            As in ``differential_expression``.
        mode
            ``"population"``: how the mean probabilities of the groups differ; ``"change"``: how probable it is that a
            cell of one group exceeds a cell of the other by ``delta``.
        delta
            Smallest difference of probabilities of interest: by default 0 in mode ``"population"``, so that signs are
            called, and 0.05 in mode ``"change"``; None learns it from the data.
        fdr_target
            Expected proportion of false calls in the column ``is_da_fdr_...``.
        options
            Everything else. ``DifferentialOptions(effect="log2_ratio")`` compares the log2 ratio of the probabilities,
            with ``delta`` a log2 ratio too. ``DifferentialOptions(test="one")`` asks only for group 1 being higher. In
            mode ``"change"``, ``DifferentialOptions(test="two")`` adds the two directions up; differences between cells
            of one group then count too, and false calls are far more than ``fdr_target`` (see the page of PEAKVI).

        Returns
        -------
        DataFrame
            One row for each region and comparison, with ``comparison``, ``group1``, ``group2``; ``prob_da``, the
            posterior probability of the effect; ``is_da_fdr_<fdr_target>``; ``lfsr``, the local false sign rate (or, in
            mode ``"change"``, ``bayes_factor``, the natural log of odds); ``est_prob1``,
            ``est_prob2``, mean probabilities of being open; ``effect_size``, the mean effect, and more
            of its distribution; ``emp_prob1``, ``emp_prob2``, shares of cells in which the region was seen open, and
            ``emp_effect``, their difference; numbers of cells and replicates, or of draws.

        Raises
        ------
        QueryError
            If a group does not exist or has no cells, or the cells to compare were given twice or not at all.
        """
        question = Question(self, adata, None, field=self.accessibility_field)
        options = options or DifferentialOptions(seed=self.stream.seed)
        table = self._differential(
            question,
            Groups(groupby, group1, group2, idx1, idx2),
            {str(self.accessibility_site): self.accessibility_field},
            mode=mode,
            effect="difference",
            delta=0.05 if delta == "auto" and mode == "change" else delta,
            batch_correction=batch_correction,
            fdr_target=fdr_target,
            options=options,
        )
        return _named_for_accessibility(table)


def _named_for_accessibility(table: pd.DataFrame) -> pd.DataFrame:
    """Give the columns the names of this field, and leave out what means nothing for zeros and ones."""
    names = [str(name) for name in table.columns]
    odd = [name for name in names if name.startswith(("raw_", "proba_not")) or name.endswith("_raw")]
    calls = {name: name.replace("is_de", "is_da") for name in names if name.startswith("is_de")}
    effects = {name: name.replace("lfc_", "effect_") for name in names if name.startswith("lfc_")}
    table = table.drop(columns=odd).rename(columns=effects | _COLUMNS | calls)
    place = list(table.columns).index("emp_prob2") + 1
    table.insert(place, "emp_effect", table["emp_prob1"] - table["emp_prob2"])
    return table


def _in_parts(question: Question, given: Mapping[str, Any] | None) -> Iterator[Question]:
    """Cut a question into some cells at a time."""
    step = max(1, _BLOCK // max(1, len(question.feature_names)))
    for start in range(0, len(question.rows), step):
        yield question.about(question.rows[start : start + step], given)
