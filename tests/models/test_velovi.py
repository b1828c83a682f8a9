"""VELOVI: its likelihood, its options, its verbs, its refusals, and what it recovers."""

from __future__ import annotations

import warnings
from functools import partial

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import expm
from scipy.special import digamma, gammaln, logsumexp
from scipy.stats import norm, spearmanr, ttest_ind
from sklearn.neighbors import kneighbors_graph

import pyrocell
from pyrocell import VELOVI
from pyrocell.errors import DataError, PyrocellWarning, QueryError, SetupError
from pyrocell.infer.effects import AtMean
from pyrocell.models.directions import expected_ways, spread_of_directions, two_sample_t
from pyrocell.models.kinetic_sites import STATES, Phases
from pyrocell.nn import Rates, induction, repression

LAYERS = {"spliced_layer": "Ms", "unspliced_layer": "Mu"}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


def simulate(seed=0, n_cells=2000, n_genes=100, n_steady=0, noise=0.05):
    """Cells at a common time, genes with rates of their own; the last ones are steadily on and have noise alone."""
    draw = np.random.default_rng(seed)
    limits = {"alpha": (1, 5), "beta": (0.3, 1), "gamma": (0.2, 0.8), "switch": (5, 12)}
    truth = {name: draw.uniform(*limit, n_genes) for name, limit in limits.items()}
    rates = Rates(*(torch.from_numpy(truth[name]) for name in ("alpha", "beta", "gamma")))
    time = draw.uniform(0, 20, (n_cells, 1))
    up, switch = torch.from_numpy(np.minimum(time, truth["switch"])), torch.from_numpy(truth["switch"])
    on = induction(rates, up)
    off = repression(induction(rates, switch), rates, torch.from_numpy(np.maximum(time - truth["switch"], 0)))
    is_on = time < truth["switch"]
    u, s = (np.where(is_on, one.numpy(), two.numpy()) for one, two in zip(on, off, strict=True))
    velocity = truth["beta"] * u - truth["gamma"] * s
    steady = np.arange(n_genes) >= n_genes - n_steady
    u[:, steady], s[:, steady], velocity[:, steady] = 2.0, 2.0, 0.0
    width = [np.where(steady, 2.0, np.ptp(x, axis=0)) for x in (s, u)]
    seen = [
        np.maximum(x + noise * w * draw.normal(size=x.shape), 0) for x, w in zip((s, u), width, strict=True)
    ]
    adata = anndata.AnnData(seen[0].astype(np.float32))
    adata.layers["Ms"], adata.layers["Mu"] = (x.astype(np.float32) for x in seen)
    adata.obs_names = [f"cell{i}" for i in range(n_cells)]
    adata.var_names = [f"gene{g}" for g in range(n_genes)]
    adata.obs["stage"] = np.digitize(time[:, 0], [5, 10, 15]).astype(str)
    return adata, truth | {"time": time[:, 0], "is_on": is_on, "velocity": velocity, "steady": steady}


def make(adata=None, *, model_class=VELOVI, train=True, **options):
    adata = simulate(n_cells=160, n_genes=12)[0] if adata is None else adata
    model_class.setup_anndata(adata, **LAYERS)
    model = model_class(adata, **({"n_hidden": 16, "n_latent": 3} | options))
    if train:
        model.train(4, n_epochs_kl_warmup=2, early_stopping=False)
    return model


@pytest.fixture(scope="module")
def fitted():
    before, pyrocell.settings.progress = pyrocell.settings.progress, False
    try:
        return make()
    finally:
        pyrocell.settings.progress = before


# --------------------------------------------------------------------------------------------- the model


def solved(alpha, beta, gamma, start, time):
    """Solve the two equations by a matrix exponential."""
    system = np.array([[-beta, 0, alpha], [beta, -gamma, 0], [0, 0, 0]])
    return (expm(system * float(time)) @ np.array([*start, 1.0]))[:2]


