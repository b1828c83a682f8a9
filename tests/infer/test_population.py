"""Effects on means against closed forms, brute force and simulations with known truth."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from pyrocell.errors import DataError, PyrocellWarning, QueryError
from pyrocell.infer.comparison import Comparison, compare_groups
from pyrocell.infer.levels import PRIOR_COUNT, Scale, corrected_levels
from pyrocell.infer.moments import MomentSums
from pyrocell.infer.population import PopulationData, population_differential
from pyrocell.infer.population_plan import plan_population
from pyrocell.infer.raw_summary import summarise_comparisons
from pyrocell.infer.replicates import replicate_evidence
from pyrocell.infer.scale_sampler import DifferentialOptions
from pyrocell.infer.shrinkage import CountEvidence, NormalEvidence, common_centre, shrunken_effects

CALLED = "is_de_fdr_0.05"
RATIO = Scale("log2_ratio")


def moments_of(codes, *values, block=97, weights=None):
    sums = MomentSums(int(codes.max()) + 1, values[0].shape[1], weights)
    for start in range(0, len(codes), block):
        rows = slice(start, start + block)
        sums.update(codes[rows], [torch.as_tensor(value[rows], dtype=torch.float32) for value in values])
    return sums.result([f"g{i}" for i in range(values[0].shape[1])])


class Study:
    """Simulated counts of donors in two groups; the model's expectation has a part of the effects alone."""

    def __init__(
        self,
        *,
        n_genes=400,
        n_donors=4,
        n_cells=60,
        effects=None,
        donor_sd=0.0,
        theta=2.0,
        learned=0.5,
        paired=False,
        seed=0,
    ):
        rng = np.random.default_rng(seed)
        self.effects = np.zeros(n_genes) if effects is None else np.asarray(effects)
        base = rng.lognormal(0.0, 1.0, n_genes)
        donors = np.repeat(np.arange(2 * n_donors), n_cells)
        group = donors // n_donors
        person = donors % n_donors if paired else donors
        lasting = rng.normal(0.0, donor_sd, (2 * n_donors, n_genes))
        if paired:  # what a donor has in both groups is much larger than what differs within
            lasting = lasting * 0.2 + rng.normal(0.0, donor_sd, (n_donors, n_genes))[person[::n_cells]]
        profile = base * 2.0 ** np.where(group[:, None] == 0, self.effects, 0.0) * np.exp(lasting[donors])
        self.library = rng.lognormal(0.0, 0.3, (len(donors), 1))
        mean = self.library * profile
        self.counts = rng.poisson(rng.gamma(theta, mean / theta)).astype(np.float64)
        known = base * 2.0 ** np.where(group[:, None] == 0, learned * self.effects, 0.0)
        self.quantity = known * rng.lognormal(0.0, 0.1, known.shape)  # draws of the cells' posterior
        self.expected = self.library * self.quantity
        self.obs = pd.DataFrame(
            {
                "group": np.where(group == 0, "A", "B"),
                "donor": [f"d{i}" for i in person],
                "unit": [f"u{i}" for i in donors],
                "sex": np.where(person % 2 == 0, "F", "M"),
            }
        )
        self.names = [f"g{i}" for i in range(n_genes)]

    def data(self, comparisons=None, options=None, *, without_counts=False, obs=None):
        obs = self.obs if obs is None else obs
        comparisons = comparisons or compare_groups(obs["group"], group1="A", group2="B")
        samples = obs[options.sample_key] if options and options.sample_key else None
        plan = plan_population(comparisons, samples=samples, cells_per_stratum=10**6)
        rows = plan.rows
        counts, expected = (
            np.zeros_like(table) if without_counts else table for table in (self.counts, self.expected)
        )
        moments = moments_of(plan.codes, counts[rows], expected[rows], self.quantity[rows])
        raw = summarise_comparisons([(np.arange(len(obs)), self.counts, None)], comparisons)
        return PopulationData(self.names, plan, moments, raw, obs=obs, group_key="group")

    def table(self, *, scale=RATIO, delta=0.0, fdr_target=0.05, **choices):
        keys = ("comparisons", "without_counts", "obs")
        asked = {key: choices.pop(key) for key in keys if key in choices}
        options = DifferentialOptions(**choices)
        found = population_differential(
            self.data(options=options, **asked), scale, delta=delta, fdr_target=fdr_target, options=options
        )
        return found.loc[self.names] if found.index.is_unique else found


