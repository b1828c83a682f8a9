"""The one objective: a per-cell evidence lower bound, with no host synchronisation.

With N cells in the population and B in the minibatch, local terms are averages over the minibatch
and global ones are divided by N, so that the loss does not depend on N or B, nor do step sizes,
clipping thresholds and weight decay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.kl import kl_divergence
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceEnum_ELBO

from pyrocell.errors import TrainingError, list_some
from pyrocell.infer.effects import CELLS, Site, Warmup, enumerates, is_latent, is_local, is_observed

__all__ = ["Elbo", "ElboTerms", "Population"]


class Population(Protocol):
    """What the objective needs to know of a minibatch."""

    @property
    def n_total(self) -> int:
        """Number of cells in the population that the minibatch stands for."""

    @property
    def rows(self) -> torch.Tensor:
        """Positions of the cells in that population."""

    def __len__(self) -> int:
        """Return the number of cells in the minibatch."""


Program = Callable[[Any], Any]


@dataclass
class ElboTerms:
    """One evaluation of the bound.

    Attributes
    ----------
    loss
        Scalar to minimise, per cell, with the warm-up weight applied.
    reconstruction
        Negative log-likelihood of each cell, shape ``(B,)``.
    kl_local
        KL term of each cell with weight 1, shape ``(B,)``.
    kl_global
        KL of all global latents divided by the number of cells, scalar.
    sites
        Contribution of each site to the loss, to name the culprit of a non-finite one.
    """

    loss: torch.Tensor
    reconstruction: torch.Tensor
    kl_local: torch.Tensor
    kl_global: torch.Tensor
    sites: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def elbo(self) -> torch.Tensor:
        """Negative bound per cell with weight 1: the quantity that history and early stopping use."""
        return self.reconstruction.mean() + self.kl_local.mean() + self.kl_global


class Elbo:
    """Evidence lower bound of a model and its guide.

    Parameters
    ----------
    model, guide
        Pyro programs of one argument, the minibatch of cells, in which every local site lies in the
        plate ``"cells"``.
    max_plate_nesting
        Number of nested plates; needed only where sites are enumerated.

    Notes
    -----
    A latent uses the analytic KL where one is registered *and* it is exact: the analytic form
    ignores that the prior of a site may depend on latents that the guide draws after it (SCANVI's
    class-conditional prior, for one). Such sites use log q - log p at the draw. The test is on order:
    a site is safe when no latent comes before it in the model and after it in the guide.
    Models with enumerated sites are handed to ``TraceEnum_ELBO``.
    """

    def __init__(self, model: Program, guide: Program, *, max_plate_nesting: int = 1) -> None:
        self.model = model
        self.guide = guide
        self._enumerating = TraceEnum_ELBO(
            max_plate_nesting=max_plate_nesting, strict_enumeration_warning=False
        )
        self._analytic: dict[str, bool] | None = None
        self._enumerates = False

    def __call__(self, cells: Population, weight: float | torch.Tensor = 1.0) -> ElboTerms:
        """Evaluate the bound on a minibatch.

        Parameters
        ----------
        cells
            Minibatch of B cells.
        weight
            KL weight in [0, 1] of the local latents that warm up.

        Raises
        ------
        TrainingError
            If model and guide do not have the same latents, or do not share their minibatch.
        """
        with Warmup(weight):
            if self._enumerates:
                return self._enumerated(cells)
            guide_trace: Any = poutine.trace(self.guide).get_trace(cells)
            model_trace: Any = poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(cells)
            if self._analytic is None and self._inspect(model_trace, guide_trace, cells):
                return self._enumerated(cells)
            return self._sum(model_trace, guide_trace, cells)

    def _inspect(self, model_trace: Any, guide_trace: Any, cells: Population) -> bool:
        """Check the pair once, note which latents may use an analytic KL, and say whether any are enumerated."""
        model_latents = [name for name, site in model_trace.nodes.items() if is_latent(site)]
        guide_latents = [
            name
            for name, site in guide_trace.nodes.items()
            if is_latent(site) and not site["infer"].get("is_auxiliary")
        ]
        traces = (model_trace, guide_trace)
        enumerated = {name for trace in traces for name, site in trace.nodes.items() if enumerates(site)}
        _check_same_latents(set(model_latents) - enumerated, set(guide_latents) - enumerated)
        _check_same_cells(model_trace, guide_trace, cells)
        _check_reparameterised(guide_trace)
        self._enumerates = bool(enumerated)
        rank = {name: i for i, name in enumerate(guide_latents)}
        self._analytic = {
            name: not any(rank.get(earlier, -1) > rank[name] for earlier in model_latents[:i])
            for i, name in enumerate(model_latents)
            if name in rank
        }
        return self._enumerates

    def _sum(self, model_trace: Any, guide_trace: Any, cells: Population) -> ElboTerms:
        per_cell = len(cells) / cells.n_total
        zero = torch.zeros((), device=_device_of(model_trace))
        totals: dict[str, list[torch.Tensor]] = {"reconstruction": [], "kl_local": [], "kl_global": []}
        sites = {}
        for name, site in model_trace.nodes.items():
            if is_observed(site):
                term, scale = -_log_prob(site), site["scale"]
                kind = "reconstruction" if is_local(site) else "kl_global"
                unweighted = scale
            elif is_latent(site):
                guide_site = guide_trace.nodes[name]
                term, scale = _kl(
                    site, guide_site, analytic=bool(self._analytic and self._analytic.get(name))
                )
                kind = "kl_local" if is_local(site) else "kl_global"
                unweighted = guide_site["infer"].get("scale_before_warmup", scale)
            else:
                continue
            sites[name] = (term * scale).sum() / cells.n_total
            totals[kind].append(
                term * (unweighted * per_cell) if is_local(site) else term.sum() / cells.n_total
            )
        for name, site in guide_trace.nodes.items():
            # Auxiliary latents, whose term is log q alone, and penalties written with pyro.factor.
            if (is_latent(site) and name not in model_trace.nodes) or is_observed(site):
                term, local = _log_prob(site), is_local(site)
                plain = site["infer"].get("scale_before_warmup", site["scale"])
                sites[name] = (term * site["scale"]).sum() / cells.n_total
                kind = "kl_local" if local else "kl_global"
                totals[kind].append(term * (plain * per_cell) if local else term.sum() / cells.n_total)
        summed = {kind: sum((t.detach() for t in terms), zero) for kind, terms in totals.items()}
        return ElboTerms(loss=sum(sites.values(), zero), sites=sites, **summed)

    def _enumerated(self, cells: Population) -> ElboTerms:
        with torch.enable_grad():  # Pyro's estimator refuses a loss without a gradient
            loss = self._enumerating.differentiable_loss(self.model, self.guide, cells) / cells.n_total
        whole, zero = loss.detach(), torch.zeros_like(loss.detach())
        return ElboTerms(loss, whole.expand(len(cells)), zero.expand(len(cells)), zero, {"enumerated": loss})


def _log_prob(site: Site) -> torch.Tensor:
    """Log-probability of a site, masked, not scaled."""
    return scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])


def _kl(site: Site, guide_site: Site, *, analytic: bool) -> tuple[torch.Tensor, Any]:
    """KL of one latent, elementwise over its batch shape, and the scale that belongs to it."""
    if analytic and not isinstance(guide_site["fn"], Delta):  # Pyro's KL of a Delta forgets its log_density
        try:
            kl = kl_divergence(guide_site["fn"], site["fn"])
            kl = torch.as_tensor(kl).expand(guide_site["fn"].batch_shape)
            return scale_and_mask(kl, mask=guide_site["mask"]), guide_site["scale"]
        except NotImplementedError:  # no closed form registered for this pair
            pass
    # Scales of both sides are equal: warm-up acts on both, and both lie in the same plate.
    return _log_prob(guide_site) - _log_prob(site), guide_site["scale"]


def _check_same_latents(model_latents: set[str], guide_latents: set[str]) -> None:
    if missing := sorted(model_latents - guide_latents):
        raise TrainingError(
            f"The model draws {list_some(missing)}, which the guide does not. Draw each in the guide under the same "
            "name, observe it in the model (obs=...), or drop the guide to get an automatic one."
        )
    if extra := sorted(guide_latents - model_latents):
        raise TrainingError(
            f"The guide draws {list_some(extra)}, which the model does not. Remove it from the guide, or mark it "
            'infer={"is_auxiliary": True}.'
        )


def _check_same_cells(model_trace: Any, guide_trace: Any, cells: Population) -> None:
    plates = [trace.nodes[CELLS]["value"] for trace in (model_trace, guide_trace) if CELLS in trace.nodes]
    if not all(torch.equal(torch.as_tensor(rows).cpu(), cells.rows.cpu()) for rows in plates):
        raise TrainingError(
            "Model and guide look at different cells: a plate 'cells' drew rows of its own. Open the plate with "
            "`with self.plate(cells):` in both (an autoguide takes create_plates=self.plate)."
        )


def _check_reparameterised(guide_trace: Any) -> None:
    for name, site in guide_trace.nodes.items():
        if is_latent(site) and not enumerates(site) and not site["fn"].has_rsample:
            raise TrainingError(
                f"The guide's site {name!r} draws from {type(site['fn']).__name__}, which has no rsample: no "
                "gradient would reach it. Use a continuous distribution with rsample, or enumerate the site with "
                'infer={"enumerate": "parallel"}.'
            )


def _device_of(trace: Any) -> torch.device:
    for site in trace.nodes.values():
        if site["type"] == "sample" and isinstance(site["value"], torch.Tensor):
            return site["value"].device
    return torch.device("cpu")