def independent(model, cells, up, down, pi):
    """Log-likelihood of each cell in float64, gene by gene and state by state."""
    rates = [rate.double().numpy() for rate in model.rates[:3]]
    switch = model.switch_time.double().numpy()
    sds = np.log1p(np.exp(model.sd_raw.double().numpy()))
    total = np.zeros(len(cells))
    for n in range(len(cells)):
        for g, (alpha, beta, gamma) in enumerate(zip(*rates, strict=True)):
            top = solved(alpha, beta, gamma, (0, 0), switch[g])
            means = [
                solved(alpha, beta, gamma, (0, 0), up[n, g] * switch[g]),
                (alpha / beta, alpha / gamma),
                solved(0, beta, gamma, top, down[n, g] * (model.t_max - switch[g])),
                (0.0, 0.0),
            ]
            u, s = (
                [
                    norm.logpdf(
                        getattr(cells, name)[n, g].item(), mean[i], sds[i, g] * (0.1 if k == 3 else 1)
                    )
                    for k, mean in enumerate(means)
                ]
                for i, name in enumerate(("unspliced", "spliced"))
            )
            weights = np.log(pi[n, g])
            if model.state_coupling == "joint":
                total[n] += logsumexp(weights + u + s)
            else:
                total[n] += logsumexp(weights + u) + logsumexp(weights + s)
    return total


@pytest.mark.parametrize("coupling", ["joint", "separate"])
@pytest.mark.parametrize("linear", [False, True], ids=["network", "linear"])
def test_likelihood_and_divergence_are_those_of_the_page(coupling, linear):
    model = make(state_coupling=coupling, linear_decoder=linear)
    cells = model.dataset.cells(np.arange(4))
    with model.asking():
        [trace] = model.drawer().block(cells, ["z", "pi", "s", "u"])
        got = trace["s"].fn.log_prob(cells.spliced)[0] + trace["u"].fn.log_prob(cells.unspliced)[0]
        up, down = (part[0].double().numpy() for part in model.decoder(trace["z"].value))
        z = model.encoder(torch.cat([cells.spliced, cells.unspliced], -1))
        with AtMean():
            terms = model.elbo()(cells)
        c = model.decoder.concentration(z.mean).double().numpy()
        pi = trace["pi"].value[0].double().numpy()
        expected = independent(model, cells, up, down, pi)
    np.testing.assert_allclose(got.numpy(), expected, rtol=2e-4, atol=2e-3)
    mean, variance = z.mean.double().numpy(), z.variance.double().numpy()
    kl_z = 0.5 * (variance + mean**2 - 1 - np.log(variance)).sum(-1)
    total, prior = c.sum(-1), np.full(4, 0.25)
    kl_pi = gammaln(total) - gammaln(c).sum(-1) - gammaln(prior.sum()) + gammaln(prior).sum()
    kl_pi = kl_pi + ((c - prior) * (digamma(c) - digamma(total)[..., None])).sum(-1)
    np.testing.assert_allclose(terms.kl_local.numpy(), kl_z + kl_pi.sum(-1), rtol=1e-5)


def test_warm_up_spares_the_states_and_fades_the_penalty():
    model = make(train=False)
    cells = model.dataset.cells(np.arange(20))
    terms = {}
    for weight in (0.0, 0.25, 1.0):
        model.module.train()
        with model.running(), torch.no_grad():
            torch.manual_seed(0)
            terms[weight] = model.elbo()(cells, weight, with_extra=True)
    assert terms[0.0].sites["z"] == 0 and terms[0.0].sites["pi"] == terms[1.0].sites["pi"] > 0
    np.testing.assert_allclose(terms[0.25].sites["z"], 0.25 * terms[1.0].sites["z"], rtol=1e-5)
    alpha, beta, gamma = (rate.detach().numpy() for rate in model.rates[:3])
    top = [
        solved(*row, (0, 0), t)
        for *row, t in zip(alpha, beta, gamma, model.switch_time.detach(), strict=True)
    ]
    expected = 0.2 * ((np.array(top).T - model.corner.numpy()) ** 2).sum()
    np.testing.assert_allclose(terms[0.0].extra["switch_penalty"], expected, rtol=1e-4)
    np.testing.assert_allclose(terms[0.25].extra["switch_penalty"], 0.75 * expected, rtol=1e-4)
    assert terms[1.0].extra["switch_penalty"] == 0
    model.module.eval()
    with model.running(), torch.no_grad():
        assert not model.elbo()(cells, 0.0).extra  # held-out cells are judged by the bound alone


