"""The differential engine against toys whose answers are known in closed form."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy import special, stats

from pyrocell.errors import DataError, PyrocellWarning, QueryError
from pyrocell.infer.decisions import expected_fdr_calls, highest_density_interval, learned_delta
from pyrocell.infer.differential import (
    Comparison,
    DifferentialOptions,
    PopulationDraws,
    RawSummary,
    compare_groups,
    differential,
    joined_tables,
    summarise_comparisons,
    summarise_counts,
)
from pyrocell.infer.draw_plan import plan_draws

FIXED = DifferentialOptions(pseudocount=1e-6)


class GammaCells:
    """Every cell has an exact Gamma posterior for each feature; substituted batches multiply it."""

    def __init__(self, shape, rate, batch_effect=None):
        self.shape, self.rate = np.atleast_2d(shape), np.atleast_2d(rate)
        self.batch_effect = batch_effect or {}
        self.feature_names = [f"f{index}" for index in range(self.shape.shape[1])]
        self.asked = []

    def draw(self, rows, *, given, seed, weights_from=None):
        self.asked.append((len(rows), given))
        rng = np.random.default_rng(seed)
        values = rng.gamma(self.shape[rows]) / self.rate[rows]
        if given is not None:
            values = values * self.batch_effect[given["batch"]]
        return PopulationDraws(torch.from_numpy(values.astype(np.float32)))


class FixedValues:
    """The posterior of each cell is a point: draws are the cell's own values."""

    def __init__(self, values):
        self.values = torch.as_tensor(values, dtype=torch.float32)
        self.feature_names = [f"f{index}" for index in range(self.values.shape[1])]

    def draw(self, rows, *, given, seed, weights_from=None):
        return PopulationDraws(self.values[torch.as_tensor(rows)])


def two_groups(shape1, rate1, shape2, rate2, n=40):
    """Cells 0..n-1 have one posterior, cells n..2n-1 the other."""
    shape = np.repeat([shape1, shape2], n, axis=0)
    rate = np.repeat([rate1, rate2], n, axis=0)
    return GammaCells(shape, rate), Comparison("A vs B", "A", "B", np.arange(n), np.arange(n, 2 * n))


SHAPES1, RATES1 = [5.0, 20.0, 3.0, 8.0], [5.0, 5.0, 1.0, 8.0]
SHAPES2, RATES2 = [5.0, 20.0, 9.0, 8.0], [5.0, 7.0, 9.0, 1.0]


def beta_tail(delta):
    """P(X > 2**delta Y) of independent Gamma variables, from the Beta law of X r1 / (X r1 + Y r2)."""
    shape1, rate1, shape2, rate2 = map(np.array, (SHAPES1, RATES1, SHAPES2, RATES2))
    edge = rate1 * 2.0**delta / (rate1 * 2.0**delta + rate2)
    return special.betaincc(shape1, shape2, edge)


@pytest.fixture(scope="module")
def gamma_table():
    sampler, comparison = two_groups(SHAPES1, RATES1, SHAPES2, RATES2)
    return differential(sampler, [comparison], options=FIXED).loc[sampler.feature_names]


# ------------------------------------------------------------------------------------------- closed forms


def test_change_probabilities_are_those_of_gamma_posteriors(gamma_table):
    up, down = beta_tail(0.25), 1.0 - beta_tail(-0.25)
    np.testing.assert_allclose(gamma_table["proba_de"], np.maximum(up, down), atol=0.02)
    np.testing.assert_allclose(gamma_table["proba_de"] + gamma_table["proba_not_de"], 1.0)


def test_two_sided_test_adds_both_tails():
    sampler, comparison = two_groups(SHAPES1, RATES1, SHAPES2, RATES2)
    options = DifferentialOptions(pseudocount=1e-6, test="two")
    table = differential(sampler, [comparison], options=options).loc[sampler.feature_names]
    np.testing.assert_allclose(table["proba_de"], beta_tail(0.25) + 1.0 - beta_tail(-0.25), atol=0.02)


def test_one_sided_test_takes_the_upper_tail():
    sampler, comparison = two_groups(SHAPES1, RATES1, SHAPES2, RATES2)
    options = DifferentialOptions(pseudocount=1e-6, test="one")
    table = differential(sampler, [comparison], options=options).loc[sampler.feature_names]
    np.testing.assert_allclose(table["proba_de"], beta_tail(0.25), atol=0.02)


