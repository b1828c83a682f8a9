"""One shared pass over the cells of all comparisons: what was counted, what was expected, and what is compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from pyrocell.data import Cells
from pyrocell.errors import DataError, QueryError
from pyrocell.infer.comparison import Comparison
from pyrocell.infer.draws import SiteDraws
from pyrocell.infer.levels import Correction, Scale
from pyrocell.infer.moments import MomentSums, StratumMoments
from pyrocell.infer.population import PopulationData, population_differential
from pyrocell.infer.population_plan import PopulationPlan, plan_population
from pyrocell.models.asking import Question
from pyrocell.models.chosen import measured_in
from pyrocell.models.groups import Asked, replicates_of, warn_if_confounded
from pyrocell.models.sampling import raw_summaries

if TYPE_CHECKING:
    from pyrocell.models.comparisons import Comparisons

__all__ = ["population_moments", "population_tables"]

_NUMBERS = 2**21


def population_tables(
    model: Comparisons,
    question: Question,
    comparisons: Sequence[Comparison],
    sites: Mapping[str, str],
    asked: Asked,
    group_key: str,
) -> dict[str, pd.DataFrame]:
    """Compare the means of groups: one table for each site.

    Parameters
    ----------
    model, question
        The model asked, and the data.
    comparisons
        What is compared.
    sites
        Quantities, each with the field whose features it is over.
    asked
        How.
    group_key
        Column of the groups.
    """
    options, obs = asked.options, question.dataset.obs
    samples = replicates_of(obs, options.sample_key)
    plan = plan_population(
        comparisons, samples=samples, cells_per_stratum=options.cells_per_stratum, seed=options.seed
    )
    corrected = asked.batches is not None
    warn_if_confounded(question, comparisons, samples, group_key=group_key, corrected=corrected)
    effect = options.effect or asked.effect
    tables = {}
    _refuse_ratios(model, effect)
    for site, field in sites.items():
        moments = population_moments(
            question.over(field), model, site, plan, batches=asked.batches, seed=options.seed
        )
        data = PopulationData(
            question.feature_names,
            plan,
            moments,
            raw_summaries(question, comparisons),
            _correction(model, site),
            1.0 if site == model.accessibility_site else math.inf,
            obs,
            group_key,
        )
        pseudocount = (
            model.pseudocounts.get(field, 0.0) if options.pseudocount is None else options.pseudocount
        )
        tables[field] = population_differential(
            data,
            Scale(effect, 0.0 if effect == "difference" else pseudocount),
            delta=asked.delta,
            fdr_target=asked.fdr_target,
            options=options,
        )
    return tables


def _correction(model: Comparisons, site: str) -> Correction:
    """How counts correct a site: proteins are counted over a background, which is no part of them."""
    if site == model.protein_site and model.background_site is not None:
        return "excess"
    return "shift" if model.expression_effect == "difference" else "ratio"


def _refuse_ratios(model: Comparisons, effect: str) -> None:
    """Refuse ratios of values of any sign."""
    if effect == "log2_ratio" and model.expression_effect == "difference":
        raise DataError(
            f"The values that {type(model).__name__} expects may be negative; expected positive values for a ratio. "
            'Use effect="difference".'
        )


def population_moments(
    question: Question,
    model: Comparisons,
    site: str,
    plan: PopulationPlan,
    *,
    batches: Sequence[Mapping[str, object]] | None,
    seed: int,
) -> StratumMoments:
    """Sum over strata, from one draw of the latent of each cell.

    Parameters
    ----------
    question
        The data, turned to the features of the site.
    model
        The model asked.
    site
        Quantity that is compared, over features.
    plan
        Cells and strata.
    batches
        Substitutions under which the quantity is averaged; None for each cell's own. What is expected to be counted is
        always that of the cell's own batch.
    seed
        Of the draws.

    Returns
    -------
    StratumMoments
    """
    asked = question.about(plan.rows)
    versions = (
        []
        if batches is None
        else [one for given in batches for one in question.about(plan.rows, given).circumstances]
    )
    observed = {field: name for name, field in model.observed_sites.items()}.get(question.field)
    sites = [site] if observed is None else [site, observed]
    sums = MomentSums(plan.n_strata, len(question.feature_names), plan.weights)
    drawer, size = model.drawer(), max(16, _NUMBERS // (asked.n_features * (1 + len(versions))))
    with model.asking(seed):
        for place, cells in asked.blocks(size):
            given = [cells, *(version(cells) for version in versions)]
            own, *others = drawer.block(cells, sites, counterfactuals=given)
            values = [trace[site].value[0] for trace in (others or [own])]
            quantity = values[0] if len(values) == 1 else torch.stack(values).mean(0)
            counted, expected = _counts(cells, question.field, own, observed, quantity)
            sums.update(plan.codes[place], [counted, expected, quantity])
    return sums.result(question.feature_names)


def _counts(
    cells: Cells, field: str, trace: Mapping[str, SiteDraws], observed: str | None, like: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Observed values and their expectation under the likelihood, both zero where nothing was measured.

    Structural zeros are part of what is observed, not of the expectation: a group that has more of them has less.
    """
    if observed is None:
        return iter((torch.zeros_like(like), torch.zeros_like(like)))
    draws = trace[observed]
    parameters: dict[str, Any] = draws.parameters
    expected = parameters.get("mean")
    expected = (draws.fn.mean if expected is None else expected).expand((1, *like.shape))[0]
    counted = getattr(cells, field)
    if counted.shape != like.shape:
        raise QueryError(
            f"The quantity has shape {tuple(like.shape)} and the field {field!r} {tuple(counted.shape)} for "
            f"{len(cells)} cells; expected the same. Name a site over the features of {field!r}."
        )
    measured = measured_in(cells, field)
    if measured is None:
        return iter((counted, expected))
    return iter((counted * measured, torch.where(measured, expected, 0.0)))
