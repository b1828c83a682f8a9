"""Exact sums over discrete sites, cell by cell, in place of draws that no gradient would reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pyro.distributions import Categorical
from pyro.distributions.util import scale_and_mask

from pyrocell.infer.effects import Site, enumerates, is_local, is_observed

__all__ = [
    "Enumeration",
    "Term",
    "class_posterior",
    "classes_of_model_alone",
    "draw_classes",
    "log_prob",
]

Kind = Literal["reconstruction", "kl_local", "kl_global"]


def log_prob(site: Site) -> torch.Tensor:
    """Return the log-probability of a site, masked, not scaled."""
    values: torch.Tensor = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
    return values


@dataclass(frozen=True)
class Term:
    """One part of the loss, elementwise.

    Attributes
    ----------
    name
        The site that it comes from; several, where a sum over classes joins them.
    kind
        What it counts as.
    weighted
        As it enters the loss, shape ``(..., B)`` for a local site.
    plain
        The same with KL weight 1.
    """

    name: str
    kind: Kind
    weighted: torch.Tensor
    plain: torch.Tensor

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Term:
        """Return the term with its values changed."""
        weighted = change(self.weighted)
        same = self.plain is self.weighted
        return Term(self.name, self.kind, weighted, weighted if same else change(self.plain))


class Enumeration:
    """The enumerated sites of one pair of traces.

    A class c drawn by the guide is summed over with its probability: ``sum_c q(c | h) t_c`` for each term t that
    depends on it. A class that only the model has is summed out of the product of all that depends on it: ``log sum_c
    exp(t_c)``, the exact marginal. Either is taken for each cell on its own.

    Parameters
    ----------
    model_trace, guide_trace
        Traces recorded under ``poutine.enum``.
    n_plates
        Nested plates: dimensions left of these are classes.
    """

    def __init__(self, model_trace: Any, guide_trace: Any, n_plates: int) -> None:
        self.n_plates = n_plates
        drawn = [site for site in guide_trace.nodes.values() if enumerates(site)]
        # Probabilities of the classes themselves: neither masked nor scaled.
        self.log_q = [site["fn"].log_prob(site["value"]) for site in drawn]
        alone = classes_of_model_alone(model_trace, guide_trace)
        self.marginal_dims = [site["infer"]["_enumerate_dim"] for site in alone]

    def sum_out(self, terms: Iterable[Term]) -> list[Term]:
        """Return terms without dimensions of classes.

        Parameters
        ----------
        terms
            Terms of which some have such dimensions.
        """
        joined = self._marginalise(list(terms))
        probability = sum(self.log_q, torch.zeros(())).exp()

        def expect(values: torch.Tensor) -> torch.Tensor:
            n_classes = values.dim() - self.n_plates
            if n_classes <= 0:
                return values
            product = values * probability
            return product.sum(tuple(range(product.dim() - self.n_plates)))

        return [term.map(expect) for term in joined]

    def _marginalise(self, terms: list[Term]) -> list[Term]:
        """Join the terms that depend on classes of the model alone into one."""
        inside = [term for term in terms if self._depends(term.plain)]
        if not inside:
            return terms
        observed = any(term.kind == "reconstruction" for term in inside)
        weighted, plain = (
            -(-sum(values)).logsumexp(self.marginal_dims, keepdim=True)  # type: ignore[union-attr]
            for values in ([t.weighted for t in inside], [t.plain for t in inside])
        )
        names = ", ".join(term.name for term in inside)
        joint = Term(names, "reconstruction" if observed else "kl_local", weighted, plain)
        return [*(term for term in terms if not self._depends(term.plain)), joint]

    def _depends(self, values: torch.Tensor) -> bool:
        return any(values.dim() >= -dim and values.shape[dim] > 1 for dim in self.marginal_dims)


def classes_of_model_alone(model_trace: Any, guide_trace: Any) -> list[Site]:
    """Return the enumerated sites that the guide does not draw."""
    nodes = model_trace.nodes.items()
    return [site for name, site in nodes if enumerates(site) and name not in guide_trace.nodes]


def draw_classes(model_trace: Any, guide_trace: Any, n_plates: int) -> None:
    """Draw classes that only the model has, given all else, and add them to the guide's trace.

    Parameters
    ----------
    model_trace
        Recorded under ``poutine.enum`` on the guide's draws.
    guide_trace
        What the guide drew; changed in place.
    n_plates
        Dimensions that are not of classes, the draws among them.
    """
    alone, joint = _joint_with_classes(model_trace, guide_trace, n_plates)
    sizes = joint.shape[: joint.dim() - n_plates]
    chosen = Categorical(logits=joint.flatten(0, len(sizes) - 1).movedim(0, -1)).sample()
    codes = torch.unravel_index(chosen, sizes)
    for site in alone:
        place = joint.dim() + site["infer"]["_enumerate_dim"]
        support = site["value"].reshape(sizes[place], *site["fn"].event_shape)
        guide_trace.add_node(site["name"], **{**site, "value": support[codes[place]], "infer": {}})


def class_posterior(model_trace: Any, guide_trace: Any, n_plates: int) -> dict[str, torch.Tensor]:
    """Return the probabilities of each class that only the model has, given all else but other such classes.

    Parameters
    ----------
    model_trace, guide_trace, n_plates
        As for `draw_classes`.

    Returns
    -------
    dict of str to Tensor
        By name of the site: the dimensions of the plates, then one of its values.
    """
    alone, joint = _joint_with_classes(model_trace, guide_trace, n_plates)
    n_classes, found = joint.dim() - n_plates, {}
    for site in alone:
        place = joint.dim() + site["infer"]["_enumerate_dim"]
        others = [dim for dim in range(n_classes) if dim != place]
        own = joint.logsumexp(others, keepdim=True) if others else joint
        found[site["name"]] = own.flatten(0, n_classes - 1).movedim(0, -1).softmax(-1)
    return found


def _joint_with_classes(model_trace: Any, guide_trace: Any, n_plates: int) -> tuple[list[Site], torch.Tensor]:
    """Return the sites of classes that only the model has, and the log joint of each cell in every combination."""
    alone = classes_of_model_alone(model_trace, guide_trace)
    latent = {*guide_trace.nodes, *(site["name"] for site in alone)}
    sites = [s for name, s in model_trace.nodes.items() if is_local(s) and (is_observed(s) or name in latent)]
    joint = sum((log_prob(site) for site in sites if site["type"] == "sample"), torch.zeros(()))
    # Where nothing else is drawn, all draws have the same joint; each draws classes of its own.
    plates = alone[0]["fn"].batch_shape[-n_plates:]
    return alone, joint.expand(*joint.shape[: joint.dim() - n_plates], *plates)