def test_starts_from_the_corner_of_the_data():
    model = make(train=False)
    cells = model.dataset.cells(np.arange(160))
    top = np.argsort(-cells.unspliced.numpy(), axis=0)[:2]  # 1 % of 160 cells
    highest = np.take_along_axis(cells.unspliced.numpy(), top, 0)
    np.testing.assert_allclose(model.corner[0], highest.min(0), rtol=1e-6)  # the lower median of two
    np.testing.assert_allclose(model.rates.alpha.detach(), model.corner[0], rtol=1e-5)


def test_training_habits():
    model = make(train=False)
    assert model.default_plan.max_grad_norm == 10 and model.default_plan.optimizer == "adamw"
    model.train(3)
    assert (model.history["lr"] == 1e-2).all() and "elbo_validation" in model.history


# --------------------------------------------------------------------------------------------- the verbs


def test_velocity_is_that_of_the_kinetics_in_the_unit_of_the_layer(fitted):
    table = fitted.get_velocity(clip=False)
    adata = fitted.dataset.adata
    assert table.shape == adata.shape and list(table.columns) == list(adata.var_names)
    pi, names = fitted.get_state_assignment()
    assert names == STATES and pi.shape == (*adata.shape, 4)
    np.testing.assert_allclose(pi.sum(-1), 1, rtol=1e-5)
    cells = fitted.dataset.cells(np.arange(160))
    with torch.no_grad():
        z = fitted.encoder(torch.cat([cells.spliced, cells.unspliced], -1)).mean
        phases = Phases.at(fitted.rates, fitted.switch_time, fitted.t_max, fitted.decoder(z))
    scaled = pi[..., 0] * phases.velocity[0].numpy() + pi[..., 2] * phases.velocity[2].numpy()
    expected = scaled * np.ptp(adata.layers["Ms"], axis=0)
    np.testing.assert_allclose(table, expected, rtol=1e-3, atol=1e-5)
    u = pi[..., 0] * phases.velocity_unspliced[0].numpy() + pi[..., 2] * phases.velocity_unspliced[2].numpy()
    got = fitted.get_velocity(velo_mode="unspliced", clip=False, return_numpy=True)
    np.testing.assert_allclose(got, u * np.ptp(adata.layers["Mu"], axis=0), rtol=1e-3, atol=1e-5)
    likeliest = np.take_along_axis(
        np.stack([part.expand(160, 12).numpy() for part in phases.velocity], -1), pi.argmax(-1)[..., None], -1
    )[..., 0] * np.ptp(adata.layers["Ms"], axis=0)
    got = fitted.get_velocity(velo_statistic="max", clip=False, return_numpy=True)
    np.testing.assert_allclose(got, likeliest, rtol=1e-3, atol=1e-5)


def test_velocity_does_not_take_more_than_there_is():
    model = make()
    with torch.no_grad():
        model.alpha_raw += 20  # more RNA than there is,
        model.decoder.concentrations.bias.view(-1, 4)[:, 2] += 20  # and all of it going
    free, held = (model.get_velocity(clip=clip, return_numpy=True) for clip in (False, True))
    there = model.dataset.adata.layers["Ms"]
    np.testing.assert_allclose(held, np.maximum(free, -there), rtol=1e-3, atol=1e-5)
    assert (held != free).any()


def test_time_lies_on_the_axis_and_off_is_early_or_late(fitted):
    early, late = (fitted.get_latent_time(off_time=off, return_numpy=True) for off in ("start", "end"))
    pi = fitted.get_state_assignment()[0]
    assert (early >= 0).all() and (late <= fitted.t_max).all()
    np.testing.assert_allclose(late - early, fitted.t_max * pi[..., 3], rtol=1e-3, atol=1e-4)
    hard = fitted.get_state_assignment(hard_assignment=True)[0]
    assert (hard.to_numpy() == pi.argmax(-1)).all()
    time = fitted.get_latent_time(time_statistic="max", return_numpy=True)
    assert (time[hard.to_numpy() == 3] == 0).all()


