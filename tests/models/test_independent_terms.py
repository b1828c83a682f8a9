"""Terms of the bound against NumPy and SciPy in float64, for every likelihood and latent that a model may have.

The networks' outputs are taken as they are; every density, divergence and sum is written anew. The other models have
such a test in their own files: see docs/developer/silent_errors.md.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pyro import poutine
from scipy import special, stats

from tests.models.test_contract import CASES

ROWS = np.arange(12)


def exact(tensor):
    return tensor.detach().double().numpy()


def normal_kl(mean, sd, prior_mean=0.0, prior_sd=1.0):
    """KL of two normals, summed over the last dimension."""
    ratio = sd / prior_sd
    return (0.5 * (ratio**2 + ((mean - prior_mean) / prior_sd) ** 2 - 1) - np.log(ratio)).sum(-1)


def terms_and_sites(model):
    """The terms of some cells, and the sites of guide and model at the same draws."""
    cells = model.dataset.cells(ROWS)
    with model.asking(seed=3):
        terms = model.elbo()(cells)
    with model.asking(seed=3):
        guide = poutine.trace(model.elbo().guide).get_trace(cells)
        program = poutine.trace(poutine.replay(model.elbo().model, trace=guide)).get_trace(cells)
    return cells, terms, guide.nodes, program.nodes


def moments(site):
    return exact(site["fn"].mean), exact(site["fn"].variance) ** 0.5


def log_likelihood(name, model, cells, z, program):
    """Log-likelihood of each cell from the heads of the decoder alone."""
    seen = (cells.batch, cells.categorical_covariates, cells.continuous_covariates)
    out = model.decoder.heads(z, *seen)
    x, log_rho = exact(cells.counts), exact(out.log_rho)
    size = exact(cells.library) if cells.size_factor is None else exact(cells.size_factor)
    if "library" in program:
        size = np.exp(exact(program["library"]["value"]))
    mu = np.exp(log_rho) * size
    if model.gene_likelihood == "poisson":
        return stats.poisson.logpmf(x, mu).sum(1)
    log_theta = exact(out.log_theta if model.dispersion == "gene-cell" else model.log_theta)
    if model.dispersion == "gene-batch":
        log_theta = log_theta[cells.batch.numpy()]
    elif model.dispersion == "gene-label":
        log_theta = log_theta[cells.label.numpy()]
    if model.gene_likelihood == "normal":
        return stats.norm.logpdf(x, log_rho, np.logaddexp(0, log_theta) + 1e-3).sum(1)
    theta = np.exp(log_theta)
    nb = stats.nbinom.logpmf(x, theta, theta / (theta + mu))
    if model.gene_likelihood == "nb":
        return nb.sum(1)
    pi = special.expit(exact(out.zi_logits))
    return np.log(np.where(x == 0, pi + (1 - pi) * np.exp(nb), (1 - pi) * np.exp(nb))).sum(1)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("SCVI")])
def test_scvi(name):
    model = CASES[name].trained
    cells, terms, guide, program = terms_and_sites(model)
    z = program["z"]["value"]
    expected = -log_likelihood(name, model, cells, z, program)
    np.testing.assert_allclose(exact(terms.reconstruction), expected, rtol=5e-5)
    kl = normal_kl(*moments(guide["w" if "w" in guide else "z"]))
    if "library" in guide:
        prior = (exact(part)[cells.batch.numpy()] for part in (model.library_mean, model.library_sd))
        kl = kl + normal_kl(*moments(guide["library"]), *prior)
    np.testing.assert_allclose(exact(terms.kl_local), kl, rtol=5e-5, atol=1e-5)


def test_scanvi():
    """The sum over labels of z's prior given each label, u's divergence and the label's own, written out."""
    model = CASES["SCANVI"].trained
    n_labels = model.data.size("label")
    cells, terms, _, _ = terms_and_sites(model)
    with model.asking(seed=3):
        guide = poutine.trace(poutine.enum(model.elbo().guide, first_available_dim=-2)).get_trace(cells).nodes
        z, u = guide["z"]["value"], guide["u"]["value"]
        ys = [torch.full((len(ROWS),), label) for label in range(n_labels)]
        priors = [model.z_prior(u[label], y) for label, y in enumerate(ys)]
        posteriors = [model.u_encoder(z, y) for y in ys]
        logits = exact(model.classifier(z))
        likelihood = log_likelihood("SCANVI", model, cells, z, {})
    np.testing.assert_allclose(exact(terms.reconstruction), -likelihood, rtol=5e-5)
    log_q = special.log_softmax(logits, axis=1)
    known = np.where(np.arange(n_labels) == exact(cells.label)[:, None], 0.0, -np.inf)
    log_q = np.where(cells.is_labeled.numpy()[:, None], known, log_q)
    of_label = np.stack(
        [
            -stats.norm.logpdf(exact(z), exact(p.mean), exact(p.variance) ** 0.5).sum(1)
            + normal_kl(exact(q.mean), exact(q.variance) ** 0.5)
            for p, q in zip(priors, posteriors, strict=True)
        ],
        axis=1,
    )
    q = np.exp(log_q)
    expected = (q * of_label).sum(1) + special.xlogy(q, q).sum(1) + np.log(n_labels)
    mean, sd = moments(guide["z"])
    expected += stats.norm.logpdf(exact(z), mean, sd).sum(1)
    np.testing.assert_allclose(exact(terms.kl_local), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["PEAKVI", "PEAKVI-logistic-normal"])
def test_peakvi(name):
    model = CASES[name].trained
    cells, terms, guide, _ = terms_and_sites(model)
    with model.asking(seed=3):
        factors = model.drawer().block(cells, ["accessibility", "depth"])[0]
    parts = [exact(factors[site].value[0]) for site in ("accessibility", "depth")]
    p = parts[0] * parts[1] * model.get_region_factors().astype(np.float64)
    expected = -stats.bernoulli.logpmf(exact(cells.accessibility).astype(int), p).sum(1)
    np.testing.assert_allclose(exact(terms.reconstruction), expected, rtol=5e-5)
    kl = normal_kl(*moments(guide["w" if "w" in guide else "z"]))
    np.testing.assert_allclose(exact(terms.kl_local), kl, rtol=5e-5)