def mixed_effects(n_genes, share, seed, size=1.0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(n_genes) < share, rng.normal(0.0, size, n_genes), 0.0)


# ------------------------------------------------------------------------------------------- sums and levels


def test_moments_are_those_of_the_cells_whatever_the_blocks():
    rng = np.random.default_rng(0)
    codes, values = rng.integers(3, size=200), rng.gamma(2.0, size=(3, 200, 5))
    one, two = (moments_of(codes, *values, block=block) for block in (7, 200))
    np.testing.assert_allclose(one.products, two.products, rtol=1e-5)
    for stratum in range(3):
        inside = values[:, codes == stratum]
        np.testing.assert_allclose(one.sums[:, stratum], inside.sum(1), rtol=1e-5)
        np.testing.assert_allclose(one.products[4, stratum], (inside[0] * inside[2]).sum(0), rtol=1e-5)
    united = one.united([[0, 2]])
    np.testing.assert_allclose(united.sums[:, 0], values[:, codes != 1].sum(1), rtol=1e-5)
    weights = rng.normal(size=(3, 3, 5))
    by_hand = [
        ((weights[:, stratum][:, None] * values[:, codes == stratum]).sum(0) ** 2).sum(0)
        for stratum in range(3)
    ]
    np.testing.assert_allclose(one.weighted(*weights), by_hand, rtol=1e-3)


def test_draws_that_are_not_finite_are_named():
    values = np.ones((3, 4, 2))
    values[2, 1, 1] = np.nan
    with pytest.raises(DataError, match="1 features are not finite: 'g1'"):
        moments_of(np.zeros(4, dtype=int), *values)


def test_the_level_is_the_mean_of_the_gamma_posterior():
    study = Study(n_genes=30, n_cells=50)
    codes = (study.obs["group"] == "B").to_numpy().astype(int)
    levels = corrected_levels(
        moments_of(codes, study.counts, study.expected, study.quantity), [[0], [1]], by="ratio"
    )
    for side in (0, 1):
        x, e, m = (table[codes == side] for table in (study.counts, study.expected, study.quantity))
        factor = (PRIOR_COUNT + x.sum(0)) / (PRIOR_COUNT + e.sum(0))
        np.testing.assert_allclose(levels.level[side], m.mean(0) * factor, rtol=1e-5)


def test_the_variance_is_that_of_the_bayesian_bootstrap():
    study = Study(n_genes=200, n_cells=100, seed=3)
    codes = np.zeros(len(study.obs), dtype=int)
    levels = corrected_levels(
        moments_of(codes, study.counts, study.expected, study.quantity), [[0]], by="ratio"
    )
    weights = np.random.default_rng(0).exponential(size=(len(codes), 3000))
    x, e, m = (weights.T @ table for table in (study.counts, study.expected, study.quantity))
    replicates = np.log(x + PRIOR_COUNT) - np.log(e + PRIOR_COUNT) + np.log(m)
    replicates -= np.log(weights.sum(0))[:, None]
    seen = study.counts.sum(0) >= 100
    ratio = np.sqrt(levels.variance[0]) / levels.level[0] / replicates.std(0)
    assert abs(np.median(ratio[seen]) - 1) < 0.02
    assert (
        np.quantile(np.abs(ratio[seen] - 1), 0.9) < 0.15
    )  # the dispersion is moderated, the bootstrap's is not


def test_rare_counts_have_the_dispersion_of_poisson_counts():
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.02, (2000, 300)).astype(float)
    ones = np.full_like(counts, 0.02) * rng.lognormal(0, 0.05, counts.shape)
    levels = corrected_levels(moments_of(np.zeros(2000, int), counts, ones, ones), [[0]], by="ratio")
    assert 0.95 < np.median(levels.dispersion) < 1.02


def test_values_of_any_sign_are_shifted():
    rng = np.random.default_rng(1)
    x, e = rng.normal(0.3, 2.0, (500, 40)), rng.normal(0.0, 0.1, (500, 40))
    levels = corrected_levels(moments_of(np.zeros(500, int), x, e, e), [[0]], by="shift")
    np.testing.assert_allclose(levels.level[0], x.mean(0), atol=1e-5)
    np.testing.assert_allclose(np.sqrt(levels.variance[0]), x.std(0) / np.sqrt(500), rtol=0.02)


