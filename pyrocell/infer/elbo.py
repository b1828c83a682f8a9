"""The one objective: a per-cell evidence lower bound, with no host synchronisation.

With N cells in the population and B in the minibatch, local terms are averages over the minibatch
and global ones are divided by N, so that the loss does not depend on N or B, nor do step sizes,
clipping thresholds and weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.kl import kl_divergence
from pyro.distributions.util import scale_and_mask

from pyrocell.errors import TrainingError, list_some
from pyrocell.infer.effects import CELLS, Site, Warmup, enumerates, is_latent, is_local, is_observed
from pyrocell.infer.enumeration import Enumeration, Kind, Term, classes_of_model_alone, log_prob

__all__ = ["Elbo", "ElboTerms", "ExtraTerms", "Population"]


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

    def load(self) -> Any:
        """Return the cells themselves, where these are only named (`pyrocell.data.resident.Selection`)."""


Program = Callable[[Any], Any]
ExtraTerms = Callable[[Any, Mapping[str, Site]], dict[str, torch.Tensor]]


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
        Contribution of each site and further term to the loss, to name the culprit of a non-finite one.
    extra
        Further terms of the loss that belong to no bound, such as a classifier's: scalars per cell.
    """

    loss: torch.Tensor
    reconstruction: torch.Tensor
    kl_local: torch.Tensor
    kl_global: torch.Tensor
    sites: dict[str, torch.Tensor] = field(default_factory=dict)
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def elbo(self) -> torch.Tensor:
        """Negative bound per cell with weight 1: the quantity that history and early stopping use."""
        return self.reconstruction.mean() + self.kl_local.mean() + self.kl_global

    def add(self, extra: dict[str, torch.Tensor]) -> None:
        """Add further terms to the loss."""
        self.extra |= extra
        self.sites |= extra
        self.loss = sum(extra.values(), self.loss)

    def tensors(self) -> list[torch.Tensor]:
        """All that is known, in a fixed order."""
        return [self.loss, self.reconstruction, self.kl_local, self.kl_global, *self.sites.values()]

    def of_tensors(self, tensors: Sequence[torch.Tensor]) -> ElboTerms:
        """Return terms of the same names that hold other tensors, given in the order of `tensors`."""
        loss, reconstruction, kl_local, kl_global, *rest = tensors
        sites = dict(zip(self.sites, rest, strict=True))
        extra = {name: sites[name] for name in self.extra}
        return ElboTerms(loss, reconstruction, kl_local, kl_global, sites, extra)

    def totals(self, extra: Iterable[str] = ()) -> torch.Tensor:
        """Reconstruction, local and global KL, then the extra terms named, each summed over the cells."""
        n_cells = len(self.reconstruction)
        rest = [term.detach() * n_cells for term in (self.kl_global, *(self.extra[name] for name in extra))]
        return torch.stack([self.reconstruction.sum(), self.kl_local.sum(), *rest])


