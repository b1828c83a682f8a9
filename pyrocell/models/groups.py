"""Which cells are compared with which: groups of a column, cells by position, or conditions inside groups."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from pyrocell.errors import PyrocellWarning, QueryError, list_some
from pyrocell.infer.comparison import Comparison, compare_groups
from pyrocell.infer.designs import replicate_design
from pyrocell.infer.population_plan import plan_population
from pyrocell.infer.scale_sampler import DifferentialOptions
from pyrocell.models.chosen import chosen_cells

if TYPE_CHECKING:
    from pyrocell.models.asking import Question

__all__ = [
    "Asked",
    "CellSet",
    "Groups",
    "asked_comparisons",
    "designed",
    "replicates_of",
    "warn_if_confounded",
]

CellSet = Sequence[int] | np.ndarray | str | None


@dataclass(frozen=True)
class Groups:
    """The arguments of a verb that say what is compared."""

    groupby: str | None = None
    group1: str | Sequence[str] | None = None
    group2: str | None = None
    idx1: CellSet = None
    idx2: CellSet = None

    def column(self, options: DifferentialOptions) -> str:
        """Name of the column whose groups are compared, as a formula knows it."""
        return options.condition or self.groupby or "group"


@dataclass(frozen=True)
class Asked:
    """How groups are compared, whichever they are.

    Parameters
    ----------
    effect
        Ratio or difference.
    delta
        Smallest effect of interest, or None to learn it.
    batches
        Substitutions to average over, or None.
    fdr_target
        Expected proportion of false calls.
    options
        Everything else.
    """

    effect: Literal["log2_ratio", "difference"]
    delta: float | None
    batches: list[dict[str, str]] | None
    fdr_target: float
    options: DifferentialOptions


def asked_comparisons(question: Question, groups: Groups, options: DifferentialOptions) -> list[Comparison]:
    """Turn the arguments of a verb into comparisons.

    Parameters
    ----------
    question
        The data.
    groups
        Which cells.
    options
        Contrasts inside groups, and all pairs.

    Raises
    ------
    QueryError
        Cells given twice or not at all, or groups that do not exist or have no cells.
    """
    obs = question.dataset.obs
    by_cells = any(given is not None for given in (groups.idx1, groups.idx2))
    by_groups = any(given is not None for given in (groups.groupby, groups.group1, groups.group2))
    if by_cells == by_groups or (groups.idx1 is None and groups.groupby is None):
        raise QueryError("Give either groupby= (with group1=, group2=) or idx1= (with idx2=), and not both.")
    if groups.groupby is None and (options.condition is not None or options.all_pairs):
        raise QueryError(
            "condition and all_pairs compare groups of a column; give groupby= in place of idx1=."
        )
    if groups.groupby is not None:
        column = _column(obs, groups.groupby, "groupby")
        if options.condition is not None:
            return _inside(column, _column(obs, options.condition, "condition"), groups, options)
        return _between(column, groups, options)
    one = _cell_set(groups.idx1, obs, "idx1")
    everything = np.arange(len(obs))
    two = np.setdiff1d(everything, one) if groups.idx2 is None else _cell_set(groups.idx2, obs, "idx2")
    names = ("idx1", "rest" if groups.idx2 is None else "idx2")
    return [Comparison(" vs ".join(names), *names, one, two)]


def _column(obs: pd.DataFrame, key: str, argument: str) -> pd.Series:
    if key not in obs:
        raise QueryError(
            f"{argument}={key!r} is no column of adata.obs; it has {list_some(obs.columns, 20)}."
        )
    return obs[key]


def _between(labels: pd.Series, groups: Groups, options: DifferentialOptions) -> list[Comparison]:
    """Each group with the rest or with another one, or each pair of groups."""
    if not options.all_pairs:
        return compare_groups(labels, group1=groups.group1, group2=groups.group2)
    if groups.group2 is not None:
        raise QueryError("all_pairs=True compares the groups of group1 with each other; leave group2 out.")
    names = [one.group1 for one in compare_groups(labels, group1=groups.group1)]
    if len(names) < 2:
        raise QueryError(
            f"all_pairs=True, but only {list_some(names)} was given; expected two groups or more."
        )
    pairs = combinations(names, 2)
    return [one for a, b in pairs for one in compare_groups(labels, group1=a, group2=b)]


def _inside(
    labels: pd.Series, condition: pd.Series, groups: Groups, options: DifferentialOptions
) -> list[Comparison]:
    """Make the same contrast of conditions inside each group that has cells of both."""
    _between(condition, groups, options)  # refuses names that do not exist in any group
    found: list[Comparison] = []
    empty: list[str] = []
    for name in (str(one) for one in pd.Categorical(labels).categories):
        inside = condition.where((labels.astype(str) == name).to_numpy() & labels.notna().to_numpy())
        try:
            parts = _between(inside, groups, options)
        except QueryError:
            empty.append(name)
            continue
        found += [replace(one, name=f"{one.name} in {name}", within=name) for one in parts]
    if not found:
        raise QueryError(
            f"No group of {labels.name!r} has cells of both sides of the condition {condition.name!r}; expected one at "
            "least. Check the two columns."
        )
    if empty:
        warnings.warn(
            f"{list_some(empty)} of {labels.name!r} have no cells of one side of the condition {condition.name!r}; "
            "they are left out.",
            PyrocellWarning,
            stacklevel=4,
        )
    return found


def designed(
    question: Question, comparisons: list[Comparison], groups: Groups, options: DifferentialOptions
) -> list[Comparison]:
    """Make every design once before anything is drawn, and keep the comparisons that have one.

    Parameters
    ----------
    question
        The data.
    comparisons
        What is compared.
    groups, options
        How it was asked.

    Raises
    ------
    QueryError
        A design is refused; or, of conditions inside groups, that of every group. Where it is that of some groups,
        these are left out with a warning.
    """
    obs = question.dataset.obs
    samples = replicates_of(obs, options.sample_key)
    if samples is None:
        return comparisons
    refused: dict[str, QueryError] = {}
    most, seed = options.cells_per_stratum, options.seed
    for one in comparisons:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PyrocellWarning)  # said later, once
                plan = plan_population([one], samples=samples, cells_per_stratum=most, seed=seed)
                replicate_design(plan.contrasts[0], plan, obs, options, group_key=groups.column(options))
        except QueryError as error:
            if not one.within:
                raise
            refused[one.name] = error
    if refused and len(refused) == len(comparisons):
        raise next(iter(refused.values()))
    for name, problem in refused.items():
        warnings.warn(f"{name!r} is left out. {problem}", PyrocellWarning, stacklevel=4)
    return [one for one in comparisons if one.name not in refused]


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


def replicates_of(obs: pd.DataFrame, sample_key: str | None) -> pd.Series | None:
    """Return the column of replicates, refusing one that does not exist."""
    return None if sample_key is None else _column(obs, sample_key, "sample_key")


def warn_if_confounded(
    question: Question,
    comparisons: Sequence[Comparison],
    samples: pd.Series | None,
    *,
    group_key: str,
    corrected: bool,
) -> None:
    """Warn where the two sides share no batch: the difference of groups is then one of batches too.

    Who compares the batches themselves knows.

    Batches that lie inside replicates (a lane for each donor) do no harm between replicates, unless the model is asked
    to take them out.

    Parameters
    ----------
    question
        The data.
    comparisons
        What is compared.
    samples
        Replicate of each cell, or None.
    group_key
        Column of the groups.
    corrected
        Whether the groups are compared as if in the same batches.
    """
    batch = _batches(question)
    if batch is None or group_key == question.model.data.setup["batch_key"]:
        return
    if samples is not None and not corrected:
        of_batch = pd.DataFrame({"batch": batch, "sample": samples.to_numpy()}).dropna().drop_duplicates()
        if of_batch["batch"].is_unique:
            return
    tied = [one.name for one in comparisons if not set(batch[one.rows1]) & set(batch[one.rows2])]
    if tied:
        warnings.warn(
            f"The groups of {list_some(tied)} share no batch: their difference cannot be told apart from one between "
            f"batches{', and correcting for batches may take it away' if corrected else ''}. Compare groups that were "
            "measured together, or read the result as one of both.",
            PyrocellWarning,
            stacklevel=5,
        )


def _batches(question: Question) -> np.ndarray | None:
    """Batch of each cell, or None where the model knows at most one."""
    data, obs = question.model.data, question.dataset.obs
    key = data.setup.get("batch_key")
    if key not in obs or not data.has("batch") or data.size("batch") < 2:
        return None
    return obs[key].astype(str).to_numpy()