def test_fold_changes_are_those_of_gamma_posteriors(gamma_table):
    shape1, rate1, shape2, rate2 = map(np.array, (SHAPES1, RATES1, SHAPES2, RATES2))
    mean = (special.digamma(shape1) - np.log(rate1) - special.digamma(shape2) + np.log(rate2)) / np.log(2)
    spread = np.sqrt(special.polygamma(1, shape1) + special.polygamma(1, shape2)) / np.log(2)
    half = stats.beta(shape1, shape2).median()
    median = np.log2(half / (1 - half) * rate2 / rate1)
    np.testing.assert_allclose(gamma_table["lfc_mean"], mean, atol=0.04)
    np.testing.assert_allclose(gamma_table["lfc_std"], spread, rtol=0.04)
    np.testing.assert_allclose(gamma_table["lfc_median"], median, atol=0.12)
    np.testing.assert_allclose(gamma_table["scale1"], shape1 / rate1, rtol=0.03)
    np.testing.assert_allclose(gamma_table["scale2"], shape2 / rate2, rtol=0.03)
    assert (gamma_table["lfc_min"] < mean - 2 * spread).all()
    assert (gamma_table["lfc_max"] > mean + 2 * spread).all()


def test_vanilla_probabilities_are_those_of_gamma_posteriors():
    sampler, comparison = two_groups(SHAPES1, RATES1, SHAPES2, RATES2)
    table = differential(sampler, [comparison], mode="vanilla", options=FIXED).loc[sampler.feature_names]
    np.testing.assert_allclose(table["proba_m1"], beta_tail(0.0), atol=0.02)
    np.testing.assert_allclose(table["proba_m1"] + table["proba_m2"], 1.0, atol=1e-12)
    expected = np.log(table["proba_m1"] + 1e-8) - np.log(table["proba_m2"] + 1e-8)
    np.testing.assert_allclose(table["bayes_factor"], expected)
    assert not any(column.startswith(("lfc", "is_de", "delta")) for column in table)


def test_vanilla_counts_a_tie_half():
    table = differential(
        FixedValues(np.ones((6, 2))),
        [Comparison("A vs B", "A", "B", np.arange(3), np.arange(3, 6))],
        mode="vanilla",
    )
    assert (table[["proba_m1", "proba_m2"]] == 0.5).all().all()
    assert (table["bayes_factor"] == 0).all()


def test_bounded_quantity_uses_the_difference():
    values = np.vstack([np.full((5, 2), [0.6, 0.31]), np.full((5, 2), [0.2, 0.30])])
    table = differential(
        FixedValues(values),
        [Comparison("A vs B", "A", "B", np.arange(5), np.arange(5, 10))],
        effect="difference",
        delta=0.05,
    ).loc[["f0", "f1"]]
    np.testing.assert_allclose(table["effect_mean"], [0.4, 0.01], atol=1e-6)
    np.testing.assert_allclose(table["effect_median"], [0.4, 0.01], atol=1e-6)
    assert table["proba_de"].tolist() == [1.0, 0.0]
    assert not any(column.startswith(("lfc", "pseudocount")) for column in table)


def test_second_fold_change_uses_a_thousandth_of_the_pseudocount():
    table = differential(
        FixedValues([[0.0], [0.0], [1e-3], [1e-3]]),
        [Comparison("A vs B", "A", "B", np.array([0, 1]), np.array([2, 3]))],
        options=DifferentialOptions(pseudocount=1e-3),
    )
    assert table["lfc_mean"].item() == pytest.approx(-1.0, abs=1e-5)
    assert table["lfc_raw_mean"].item() == pytest.approx(-np.log2(1001), abs=1e-4)
    assert table["lfc_raw_median"].item() == pytest.approx(-np.log2(1001), abs=1e-4)


def test_extremes_are_over_all_pairs():
    values = np.array([[1.0], [8.0], [2.0], [4.0]])
    table = differential(
        FixedValues(values),
        [Comparison("A vs B", "A", "B", np.array([0, 1]), np.array([2, 3]))],
        options=FIXED,
    )
    assert table["lfc_min"].item() == pytest.approx(-2.0, abs=1e-4)
    assert table["lfc_max"].item() == pytest.approx(2.0, abs=1e-4)


# ------------------------------------------------------------------------------------------- symmetry, seeds


def assert_swapped(table, swapped, index):
    """Every signed column changes sign exactly, every sided column changes side exactly."""
    table, swapped = table.loc[index], swapped.loc[index]
    for column in table:
        if column in ("comparison", "group1", "group2"):
            continue
        other, sign = column, 1
        stem, _, end = column.rpartition("_")
        if column.startswith(("lfc_", "effect_")) and end in ("mean", "median", "min", "max", "low", "high"):
            opposite = {"min": "max", "max": "min", "low": "high", "high": "low"}.get(end, end)
            other, sign = f"{stem}_{opposite}", -1
        elif mode_specific := {"proba_m1": "proba_m2", "proba_m2": "proba_m1"}.get(column):
            other = mode_specific
        elif column == "bayes_factor" and "proba_m1" in table:
            sign = -1
        elif column.endswith(("1", "2")):
            other = column[:-1] + ("2" if column.endswith("1") else "1")
        expected = swapped[other].to_numpy()
        np.testing.assert_array_equal(table[column].to_numpy(), expected if sign == 1 else -expected, column)


