"""Effects on means where a plain answer would be wrong: strata that are cut, few counts, odd donors, bounds."""

from __future__ import annotations

import numpy as np

from pyrocell.infer.comparison import compare_groups
from pyrocell.infer.moments import StratumMoments
from pyrocell.infer.population import PopulationData, population_differential
from pyrocell.infer.population_plan import plan_population
from pyrocell.infer.raw_summary import summarise_comparisons
from pyrocell.infer.scale_sampler import DifferentialOptions
from tests.infer.test_population import CALLED, RATIO, moments_of

# ------------------------------------------------------------------------------------------- strata that are cut


class Unequal:
    """A large group between two small ones; the model knows no group."""

    def __init__(self, seed=0, sizes=(300, 4000, 300), n_genes=60):
        rng = np.random.default_rng(seed)
        self.groups = np.repeat(list("ABC"), sizes)
        profiles = {name: rng.lognormal(0.5, 1.0, n_genes) for name in "ABC"}
        mean = np.stack([profiles[name] for name in self.groups])
        self.counts = rng.poisson(rng.gamma(3.0, mean / 3.0)).astype(float)
        self.quantity = np.full_like(self.counts, 1.0) * mean.mean(0)
        self.names = [f"g{i}" for i in range(n_genes)]
        first = self.groups == "A"
        self.effects = np.log2(self.counts[first].mean(0) / self.counts[~first].mean(0))

    def table(self, comparisons, cells_per_stratum, seed=0):
        plan = plan_population(comparisons, cells_per_stratum=cells_per_stratum, seed=seed)
        rows = plan.rows
        values = (self.counts[rows], self.quantity[rows], self.quantity[rows])
        moments = moments_of(plan.codes, *values, weights=plan.weights)
        raw = summarise_comparisons([(np.arange(len(self.groups)), self.counts, None)], comparisons)
        table = population_differential(
            PopulationData(self.names, plan, moments, raw),
            RATIO,
            options=DifferentialOptions(relative_to="total"),
        )
        return table[table["group1"] == "A"].loc[self.names]


def test_the_rest_is_the_same_population_whatever_else_is_asked():
    study = Unequal()
    for comparisons in (compare_groups(study.groups, group1="A"), compare_groups(study.groups)):
        errors, z = [], []
        for seed in range(4):
            table = study.table(comparisons, 400, seed)
            error = table["lfc_estimate"] - study.effects
            errors.append(np.sqrt((error**2).mean()))
            z.append((error / table["lfc_error"]).std())
            assert (table["n_cells1"] == 300).all() and (table["n_cells2"] == 4300).all()
            assert not (table[CALLED] & (np.sign(table["lfc_mean"]) != np.sign(study.effects))).any()
        assert np.mean(errors) < 0.15 and np.mean(z) < 1.1, (errors, z)


def test_the_choice_of_cells_is_part_of_the_error():
    """Estimates from different choices scatter by what is added to the variance of all cells."""
    study = Unequal(sizes=(300, 3000, 300))
    comparisons = compare_groups(study.groups)
    tables = [study.table(comparisons, 200, seed) for seed in range(20)]
    scatter = np.std([table["lfc_estimate"] for table in tables], axis=0)
    whole = study.table(comparisons, 10**6)["lfc_error"].to_numpy()
    claimed = np.median([table["lfc_error"] for table in tables], axis=0)
    ratio = scatter**2 / (claimed**2 - whole**2)
    frequent = study.counts[study.groups != "A"].mean(0) > 0.5
    assert 0.75 < np.median(ratio[frequent]) < 1.35, np.median(ratio[frequent])


def test_cells_that_stand_for_one_each_are_plain_sums():
    study = Unequal(n_genes=5)
    codes = np.unique(study.groups, return_inverse=True)[1]
    plain = moments_of(codes, study.counts, study.quantity, study.quantity)
    assert isinstance(plain, StratumMoments)
    np.testing.assert_allclose(plain.inflation, 1.0)
    np.testing.assert_array_equal(plain.n, plain.n_seen)