def test_some_cells_some_genes_and_draws(fitted):
    genes = ["gene7", "gene2"]
    for verb in (partial(fitted.get_velocity, clip=False), fitted.get_latent_time):
        whole, some = verb(), verb(indices=[5, 3], gene_list=genes)
        pd.testing.assert_frame_equal(some, whole.iloc[[5, 3]][genes], rtol=1e-4, atol=1e-5)
        draws = verb(n_samples=6, return_mean=False)
        assert draws.shape == (6, 160, 12) and draws.std(0).mean() > 0
        np.testing.assert_allclose(verb(n_samples=6, return_numpy=True), draws.mean(0), rtol=1e-4, atol=1e-5)
    states = fitted.get_state_assignment(indices=[5, 3], gene_list=genes)[0]
    np.testing.assert_allclose(states, fitted.get_state_assignment()[0][[5, 3]][:, [7, 2]], rtol=1e-4)
    with pytest.raises(QueryError, match="geneX"):
        fitted.get_velocity(gene_list=["geneX"])


def test_the_fit_is_in_the_unit_of_the_layers(fitted):
    s, u = fitted.get_expression_fit()
    adata = fitted.dataset.adata
    for fit, layer in ((s, "Ms"), (u, "Mu")):
        seen = adata.layers[layer]
        assert np.abs(fit.to_numpy() - seen).mean() < np.ptp(seen, axis=0).mean()
    pi = fitted.get_state_assignment()[0]
    cells = fitted.dataset.cells(np.arange(160))
    with torch.no_grad():
        z = fitted.encoder(torch.cat([cells.spliced, cells.unspliced], -1)).mean
        phases = Phases.at(fitted.rates, fitted.switch_time, fitted.t_max, fitted.decoder(z))
    for fit, layer, parts in ((s, "Ms", phases.spliced), (u, "Mu", phases.unspliced)):
        of_states = np.stack([part.expand(160, 12).numpy() for part in parts], -1)
        scaled, seen = (pi * of_states).sum(-1), adata.layers[layer]
        np.testing.assert_allclose(fit, seen.min(0) + scaled * np.ptp(seen, axis=0), rtol=1e-3, atol=1e-4)
    rates = fitted.get_rates()
    assert list(rates) == ["alpha", "beta", "gamma", "switch_time"] and list(rates.index) == list(
        adata.var_names
    )
    assert (rates > 0).all(axis=None) and (rates["switch_time"] <= fitted.t_max).all()


def test_uncertainty_of_directions(fitted):
    table, cosine = fitted.get_directional_uncertainty(n_samples=20)
    assert cosine.shape == (20, 160) and (np.abs(cosine) <= 1 + 1e-6).all()
    np.testing.assert_allclose(table["directional_cosine_sim_mean"], cosine.mean(0), rtol=1e-6)
    np.testing.assert_allclose(table["directional_variance"], np.arccos(cosine.clip(-1, 1)).var(0), rtol=1e-5)
    low, high = np.quantile(cosine, [0.05, 0.95], axis=0)
    np.testing.assert_allclose(table["directional_cosine_sim_difference"], high - low, rtol=1e-6)
    same = fitted.get_directional_uncertainty(n_samples=20, batch_size=160)[1]
    assert np.abs(same.mean() - cosine.mean()) < 0.1
    with pytest.raises(QueryError, match="n_samples is 1"):
        fitted.get_directional_uncertainty(n_samples=1)
    with pytest.raises(QueryError, match="kind is 'both'; expected 'intrinsic' or 'extrinsic'"):
        fitted.get_directional_uncertainty(kind="both")