@pytest.mark.parametrize(
    ("keywords", "options"),
    [
        ({}, {}),
        ({}, {"test": "two", "credible_interval": 0.9}),
        ({"delta": None}, {}),
        ({"mode": "vanilla"}, {}),
        ({"effect": "difference"}, {"credible_interval": 0.5}),
        ({"batches": [{"batch": "x"}, {"batch": "y"}]}, {}),
    ],
)
def test_swapping_the_groups_flips_every_sign_exactly(keywords, options):
    rng = np.random.default_rng(0)
    sampler = GammaCells(rng.uniform(1, 9, (90, 30)), np.ones((90, 30)), {"x": 1.0, "y": 3.0})
    comparison = Comparison("A vs B", "A", "B", np.arange(30), np.arange(30, 90))
    chosen = DifferentialOptions(n_samples=300, n_pairs=500, pseudocount=0.01, **options)
    tables = [
        differential(sampler, [one], options=chosen, **keywords) for one in (comparison, comparison.swapped())
    ]
    assert tables[1]["group1"].unique() == ["B"]
    assert_swapped(*tables, sampler.feature_names)


def test_swapping_is_exact_with_one_sided_batches_and_overlap():
    sampler = GammaCells(np.ones((20, 4)), np.ones((20, 4)), {"x": 1.0, "y": 3.0})
    comparison = Comparison("A vs all", "A", "all", np.arange(5), np.arange(20))
    tables = [
        differential(
            sampler,
            [one],
            options=DifferentialOptions(n_samples=100, pseudocount=0.1, batches1=lists[0], batches2=lists[1]),
        )
        for one, lists in (
            (comparison, ([{"batch": "x"}], [{"batch": "y"}])),
            (comparison.swapped(), ([{"batch": "y"}], [{"batch": "x"}])),
        )
    ]
    assert_swapped(*tables, sampler.feature_names)


def test_a_seed_fixes_the_table_and_the_order_of_cells_does_not_matter():
    sampler, comparison = two_groups(SHAPES1, RATES1, SHAPES2, RATES2)
    shuffled = Comparison("A vs B", "A", "B", comparison.rows1[::-1], np.repeat(comparison.rows2[::-1], 2))
    first, again, other_order = (
        differential(sampler, [one], options=FIXED) for one in (comparison, comparison, shuffled)
    )
    pd.testing.assert_frame_equal(first, again)
    pd.testing.assert_frame_equal(first, other_order)
    other_seed = differential(sampler, [comparison], options=DifferentialOptions(pseudocount=1e-6, seed=1))
    assert not np.array_equal(first["lfc_mean"], other_seed["lfc_mean"])


def test_the_seed_chooses_the_cells():
    sampler = FixedValues(np.arange(1.0, 41.0)[:, None])
    comparison = Comparison("A vs B", "A", "B", np.arange(20), np.arange(20, 40))
    scales = {
        differential(
            sampler, [comparison], options=DifferentialOptions(n_samples=50, pseudocount=1e-6, seed=seed)
        )["scale1"].item()
        for seed in range(3)
    }
    assert len(scales) == 3


def test_global_random_numbers_are_left_alone():
    sampler, comparison = two_groups(SHAPES1, RATES1, SHAPES2, RATES2)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    differential(sampler, [comparison], options=FIXED)
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


# ------------------------------------------------------------------------------------------- decisions


def test_fdr_calls_by_brute_force():
    rng = np.random.default_rng(3)
    for _ in range(20):
        probability = rng.beta(0.5, 0.3, size=50)
        called = expected_fdr_calls(probability, 0.05)
        order = np.argsort(-probability)
        fits = [k for k in range(1, 51) if np.mean(1 - probability[order[:k]]) <= 0.05]
        assert called.sum() == max(fits, default=0)
        assert set(np.flatnonzero(called)) == set(order[: called.sum()])


def test_fdr_column_of_the_table():
    sampler, comparison = two_groups(SHAPES1, RATES1, SHAPES2, RATES2)
    table = differential(sampler, [comparison], fdr_target=0.2, options=FIXED)
    np.testing.assert_array_equal(
        table["is_de_fdr_0.2"], expected_fdr_calls(table["proba_de"].to_numpy(), 0.2)
    )
    assert table["is_de_fdr_0.2"].any()
    assert not table["is_de_fdr_0.2"].all()
    assert table["proba_de"].is_monotonic_decreasing


def test_highest_density_interval_by_brute_force():
    draws = np.random.default_rng(0).gamma(2.0, size=(3, 101))
    low, high = highest_density_interval(draws, 0.8)
    for row, left, right in zip(draws, low, high, strict=True):
        ordered = np.sort(row)
        windows = [(ordered[i + 80] - ordered[i], ordered[i], ordered[i + 80]) for i in range(21)]
        assert (left, right) == min(windows)[1:]
        assert np.mean((row >= left) & (row <= right)) >= 0.8


def test_interval_of_the_table_holds_its_mass():
    sampler, comparison = two_groups([30.0], [30.0], [30.0], [30.0])
    options = DifferentialOptions(pseudocount=1e-6, credible_interval=0.9)
    table = differential(sampler, [comparison], options=options)
    spread = np.sqrt(2 * special.polygamma(1, 30.0)) / np.log(2)
    assert table["lfc_hdi_high"].item() == pytest.approx(1.645 * spread, rel=0.1)
    assert table["lfc_hdi_low"].item() == pytest.approx(-1.645 * spread, rel=0.1)


