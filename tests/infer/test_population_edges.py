"""Effects on means where a plain answer would be wrong: strata that are cut, few counts, odd donors, bounds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pyrocell.infer.comparison import compare_groups
from pyrocell.infer.levels import Scale, corrected_levels
from pyrocell.infer.moments import StratumMoments
from pyrocell.infer.population import PopulationData, population_differential
from pyrocell.infer.population_plan import plan_population
from pyrocell.infer.raw_summary import summarise_comparisons
from pyrocell.infer.replicates import linear_evidence
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


# ------------------------------------------------------------------------------------------- differences


def two_sides(counted, expected, quantity, scale, *, sample_key=None, **choices):
    """Compare the first half of the cells with the second; four donors in each."""
    n, n_features = counted.shape
    groups = np.repeat(["A", "B"], n // 2)
    obs = pd.DataFrame({"group": groups, "unit": [f"u{i // (n // 8)}" for i in range(n)]})
    comparisons = compare_groups(groups, group1="A", group2="B")
    samples = obs["unit"] if sample_key else None
    plan = plan_population(comparisons, samples=samples, cells_per_stratum=10**6)
    rows = plan.rows
    moments = moments_of(plan.codes, *(table[rows] for table in (counted, expected, quantity)))
    raw = summarise_comparisons([(np.arange(n), np.abs(counted), None)], comparisons)
    names = [f"g{i}" for i in range(n_features)]
    data = PopulationData(names, plan, moments, raw, obs=obs, **choices)
    options = DifferentialOptions(sample_key=sample_key, relative_to="total")
    return population_differential(data, scale, options=options).loc[names]


def test_large_values_keep_their_variance():
    values = np.random.default_rng(0).normal(1000.0, 1.0, (2000, 5))
    zeros = np.zeros_like(values)
    moments = moments_of(np.zeros(2000, int), values, zeros, zeros, block=500)
    levels = corrected_levels(moments, [[0]], by="shift")
    np.testing.assert_allclose(np.sqrt(levels.variance[0]), values.std(0) / np.sqrt(2000), rtol=1e-3)


@pytest.mark.parametrize("sample_key", [None, "unit"])
def test_what_is_constant_is_not_tested(sample_key):
    values = np.random.default_rng(1).normal(0.0, 1.0, (400, 60))
    values[:, 3], values[:, 4] = 0.0, 1e4
    zeros = np.zeros_like(values)
    table = two_sides(values, zeros, zeros, Scale("difference"), sample_key=sample_key, correct="shift")
    assert list(table.index[~table["tested"]]) == ["g3", "g4"]
    assert table[CALLED].sum() == 0


@pytest.mark.parametrize("within", [1e-2, 1e-6, 1e-12])
def test_the_spread_between_replicates_is_reached_whatever_it_is_within(within):
    values = np.random.default_rng(0).normal(0.0, 1.0, (8, 400))
    design = np.stack([np.ones(8), np.repeat([1.0, 0.0], 4)], axis=1)
    found = linear_evidence(values, np.full_like(values, within), design, np.array([0.0, 1.0]))
    z = found.centre / found.error
    assert 0.8 < z.std() < 1.2
    small = linear_evidence(1e-7 * values, np.full_like(values, 1e-14 * within), design, np.array([0.0, 1.0]))
    np.testing.assert_allclose(small.centre / small.error, z, rtol=1e-3)


@pytest.mark.parametrize("sample_key", [None, "unit"])
def test_probabilities_stay_between_zero_and_one(sample_key):
    """Cells of the first half have more depth than the model knows."""
    rng = np.random.default_rng(2)
    share = np.repeat([0.95, 0.3], 20)
    depth = np.repeat([0.95, 0.55], 200)[:, None]
    opened = (rng.random((400, 40)) < share * depth).astype(float)
    known = np.full_like(opened, 1.0) * share
    asked = (opened, known * 0.75, known, Scale("difference"))
    table = two_sides(*asked, sample_key=sample_key, bound=1.0)
    assert ((table[["scale1", "scale2"]] >= 0) & (table[["scale1", "scale2"]] <= 1)).all(axis=None)
    assert (table["effect_estimate"].abs() <= 1).all() and (table["effect_error"] > 0.01).all()
    assert two_sides(*asked, sample_key=sample_key)["scale1"].max() > 1  # without the bound


@pytest.mark.parametrize("sample_key", [None, "unit"])
def test_the_signal_over_a_background_is_right_where_the_model_is_not(sample_key):
    """Foreground 20 against 10 over a background of 90; the model expects 14 against 10."""
    rng = np.random.default_rng(3)
    n, first = 2000, np.repeat([True, False], 1000)[:, None]
    truth = np.where(np.arange(30) < 10, 20.0, 10.0)
    donor = rng.lognormal(0.0, 0.02, (8, 30))[np.repeat(np.arange(8), n // 8)] if sample_key else 1.0
    foreground = np.where(first, truth, 10.0) * donor
    known = np.where(first, np.where(truth == 20.0, 14.0, 10.0), 10.0) * rng.lognormal(0.0, 0.1, (n, 30))
    counts = rng.poisson(foreground + 90.0).astype(float)
    asked = (counts, known + 90.0, known, Scale("log2_ratio", 1.0))
    table = two_sides(*asked, sample_key=sample_key, correct="excess")
    effect = np.log2(21 / 11)
    found = table["lfc_estimate"].iloc[:10]
    assert found.mean() == pytest.approx(effect, abs=0.07)
    assert np.sqrt((((found - effect) / table["lfc_error"].iloc[:10]) ** 2).mean()) < 1.6
    assert table[CALLED].iloc[:10].all() and table[CALLED].iloc[10:].sum() <= 1
    by_ratio = two_sides(*asked, sample_key=sample_key)["lfc_estimate"].iloc[:10]
    assert by_ratio.mean() < 0.75 * effect  # the defect: the background is taken for a part of the signal
    bare = two_sides(*asked[:3], RATIO, sample_key=sample_key, correct="excess")
    assert bare["lfc_estimate"].iloc[:10].mean() == pytest.approx(1.0, abs=0.08)


def test_a_signal_below_its_background_is_not_negative():
    rng = np.random.default_rng(4)
    counts, known = rng.poisson(80.0, (400, 20)).astype(float), np.full((400, 20), 5.0)
    for scale in (RATIO, Scale("log2_ratio", 1.0)):
        table = two_sides(counts, known + 90.0, known, scale, correct="excess")
        assert (table["scale1"] > 0).all() and np.isfinite(table["lfc_estimate"]).all()
        assert table[CALLED].sum() == 0


def test_depth_that_a_model_missed_is_no_effect_in_few_cells_either():
    """30 cells and 600 cells, 3 % of regions seen: of the few cells, most regions were never seen."""
    rng = np.random.default_rng(0)
    codes, chance = np.repeat([0, 1], [30, 600]), rng.uniform(0.02, 0.1, 400)
    depth = np.where(codes == 0, 0.4, 0.8)[:, None]
    seen = (rng.random((630, 400)) < depth * chance).astype(float)
    quantity = np.broadcast_to(chance, seen.shape).copy()
    moments = moments_of(codes, seen, 0.6 * quantity, quantity)
    free, levels = (corrected_levels(moments, [[0], [1]], by="ratio", bound=b) for b in (np.inf, 1.0))
    np.testing.assert_allclose(levels.level.mean(axis=1), chance.mean(), rtol=0.02)
    assert free.level[1].mean() / free.level[0].mean() > 1.5, "the depths differ"
    error = np.sqrt(levels.variance.sum(axis=0))
    assert np.abs((levels.level[1] - levels.level[0]).mean()) < 0.1 * error.mean()