# ------------------------------------------------------------------------------------------- likelihood and prior


def test_two_counts_are_compared_as_a_binomial():
    evidence = CountEvidence(*(np.array([value]) for value in (7.0, 3.0, 20.0, 10.0)))
    effect = np.linspace(-3, 3, 7)[None]
    share = 20 * 2**effect / (20 * 2**effect + 10)
    expected = stats.binom(10, share).logpmf(7)
    found = evidence.log_likelihood(effect, slice(None))
    np.testing.assert_allclose(found - found[:, :1], expected - expected[:, :1], atol=1e-10)
    assert evidence.centre[0] == pytest.approx(np.log2(7 / 20 / (3 / 10)))


def test_a_normal_prior_is_learned_and_gives_the_conjugate_posterior():
    rng = np.random.default_rng(0)
    true = rng.normal(0, 2.0, 4000)
    estimate = true + rng.normal(size=4000)
    found = shrunken_effects(NormalEvidence(estimate, np.ones(4000)), delta=0.0, mass=0.9)
    near = np.abs(estimate) < 3
    np.testing.assert_allclose(found.mean[near], 0.8 * estimate[near], atol=0.15)
    np.testing.assert_allclose(np.median(found.std), np.sqrt(0.8), rtol=0.05)
    np.testing.assert_allclose(found.positive, stats.norm.cdf(np.sqrt(0.8) * estimate), atol=0.1)
    np.testing.assert_allclose(found.positive + found.negative + found.null, 1.0)
    assert np.mean((found.low <= true) & (true <= found.high)) == pytest.approx(0.9, abs=0.02)


def test_no_effects_are_learned_from_noise():
    noise = np.random.default_rng(0).normal(size=2000)
    found = shrunken_effects(NormalEvidence(noise, np.ones(2000)), delta=0.0, mass=0.9)
    assert found.null.min() > 0.5 and found.lfsr.min() > 0.5 and np.abs(found.mean).max() < 1.0
    assert np.abs(found.mean).mean() < 0.02


def test_delta_counts_what_lies_beyond_it():
    estimate = np.concatenate([np.zeros(900), np.linspace(-3, 3, 100)])
    evidence = NormalEvidence(estimate, np.full(1000, 0.1))
    at_zero, beyond = (shrunken_effects(evidence, delta=delta, mass=0.9) for delta in (0.0, 1.0))
    np.testing.assert_allclose(at_zero.above, at_zero.positive)
    np.testing.assert_allclose(beyond.mean, at_zero.mean, atol=2e-3)
    np.testing.assert_allclose(
        beyond.above[-20:], stats.norm.sf((1.0 - beyond.mean[-20:]) / beyond.std[-20:]), atol=0.01
    )


def test_the_centre_is_that_of_the_majority():
    rng = np.random.default_rng(0)
    error = rng.uniform(0.05, 0.5, 1000)
    centre = 0.2 + error * rng.normal(size=1000)
    centre[:150] += 2.0
    assert common_centre(centre, error) == pytest.approx(0.2, abs=0.02)
    assert centre.mean() > 0.4


# ------------------------------------------------------------------------------------------- simulation: cells


@pytest.mark.parametrize("donors", [False, True], ids=["cells", "donors"])
def test_intervals_cover(donors):
    covered = []
    for seed in range(4):
        effects = mixed_effects(400, 1.0, seed)
        study = Study(effects=effects, donor_sd=0.25 if donors else 0.0, seed=seed)
        table = study.table(relative_to="total", sample_key="unit" if donors else None)
        covered.append(((table["lfc_low"] <= effects) & (effects <= table["lfc_high"])).mean())
    assert 0.87 <= np.mean(covered) <= 0.93, covered


def realised(donors=False, without_counts=False, sample_key=None):
    """Realised false discovery proportion, power for effects above 1, and slope, over three data sets."""
    n_called = n_false = 0
    slopes, shrunken, found = [], [], []
    for seed in range(3):
        effects = mixed_effects(400, 0.2, seed)
        study = Study(effects=effects, donor_sd=0.25 if donors else 0.0, seed=seed)
        table = study.table(sample_key=sample_key, without_counts=without_counts)
        called, changed = table[CALLED].to_numpy(), effects != 0
        n_called, n_false = n_called + called.sum(), n_false + (called & ~changed).sum()
        clear = changed & (study.counts.sum(0) > 100)
        slopes.append(np.polyfit(effects[clear], table["lfc_estimate"][clear], 1)[0])
        shrunken.append(np.polyfit(effects[clear], table["lfc_mean"][clear], 1)[0])
        found.append(called[np.abs(effects) > 1].mean())
    assert np.mean(shrunken) <= np.mean(slopes)
    return n_false / max(n_called, 1), np.mean(found), np.mean(slopes)


