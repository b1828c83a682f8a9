"""Each check of a fit, on numbers in which there is something to find and on numbers in which there is nothing."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from pyrocell.infer import contents, diagnosis
from pyrocell.infer.criticism import check_predictions


def decay(n_epochs, time=4.0, noise=0.02):
    """A loss that falls by 100 nats, ever more slowly."""
    generator = np.random.default_rng(0)
    return pd.Series(
        200 + 100 * np.exp(-np.arange(n_epochs) / time) + noise * generator.standard_normal(n_epochs)
    )


def test_a_loss_that_falls_no_more():
    found = diagnosis.convergence(decay(100))
    assert not found.is_flagged and 0 <= found.value < 0.001
    # Noise of 0.02 along a line through 20 epochs: its fall is known to 0.015, and three of that are the bound.
    said = float(
        re.match(r"The loss fell by less than (\S+) nats per cell in the last 20 epochs", found.advice)[1]
    )
    assert 0.02 < said < 0.1 and "nothing to do" in found.advice


def test_a_loss_that_still_falls():
    found = diagnosis.convergence(decay(100, time=40.0))
    # Over epochs 80 to 99 of exp(-t / 40), as a share of the fall from 10 (a tenth is left out) to 99; a line is near
    # that curve.
    exact = (np.exp(-80 / 40) - np.exp(-99 / 40)) / (np.exp(-10 / 40) - np.exp(-99 / 40))
    assert found.is_flagged and found.value == pytest.approx(exact, rel=0.05)
    assert "fell by" in found.advice and "20 epochs" in found.advice and "call train(" in found.advice


@pytest.mark.parametrize("n_epochs", [20, 50, 100])
def test_a_bad_start_hides_no_fall(n_epochs):
    loss = decay(n_epochs, time=60.0)
    plain = diagnosis.convergence(loss)
    loss[0] += 5000
    found = diagnosis.convergence(loss)
    assert found.is_flagged and found.value == pytest.approx(plain.value, rel=0.15)


@pytest.mark.parametrize("place", [0, 50, 99])
def test_a_loss_that_is_no_number(place):
    loss = decay(100)
    loss[place] = [np.nan, np.inf][place % 2]
    found = diagnosis.convergence(loss)
    assert found.is_flagged and np.isnan(found.value)
    assert "not a number in 1 of 100 epochs" in found.advice and "nothing to do" not in found.advice


def test_the_last_training_is_looked_at_after_its_warm_up():
    """A first training to its end, then one whose bound rises during warm-up, and falls a little or lies still."""
    for slope, is_flagged in ((0.0, False), (0.5, True)):
        second = np.concatenate([np.linspace(150, 210, 30), 200 - slope * np.arange(40)])
        loss = pd.Series(np.concatenate([decay(100), second + decay(70)[::-1] * 1e-3]))
        weight = pd.Series([0.5] * 10 + [1.0] * 90 + list(np.linspace(0, 0.9, 30)) + [1.0] * 40)
        found = diagnosis.convergence(loss, kl_weight=weight, first_epoch=100)
        assert found.is_flagged == is_flagged and "in the last 8 epochs" in found.advice
    assert "rose" in diagnosis.convergence(loss[:130], kl_weight=weight[:130] * 0, first_epoch=100).advice
    few = diagnosis.convergence(loss[:135], kl_weight=weight[:135], first_epoch=100)
    assert few.is_flagged and few.advice.startswith("5 epochs after warm-up are too few")
    lost = loss.copy()
    lost[3] = np.nan  # in a training before, which was gone on from
    again = diagnosis.convergence(lost, kl_weight=weight, first_epoch=100)
    assert again.advice == found.advice and again.value == pytest.approx(found.value, rel=0.05)


def test_a_flag_is_a_value_above_the_limit():
    falls = [
        np.random.default_rng(seed).normal(0, scale) for seed in range(40) for scale in (1e-3, 0.03, 1.0)
    ]
    for i, fall in enumerate(falls):
        loss = decay(60, noise=0.5)
        loss[48:] -= fall * np.arange(12)
        found = diagnosis.convergence(loss.sample(frac=1, random_state=i) if i % 3 else loss)
        assert found.is_flagged == (found.value > found.limit) and found.value >= 0


def test_a_loss_that_rises():
    loss = decay(100)
    loss[80:] += np.arange(20) * 0.5
    found = diagnosis.convergence(loss)
    assert found.is_flagged and "rose by" in found.advice and "lower lr" in found.advice


def test_noise_is_no_fall():
    flagged = [
        diagnosis.convergence(decay(100, noise=10.0).sample(frac=1, random_state=seed)).is_flagged
        for seed in range(3, 23)
    ]
    # Shuffled losses have no direction; three standard errors are passed by one in some hundred.
    assert sum(flagged) <= 1


@pytest.mark.parametrize("n_epochs", [1, 19])
def test_too_few_epochs_to_tell(n_epochs):
    found = diagnosis.convergence(decay(n_epochs))
    assert found.is_flagged and np.isnan(found.value) and f"{n_epochs} epochs are too few" in found.advice


def latent(live, dead, n_cells=400, seed=0):
    """Posterior means and variances: a live dimension has 0.9 of its variance between cells."""
    generator = np.random.default_rng(seed)
    scale = np.array([np.sqrt(0.9)] * live + [0.05] * dead)
    mean = generator.standard_normal((n_cells, live + dead)) * scale
    variance = np.tile(np.array([0.1] * live + [1.0] * dead), (n_cells, 1))
    return mean, variance


def test_shares_that_are_explained():
    table = diagnosis.explained_shares(*latent(3, 2))
    np.testing.assert_allclose(table["explained"][:3], 0.9, atol=0.03)
    assert table["is_dead"].tolist() == [False] * 3 + [True] * 2


def test_shares_from_draws_are_those_of_the_moments():
    mean, variance = latent(2, 2, n_cells=2000)
    draws = mean + np.sqrt(variance) * np.random.default_rng(1).standard_normal((10, *mean.shape))
    found = diagnosis.explained_shares(draws.mean(0), draws.var(0, ddof=1), n_samples=10)
    np.testing.assert_allclose(
        found["explained"], diagnosis.explained_shares(mean, variance)["explained"], atol=0.02
    )
    assert found["is_dead"].tolist() == [False, False, True, True]
    # Taken for exact, the mean of ten draws would make a dead dimension look alive.
    naive = diagnosis.explained_shares(draws.mean(0), draws.var(0, ddof=1))
    assert not naive["is_dead"].any()


@pytest.mark.parametrize(
    ("live", "dead", "flagged"),
    [
        (5, 0, []),
        (5, 5, []),
        (3, 9, ["dead dimensions"]),
        (0, 5, ["posterior collapse", "dead dimensions"]),
    ],
)
def test_collapse_and_dead_dimensions(live, dead, flagged):
    findings = diagnosis.latent_findings(diagnosis.explained_shares(*latent(live, dead)))
    assert [finding.check for finding in findings if finding.is_flagged] == flagged
    if live == 3:
        assert "Only 3 of 12 dimensions" in findings[1].advice and "n_latent=3" in findings[1].advice


def predictions(bad, n_features=20, n_cells=500):
    """Negative binomial counts; those of some features are predicted by a Poisson of the same mean."""
    generator = np.random.default_rng(0)
    observed = generator.negative_binomial(2, 0.1, (n_cells, n_features))
    draws = generator.negative_binomial(2, 0.1, (25, n_cells, n_features))
    draws[..., :bad] = generator.poisson(18.0, (25, n_cells, bad))
    blocks = [(torch.tensor(observed, dtype=torch.float32), torch.tensor(draws, dtype=torch.float32))]
    return check_predictions(blocks, [f"g{i}" for i in range(n_features)]).features


@pytest.mark.parametrize(("bad", "is_flagged"), [(0, False), (1, False), (4, True)])
def test_features_that_are_predicted_badly(bad, is_flagged):
    features, finding = diagnosis.fit_of_features(predictions(bad), 500)
    assert finding.is_flagged == is_flagged and finding.value == bad / 20
    assert set(features.index[:bad]) == {f"g{i}" for i in range(bad)}
    assert features["is_misfit"].sum() == bad
    assert features["ks_pit"].is_monotonic_decreasing
    assert all(repr(name) in finding.advice for name in features.index[:10])
    assert repr(features.index[10]) not in finding.advice
    assert list(features)[:2] == ["ks_pit", "is_misfit"] and "predicted_zero_fraction" in features
    assert not [name for name in features if name.endswith(("_lower", "_upper"))]


def test_features_that_were_never_measured_are_no_misfits():
    features = predictions(0)
    features.loc["g3", "ks_pit"] = np.nan
    ranked, finding = diagnosis.fit_of_features(features, 500)
    assert finding.value == 0 and ranked.index[-1] == "g3"


def rare(shares_seen, shares_predicted, n_cells=500):
    """Counts of 0 and 1, of which so many are 1."""
    generator = np.random.default_rng(0)
    observed = generator.random((n_cells, len(shares_seen))) < shares_seen
    draws = generator.random((25, n_cells, len(shares_seen))) < shares_predicted
    blocks = [(torch.tensor(observed, dtype=torch.float32), torch.tensor(draws, dtype=torch.float32))]
    return check_predictions(blocks, [f"g{i}" for i in range(len(shares_seen))]).features


@pytest.mark.parametrize("n_cells", [200, 500, 2000])
def test_rare_features_that_are_predicted_nowhere(n_cells):
    features, finding = diagnosis.fit_of_features(rare(np.full(50, 0.086), 0.0, n_cells), n_cells)
    assert (features["ks_pit"] < 0.1 + 1.63 / np.sqrt(n_cells)).all()  # which is blind to them
    assert finding.is_flagged and finding.value == 1 and features["is_misfit"].all()
    features, finding = diagnosis.fit_of_features(rare(np.full(50, 0.0), 0.086, n_cells), n_cells)
    assert finding.is_flagged and finding.value == 1
    features, finding = diagnosis.fit_of_features(rare(np.full(50, 0.086), 0.086, n_cells), n_cells)
    assert not finding.is_flagged and finding.value == 0 and features["is_told"].all()


def test_features_that_no_cell_could_tell_are_left_out_and_counted():
    seen, predicted = np.repeat([1e-3, 0.3, 0.05], [40, 5, 5]), np.repeat([1e-3, 0.3, 0.0], [40, 5, 5])
    features, finding = diagnosis.fit_of_features(rare(seen, predicted), 500)
    assert finding.value == 0.5 and features["is_told"].sum() == 10  # of ten, half: not of fifty
    assert "too few cells show 40 of the 50 features to tell" in finding.advice
    assert (
        features["is_misfit"].tolist() == [True] * 5 + [False] * 45
    )  # misfits first, though g40 has a larger ks_pit
    features, finding = diagnosis.fit_of_features(rare(np.full(5, 1e-3), 1e-3), 500)
    assert (
        np.isnan(finding.value)
        and not finding.is_flagged
        and "Too few cells show any feature" in finding.advice
    )
    features, finding = diagnosis.fit_of_features(rare(np.full(5, 0.9), 0.1, 20), 20)
    assert np.isnan(finding.value) and "like the data" not in finding.advice


def test_sizes_in_the_latent():
    generator = np.random.default_rng(0)
    z = generator.standard_normal((400, 4))
    noise = generator.standard_normal(400)
    told = contents.size_finding(z, np.exp(z @ [1, 0.5, 0, 0] + 0.5 * noise))
    assert told.is_flagged and told.value == pytest.approx(1.25 / 1.5, abs=0.07)
    assert not contents.size_finding(z, np.exp(noise)).is_flagged
    assert contents.size_finding(z, np.exp(noise)).value < 0.05
    for totals in (np.full(400, 7.0), np.exp(noise)[:30]):
        nobody_knows = contents.size_finding(z[: len(totals)], totals)
        assert np.isnan(nobody_knows.value) and not nobody_knows.is_flagged


def test_cells_without_counts_say_nothing_of_sizes():
    generator = np.random.default_rng(0)
    z, totals = generator.standard_normal((1000, 4)), np.exp(generator.normal(8, 0.5, 1000))
    z[:, 0] = np.log(totals) - 8
    totals[:5] = 0
    z[:5, 1] += 8
    assert contents.size_finding(z, totals).value > 0.99
    elsewhere = contents.size_finding(z[:, 1:], totals)
    assert elsewhere.value < 0.05 and not elsewhere.is_flagged


def test_advice_is_about_what_was_set_up():
    generator = np.random.default_rng(0)
    z, batch = generator.standard_normal((200, 2)), np.arange(200) % 2
    told = [contents.size_finding(z, np.exp(z[:, 0]), size_is_given=given).advice for given in (False, True)]
    assert ["size_factor_key" in advice for advice in told] == [False, True]
    apart = z + 9 * batch[:, None]
    told = [contents.batch_finding(apart, batch, "lane", is_known=known).advice for known in (False, True)]
    assert ["as batch_key" in advice for advice in told] == [True, False]
    assert ["train for longer" in advice for advice in told] == [False, True]


def test_some_cells_are_too_few_for_a_latent():
    dimensions = diagnosis.explained_shares(*latent(3, 2, n_cells=49))
    assert dimensions["explained"].isna().all() and not dimensions["is_dead"].any()
    for finding in diagnosis.latent_findings(dimensions):
        assert np.isnan(finding.value) and not finding.is_flagged and "too few to tell" in finding.advice


def test_a_latent_of_dead_dimensions_holds_nothing():
    nothing = np.zeros((200, 0))
    assert contents.size_finding(nothing, np.arange(1.0, 201)).value < 0.05
    assert contents.batch_finding(nothing, np.arange(200) % 2, "lane").value == 0


@pytest.mark.parametrize("sizes", [(300, 300), (500, 60, 40)])
def test_batches_in_the_latent(sizes):
    generator = np.random.default_rng(0)
    batch = np.repeat(np.arange(len(sizes)), sizes)
    z = generator.standard_normal((len(batch), 5))
    mixed = contents.batch_finding(z, batch, "lane")
    assert not mixed.is_flagged and mixed.value < 0.2 and "'lane' are mixed" in mixed.advice
    apart = contents.batch_finding(z + 8 * batch[:, None], batch, "lane")
    assert apart.is_flagged and apart.value > 0.95 and "batch_key" in apart.advice


def test_batches_that_overlap_by_the_best_possible_rule():
    """Two normal batches a distance d apart: no rule tells them better than Phi(d / 2)."""
    generator = np.random.default_rng(0)
    batch = np.arange(4000) % 2
    z = generator.standard_normal((4000, 1)) + 2 * batch[:, None]
    found = contents.batch_finding(z, batch, "lane").value
    assert found == pytest.approx(2 * stats.norm.cdf(1) - 1, abs=0.05)


@pytest.mark.parametrize("sizes", [(45, 30), (30, 30), (300, 30), (30, 30, 30)])
def test_batches_of_few_cells_are_not_told_by_chance(sizes):
    batch = np.repeat(np.arange(len(sizes)), sizes)
    found = [
        contents.batch_finding(np.random.default_rng(seed).standard_normal((len(batch), 5)), batch, "lane")
        for seed in range(60)
    ]
    assert sum(one.is_flagged for one in found) == 0


def test_too_few_cells_of_a_batch():
    for sizes in ([97, 3], [45, 5], [200, 29]):
        found = contents.batch_finding(np.zeros((sum(sizes), 2)), np.repeat([0, 1], sizes), "lane")
        assert np.isnan(found.value) and not found.is_flagged and "too few" in found.advice
    # The others are looked at all the same.
    z = np.random.default_rng(0).standard_normal((203, 2))
    some = contents.batch_finding(z, np.repeat([0, 1, 2], [100, 100, 3]), "lane")
    assert some == contents.batch_finding(z[:200], np.repeat([0, 1], 100), "lane")
