"""Predictive checks against data of known law: right models pass, wrong ones are told apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyrocell.errors import QueryError
from pyrocell.infer.criticism import PredictiveAccumulator, check_predictions

N_CELLS, N_GENES, N_DRAWS = 1500, 12, 30
MEAN = np.geomspace(0.2, 30, N_GENES)
THETA = 1.5
NAMES = [f"gene{i}" for i in range(N_GENES)]


def negative_binomial(rng, *size):
    return rng.poisson(rng.gamma(THETA, MEAN / THETA, size=(*size, N_GENES))).astype(np.float32)


def poisson(rng, *size):
    return rng.poisson(MEAN, size=(*size, N_GENES)).astype(np.float32)


def blocks(observed, draws, size):
    for start in range(0, len(observed), size):
        rows = slice(start, start + size)
        yield torch.from_numpy(observed[rows]), torch.from_numpy(draws[:, rows])


@pytest.fixture(scope="module")
def observed():
    return negative_binomial(np.random.default_rng(0), N_CELLS)


@pytest.fixture(scope="module")
def right(observed):
    draws = negative_binomial(np.random.default_rng(1), N_DRAWS, N_CELLS)
    return check_predictions(blocks(observed, draws, 400), NAMES)


@pytest.fixture(scope="module")
def wrong(observed):
    draws = poisson(np.random.default_rng(1), N_DRAWS, N_CELLS)
    return check_predictions(blocks(observed, draws, 400), NAMES)


def test_statistics_equal_a_direct_computation(observed):
    draws = negative_binomial(np.random.default_rng(2), N_DRAWS, N_CELLS)
    features = check_predictions(blocks(observed, draws, 333), NAMES).features
    drawn = {
        "mean": draws.astype(float).mean(1),
        "variance": draws.astype(float).var(1),
        "zero_fraction": (draws == 0).mean(1),
    }
    np.testing.assert_allclose(features["observed_mean"], observed.astype(float).mean(0))
    np.testing.assert_allclose(features["observed_variance"], observed.astype(float).var(0), rtol=1e-6)
    np.testing.assert_allclose(features["observed_zero_fraction"], (observed == 0).mean(0))
    for name, value in drawn.items():
        np.testing.assert_allclose(features[f"predicted_{name}"], value.mean(0), rtol=1e-6)
        lower, upper = np.quantile(value, [0.05, 0.95], axis=0)
        np.testing.assert_allclose(features[f"predicted_{name}_lower"], lower, rtol=1e-6)
        np.testing.assert_allclose(features[f"predicted_{name}_upper"], upper, rtol=1e-6)
    assert list(features.index) == NAMES


def test_right_model_is_calibrated(right):
    summary = right.summary
    # 18,000 values: three standard errors of a coverage are below 0.012.
    assert abs(summary["coverage_50"] - 0.5) < 0.012
    assert abs(summary["coverage_90"] - 0.9) < 0.008
    assert summary["ks_pit"] < 1.63 / np.sqrt(N_CELLS * N_GENES)
    assert (right.features["ks_pit"] < 1.95 / np.sqrt(N_CELLS)).all()
    assert (right.pit["density"] - 1).abs().max() < 0.12
    assert right.pit["count"].sum() == N_CELLS * N_GENES
    assert summary["pearson_log_variance"] > 0.99
    assert abs(summary["variance_ratio"] - 1) < 0.1
    assert summary["mae_zero_fraction"] < 0.02
    assert summary[["inside_mean", "inside_variance", "inside_zero_fraction"]].mean() > 0.7


def test_poisson_for_overdispersed_counts_is_found_out(right, wrong):
    summary = wrong.summary
    assert summary["coverage_90"] < 0.8
    assert summary["ks_pit"] > 5 * right.summary["ks_pit"]
    assert summary["variance_ratio"] < 0.5
    assert summary["mae_zero_fraction"] > 5 * right.summary["mae_zero_fraction"]
    assert summary["inside_variance"] < 0.2
    assert summary["spearman_log_mean"] > 0.95  # the means are right
    density = wrong.pit["density"].to_numpy()
    assert min(density[0], density[-1]) > 1.3 > density[8:12].mean()  # horns: too narrow


def test_slope_of_the_transform_tells_the_direction(observed):
    draws = negative_binomial(np.random.default_rng(8), N_DRAWS, N_CELLS)
    draws[..., 0] = 0
    check = check_predictions(blocks(observed, draws, 500), NAMES)
    assert np.isfinite(check.summary["pearson_log_mean"])  # the feature without predictions is left out
    check = check_predictions(blocks(observed + 5, draws, 500), NAMES)
    assert check.pit["density"].iloc[-1] > 5 > 0.1 > check.pit["density"].iloc[0]  # predictions too low


def test_wrong_feature_is_named_by_its_own_row(observed):
    draws = negative_binomial(np.random.default_rng(3), N_DRAWS, N_CELLS)
    draws[..., 7] *= 3
    features = check_predictions(blocks(observed, draws, 500), NAMES).features
    assert features["ks_pit"].idxmax() == "gene7"
    assert features["coverage_90"].drop("gene7").between(0.86, 0.94).all()


@pytest.mark.parametrize("n_draws", [1, 3])
def test_calibration_is_exact_with_few_draws(observed, n_draws):
    draws = negative_binomial(np.random.default_rng(4), n_draws, N_CELLS)
    summary = check_predictions(blocks(observed, draws, N_CELLS), NAMES).summary
    assert abs(summary["coverage_50"] - 0.5) < 0.012
    assert abs(summary["coverage_90"] - 0.9) < 0.008


def test_real_valued_sites_are_checked_too():
    rng = np.random.default_rng(5)
    draws = rng.normal(-3, 2, size=(20, 2000, 3)).astype(np.float32)
    observed = rng.normal(-3, 2, size=(2000, 3)).astype(np.float32)
    check = check_predictions(blocks(observed, draws, 700), list("abc"))
    assert abs(check.summary["coverage_90"] - 0.9) < 0.02
    assert np.isnan(check.summary["pearson_log_mean"])  # no positive means to take logs of
    assert check.summary["mae_zero_fraction"] == 0


def test_cutting_into_blocks_changes_no_statistic_and_seeds_repeat(observed):
    draws = negative_binomial(np.random.default_rng(6), 10, N_CELLS)
    whole = check_predictions(blocks(observed, draws, N_CELLS), NAMES)
    pieces = check_predictions(blocks(observed, draws, 64), NAMES)
    columns = [name for name in whole.features if not name.startswith(("coverage", "ks"))]
    np.testing.assert_allclose(whole.features[columns], pieces.features[columns], rtol=1e-9)
    again = check_predictions(blocks(observed, draws, N_CELLS), NAMES)
    assert whole.pit.equals(again.pit)
    assert not whole.pit.equals(check_predictions(blocks(observed, draws, N_CELLS), NAMES, seed=1).pit)


def test_memory_does_not_grow_with_cells(observed):
    draws = torch.from_numpy(negative_binomial(np.random.default_rng(7), 5, 100))
    accumulator = PredictiveAccumulator(NAMES)

    def n_bytes():
        return sum(value.nbytes for value in vars(accumulator).values() if hasattr(value, "nbytes"))

    accumulator.update(torch.from_numpy(observed[:100]), draws)
    before = n_bytes()
    for _ in range(5):
        accumulator.update(torch.from_numpy(observed[:100]), draws)
    assert n_bytes() == before > 0
    assert accumulator.n_cells == 600


def test_global_random_state_is_left_alone(observed):
    before = torch.get_rng_state()
    check_predictions(blocks(observed, observed[None], 500), NAMES)
    assert torch.equal(before, torch.get_rng_state())


def test_repr_tells_the_numbers(right):
    assert repr(right).startswith("PredictiveCheck(n_cells=1.5e+03")
    assert "coverage_90=0.9" in repr(right) or "coverage_90=0.89" in repr(right)


def test_misfitting_blocks_are_refused():
    x = torch.ones(4, 2)
    with pytest.raises(QueryError, match="needs cells"):
        check_predictions([], ["a", "b"])
    with pytest.raises(QueryError, match="draws have shape"):
        check_predictions([(x, torch.ones(3, 4, 5))], ["a", "b"])
    with pytest.raises(QueryError, match="2 features observed, but 1 names"):
        check_predictions([(x, torch.ones(3, 4, 2))], ["a"])
    with pytest.raises(QueryError, match="expected 3"):
        check_predictions([(x, torch.ones(3, 4, 2)), (x, torch.ones(2, 4, 2))], ["a", "b"])
    with pytest.raises(QueryError, match="at least 1"):
        check_predictions([(x, torch.ones(0, 4, 2))], ["a", "b"])