def test_calls_are_true_and_effects_are_right_between_cells():
    false, power, slope = realised()
    assert false <= 0.07 and power > 0.8 and 0.9 <= slope <= 1.1, (false, power, slope)


def test_calls_are_true_and_effects_are_right_between_donors():
    false, power, slope = realised(donors=True, sample_key="unit")
    assert false <= 0.07 and power > 0.5 and 0.9 <= slope <= 1.1, (false, power, slope)


def test_defects_are_noticed():
    """The model's means without the counts, and cells taken for replicates, fail what holds above."""
    *_, slope = realised(without_counts=True)
    assert slope < 0.7
    false, *_ = realised(donors=True, sample_key=None)
    assert false > 0.2


# ------------------------------------------------------------------------------------------- nothing to find


def test_random_halves_of_cells_do_not_differ():
    n_any = 0
    for seed in range(12):
        study = Study(n_genes=200, n_donors=1, n_cells=200, seed=seed)
        n_any += study.table()[CALLED].any()
    assert n_any <= 1


def test_donors_of_one_condition_do_not_differ():
    calls, with_cells = [], []
    for seed in range(6):
        study = Study(n_genes=300, donor_sd=0.3, seed=seed)
        calls.append(study.table(sample_key="unit")[CALLED].mean())
        with_cells.append(study.table()[CALLED].mean())
    assert np.mean(calls) <= 0.005, calls
    assert np.mean(with_cells) > 0.05  # the defect: cells as replicates


# ------------------------------------------------------------------------------------------- symmetry


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"scale": Scale("difference")},
        {"scale": Scale("log2_ratio", 1.0)},
        {"sample_key": "unit"},
        {"sample_key": "donor", "paired": True},
        {"sample_key": "unit", "design": "~ group + sex"},
        {"sample_key": "unit", "scale": Scale("difference")},
        {"delta": 0.3, "credible_interval": 0.5},
        {"delta": None},
    ],
    ids=str,
)
def test_swapping_the_groups_flips_every_sign_exactly(choices):
    paired = choices.get("sample_key") == "donor"
    study = Study(n_genes=80, effects=mixed_effects(80, 0.3, 0), paired=paired, donor_sd=0.2)
    [comparison] = compare_groups(study.obs["group"], group1="A", group2="B")
    one = study.table(comparisons=[comparison], **choices)
    two = study.table(comparisons=[comparison.swapped()], **choices)
    prefix = "effect" if "effect_mean" in one else "lfc"
    for name in ("mean", "estimate", "offset", "model", "raw"):
        np.testing.assert_array_equal(one[f"{prefix}_{name}"], -two[f"{prefix}_{name}"])
    np.testing.assert_array_equal(one[f"{prefix}_low"], -two[f"{prefix}_high"])
    for name in ("proba_de", "lfsr", f"{prefix}_std", f"{prefix}_error", "delta", CALLED):
        np.testing.assert_array_equal(one[name], two[name])
    for name in ("scale", "raw_mean", "n_cells", "n_replicates"):
        np.testing.assert_array_equal(one[f"{name}1"], two[f"{name}2"])


def test_names_of_donors_do_not_matter():
    study = Study(n_genes=60, effects=mixed_effects(60, 0.3, 0), donor_sd=0.2)
    other = study.obs.assign(unit=study.obs["unit"].map({f"u{i}": f"x{7 - i}" for i in range(8)}))
    one, two = study.table(sample_key="unit"), study.table(sample_key="unit", obs=other)
    for name in ("lfc_mean", "lfc_error", "proba_de"):
        np.testing.assert_allclose(one[name], two[name], atol=1e-6)