def test_delta_is_learned_from_three_groups_of_features():
    rng = np.random.default_rng(0)
    effects = np.concatenate([rng.normal(-2, 0.1, 200), rng.normal(0, 0.05, 1600), rng.normal(3, 0.1, 200)])
    assert learned_delta(effects) == pytest.approx(0.6 * 2.5, rel=0.02)
    assert learned_delta(np.zeros(10)) == 0.1


def test_learned_delta_reaches_the_table():
    values = np.ones((6, 60))
    values[:3, :10], values[:3, 10:20] = 4.0, 0.25
    comparison = Comparison("A vs B", "A", "B", np.arange(3), np.arange(3, 6))
    table = differential(FixedValues(values), [comparison], delta=None, options=FIXED)
    np.testing.assert_allclose(table["delta"], 1.2, rtol=1e-3)
    assert table["proba_de"].sum() == 20


# ------------------------------------------------------------------------------------------- null, batches


def test_no_calls_between_random_halves():
    rng = np.random.default_rng(1)
    n_calls = 0
    shape = np.exp(rng.normal(1.0, 1.0, (1, 200)) + rng.normal(0, 0.3, (200, 200)))
    sampler = GammaCells(shape, np.ones_like(shape))
    for seed in range(5):
        halves = np.random.default_rng(seed).permutation(200)
        comparison = Comparison("a vs b", "a", "b", halves[:100], halves[100:])
        options = DifferentialOptions(n_samples=500, n_pairs=1000, pseudocount=1e-3, seed=seed)
        n_calls += differential(sampler, [comparison], options=options)["is_de_fdr_0.05"].sum()
    assert n_calls <= 1


def test_pure_batch_effect_gives_no_calls_when_averaged_within_batches():
    n = 50
    sampler = GammaCells(np.full((2 * n, 20), 200.0), np.full((2 * n, 20), 200.0), {"x": 1.0, "y": 16.0})
    comparison = Comparison("A vs B", "A", "B", np.arange(n), np.arange(n, 2 * n))
    both = [{"batch": "x"}, {"batch": "y"}]
    corrected = differential(sampler, [comparison], batches=both, options=FIXED)
    own = np.sqrt(2 * special.polygamma(1, 200.0)) / np.log(2)
    assert not corrected["is_de_fdr_0.05"].any()
    np.testing.assert_allclose(corrected["lfc_std"], own, rtol=0.1)  # pairs across batches would give about 3
    np.testing.assert_allclose(corrected["lfc_median"], 0.0, atol=0.05)
    assert corrected["proba_de"].max() < 0.2
    confounded = differential(
        sampler,
        [comparison],
        options=DifferentialOptions(pseudocount=1e-6, batches1=both[:1], batches2=both[1:]),
    )
    assert confounded["is_de_fdr_0.05"].all()
    np.testing.assert_allclose(confounded["lfc_mean"], -4.0, atol=0.05)


def test_each_batch_gets_its_share_of_the_draws():
    sampler, comparison = two_groups(SHAPES1, RATES1, SHAPES2, RATES2)
    sampler.batch_effect = {"x": 1.0, "y": 1.0}
    differential(sampler, [comparison], batches=[{"batch": "x"}, {"batch": "y"}], options=FIXED)
    assert sampler.asked == [(5000, {"batch": "x"}), (5000, {"batch": "y"})]


def test_batch_lists_that_overlap_in_part_are_warned_about():
    sampler, comparison = two_groups(SHAPES1, RATES1, SHAPES2, RATES2)
    sampler.batch_effect = {"x": 1.0, "y": 1.0}
    with pytest.warns(PyrocellWarning, match="'A vs B' overlap in part"):
        differential(
            sampler,
            [comparison],
            batches=[{"batch": "x"}],
            options=DifferentialOptions(pseudocount=1e-6, batches2=[{"batch": "x"}, {"batch": "y"}]),
        )


# ------------------------------------------------------------------------------------------- sharing


def one_vs_rest_toy(sizes=(10, 40, 150), n_features=6):
    labels = np.repeat([f"group{index}" for index in range(len(sizes))], sizes)
    codes = np.repeat(np.arange(len(sizes)), sizes)
    shape = np.random.default_rng(5).uniform(2, 12, (len(sizes), n_features))[codes]
    return GammaCells(shape, np.ones_like(shape)), labels, shape


def test_shared_draws_have_the_law_of_separate_comparisons():
    sampler, labels, _ = one_vs_rest_toy()
    shared = differential(sampler, compare_groups(labels), options=FIXED)
    for comparison in compare_groups(labels):
        alone = differential(sampler, [comparison], options=FIXED).loc[sampler.feature_names]
        mine = shared[shared["comparison"] == comparison.name].loc[sampler.feature_names]
        np.testing.assert_allclose(mine["proba_de"], alone["proba_de"], atol=0.035)
        np.testing.assert_allclose(mine["lfc_mean"], alone["lfc_mean"], atol=0.06)
        np.testing.assert_allclose(mine["lfc_std"], alone["lfc_std"], rtol=0.05)
        np.testing.assert_allclose(mine["lfc_median"], alone["lfc_median"], atol=0.15)