def test_spread_is_the_cosine_with_the_mean():
    draws = np.random.default_rng(0).normal(0.5, 1, (7, 5, 9))
    found = spread_of_directions(torch.from_numpy(draws))
    for n in range(5):
        mean = draws[:, n].mean(0)
        for i in range(7):
            one, two = draws[i, n] - draws[i, n].mean(), mean - mean.mean()
            cosine = one @ two / np.sqrt(one @ one) / np.sqrt(two @ two)
            np.testing.assert_allclose(found[i, n], cosine, rtol=1e-10)


def test_ways_are_those_of_the_transition_probabilities():
    draw = np.random.default_rng(0)
    velocity, ways = draw.normal(size=(3, 4, 6)), draw.normal(size=(4, 5, 6))
    present = np.arange(5) < np.array([5, 1, 3, 2])[:, None]
    found = expected_ways(*map(torch.from_numpy, (velocity, ways, present)))
    for i in range(3):
        for n in range(4):
            there, v = ways[n][present[n]], velocity[i, n]
            cosine = np.array([way @ v / np.linalg.norm(way) / np.linalg.norm(v) for way in there])
            move = np.exp(cosine) / np.exp(cosine).sum()
            expected = sum((p - 1 / len(there)) * way for p, way in zip(move, there, strict=True))
            np.testing.assert_allclose(found[i, n], expected, rtol=1e-10, atol=1e-14)


def _with_graph(fitted, degree=6):
    """Add a graph of neighbours to the data of a model; the first cell has fewer than the others."""
    adata = fitted.dataset.adata.copy()
    near = kneighbors_graph(adata.layers["Ms"], degree, mode="distance").tolil()
    near[0, near.rows[0][2:]] = 0
    adata.obsp["mine"], adata.uns["mine"] = near.tocsr(), {"connectivities_key": "mine"}
    return adata


def test_extrinsic_uncertainty_is_that_of_the_ways_to_neighbours(fitted):
    """Against the same draws, and the formula cell by cell in NumPy."""
    adata, asked = _with_graph(fitted), [0, 7, 41]
    chosen = {"indices": asked, "gene_list": ["gene3", "gene8", "gene1", "gene5"], "n_samples": 5}
    table, cosine = fitted.get_directional_uncertainty(
        adata, kind="extrinsic", neighbors_key="mine", **chosen
    )
    assert cosine.shape == (5, 3) and list(table.index) == [f"cell{n}" for n in asked]
    genes, near = [3, 8, 1, 5], adata.obsp["mine"]
    where = np.asarray(adata.layers["Ms"], dtype=np.float64)[:, genes]
    draws = fitted.get_velocity(adata, clip=False, return_mean=False, batch_size=3, **chosen)
    for place, n in enumerate(asked):
        ways = where[near[n].indices] - where[n]
        expected = []
        for v in draws[:, place]:
            move = np.exp(ways @ v / np.linalg.norm(ways, axis=1) / np.linalg.norm(v))
            expected.append((move / move.sum() - 1 / len(ways)) @ ways)
        centred = np.array(expected) - np.mean(expected, axis=1, keepdims=True)
        mean = np.mean(expected, axis=0) - np.mean(expected)
        found = centred @ mean / np.linalg.norm(centred, axis=1) / np.linalg.norm(mean)
        np.testing.assert_allclose(cosine[:, place], found, rtol=1e-3, atol=1e-4)


def test_extrinsic_uncertainty_needs_neighbours(fitted):
    adata = _with_graph(fitted)
    with pytest.raises(SetupError, match=r"obsp has no 'connectivities'.*scanpy\.pp\.neighbors"):
        fitted.get_directional_uncertainty(adata, kind="extrinsic")
    near = adata.obsp["mine"].tolil()
    near[4] = 0
    near[6] = 0
    near[6, 7] = 1
    adata.obsp["mine"] = near.tocsr()
    with pytest.raises(
        QueryError, match="2 cells have fewer than two neighbours to choose from: 'cell4', 'cell6'"
    ):
        fitted.get_directional_uncertainty(adata, kind="extrinsic", neighbors_key="mine")
    fitted.get_directional_uncertainty(
        adata, indices=[5], kind="extrinsic", neighbors_key="mine", n_samples=2
    )


