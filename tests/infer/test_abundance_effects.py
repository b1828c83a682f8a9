"""Abundance between samples against simulations with known truth."""

from __future__ import annotations

import numpy as np
import pytest

from pyrocell.errors import QueryError
from pyrocell.infer.abundance_effects import density_effects, share_effects

SIDES = (range(5), range(5, 10))
CALLED = "is_da_fdr_0.05"


def cohort(effects, spread, seed, n_samples=10, n_cells=800):
    rng = np.random.default_rng(seed)
    base = rng.lognormal(0, 0.7, len(effects))
    shares = base * np.exp(rng.normal(0, spread, (n_samples, len(effects))))
    shares[:5] *= 2.0**effects
    shares /= shares.sum(1, keepdims=True)
    return np.stack([rng.multinomial(rng.integers(n_cells // 2, 2 * n_cells), row) for row in shares])


def names(n):
    return [f"t{i}" for i in range(n)]


def test_a_type_that_grows_is_found_and_swaps():
    effects = np.zeros(12)
    effects[3] = 2.0
    found = 0
    for seed in range(5):
        counts = cohort(effects, 0.3, seed)
        one, two = share_effects(counts, names(12), *SIDES), share_effects(counts, names(12), *SIDES[::-1])
        assert one.index[0] == "t3" and list(one.columns[:3]) == ["proba_da", "lfsr", "lfc_mean"]
        found += one.loc["t3", CALLED]
        np.testing.assert_allclose(one["lfc_mean"], -two.loc[one.index, "lfc_mean"], atol=1e-3)
        assert one.loc["t3", "lfc_low"] < one.loc["t3", "lfc_mean"] < one.loc["t3", "lfc_high"]
        own = (counts[:5] / counts[:5].sum(1, keepdims=True)).mean(0)
        np.testing.assert_allclose(one.loc[names(12), "share1"], own)
    assert found >= 4


def test_no_type_differs_between_samples_of_one_kind():
    called = [
        share_effects(cohort(np.zeros(12), 0.5, seed), names(12), *SIDES)[CALLED].sum() for seed in range(30)
    ]
    assert np.mean(np.array(called) > 0) <= 0.1
    # cells as replicates would find nearly all: the spread between samples is many times that of counts
    one = cohort(np.zeros(12), 0.5, 0)
    pooled = [one[:5].sum(0), one[5:].sum(0)]
    z = np.log(pooled[0] / pooled[1]) / np.sqrt(1 / pooled[0] + 1 / pooled[1])
    assert (np.abs(z) > 3).mean() > 0.3


def unequal(share, seed, n=10, sizes=(300, 4000), factor=1.0):
    """Samples of the first set have few cells, and a factor on the share of the first type."""
    rng = np.random.default_rng(seed)
    others = rng.lognormal(0.0, 0.5, 11)
    base = np.append(share, (1 - share) * others / others.sum())
    shares = base * np.exp(rng.normal(0.0, 0.2, (2 * n, 12)))
    shares[:n, 0] *= factor
    shares /= shares.sum(1, keepdims=True)
    return np.stack([rng.multinomial(sizes[i // n], row) for i, row in enumerate(shares)])


@pytest.mark.parametrize("n", [4, 10])
@pytest.mark.parametrize("share", [0.0, 0.0005, 0.001, 0.003])
def test_samples_of_unequal_size_do_not_make_rare_types_differ(share, n):
    tables = [
        share_effects(unequal(share, seed, n), names(12), range(n), range(n, 2 * n)) for seed in range(8)
    ]
    assert not any(table.loc["t0", CALLED] for table in tables)
    rare = [table.loc["t0"] for table in tables]
    assert all(row["tested"] == (row["n_cells1"] + row["n_cells2"] >= 10) for row in rare)
    if share == 0.0:
        assert all(np.isnan(row["lfc_mean"]) and row["lfsr"] == 1 and row["proba_da"] == 0 for row in rare)
    else:  # z-values of what differs in nothing
        z = [row["lfc_estimate"] / row["lfc_error"] for row in rare if row["tested"]]
        assert np.mean(np.abs(z)) < 1.3


def test_a_rare_type_that_differs_is_found_between_samples_of_unequal_size():
    rows = [
        share_effects(unequal(0.01, seed, factor=4.0), names(12), range(10), range(10, 20)).loc["t0"]
        for seed in range(5)
    ]
    assert np.mean([row["lfc_estimate"] for row in rows]) == pytest.approx(2.0, abs=0.3)
    assert all(row[CALLED] for row in rows)


def test_types_of_few_cells_alone_are_not_tested():
    table = share_effects(np.ones((10, 1)), ["t0"], *SIDES, min_counts=20.0)
    assert not table["tested"].any() and not table[CALLED].any() and table["lfc_mean"].isna().all()


def test_densities_that_differ_between_samples_are_found():
    rng = np.random.default_rng(0)
    truth = np.where(np.arange(400) < 100, 1.5, 0.0)
    table = rng.normal(-5, 0.4, (400, 10))
    table[:, :5] += truth[:, None]
    effect, error, lfsr = density_effects(table, *SIDES)
    assert (lfsr[:100] < 0.05).mean() > 0.9 and (lfsr[100:] > 0.2).mean() > 0.9
    assert effect[:100].mean() == pytest.approx(1.5, abs=0.2)
    assert np.median(error) == pytest.approx(0.4 * np.sqrt(2 / 5), rel=0.2)
    *_, nothing = density_effects(rng.normal(-5, 0.4, (400, 10)), *SIDES)
    assert (nothing < 0.05).mean() < 0.01


@pytest.mark.parametrize(
    ("sides", "said"),
    [(([0], [1, 2]), "samples1 has 1 samples"), (([0, 1], [1, 2]), "both samples1 and samples2")],
    ids=str,
)
def test_sets_of_samples_that_say_nothing(sides, said):
    with pytest.raises(QueryError, match=said):
        share_effects(cohort(np.zeros(4), 0.1, 0), names(4), *sides)
    with pytest.raises(QueryError, match=said):
        density_effects(np.zeros((5, 10)), *sides)