def test_the_rest_is_mixed_by_numbers_of_cells():
    sampler, labels, shape = one_vs_rest_toy()
    table = differential(sampler, compare_groups(labels), options=FIXED)
    for name in np.unique(labels):
        rest = table[table["group1"] == name].loc[sampler.feature_names]
        np.testing.assert_allclose(rest["scale2"], shape[labels != name].mean(axis=0), rtol=0.03)
    vanilla = differential(sampler, compare_groups(labels), mode="vanilla", options=FIXED)
    for name in np.unique(labels):  # the pairs must be mixed as well
        mine = vanilla[vanilla["group1"] == name].loc[sampler.feature_names, "proba_m1"]
        expected = chance_higher(shape[labels == name][0], shape[labels != name])
        np.testing.assert_allclose(mine, expected, atol=0.03)


def test_extremes_of_a_shared_run_cover_the_whole_rest():
    values = np.array([[1.0], [4.0], [32.0], [256.0]])
    table = differential(FixedValues(values), compare_groups(list("abcd")), options=FIXED)
    np.testing.assert_allclose(table.sort_values("group1")["lfc_min"], [-8, -6, -3, 3], atol=1e-4)
    np.testing.assert_allclose(table.sort_values("group1")["lfc_max"], [-2, 2, 5, 8], atol=1e-4)


def chance_higher(shape, others):
    """P(X > Y) for Gamma variables of unit rate, Y from a mixture of cells."""
    return special.betaincc(shape, others, 0.5).mean(axis=0)