def test_permutation_scores_are_t_statistics(fitted):
    scores = fitted.get_permutation_scores("stage", n_samples=2)
    assert scores.shape == (12, 4) and np.isfinite(scores).all(axis=None)
    pd.testing.assert_frame_equal(scores, fitted.get_permutation_scores("stage", n_samples=2))
    draw = np.random.default_rng(0)
    one, two = draw.normal(1, 1, (30, 3)), draw.normal(0, 2, (40, 3))
    np.testing.assert_allclose(two_sample_t(one, two), ttest_ind(one, two).statistic)
    with pytest.raises(QueryError, match="no column 'cluster'"):
        fitted.get_permutation_scores("cluster")


def test_layers_for_scvelo(fitted):
    adata = fitted.dataset.adata.copy()
    fitted.add_velocity_layers(adata)
    np.testing.assert_array_equal(adata.layers["velocity"], fitted.get_velocity(return_numpy=True))
    assert {"velocity_u", "fit_t"} <= set(adata.layers)
    # scvelo's curve: ds/dt = beta u - gamma s with u seen = fit_scaling u + fit_u0 and s seen = s + fit_s0, where
    # its beta is fit_beta times fit_scaling: that is what its plots draw
    var = adata.var
    alpha, beta, gamma, scaling = (
        torch.from_numpy(var[f"fit_{n}"].to_numpy(np.float64)) for n in ("alpha", "beta", "gamma", "scaling")
    )
    rates = Rates(alpha, beta * scaling, gamma)
    time = torch.linspace(0.1, 3, 9, dtype=torch.float64)[:, None]
    u, s = (x.numpy() for x in induction(rates, time))
    with torch.no_grad():
        scaled = induction(Rates(*(rate.double() for rate in fitted.rates[:3])), time)
    for value, own, layer, start, scale in (
        (u, scaled[0], "Mu", "fit_u0", var["fit_scaling"].to_numpy()),
        (s, scaled[1], "Ms", "fit_s0", 1.0),
    ):
        seen = adata.layers[layer]
        expected = seen.min(0) + own.numpy() * np.ptp(seen, axis=0)
        np.testing.assert_allclose(value * scale + var[start].to_numpy(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(QueryError, match="12 genes of the model"):
        fitted.add_velocity_layers(adata[:, ::-1].copy())


def test_data_are_read_on_the_scale_of_training(fitted):
    """Half of the cells give the same answers as all of them: their own ranges do not matter."""
    half = fitted.dataset.adata[:40].copy()
    np.testing.assert_array_equal(
        fitted.get_velocity(half, return_numpy=True),
        fitted.get_velocity(indices=np.arange(40), batch_size=40, return_numpy=True),
    )


def test_the_unit_of_the_layers_means_nothing():
    """Each gene in a unit of its own, powers of two, which change no digit: the same fit, told in that unit."""
    adata = simulate(n_cells=160, n_genes=12)[0]
    unit = np.exp2(np.random.default_rng(0).integers(-6, 7, 12)).astype(np.float32)
    other = adata.copy()
    other.layers["Ms"] = other.layers["Ms"] * unit
    one, two = make(adata), make(other)
    np.testing.assert_array_equal(
        two.get_velocity(return_numpy=True), one.get_velocity(return_numpy=True) * unit
    )
    pd.testing.assert_frame_equal(one.get_rates(), two.get_rates())


def test_transcription_that_changes_in_time():
    model = make(time_dependent_transcription=True)
    assert {"alpha_start", "kappa"} <= set(model.get_rates())
    assert np.isfinite(model.get_velocity(return_numpy=True)).all()


def test_velocities_are_slopes_of_the_fit_where_transcription_changes_in_time():
    """Finite differences in time, in float64: through induction with a ramp, and through repression after it."""
    draw = np.random.default_rng(0)
    rate = {
        name: torch.from_numpy(draw.uniform(0.2, 2, 6))
        for name in ("alpha", "beta", "gamma", "alpha_start", "kappa")
    }
    rates, switch, step = Rates(**rate), torch.full((6,), 8.0, dtype=torch.float64), 1e-5

    def phases(up, down):
        progress = (torch.full((1, 6), x, dtype=torch.float64) for x in (up / 8, down / 12))
        return Phases.at(rates, switch, 20.0, tuple(progress))

    for time in (0.5, 3.0, 7.5):
        low, here, high = (phases(time + shift, time + shift) for shift in (-step, 0.0, step))
        for state in (0, 2):
            for name, slope in (("unspliced", "velocity_unspliced"), ("spliced", "velocity")):
                change = (getattr(high, name)[state] - getattr(low, name)[state]) / (2 * step)
                np.testing.assert_allclose(
                    getattr(here, slope)[state], change, rtol=1e-4, atol=1e-5
                )  # series for float32


def test_other_models_have_none_of_these_verbs(fitted):
    assert "get_velocity" in dir(fitted) and not hasattr(fitted, "differential_expression")
    for name in ("get_velocity", "get_latent_time", "get_rates", "add_velocity_layers"):
        assert not hasattr(pyrocell.SCVI, name)


# ------------------------------------------------------------------------------------------------ bad input


def spoiled(change):
    adata = simulate(n_cells=80, n_genes=12)[0]
    change(adata)
    return adata


def _negative(adata):
    adata.layers["Mu"][3, 2] = -0.5


def _missing(adata):
    adata.layers["Ms"][3, 2] = np.nan


def _silent(adata):
    adata.layers["Mu"][:, [2, 5]] = 0


def _flat(adata):
    adata.layers["Ms"][:, 4] = 1.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_negative, r"Mu'\] has 1 negative values: -0.5 \(cell 'cell3', feature 'gene2'\).*at least 0"),
        (_missing, r"Ms'\] has 1 NaN or infinite values: .*cell3"),
        (_silent, r"2 of 12 genes have no unspliced RNA that varies .*gene2.*gene5.*filter_velocity_genes"),
        (_flat, r"1 of 12 genes have no spliced RNA that varies .*gene4"),
    ],
    ids=["negative", "missing", "no unspliced", "constant spliced"],
)
def test_bad_values_are_named_before_training(change, said):
    with pytest.raises(DataError, match=said):
        make(spoiled(change), train=False)


