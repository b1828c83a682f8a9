"""Designs over replicates: two groups, pairs, or a formula, each with the contrast that is asked for."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pyrocell.errors import PyrocellWarning, QueryError, list_some
from pyrocell.infer.population_plan import PopulationContrast, PopulationPlan, Unit
from pyrocell.infer.scale_sampler import DifferentialOptions

__all__ = ["Design", "design_of", "replicate_design", "unit_covariates"]

_QUOTED = re.compile("`([^`]+)`")


@dataclass(frozen=True)
class Design:
    """What is fitted to the replicates of one comparison.

    Parameters
    ----------
    units
        Replicates that enter.
    matrix
        Shape ``(n_units, n_coefficients)``.
    contrast
        Weights of the coefficients.
    """

    units: list[Unit]
    matrix: np.ndarray
    contrast: np.ndarray


def replicate_design(
    contrast: PopulationContrast,
    plan: PopulationPlan,
    obs: pd.DataFrame | None,
    options: DifferentialOptions,
    *,
    group_key: str,
) -> Design | None:
    """Make the design of one comparison from the table of the cells; None where cells are what is sampled.

    Parameters
    ----------
    contrast
        The comparison with its replicates.
    plan
        Cells of the strata.
    obs
        Table of the cells, which a formula reads.
    options
        Replicates, formula, coefficient.
    group_key
        Column of the groups.

    Raises
    ------
    QueryError
        See `design_of` and `unit_covariates`.
    """
    if not contrast.units:
        return None
    covariates = None
    if options.design is not None:
        assert obs is not None
        covariates = unit_covariates(
            contrast,
            options.design,
            obs,
            stratum_cells=[plan.rows[plan.codes == stratum] for stratum in range(plan.n_strata)],
            group_key=group_key,
        )
    return design_of(
        contrast,
        paired=options.paired,
        formula=options.design,
        coefficient=options.contrast,
        covariates=covariates,
        keys=(group_key, str(options.sample_key)),
    )


def design_of(
    contrast: PopulationContrast,
    *,
    paired: bool | None,
    formula: str | None,
    coefficient: str | None,
    covariates: pd.DataFrame | None,
    keys: tuple[str, str],
) -> Design | None:
    """Make the design of one comparison; None where replicates are too few, after a warning.

    Parameters
    ----------
    contrast
        The comparison with its replicates.
    paired
        Whether the replicates are in both groups; None to see for itself.
    formula, coefficient
        Model of the means, and the coefficient of it that is asked for, or None for the difference of the groups.
    covariates
        Values of the columns of the formula for each unit, see `unit_covariates`.
    keys
        Names of the columns of the groups and of the replicates.

    Raises
    ------
    QueryError
        Replicates in both groups of an unpaired design, a design that is not of full rank, a contrast that names
        nothing, or more coefficients than replicates allow.
    """
    first, second = (set(contrast.samples(side)) for side in (0, 1))
    shared = first & second
    if formula is not None:
        return _by_formula(contrast, formula, coefficient, covariates, keys, shared)
    if shared and (paired is False or (paired is None and shared != first | second)):
        raise QueryError(
            f"{len(shared)} replicates are in both groups of {contrast.comparison.name!r}: "
            f"{list_some(sorted(shared))}; an unpaired design expects each in one. Give "
            "paired=True to compare within replicates (those in one group only are left out), or name the "
            "replicates apart, such as donor and condition together."
        )
    if paired and not shared:
        raise QueryError(
            f"paired=True, but no replicate is in both groups of {contrast.comparison.name!r}; expected pairs. Leave "
            "paired out."
        )
    return _pairs(contrast, sorted(shared)) if shared else _two_groups(contrast, (len(first), len(second)))


def _two_groups(contrast: PopulationContrast, sizes: tuple[int, int]) -> Design | None:
    if min(sizes) < 2:
        rest = (
            "The spread between replicates is that of the other group."
            if max(sizes) > 1
            else "The result is about these cells: it cannot tell what holds for other replicates."
        )
        order = (1, 0) if contrast.flipped else (0, 1)
        alone = [contrast.group(side) for side in order if sizes[side] < 2]
        _warn(
            f"Fewer than two replicates in {list_some(alone)} of comparison {contrast.comparison.name!r}. {rest} "
            "A difference between the groups and one between individuals cannot be told apart there."
        )
    if max(sizes) < 2:
        return None
    side = np.array([unit.side == 0 for unit in contrast.units], dtype=np.float64)
    return Design(contrast.units, np.stack([np.ones_like(side), side], axis=1), np.array([0.0, 1.0]))


def _pairs(contrast: PopulationContrast, shared: list[str]) -> Design | None:
    if len(shared) < 2:
        _warn(
            f"Only one replicate ({shared[0]}) is in both groups of comparison {contrast.comparison.name!r}: fewer "
            "than two. The result is about the cells of this one: it cannot tell what holds for others."
        )
        return None
    units = [unit for unit in contrast.units if unit.sample in shared]
    matrix = np.zeros((len(units), len(shared) + 1))
    for row, unit in enumerate(units):
        matrix[row, shared.index(unit.sample)] = 1.0
        matrix[row, -1] = unit.side == 0
    return Design(units, matrix, np.eye(len(shared) + 1)[-1])


def _warn(text: str) -> None:
    warnings.warn(text, PyrocellWarning, stacklevel=7)


# ------------------------------------------------------------------------------------------------ formulas


def _by_formula(
    contrast: PopulationContrast,
    formula: str,
    coefficient: str | None,
    covariates: pd.DataFrame | None,
    keys: tuple[str, str],
    shared: set[str],
) -> Design:
    assert covariates is not None
    if shared and keys[1] not in _variables(formula):
        raise QueryError(
            f"{len(shared)} replicates are in both groups of {contrast.comparison.name!r}: "
            f"{list_some(sorted(shared))}; a design without them takes their cells as "
            f"independent. Add + {keys[1]} to the design."
        )
    matrix, spec = _matrix(formula, covariates)
    names = [str(name) for name in spec.column_names]
    _require_rank(matrix, names, formula)
    if matrix.shape[0] <= matrix.shape[1]:
        raise QueryError(
            f"The design {formula!r} has {matrix.shape[1]} coefficients for {matrix.shape[0]} replicates; expected "
            "more replicates than coefficients. Use fewer covariates."
        )
    if coefficient is not None:
        if coefficient not in names:
            raise QueryError(
                f"There is no coefficient {coefficient!r} in the design {formula!r}; it has {list_some(names, 20)}."
            )
        weights = np.eye(len(names))[names.index(coefficient)]
        # a coefficient has its own sign, whichever way the groups are turned
        return Design(contrast.units, matrix, -weights if contrast.flipped else weights)
    if keys[0] not in _variables(formula):
        raise QueryError(
            f"The design {formula!r} has no {keys[0]!r}, the column of the groups; expected it, or a coefficient. Add "
            f"+ {keys[0]}, or give contrast= one of {list_some(names, 20)}."
        )
    levels = [_matrix_at(spec, covariates, keys[0], contrast.group(side)) for side in (0, 1)]
    return Design(contrast.units, matrix, (levels[0] - levels[1]).mean(axis=0))


def _parsed(formula: str) -> Any:
    """Read a formula, refusing what is no model of means."""
    from formulaic import Formula, SimpleFormula  # slow to import, and only needed here

    try:
        found = Formula(formula)
    except Exception as error:  # the parser raises many kinds
        raise QueryError(
            f"design={formula!r} is no formula: {error}. Write it such as '~ condition + sex'."
        ) from error
    if not isinstance(found, SimpleFormula):
        raise QueryError(
            f"design={formula!r} has a left-hand side, or several parts; expected what the means depend on alone. "
            "Write it such as '~ condition + sex'."
        )
    return found


def _variables(formula: str) -> set[str]:
    """Names that a formula cannot do without."""
    return {str(name) for name in _parsed(formula).required_variables}


def _arguments(formula: str) -> set[str]:
    """Names inside calls as well: transforms with a memory, such as ``scale``, do not tell theirs."""
    found: set[str] = set()
    for factor in (factor for term in _parsed(formula) for factor in term.factors):
        code, quoted = str(factor.expr), {}
        for place, name in enumerate(_QUOTED.findall(code)):
            quoted[f"quoted_{place}_"] = name
            code = code.replace(f"`{name}`", f"quoted_{place}_")
        try:
            nodes = list(ast.walk(ast.parse(code, mode="eval")))
        except SyntaxError:  # a column whose name is no word, looked up as it is
            continue
        called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
        names = {node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in called}
        found |= {quoted.get(name, name) for name in names}
    return found


def _matrix(formula: str, covariates: pd.DataFrame) -> tuple[np.ndarray, Any]:
    """Design of the replicates, and how to make it again."""
    try:
        with np.errstate(all="ignore"):
            found: Any = _parsed(formula).get_model_matrix(covariates, na_action="raise")
    except QueryError:
        raise
    except Exception as error:  # whatever the functions in the formula raise
        raise QueryError(
            f"The design {formula!r} cannot be computed for these replicates: {error} Correct the formula, or the "
            f"columns {list_some(covariates.columns, 20)}."
        ) from error
    matrix = np.asarray(found, dtype=np.float64)
    wrong = [str(found.columns[place]) for place in np.flatnonzero(~np.isfinite(matrix).all(axis=0))]
    if wrong:
        raise QueryError(
            f"The design {formula!r} is not finite in {list_some(wrong)}; expected numbers. Correct the formula, or "
            "the columns that it reads."
        )
    return matrix, found.model_spec


def _matrix_at(spec: Any, covariates: pd.DataFrame, key: str, value: str) -> np.ndarray:
    """Design of the replicates as if all were in one group."""
    known = covariates[key].astype("category").cat.categories
    column = pd.Categorical([value] * len(covariates), categories=known)
    return np.asarray(spec.get_model_matrix(covariates.assign(**{key: column})), dtype=np.float64)


def _require_rank(matrix: np.ndarray, names: list[str], formula: str) -> None:
    rank = np.linalg.matrix_rank(matrix)
    if rank == matrix.shape[1]:
        return
    tied = [
        name for i, name in enumerate(names) if np.linalg.matrix_rank(np.delete(matrix, i, axis=1)) == rank
    ]
    raise QueryError(
        f"The design {formula!r} is not of full rank: {list_some(tied, 20)} cannot be told apart from each other in "
        "these replicates. Leave one of them out."
    )


def unit_covariates(
    contrast: PopulationContrast,
    formula: str,
    obs: pd.DataFrame,
    *,
    stratum_cells: Sequence[np.ndarray],
    group_key: str,
) -> pd.DataFrame:
    """Look up what the formula reads, once for each replicate on each side.

    Categories keep their order, so that the first is what coefficients are relative to.

    Parameters
    ----------
    contrast
        The comparison with its replicates.
    formula
        Model of the means.
    obs
        Table of the cells.
    stratum_cells
        Cells of each stratum.
    group_key
        Column of the groups, which gets the name of the side.

    Raises
    ------
    QueryError
        A column does not exist, or has several or missing values in one replicate.
    """
    missing = sorted(name for name in _variables(formula) - {group_key} if name not in obs)
    if missing:
        raise QueryError(
            f"The design {formula!r} reads {list_some(missing)}, which adata.obs does not have; it has "
            f"{list_some(obs.columns, 20)}."
        )
    wanted = (_variables(formula) | _arguments(formula)) & set(obs.columns)
    groups = [contrast.group(unit.side) for unit in contrast.units]
    table = {group_key: _in_order(groups, obs.get(group_key))}
    for name in sorted(wanted - {group_key}):
        column, found = obs[name], []
        for unit in contrast.units:
            cells = np.concatenate([stratum_cells[index] for index in unit.strata])
            values = column.iloc[cells].unique()
            if len(values) != 1 or pd.isna(values[0]):
                raise QueryError(
                    f"{name!r} has {len(values)} values ({list_some([str(value) for value in values])}) in replicate "
                    f"{unit.sample!r}; the design {formula!r} expects one, not missing, in each. Correct the "
                    "column, or name replicates that have one."
                )
            found.append(values[0])
        table[name] = _in_order(found, column)
    return pd.DataFrame(table)


def _in_order(values: list[Any], column: pd.Series | None) -> Any:
    """Values as categories in the order of the column that they come from, if it has categories."""
    if column is None or not isinstance(column.dtype, pd.CategoricalDtype):
        return values
    # a group goes by its name, and "rest" is none of the column's
    names = {str(one): place for place, one in enumerate(column.cat.categories)}
    seen = sorted(dict.fromkeys(values), key=lambda one: (names.get(str(one), len(names)), str(one)))
    return pd.Categorical(values, categories=seen)