@pytest.mark.parametrize("n_groups", [2, 8, 20])
def test_all_groups_draw_no_more_than_one_comparison(n_groups):
    sampler, labels, _ = one_vs_rest_toy(sizes=[9] * n_groups)
    table = differential(sampler, compare_groups(labels), options=FIXED)
    assert sum(n_rows for n_rows, _ in sampler.asked) <= 10000
    assert len(sampler.asked) == 1
    assert (table["n_draws"] >= 2 * 250).all()
    np.testing.assert_allclose(table["ess1"], max(250, 10000 // n_groups), rtol=1e-6)


def test_groups_of_a_shared_run_keep_a_floor_of_draws():
    _, labels, _ = one_vs_rest_toy(sizes=[2] * 100)
    plan = plan_draws(compare_groups(labels), options=FIXED)
    assert {stratum.size for stratum in plan.strata} == {250}


def test_overlapping_sides_do_not_share_draws():
    plan = plan_draws([Comparison("A vs all", "A", "all", np.arange(5), np.arange(20))], options=FIXED)
    assert [len(stratum.cells) for stratum in plan.strata] in ([5, 20], [20, 5])
    assert [stratum.size for stratum in plan.strata] == [5000, 5000]


def test_a_few_groups_against_the_rest_share_a_third_piece():
    _, labels, _ = one_vs_rest_toy(sizes=[10, 20, 30, 40])
    plan = plan_draws(compare_groups(labels, group1=["group0", "group2"]), options=FIXED)
    assert sorted(len(stratum.cells) for stratum in plan.strata) == [10, 30, 60]


class CountedDraws:
    """A sampler that counts the draws it is asked for: decoding them is what a comparison costs."""

    def __init__(self, n_features):
        self.n_drawn, self.feature_names = 0, [f"f{index}" for index in range(n_features)]

    def draw(self, rows, *, given, seed, weights_from=None):
        self.n_drawn += len(rows)
        values = torch.rand(len(rows), len(self.feature_names), generator=torch.Generator().manual_seed(0))
        return PopulationDraws(values)


def test_eight_groups_need_as_many_draws_as_one():
    """A slow test times the whole (tests/models/test_comparisons.py)."""
    labels, drawn = np.repeat(np.arange(8), 50), []
    for comparisons in (compare_groups(labels, group1=0), compare_groups(labels)):
        sampler = CountedDraws(20)
        options = DifferentialOptions(n_samples=4000, n_pairs=8000, pseudocount=1e-5)
        differential(sampler, comparisons, options=options)
        drawn.append(sampler.n_drawn)
    assert drawn[1] <= 1.05 * drawn[0]


# ------------------------------------------------------------------------------------------- weights


class WrongGuide:
    """Log-normal draws around 0 where the true posterior is around ``shift``; the weights know."""

    feature_names = ("f0",)

    def __init__(self, shift, *, weighted=True):
        self.shift, self.weighted = shift, weighted

    def draw(self, rows, *, given, seed, weights_from=None):
        h = np.random.default_rng(seed).normal(size=len(rows))
        shift = np.where(rows < 10, self.shift, 0.0)
        log_weights = torch.from_numpy(shift * h - shift**2 / 2) if self.weighted else None
        return PopulationDraws(torch.from_numpy(np.exp2(h)[:, None].astype(np.float32)), log_weights)


LEFT_RIGHT = Comparison("A vs B", "A", "B", np.arange(10), np.arange(10, 20))


def test_importance_weights_repair_the_mean():
    options = DifferentialOptions(pseudocount=1e-6, weights="importance", n_samples=20000)
    table = differential(WrongGuide(1.0), [LEFT_RIGHT], options=options)
    assert table["lfc_mean"].item() == pytest.approx(1.0, abs=0.05)
    assert table["lfc_median"].item() == pytest.approx(1.0, abs=0.15)
    assert table["ess1"].item() == pytest.approx(20000 / np.e, rel=0.1)  # E[W]^2 / E[W^2] = exp(-1)
    assert table["ess2"].item() == pytest.approx(20000)
    uniform = differential(WrongGuide(1.0), [LEFT_RIGHT], options=FIXED)
    assert uniform["lfc_mean"].item() == pytest.approx(0.0, abs=0.08)


def test_weights_are_capped_from_above():
    options = DifferentialOptions(pseudocount=1e-6, weights="importance", truncate_weights=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PyrocellWarning)
        capped = differential(WrongGuide(3.0), [LEFT_RIGHT], options=options)
        free = differential(
            WrongGuide(3.0), [LEFT_RIGHT], options=DifferentialOptions(pseudocount=1e-6, weights="importance")
        )
    assert capped["ess1"].item() > 1.2 * free["ess1"].item()
    assert 0.5 < capped["lfc_mean"].item() < free["lfc_mean"].item() + 0.1


def test_few_effective_draws_are_warned_about():
    options = DifferentialOptions(pseudocount=1e-6, weights="importance")
    with pytest.warns(PyrocellWarning, match="group 'A' leave .* effective draws of 5000"):
        differential(WrongGuide(4.0), [LEFT_RIGHT], options=options)


def test_weights_are_not_averaged_over_batches_nor_invented():
    options = DifferentialOptions(weights="importance")
    with pytest.raises(QueryError, match=r"importance.*average over batches"):
        differential(WrongGuide(1.0), [LEFT_RIGHT], batches=[{"batch": "x"}], options=options)
    with pytest.raises(QueryError, match="returned no weights"):
        differential(WrongGuide(1.0, weighted=False), [LEFT_RIGHT], options=options)


def test_each_set_of_cells_is_weighted_against_itself():
    asked = []

    class Spy(WrongGuide):
        def draw(self, rows, *, given, seed, weights_from=None):
            asked.append((set(rows.tolist()) <= set(weights_from.tolist()), len(weights_from)))
            return super().draw(rows, given=given, seed=seed)

    differential(
        Spy(0.1),
        [LEFT_RIGHT],
        options=DifferentialOptions(pseudocount=1e-6, weights="importance", n_samples=99),
    )
    assert asked == [(True, 10), (True, 10)]


# ------------------------------------------------------------------------------------------- raw counts


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_array, torch.as_tensor])
def test_raw_summaries_by_brute_force(kind):
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.7, (30, 5)).astype(np.float32)
    counts[:, 0] += 1
    library = counts.sum(1) + 10
    codes = rng.integers(-1, 3, 30)
    blocks = [
        (rows, kind(counts[rows]), library[rows, None]) for rows in np.array_split(rng.permutation(30), 4)
    ]
    for group, summary in enumerate(summarise_counts(blocks, codes)):
        mine = counts[codes == group]
        assert summary.n == len(mine)
        np.testing.assert_allclose(summary.mean, mine.mean(0), rtol=1e-6)
        np.testing.assert_allclose(summary.non_zeros_proportion, (mine > 0).mean(0))
        scaled = 1e4 * mine / library[codes == group, None]
        np.testing.assert_allclose(summary.normalised_mean, scaled.mean(0), rtol=1e-6)


def test_rest_is_total_minus_group_and_sides_may_overlap():
    counts = np.random.default_rng(0).poisson(2.0, (20, 3)) + 1
    sets = [np.arange(5), np.arange(5, 18), np.arange(3, 9), np.arange(16)]
    comparisons = [Comparison(str(i), "a", "b", one, two) for i, (one, two) in enumerate(pairwise(sets))]
    raw = summarise_comparisons([(np.arange(20), counts, None)], comparisons)
    for (one, two), pair in zip(pairwise(sets), raw, strict=True):
        for rows, summary in zip((one, two), pair, strict=True):
            assert summary.n == len(rows)
            np.testing.assert_allclose(summary.mean, counts[rows].mean(0))
    codes = (np.arange(20) < 7).astype(int)
    rest, group = summarise_counts([(np.arange(20), counts, None)], codes)
    np.testing.assert_allclose(((group + rest) - group).mean, counts[7:].mean(0))
    assert RawSummary.empty(3).mean.tolist() == [0, 0, 0]