def test_layers_must_exist():
    adata = simulate(n_cells=80, n_genes=12)[0]
    with pytest.raises(SetupError, match="unspliced_layer='unspliced'.*no such layer"):
        VELOVI.setup_anndata(adata, spliced_layer="Ms", unspliced_layer="unspliced")
    with pytest.raises(TypeError, match="unspliced_layer"):
        VELOVI.setup_anndata(adata, spliced_layer="Ms")


def test_raw_counts_are_noticed():
    with pytest.warns(PyrocellWarning, match="whole numbers only.*smooth_velocity_layers"):
        make(spoiled(lambda adata: adata.layers.update(Ms=np.ceil(adata.layers["Ms"]))), train=False)


@pytest.mark.parametrize("genes", [slice(0, 9), slice(None, None, -1)], ids=["fewer", "another order"])
def test_spliced_and_unspliced_of_different_genes(genes):
    adata = simulate(n_cells=80, n_genes=12)[0]
    parts = {"spliced": adata, "unspliced": adata[:, genes].copy()}
    with mudata.set_options(pull_on_update=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names are shared between the modalities, as they must be here
        mdata = mudata.MuData({name: part.copy() for name, part in parts.items()})
    VELOVI.setup_mudata(mdata, modalities={name: name for name in parts}, **LAYERS)
    said = "3 of them are in one only: 'gene10'" if genes == slice(0, 9) else "their order differs"
    with pytest.raises(DataError, match=f"spliced has 12 genes and unspliced has .*{said}.*same order"):
        VELOVI(mdata)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"state_coupling": "none"}, "state_coupling is 'none'; expected 'joint' or 'separate'"),
        ({"t_max": 0.0}, "t_max is 0.0"),
        ({"penalty": -1.0}, "penalty is -1.0"),
        ({"state_concentration": 0.0}, "state_concentration is 0.0"),
        ({"n_latent": 0}, "n_latent is 0"),
    ],
    ids=str,
)
def test_impossible_options_are_named(options, said):
    with pytest.raises(SetupError, match=said):
        make(train=False, **options)