class Elbo:
    """Evidence lower bound of a model and its guide.

    Parameters
    ----------
    model, guide
        Pyro programs of one argument, the minibatch of cells, in which every local site lies in the
        plate ``"cells"``.
    max_plate_nesting
        Number of nested plates; needed only where sites are enumerated.
    extra_terms
        Given the cells and the sites of the guide, returns named scalars to add to the loss, each an average over
        the minibatch with its weight applied.
    owner
        What the programs belong to, beside the module: its Python values must not change in a step that is recorded.

    Notes
    -----
    A latent uses the analytic KL where one is registered *and* it is exact: the analytic form
    ignores that the prior of a site may depend on latents that the guide draws after it (SCANVI's
    class-conditional prior, for one). Such sites use log q - log p at the draw. The test is on order:
    a site is safe when no latent comes before it in the model and after it in the guide.

    Discrete sites with ``infer={"enumerate": "parallel"}`` are summed over exactly, whether the guide draws them
    or only the model has them; see `Enumeration`.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        max_plate_nesting: int = 1,
        extra_terms: ExtraTerms | None = None,
        owner: object = None,
    ) -> None:
        self.model, self.guide, self.owner = model, guide, owner
        self.max_plate_nesting = max_plate_nesting
        self.extra_terms = extra_terms
        self._analytic: dict[str, bool] | None = None
        self._enumerates = True  # until the pair was inspected
        self.has_classes_of_model_alone = False

    def __call__(
        self, cells: Population, weight: float | torch.Tensor = 1.0, *, with_extra: bool = False
    ) -> ElboTerms:
        """Evaluate the bound on a minibatch.

        Parameters
        ----------
        cells
            Minibatch of B cells.
        weight
            KL weight in [0, 1] of the local latents that warm up.
        with_extra
            Whether to add the extra terms to the loss, as a training step does; they belong to no bound.

        Raises
        ------
        TrainingError
            If model and guide do not have the same latents, or do not share their minibatch.
        """
        with Warmup(weight):
            model_trace, guide_trace = self._traces(cells)
        if self._analytic is None:
            self._inspect(model_trace, guide_trace, cells)
        terms = self._sum(model_trace, guide_trace, cells)
        if with_extra and self.extra_terms is not None:
            sites = {name: site for name, site in guide_trace.nodes.items() if site["type"] == "sample"}
            terms.add(self.extra_terms(cells, sites))
        return terms

    def _traces(self, cells: Population) -> tuple[Any, Any]:
        """Run guide and model; discrete sites take all their values at once, in dimensions left of the plates."""
        model, guide = self.model, self.guide
        if self._enumerates:
            guide = poutine.enum(guide, first_available_dim=-1 - self.max_plate_nesting)
            model = poutine.enum(model)
        guide_trace: Any = poutine.trace(guide).get_trace(cells)
        return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(cells), guide_trace

    def _inspect(self, model_trace: Any, guide_trace: Any, cells: Population) -> None:
        """Check the pair once, and note which latents may use an analytic KL and whether any are enumerated."""
        model_latents = [name for name, site in model_trace.nodes.items() if is_latent(site)]
        guide_latents = [
            name
            for name, site in guide_trace.nodes.items()
            if is_latent(site) and not site["infer"].get("is_auxiliary")
        ]
        enumerated = {name for name, site in model_trace.nodes.items() if enumerates(site)}
        _check_same_latents(model_latents, guide_latents, enumerated)
        _check_same_cells(model_trace, guide_trace, cells)
        _check_reparameterised(guide_trace)
        _check_enumerated(model_trace, enumerated)
        self._enumerates = bool(enumerated)
        self.has_classes_of_model_alone = bool(classes_of_model_alone(model_trace, guide_trace))
        rank = {name: i for i, name in enumerate(guide_latents)}
        last = len(rank)  # the guide never draws what the model alone sums over
        self._analytic = {
            name: not any(rank.get(earlier, last) > rank[name] for earlier in model_latents[:i])
            for i, name in enumerate(model_latents)
            if name in rank
        }

    def _sum(self, model_trace: Any, guide_trace: Any, cells: Population) -> ElboTerms:
        n_cells, n_total = len(cells), cells.n_total
        terms: Iterable[Term] = self._terms(model_trace, guide_trace, n_cells / n_total)
        if self._enumerates:
            terms = Enumeration(model_trace, guide_trace, self.max_plate_nesting).sum_out(terms)
        zero = torch.zeros((), device=_device_of(model_trace))
        totals = {"reconstruction": zero.expand(n_cells), "kl_local": zero.expand(n_cells), "kl_global": zero}
        sites = {}
        for term in terms:
            local = term.kind != "kl_global"
            sites[term.name] = term.weighted.sum() / (n_cells if local else n_total)
            plain = term.plain.detach()
            totals[term.kind] = totals[term.kind] + (_per_cell(plain) if local else plain.sum() / n_total)
        return ElboTerms(
            loss=sum(sites.values(), zero),
            reconstruction=totals["reconstruction"],
            kl_local=totals["kl_local"],
            kl_global=totals["kl_global"],
            sites=sites,
        )

    def _terms(self, model_trace: Any, guide_trace: Any, share: float) -> Iterator[Term]:
        """Yield the term of each site; ``share`` is the fraction of the population in the minibatch."""
        for name, site in model_trace.nodes.items():
            if is_observed(site):
                kind: Kind = "reconstruction" if is_local(site) else "kl_global"
                yield _term(kind, -log_prob(site), site, share)
            elif is_latent(site) and name in guide_trace.nodes:
                analytic = bool(self._analytic and self._analytic[name])
                # Scales of both sides are equal: warm-up acts on both, and both lie in the same plate.
                guide_site = guide_trace.nodes[name]
                yield _term(_kl_kind(site), _kl(site, guide_site, analytic=analytic), guide_site, share)
            elif is_latent(site):  # enumerated
                yield _term(_kl_kind(site), -log_prob(site), site, share)
        for name, site in guide_trace.nodes.items():
            # Auxiliary latents, whose term is log q alone, and penalties written with pyro.factor.
            if (is_latent(site) and name not in model_trace.nodes) or is_observed(site):
                yield _term(_kl_kind(site), log_prob(site), site, share)


def _kl_kind(site: Site) -> Kind:
    return "kl_local" if is_local(site) else "kl_global"


def _term(kind: Kind, value: torch.Tensor, site: Site, share: float) -> Term:
    """Weigh the values of a site, local ones such that their sum over the minibatch counts each cell once."""
    share = share if is_local(site) else 1.0
    weighted = value * (site["scale"] * share)
    before = site["infer"].get("scale_before_warmup")
    plain = weighted if before is None else value * (before * share)
    return Term(site["name"], kind, weighted, plain)


def _per_cell(values: torch.Tensor) -> torch.Tensor:
    """Sum over everything but the cells, which lie in the last dimension."""
    return values if values.dim() == 1 else values.reshape(-1, values.shape[-1]).sum(0)


def _kl(site: Site, guide_site: Site, *, analytic: bool) -> torch.Tensor:
    """KL of one latent, elementwise over its batch shape."""
    if analytic and not isinstance(guide_site["fn"], Delta):  # Pyro's KL of a Delta forgets its log_density
        try:
            kl = kl_divergence(guide_site["fn"], site["fn"])
            # A prior that depends on an enumerated site has the classes in a dimension of its own, left of the guide's.
            if kl.shape != guide_site["fn"].batch_shape:
                kl = kl.expand(torch.broadcast_shapes(kl.shape, guide_site["fn"].batch_shape))
            return scale_and_mask(kl, mask=guide_site["mask"])
        except NotImplementedError:  # no closed form registered for this pair
            pass
    return log_prob(guide_site) - log_prob(site)


def _check_same_latents(model_latents: list[str], guide_latents: list[str], enumerated: set[str]) -> None:
    if missing := sorted(set(model_latents) - set(guide_latents) - enumerated):
        raise TrainingError(
            f"The model draws {list_some(missing)}, which the guide does not. Draw each in the guide under the same "
            "name, observe it in the model (obs=...), or drop the guide to get an automatic one."
        )
    if extra := sorted(set(guide_latents) - set(model_latents)):
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


def _check_enumerated(model_trace: Any, enumerated: set[str]) -> None:
    if outside := sorted(name for name in enumerated if not is_local(model_trace.nodes[name])):
        raise TrainingError(
            f"The sites {list_some(outside)} are enumerated outside the plate of cells, where a minibatch does not "
            "tell the sum over all cells. Move them into the plate, or use continuous sites."
        )


def _device_of(trace: Any) -> torch.device:
    for site in trace.nodes.values():
        if site["type"] == "sample" and isinstance(site["value"], torch.Tensor):
            return site["value"].device
    return torch.device("cpu")