def test_raw_columns_and_learned_pseudocount():
    rng = np.random.default_rng(2)
    values = rng.gamma(2.0, size=(40, 50)).astype(np.float32)
    counts = rng.poisson(0.02, (40, 50))
    comparison = Comparison("A vs B", "A", "B", np.arange(15), np.arange(15, 40))
    raw = summarise_comparisons([(np.arange(40), counts, np.full(40, 100.0))], [comparison])
    sampler = FixedValues(values)
    table = differential(sampler, [comparison], raw=raw).loc[sampler.feature_names]
    unit = values.sum() / counts.sum()  # of the quantity, for one count
    np.testing.assert_allclose(table["pseudocounts"], 0.01 * unit, rtol=0.02)
    np.testing.assert_allclose(table["raw_mean1"], counts[:15].mean(0))
    np.testing.assert_allclose(table["raw_normalized_mean2"], 100 * counts[15:].mean(0))
    np.testing.assert_allclose(table["non_zeros_proportion1"], (counts[:15] > 0).mean(0))


def test_learned_pseudocount_does_not_depend_on_what_else_is_asked():
    rng = np.random.default_rng(2)
    values, counts = rng.gamma(2.0, size=(60, 50)).astype(np.float32), rng.poisson(0.02, (60, 50))
    every = compare_groups(np.repeat(["a", "b", "c", "c"], 15))
    tables = [
        differential(
            FixedValues(values), asked, raw=summarise_comparisons([(np.arange(60), counts, None)], asked)
        )
        for asked in (every, every[:1])
    ]
    learned = [table["pseudocounts"].iloc[0] for table in tables]
    assert learned[0] == pytest.approx(learned[1], rel=0.02)


def test_pseudocount_has_a_floor_and_needs_counts_or_a_number():
    sampler, comparison = two_groups(SHAPES1, RATES1, SHAPES2, RATES2)
    often = RawSummary(40, np.full(4, 4e12), np.full(4, 40.0), np.ones(4))
    assert (differential(sampler, [comparison], raw=[(often, often)])["pseudocounts"] == 1e-10).all()
    with pytest.raises(QueryError, match="no raw counts were given"):
        differential(sampler, [comparison])


# ------------------------------------------------------------------------------------------- outliers


def test_outlier_cells_are_left_out():
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(200, 2))
    odd = np.arange(90, 100)
    latent[odd] += 50.0
    values = np.ones((200, 1))
    values[odd] = 1e6
    comparison = Comparison("A vs B", "A", "B", np.arange(100), np.arange(100, 200))
    options = DifferentialOptions(pseudocount=1e-6, filter_outlier_cells=True)
    table = differential(FixedValues(values), [comparison], latent_means=latent, options=options)
    assert table["scale1"].item() == pytest.approx(1.0)
    assert differential(FixedValues(values), [comparison], options=FIXED)["scale1"].item() > 1000


def test_all_cells_are_kept_when_outliers_cannot_be_found():
    comparison = Comparison("A vs B", "A", "B", np.array([0]), np.array([1]))
    options = DifferentialOptions(pseudocount=1e-6, filter_outlier_cells=True)
    sampler, latent = FixedValues([[1.0], [2.0]]), np.ones((2, 2))
    with pytest.warns(PyrocellWarning, match="Outlier cells of group '[AB]'") as seen:
        table = differential(sampler, [comparison], latent_means=latent, options=options)
    assert len(seen) == 2  # one for each side
    assert table["lfc_mean"].item() == pytest.approx(-1.0, abs=1e-4)
    with pytest.raises(QueryError, match="needs latent means"):
        differential(FixedValues([[1.0], [2.0]]), [comparison], options=options)


# ------------------------------------------------------------------------------------------- groups, errors


def test_groups_from_labels():
    labels = pd.Series(["T", "B", None, "T", "NK", "B"], dtype=pd.CategoricalDtype(["T", "B", "NK", "gone"]))
    comparisons = compare_groups(labels)
    assert [one.name for one in comparisons] == ["T vs rest", "B vs rest", "NK vs rest"]
    assert comparisons[0].rows1.tolist() == [0, 3]
    assert comparisons[0].rows2.tolist() == [1, 4, 5]
    (pair,) = compare_groups(labels, group1="T", group2="NK")
    assert (pair.rows1.tolist(), pair.rows2.tolist(), pair.group2) == ([0, 3], [4], "NK")
    assert [one.group1 for one in compare_groups(labels, group2="B")] == ["T", "NK"]
    assert [one.group1 for one in compare_groups(np.array([0, 1, 1]), group1=1)] == ["1"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"group1": "Bcell"}, "Group 'Bcell' does not exist; expected one of 'T', 'B', 'gone'"),
        ({"group1": "T", "group2": "X"}, "Group 'X' does not exist"),
        ({"group1": ["T", "gone"]}, "Group 'gone' has no cells"),
    ],
)
def test_groups_that_cannot_be_compared_are_named(keywords, message):
    labels = pd.Categorical(["T", "B"], categories=["T", "B", "gone"])
    with pytest.raises(QueryError, match=message):
        compare_groups(labels, **keywords)