@pytest.mark.parametrize(
    ("verb", "options", "said"),
    [
        ("get_velocity", {"velo_mode": "u"}, "velo_mode is 'u'"),
        ("get_velocity", {"velo_statistic": "median"}, "statistic is 'median'"),
        ("get_latent_time", {"off_time": "never"}, "off_time is 'never'"),
    ],
)
def test_impossible_questions_are_named(fitted, verb, options, said):
    with pytest.raises(QueryError, match=said):
        getattr(fitted, verb)(**options)


# ------------------------------------------------------------------------------------------- the recovery


def recovery(model_class=VELOVI, max_epochs=60):
    adata, truth = simulate(n_steady=20)
    model_class.setup_anndata(adata, **LAYERS)
    model = model_class(adata)
    model.train(max_epochs, early_stopping=False)
    return model, truth, scores_of(model, truth, adata)


def scores_of(model, truth, adata):
    moving = ~truth["steady"]
    true = truth["velocity"][:, moving]
    velocity = model.get_velocity(return_numpy=True, clip=False)[:, moving]
    cosine = (velocity * true).sum(1) / np.linalg.norm(velocity, axis=1) / np.linalg.norm(true, axis=1)
    clear = np.abs(true) > np.quantile(np.abs(true), 0.25)
    on = model.get_state_assignment()[0][..., :2].sum(-1)[:, moving] > 0.5
    time = model.get_latent_time(time_statistic="max", off_time="end", return_numpy=True)
    rates = model.get_rates().to_numpy()
    span = [np.ptp(adata.layers[name], axis=0) for name in ("Mu", "Ms")]
    ratio = rates[:, 2] / rates[:, 1] * span[0] / span[1]
    return {
        "time": np.median([rank_correlation(time[:, g], truth["time"]) for g in np.flatnonzero(moving)]),
        "rates": rank_correlation(ratio[moving], (truth["gamma"] / truth["beta"])[moving]),
        "cosine": cosine.mean(),
        "sign": (np.sign(velocity) == np.sign(true))[clear].mean(),
        "state": (on == truth["is_on"][:, moving])[clear].mean(),
    }


def rank_correlation(x, y):
    return 0.0 if np.ptp(x) == 0 else spearmanr(x, y)[0]


GATES = {"time": 0.9, "rates": 0.9, "cosine": 0.9, "sign": 0.95, "state": 0.85}


def failures(scores):
    return {name for name, least in GATES.items() if not scores[name] >= least}


@pytest.mark.slow
def test_recovers_what_was_simulated():
    model, truth, scores = recovery()
    assert not failures(scores), scores
    permuted = model.get_permutation_scores("stage").to_numpy()
    assert (permuted.max(1)[~truth["steady"]] > 0).mean() >= 0.8
    assert (np.abs(permuted[truth["steady"]]) <= 2).mean() >= 0.9


class Misaligned(VELOVI):
    """Defect: the guide sees each cell's neighbour in the minibatch."""

    def guide(self, cells):
        moved = {name: getattr(cells, name).roll(1, 0) for name in ("spliced", "unspliced")}
        super().guide(cells.replace(**moved))


class Swapped(VELOVI):
    """Defect: spliced RNA is taken for unspliced RNA, so that time runs backwards."""

    def model(self, cells):
        super().model(cells.replace(spliced=cells.unspliced, unspliced=cells.spliced))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defect", "broken"),
    [(Misaligned, {"time", "cosine", "sign"}), (Swapped, {"time", "cosine", "sign"})],
    ids=["guide", "layers"],
)
def test_the_recovery_fails_on_a_defect(defect, broken):
    scores = recovery(defect, max_epochs=25)[2]
    assert broken <= failures(scores), scores