def test_the_order_of_comparisons_does_not_matter():
    study = Study(n_genes=40, effects=mixed_effects(40, 0.3, 0))
    obs = study.obs.assign(group=study.obs["unit"].map(lambda unit: f"k{int(unit[1]) % 4}"))
    forth, back = (
        study.table(comparisons=comparisons, obs=obs)
        for comparisons in (compare_groups(obs["group"]), compare_groups(obs["group"])[::-1])
    )
    for name in obs["group"].unique():
        one, two = (table[table["group1"] == name].loc[study.names] for table in (forth, back))
        np.testing.assert_allclose(one["lfc_mean"], two["lfc_mean"], rtol=1e-9)


# ------------------------------------------------------------------------------------------- designs


def test_pairs_find_what_donors_hide():
    effects = mixed_effects(300, 0.2, 1)
    study = Study(n_genes=300, effects=effects, paired=True, donor_sd=0.8)
    paired, apart = study.table(sample_key="donor"), study.table(sample_key="unit")
    changed = effects != 0
    assert paired[CALLED][changed].sum() > 2 * apart[CALLED][changed].sum()
    assert (paired[CALLED] & ~changed).sum() <= 0.1 * paired[CALLED].sum()
    assert (paired["n_replicates1"] == 4).all() and (paired["n_replicates2"] == 4).all()


def test_a_formula_of_the_groups_alone_is_two_groups():
    study = Study(n_genes=60, effects=mixed_effects(60, 0.3, 0), donor_sd=0.2)
    one = study.table(sample_key="unit")
    two = study.table(sample_key="unit", design="~ group")
    np.testing.assert_allclose(one["lfc_mean"], two["lfc_mean"], atol=1e-6)
    pairs = Study(n_genes=60, paired=True, donor_sd=0.4)
    one = pairs.table(sample_key="donor", paired=True)
    two = pairs.table(sample_key="donor", design="~ group + donor")
    np.testing.assert_allclose(one["lfc_mean"], two["lfc_mean"], atol=1e-6)


def test_covariates_take_their_part_away():
    """Sex shifts half of the genes and is not balanced between the groups."""
    study = Study(n_genes=200, n_donors=6, n_cells=80, donor_sd=0.05)
    number = study.obs["unit"].str[1:].astype(int)
    study.obs["sex"] = np.where(number.isin([0, 1, 2, 3, 6, 7]), "F", "M")
    shifted = np.arange(200) < 100
    factor = np.where((study.obs["sex"] == "F").to_numpy()[:, None] & shifted, 3.0, 1.0)
    study.counts = np.random.default_rng(5).poisson(study.counts * factor).astype(float)
    plain = study.table(sample_key="unit", relative_to="total")
    found = study.table(sample_key="unit", relative_to="total", design="~ group + sex")
    sex = study.table(sample_key="unit", relative_to="total", design="~ group + sex", contrast="sex[T.M]")
    assert np.abs(found["lfc_estimate"][shifted].median()) < 0.1 < plain["lfc_estimate"][shifted].median()
    assert found[CALLED].sum() <= 2
    assert set(sex["comparison"]) == {"sex[T.M] among A vs B"}
    assert sex["lfc_estimate"][shifted].median() == pytest.approx(-np.log2(3), abs=0.15)
    assert sex[CALLED][shifted].mean() > 0.8 and sex[CALLED][~shifted].mean() < 0.15


