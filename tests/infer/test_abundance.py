"""Differential abundance against mixtures written out in full."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special, stats

from pyrocell.errors import DataError, QueryError
from pyrocell.infer import abundance
from pyrocell.infer.abundance import abundance_scores, sample_log_densities


@pytest.fixture
def latent():
    rng = np.random.default_rng(0)
    codes = rng.permutation(np.repeat([0, 1, 2], [5, 9, 16]))
    return rng.normal(30, 2, (30, 3)), rng.gamma(2.0, size=(30, 3)), codes


def brute_force(means, variances, codes, positions, law):
    """Average the kernels of all cells but the one whose position it is."""
    log_kernel = law.logpdf(positions[:, None], loc=means, scale=np.sqrt(variances)).sum(-1)
    if positions is means:
        np.fill_diagonal(log_kernel, -np.inf)
    counted = np.isfinite(log_kernel)
    return np.stack(
        [
            special.logsumexp(log_kernel[:, codes == s], axis=1) - np.log(counted[:, codes == s].sum(1))
            for s in range(3)
        ],
        axis=1,
    )


@pytest.mark.parametrize("block", [1, 200, 4_000_000])
@pytest.mark.parametrize(("kernel", "law"), [("normal", stats.norm), ("student", stats.t(df=3))])
def test_densities_are_mixtures(latent, kernel, law, block, monkeypatch):
    monkeypatch.setattr(abundance, "BLOCK_ENTRIES", block)
    means, variances, codes = latent
    if kernel == "student":

        class law:
            logpdf = staticmethod(lambda x, loc, scale: stats.t.logpdf(x, 3, loc=loc, scale=scale))

    result = sample_log_densities(means, torch.from_numpy(variances), codes, kernel=kernel)
    np.testing.assert_allclose(result, brute_force(means, variances, codes, means, law), rtol=1e-9)
    elsewhere = means[:4] + 1.0
    result = sample_log_densities(means, variances, codes, at=elsewhere, kernel=kernel)
    np.testing.assert_allclose(result, brute_force(means, variances, codes, elsewhere, law), rtol=1e-9)


def test_densities_integrate_to_one():
    grid = np.linspace(-12, 12, 4001)[:, None]
    means, variances = np.array([[-2.0], [0.5], [3.0]]), np.array([[0.5], [1.0], [2.0]])
    density = np.exp(sample_log_densities(means, variances, np.array([0, 1, 1]), at=grid))
    np.testing.assert_allclose(np.trapezoid(density, grid[:, 0], axis=0), 1.0, atol=1e-4)


def test_cells_of_no_sample_are_only_positions(latent):
    means, variances, codes = latent
    left_out = np.where(np.arange(30) < 7, -1, codes)
    result = sample_log_densities(means, variances, left_out)
    kept = sample_log_densities(means[7:], variances[7:], codes[7:], at=means)
    np.testing.assert_allclose(result[:7], kept[:7])
    assert not np.allclose(
        result[7:], kept[7:]
    )  # those of a sample are left out of its density at their own place


def test_a_sample_is_not_dense_merely_where_it_has_a_cell():
    """Cells of one population in many dimensions, where neighbours are far: the own cell would be all there is."""
    rng = np.random.default_rng(0)
    means, codes = rng.normal(size=(300, 8)), rng.permutation(np.arange(300) % 6)
    densities = sample_log_densities(means, np.full((300, 8), 0.05), codes)
    others = [np.median(densities[codes != s, s]) for s in range(6)]
    own = [np.median(densities[codes == s, s]) for s in range(6)]
    assert abs(np.mean(own) - np.mean(others)) < 3 < np.std(densities)
    with_itself = sample_log_densities(means, np.full((300, 8), 0.05), codes, at=means)
    own = [np.median(with_itself[codes == s, s]) for s in range(6)]
    assert np.mean(own) - np.mean(others) > 10  # the defect


def test_the_only_cell_of_a_sample_stays(latent):
    means, variances, _ = latent
    codes = np.where(np.arange(30) == 4, 1, 0)
    alone = sample_log_densities(means, variances, codes)[:, 1]
    np.testing.assert_allclose(
        alone, stats.norm.logpdf(means, means[4], np.sqrt(variances[4])).sum(1), rtol=1e-9
    )


def test_scores_average_samples_equally_and_change_sign(latent):
    log_densities = sample_log_densities(*latent)
    density = np.exp(log_densities)
    expected = np.log(density[:, [0, 2]].mean(1)) - np.log(density[:, 1])
    scores = abundance_scores(log_densities, [0, 2], [1])
    np.testing.assert_allclose(scores, expected, rtol=1e-9)
    np.testing.assert_array_equal(abundance_scores(log_densities, [1], [0, 2]), -scores)


def test_scores_find_the_enriched_state():
    rng = np.random.default_rng(1)
    means = np.concatenate([rng.normal(-3, 1, (100, 2)), rng.normal(3, 1, (100, 2))])
    codes = np.concatenate([rng.choice(2, 100, p=[0.8, 0.2]), rng.choice(2, 100, p=[0.2, 0.8])])
    scores = abundance_scores(sample_log_densities(means, np.full((200, 2), 0.3), codes), [0], [1])
    assert scores[:100].mean() > 0.8
    assert scores[100:].mean() < -0.8


def test_errors_name_what_is_wrong(latent):
    means, variances, codes = latent
    with pytest.raises(DataError, match=r"sample codes \(29,\)"):
        sample_log_densities(means, variances, codes[:-1])
    with pytest.raises(DataError, match="variances are not positive"):
        sample_log_densities(means, -variances, codes)
    with pytest.raises(QueryError, match="Samples 3, 4 have no cells"):
        sample_log_densities(means, variances, codes, n_samples=5)
    with pytest.raises(QueryError, match="kernel is 'box'"):
        sample_log_densities(means, variances, codes, kernel="box")
    log_densities = sample_log_densities(means, variances, codes)
    with pytest.raises(QueryError, match="set of samples is 0, 3; expected at least one of 0 to 2"):
        abundance_scores(log_densities, [0, 3], [1])
    with pytest.raises(QueryError, match="set of samples is empty"):
        abundance_scores(log_densities, [0], [])
