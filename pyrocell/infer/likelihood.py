"""How well each cell is explained: importance-weighted marginal likelihood, and weights between cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.distributions.util import sum_rightmost
from torch.distributions import Independent

from pyrocell.infer.draws import Drawer
from pyrocell.infer.effects import is_latent, is_local, is_observed
from pyrocell.infer.enumeration import log_prob

__all__ = ["log_importance", "log_marginal"]

_DRAWS_AT_ONCE = 512


@torch.no_grad()
def log_marginal(drawer: Drawer, cells: Any, *, n_samples: int, n_per_pass: int = 100) -> torch.Tensor:
    """Estimate log p(x) of each cell by importance sampling from the guide.

    ``log p(x_n) ~ logsumexp_m [log p(x_n, h_m) - log q(h_m | x_n)] - log M`` with M draws; with M = 1 this is one
    draw of the bound, and it grows towards log p(x) with M (Burda, Grosse and Salakhutdinov, ICLR 2016).

    Parameters
    ----------
    drawer
        Model and guide.
    cells
        B cells.
    n_samples
        Number of draws M.
    n_per_pass
        Draws held in memory at once.

    Returns
    -------
    Tensor
        Natural logs, shape ``(B,)``.
    """
    total = torch.full((len(cells),), -math.inf)
    left = n_samples
    while left > 0:
        n = min(left, n_per_pass)
        total = torch.logaddexp(total, _log_weights(drawer, cells, n).logsumexp(0).cpu())
        left -= n
    return total - math.log(n_samples)


def _log_weights(drawer: Drawer, cells: Any, n_samples: int) -> torch.Tensor:
    """Return log p(x, h) - log q(h) of each draw and cell, shape ``(n_samples, B)``, local sites only."""
    guide_trace = drawer.guide_trace(cells, n_samples)
    model_trace = drawer.model_trace(cells, guide_trace, n_samples)
    # A latent that only the model has was drawn from its prior, which is then proposal and target at once.
    log_p = [
        log_prob(site)
        for name, site in model_trace.nodes.items()
        if is_local(site) and (is_observed(site) or (is_latent(site) and name in guide_trace.nodes))
    ]
    log_q = [log_prob(site) for site in guide_trace.nodes.values() if is_latent(site) and is_local(site)]
    ratio: Any = sum(log_p) - sum(log_q)
    return ratio.expand(n_samples, len(cells))


@torch.no_grad()
def log_importance(
    drawer: Drawer,
    latents: Mapping[str, torch.Tensor],
    anchors: Iterable[tuple[Any, torch.Tensor]],
    population: Iterable[Any],
) -> torch.Tensor:
    """Weigh draws of latents so that they represent a population of cells, also where the guide is wrong.

    The target is the average over cells n of p(h | x_n) = p(h) p(x_n | h) / p(x_n), estimated at some anchor cells; the
    proposal is the average of q(h | x_m) over all cells of the population.

    Parameters
    ----------
    drawer
        Model and guide.
    latents
        Draws of each local latent, shape ``(S, ...)``.
    anchors
        Cells of the population, one a time, each with the estimate of its log p(x_n).
    population
        Blocks of all cells of the population.

    Returns
    -------
    Tensor
        Unnormalised log weights, shape ``(S,)``.
    """
    n_draws = len(next(iter(latents.values())))
    log_target = torch.full((n_draws,), -math.inf)
    for cells, log_evidence in anchors:
        for start in range(0, n_draws, _DRAWS_AT_ONCE):
            chosen = slice(start, start + _DRAWS_AT_ONCE)
            part = {name: value[chosen] for name, value in latents.items()}
            log_joint = _log_joint(drawer, cells, part) - log_evidence
            log_target[chosen] = torch.logaddexp(log_target[chosen], log_joint.cpu())
    log_proposal = torch.full((n_draws,), -math.inf)
    for cells in population:
        log_q = _log_guide(drawer, cells, latents)
        log_proposal = torch.logaddexp(log_proposal, log_q.logsumexp(1).cpu())
    return log_target - log_proposal


def _log_joint(drawer: Drawer, cells: Any, latents: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return log p(h) + log p(x | h) of one cell at every draw, decoded with that cell's own size and batch."""
    n_draws = len(next(iter(latents.values())))
    guide_trace = drawer.guide_trace(cells, n_draws)
    with _at(latents):
        trace = drawer.model_trace(cells, guide_trace, n_draws)
    sites = [(n, site) for n, site in trace.nodes.items() if is_observed(site) and is_local(site)]
    total: Any = sum(_density(site) if name in latents else log_prob(site) for name, site in sites)
    return total.reshape(n_draws)


def _log_guide(drawer: Drawer, cells: Any, latents: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return log q(h | x_m) of every draw h and cell m, shape (S, B); each latent given those drawn before it."""
    n_draws = len(next(iter(latents.values())))
    with _at(latents):
        trace = drawer.guide_trace(cells, n_draws)
    total: Any = sum(_density(trace.nodes[name]) for name in latents)
    return total.expand(n_draws, len(cells))


def _density(site: Any) -> torch.Tensor:
    """Return the log density of a latent at a draw, whatever a mask says was measured in the cell.

    Densities at one draw are added over cells. With masks, those of some cells would be over fewer dimensions than
    those of others, and could not be compared.
    """
    fn, n_event = site["fn"], 0
    while isinstance(fn, Independent | MaskedDistribution):
        n_event += getattr(fn, "reinterpreted_batch_ndims", 0)
        fn = fn.base_dist
    return sum_rightmost(fn.log_prob(site["value"]), n_event)


def _at(latents: Mapping[str, torch.Tensor]) -> Any:
    """Hold latents at their draws, whatever the cell; they count as observed then."""
    return poutine.condition(data={name: value[:, None] for name, value in latents.items()})
