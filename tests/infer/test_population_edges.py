"""Effects on means where a plain answer would be wrong: strata that are cut, few counts, odd donors, bounds."""

from __future__ import annotations

import numpy as np
import pytest

from pyrocell.infer.comparison import compare_groups
from pyrocell.infer.levels import Scale
from pyrocell.infer.moments import StratumMoments
from pyrocell.infer.population import PopulationData, population_differential
from pyrocell.infer.population_plan import plan_population
from pyrocell.infer.raw_summary import summarise_comparisons
from pyrocell.infer.scale_sampler import DifferentialOptions
from tests.infer.test_population import CALLED, RATIO, Study, moments_of

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


# ------------------------------------------------------------------------------------------- few counts of a donor


def many_donors(scale=RATIO, learned=0.0, seed=1, n_cells=1):
    """120 donors in each group, one cell of each; the model has nothing of the effects of a quarter of the genes."""
    effects = np.where(np.arange(150) < 40, np.where(np.arange(150) % 2 == 0, 1.5, -1.5), 0.0)
    study = Study(
        n_genes=150,
        n_donors=120,
        n_cells=n_cells,
        effects=effects,
        donor_sd=0.2,
        learned=learned,
        seed=seed,
    )
    return study, study.table(sample_key="unit", relative_to="total", scale=scale)


@pytest.mark.parametrize("learned", [0.0, 1.0], ids=["model knows nothing", "model is right"])
def test_many_donors_of_one_cell_each_are_not_drawn_to_the_model(learned):
    study, table = many_donors(learned=learned)
    changed = study.effects != 0
    covered = (table["lfc_low"] <= study.effects) & (study.effects <= table["lfc_high"])
    slope = np.polyfit(study.effects[changed], table["lfc_estimate"][changed], 1)[0]
    assert 0.92 <= slope <= 1.08, slope
    assert covered[changed].mean() >= 0.8 and table[CALLED][changed].mean() >= 0.9
    assert table[CALLED][~changed].sum() <= 4


@pytest.mark.parametrize("scale", [Scale("difference"), Scale("log2_ratio", 1.0)], ids=str)
def test_levels_of_such_donors_are_not_drawn_either(scale):
    study, table = many_donors(scale)
    prefix = "effect" if scale.effect == "difference" else "lfc"
    first = (study.obs["group"] == "A").to_numpy()
    size = study.library
    seen = [(study.counts[side].sum(0) / size[side].sum()) for side in (first, ~first)]
    if scale.effect == "difference":
        changed = study.effects != 0
        truth = (seen[0] - seen[1])[changed]
        slope = np.polyfit(truth, table[f"{prefix}_estimate"][changed], 1)[0]
        assert 0.9 <= slope <= 1.1, slope
    assert table[CALLED][study.effects != 0].mean() > 0.8
    assert table[CALLED][study.effects == 0].sum() <= 7


# ------------------------------------------------------------------------------------------- one odd donor


def with_odd_genes(n_donors, n_cells, *, model_knows):
    """Of the first four genes, one donor alone has counts; of the next four, all donors of the first group."""
    study = Study(n_genes=150, n_donors=n_donors, n_cells=n_cells, donor_sd=0.3, seed=3)
    donors = study.obs["unit"].str[1:].astype(int).to_numpy()
    rng = np.random.default_rng(0)
    for gene in range(8):
        has_it = donors == gene % n_donors if gene < 4 else donors < n_donors
        level = 3.0 * rng.lognormal(0.0, 0.3, 2 * n_donors)[donors]
        study.counts[:, gene] = np.where(has_it, rng.poisson(level), 0.0)
        known = np.where(has_it, 3.0, 0.001) if model_knows else np.full(len(donors), 3.0 * has_it.mean())
        study.quantity[:, gene] = known
        study.expected[:, gene] = known * study.library[:, 0]
    return study


@pytest.mark.parametrize("model_knows", [False, True], ids=["unknown", "known"])
@pytest.mark.parametrize(("n_donors", "n_cells"), [(4, 40), (8, 20), (15, 12)], ids=str)
@pytest.mark.parametrize("scale", [RATIO, Scale("difference")], ids=["ratio", "difference"])
def test_a_gene_of_one_donor_is_no_difference_of_groups(n_donors, n_cells, model_knows, scale):
    study = with_odd_genes(n_donors, n_cells, model_knows=model_knows)
    table = study.table(sample_key="unit", scale=scale)
    assert not table[CALLED].iloc[:4].any()
    assert (table["lfsr"].iloc[:4] > 0.9).all()
    assert table[CALLED].iloc[4:8].sum() >= 2


def test_without_caution_one_donor_is_almost_a_difference(monkeypatch):
    monkeypatch.setattr(
        "pyrocell.infer.replicates._caution", lambda fitted, evidence, *_: np.ones_like(evidence.centre)
    )
    table = with_odd_genes(4, 40, model_knows=True).table(sample_key="unit")
    assert (table["lfsr"].iloc[:4] < 0.7).all()