def test_one_group_is_not_enough():
    with pytest.raises(QueryError, match="Only 1 group has cells"):
        compare_groups(["T", "T"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array([], dtype=int), "Group 'A' of comparison 'A vs B' has no cells"),
        (np.array([True, False]), "boolean mask"),
        (np.array([-1, 2]), "expected integers of at least 0"),
        (np.array([0.5]), "float64 positions"),
    ],
)
def test_sets_of_cells_are_checked(rows, message):
    with pytest.raises(QueryError, match=message):
        Comparison("A vs B", "A", "B", rows, np.array([1]))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"mode": "classic"}, "mode is 'classic'"),
        ({"effect": "ratio"}, "effect is 'ratio'"),
        ({"delta": -1.0}, "delta is -1.0"),
        ({"fdr_target": 5}, "fdr_target is 5"),
        ({"raw": []}, "raw has 0 entries for 1 comparisons"),
        (
            {"raw": [(RawSummary.empty(3), RawSummary.empty(3))]},
            r"raw has summaries of \[3\] features; expected 4",
        ),
        ({"batches": []}, "batches is an empty list"),
    ],
)
def test_choices_are_checked(keywords, message):
    sampler, comparison = two_groups(SHAPES1, RATES1, SHAPES2, RATES2)
    with pytest.raises(QueryError, match=message):
        differential(sampler, [comparison], options=FIXED, **keywords)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_samples": 1},
        {"n_pairs": 0},
        {"pseudocount": 0.0},
        {"test": "four"},
        {"weights": "none"},
        {"credible_interval": 95},
        {"batches1": []},
        {"batches2": []},
        {"seed": -1},
    ],
)
def test_options_are_checked(wrong):
    (name,) = wrong
    with pytest.raises(QueryError, match=f"{name} is .*; expected"):
        DifferentialOptions(**wrong)


def test_what_is_compared_is_checked():
    sampler, comparison = two_groups(SHAPES1, RATES1, SHAPES2, RATES2)
    with pytest.raises(QueryError, match="No comparison was given"):
        differential(sampler, [], options=FIXED)
    same = Comparison("A vs A", "A", "A", np.arange(3), np.arange(3))
    with pytest.raises(QueryError, match="'A vs A' are the same 3 cells"):
        differential(sampler, [same], options=FIXED)
    values = np.ones((80, 2))
    values[0, 1] = np.nan
    with pytest.raises(DataError, match="1 features are not finite: 'f1'"):
        differential(FixedValues(values), [comparison], options=FIXED)
    values[0, 1] = -1.0
    with pytest.raises(DataError, match="1 features are negative: 'f1'"):
        differential(FixedValues(values), [comparison], options=FIXED)
    sampler.feature_names = ["f0"]
    with pytest.raises(DataError, match=r"shape \(10000, 4\); expected \(10000, 1\)"):
        differential(sampler, [comparison], options=FIXED)


@pytest.mark.parametrize("multiplicity", ["comparison", "table"])
def test_false_calls_of_several_kinds_of_features_are_counted_as_asked(multiplicity):
    rng = np.random.default_rng(0)

    def part(n_features):
        proba = np.concatenate([1 - 0.02 * rng.random(n_features), rng.random(n_features)])
        names = np.repeat(["A vs rest", "B vs rest"], n_features)
        return pd.DataFrame({"comparison": names, "proba_de": proba, "lfc_mean": rng.normal(size=len(names))})

    table = joined_tables({"counts": part(30), "proteins": part(5)}, 0.05, multiplicity=multiplicity)
    proba, called = table["proba_de"].to_numpy(), table["is_de_fdr_0.05"].to_numpy()
    first = (table["comparison"] == "A vs rest").to_numpy()
    together = expected_fdr_calls(proba, 0.05)
    apart = np.concatenate([expected_fdr_calls(proba[first], 0.05), expected_fdr_calls(proba[~first], 0.05)])
    assert (
        together.sum() > apart.sum()
    )  # the sure features of one comparison pay for doubtful ones of the other
    np.testing.assert_array_equal(called, together if multiplicity == "table" else apart)


# ------------------------------------------------------------------------------------------- documentation


def test_every_column_is_in_the_guide():
    page = (Path(__file__).parents[2] / "docs/user_guide/differential_expression.md").read_text()
    sampler, comparison = two_groups(SHAPES1, RATES1, SHAPES2, RATES2)
    raw = [(RawSummary.empty(4), RawSummary.empty(4))]
    options = DifferentialOptions(n_samples=10, n_pairs=10, credible_interval=0.95)
    columns: set[str] = set()
    for keywords in ({}, {"mode": "vanilla"}, {"effect": "difference"}):
        columns |= set(differential(sampler, [comparison], raw=raw, options=options, **keywords))
    assert len(columns) > 35
    missing = sorted(column for column in columns if f"`{column}`" not in page)
    assert not missing