def test_few_replicates_are_said_to_be_few():
    study = Study(n_genes=40, n_donors=2)
    comparison = [Comparison("A vs B", "A", "B", np.arange(120), np.arange(120, 180))]
    with pytest.warns(PyrocellWarning, match=r"Fewer than two replicates in 'B'.*spread.*other group"):
        table = study.table(comparisons=comparison, sample_key="unit")
    assert (table["n_replicates1"] == 2).all() and (table["n_replicates2"] == 1).all()
    comparison = [Comparison("A vs B", "A", "B", np.arange(60), np.arange(120, 180))]
    with pytest.warns(PyrocellWarning, match=r"'A', 'B'.*about these cells"):
        table = study.table(comparisons=comparison, sample_key="unit")
    assert (table["n_replicates1"] == 0).all()
    pd.testing.assert_series_equal(table["lfc_mean"], study.table(comparisons=comparison)["lfc_mean"])
    pairs = Study(n_genes=40, n_donors=1, paired=True)
    with pytest.warns(PyrocellWarning, match=r"Only one replicate \(d0\)"):
        pairs.table(sample_key="donor")


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"sample_key": "donor", "paired": False}, r"4 replicates are in both groups of 'A vs B': 'd0'"),
        ({"sample_key": "unit", "paired": True}, "no replicate is in both groups"),
        ({"sample_key": "donor", "design": "~ group"}, r"Add \+ donor to the design"),
        (
            {"sample_key": "unit", "design": "~ group + twin"},
            r"not of full rank: 'group\[T.B\]', 'twin\[T.two\]'",
        ),
        (
            {"sample_key": "unit", "design": "~ group + sex", "contrast": "sex[T.X]"},
            r"no coefficient 'sex\[T.X\]'.*'sex\[T.M\]'",
        ),
        ({"sample_key": "unit", "design": "~ sex"}, r"has no 'group', the column of the groups"),
        ({"sample_key": "unit", "design": "~ group + age"}, r"reads 'age', which adata.obs does not have"),
        ({"sample_key": "unit", "design": "~ group + cell"}, r"'cell' has 60 values .* in replicate 'u"),
        ({"sample_key": "unit", "design": "~ group +"}, "is no formula"),
        ({"sample_key": "unit", "design": "~ group + unit"}, "not of full rank|coefficients for"),
    ],
    ids=str,
)
def test_designs_that_make_no_sense(choices, said):
    study = Study(n_genes=20, paired=choices["sample_key"] == "donor")
    study.obs["twin"] = np.where(study.obs["group"] == "A", "one", "two")
    study.obs["cell"] = np.arange(len(study.obs)).astype(str)
    with pytest.raises(QueryError, match=said):
        study.table(**choices)


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"paired": True}, "paired was given without sample_key"),
        ({"design": "~ group"}, "design was given without sample_key"),
        ({"sample_key": "unit", "contrast": "sex[T.M]"}, "contrast was given without design"),
        ({"sample_key": "unit", "design": "~ group", "paired": True}, "Both paired and design"),
        ({"multiplicity": "all"}, "multiplicity is 'all'"),
        ({"relative_to": "mean"}, "relative_to is 'mean'"),
        ({"min_counts": -1}, "min_counts is -1"),
        ({"cells_per_stratum": 1}, "cells_per_stratum is 1"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(choices, said):
    with pytest.raises(QueryError, match=said):
        DifferentialOptions(**choices)


def test_cells_that_cannot_be_compared():
    study = Study(n_genes=20)
    both = [Comparison("a vs b", "a", "b", np.arange(20), np.arange(10, 40))]
    with pytest.raises(QueryError, match="10 cells are on both sides of comparison 'a vs b'"):
        study.table(comparisons=both)
    obs = study.obs.assign(unit=study.obs["unit"].where(study.obs["group"] == "A"))
    with (
        pytest.warns(PyrocellWarning, match="240 of the cells compared have no value in 'unit'"),
        pytest.raises(QueryError, match="No cell of group 'B' has a replicate"),
    ):
        study.table(obs=obs, sample_key="unit")
    obs = study.obs.assign(unit=study.obs["unit"].where(np.arange(480) % 10 > 0))
    with pytest.warns(PyrocellWarning, match="48 of the cells"):
        table = study.table(obs=obs, sample_key="unit")
    assert (table["n_cells1"] == 216).all()


# ------------------------------------------------------------------------------------------- the table


def test_genes_below_the_floor_are_untested():
    study = Study(n_genes=30)
    study.counts[:, 3] = 0.0
    study.counts[:5, 4] = 1.0
    study.counts[5:, 4] = 0.0
    table = study.table()
    assert list(table.index[~table["tested"]]) == ["g3", "g4"]
    untested = table[~table["tested"]]
    assert untested[["lfc_mean", "lfc_low", "lfc_error"]].isna().all(axis=None)
    assert (untested["proba_de"] == 0).all() and (untested["lfsr"] == 1).all()
    assert not untested[CALLED].any()
    assert study.table(min_counts=3.0).loc["g4", "tested"]
    study.counts[:] = 0.0
    assert not study.table()["tested"].any()


def test_each_column_is_what_it_says():
    effects = mixed_effects(100, 0.3, 0)
    study = Study(n_genes=100, effects=effects)
    table = study.table(relative_to="total", credible_interval=0.8)
    first = (study.obs["group"] == "A").to_numpy()
    sums = [study.counts[side].sum(0) for side in (first, ~first)]
    bulk = [np.log2(total + 0.5) - np.log2(total.sum() + 1) for total in sums]
    np.testing.assert_allclose(table["lfc_pseudobulk"], bulk[0] - bulk[1])
    np.testing.assert_allclose(table["raw_mean1"], study.counts[first].mean(0))
    np.testing.assert_allclose(
        table["lfc_raw"],
        np.log2(table["raw_normalized_mean1"] + 1e-3) - np.log2(table["raw_normalized_mean2"] + 1e-3),
    )
    model = [study.quantity[side].mean(0) for side in (first, ~first)]
    np.testing.assert_allclose(table["lfc_model"], np.log2(model[0] / model[1]), atol=1e-5)
    np.testing.assert_allclose(table["lfc_estimate"], np.log2(table["scale1"] / table["scale2"]), atol=1e-9)
    assert (table["lfc_offset"] == 0).all() and (table["delta"] == 0).all()
    certain = table["lfsr"] < 1e-3
    width = (table["lfc_high"] - table["lfc_low"])[certain] / table["lfc_std"][certain]
    np.testing.assert_allclose(width.median(), 2 * stats.norm.ppf(0.9), rtol=0.02)
    np.testing.assert_allclose(table["lfsr"], 1 - table["proba_de"], atol=1e-12)
    centred = study.table()
    np.testing.assert_allclose(
        centred["lfc_estimate"] + centred["lfc_offset"], table["lfc_estimate"], atol=1e-9
    )


def test_the_clearest_effects_come_first():
    study = Study(n_genes=60, effects=mixed_effects(60, 0.4, 0))
    study.counts[:, 7] = 0.0
    options = DifferentialOptions()
    table = population_differential(study.data(options=options), RATIO, options=options)
    least = np.maximum(np.maximum(table["lfc_low"], -table["lfc_high"]), 0).fillna(-1)
    assert least.is_monotonic_decreasing and table.index[-1] == "g7"


def test_false_calls_are_counted_in_each_comparison_or_in_all():
    study = Study(n_genes=150, effects=mixed_effects(150, 0.2, 0, size=0.6))
    obs = study.obs.assign(group=study.obs["group"] + (study.obs["unit"].str[1:].astype(int) % 2).astype(str))
    comparisons = compare_groups(obs["group"], group2="A0")
    apart = study.table(comparisons=comparisons, obs=obs)
    whole = study.table(comparisons=comparisons, obs=obs, multiplicity="table")
    assert (1 - whole["proba_de"][whole[CALLED]]).mean() <= 0.05
    for _, part in apart.groupby("comparison"):
        assert part[CALLED].sum() == 0 or (1 - part["proba_de"][part[CALLED]]).mean() <= 0.05
    assert whole["proba_de"][whole[CALLED]].min() >= whole["proba_de"][~whole[CALLED]].max()


def test_large_strata_are_sampled():
    study = Study(n_genes=20, n_cells=200)
    one = compare_groups(study.obs["group"], group1="A", group2="B")
    plans = [plan_population(one, cells_per_stratum=100, seed=seed) for seed in (0, 0, 1)]
    assert len(plans[0].rows) == 200 and (np.diff(plans[0].rows) > 0).all()
    np.testing.assert_array_equal(plans[0].rows, plans[1].rows)
    assert not np.array_equal(plans[0].rows, plans[2].rows)


def test_the_spread_between_replicates_widens_the_likelihood():
    """With few replicates, tails are wider than those of a Normal: about those of Student's t."""
    study = Study(n_genes=2000, n_cells=40, donor_sd=0.3, theta=50.0)
    codes = study.obs["unit"].str[1:].astype(int).to_numpy()
    levels = corrected_levels(
        moments_of(codes, study.counts, study.expected, study.quantity), [[i] for i in range(8)], by="ratio"
    )
    design = np.stack([np.ones(8), np.repeat([1.0, 0.0], 4)], axis=1)
    found = replicate_evidence(levels, RATIO, design, np.array([0.0, 1.0]))
    z = found.centre / found.error
    assert 0.85 < z.std() < 1.1
    np.testing.assert_allclose(found.weights.sum(0), 1.0)
    frequent = study.counts.sum(0) > 2000
    spreads = np.sqrt(2 * (0.3**2) / 4) / np.log(2)
    assert np.median(found.error[frequent]) == pytest.approx(spreads, rel=0.15)
