"""Posterior draws of any site, block by block: the guide sees cells as measured, the model as asked."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine

from pyrocell.errors import QueryError, list_some
from pyrocell.infer.effects import Record, Site, is_latent, is_local, is_observed, run_until
from pyrocell.infer.enumeration import class_posterior, draw_classes

__all__ = ["DRAWS", "Drawer", "SiteDraws"]

DRAWS = "draws"
"""Name of the plate of Monte Carlo draws."""

Program = Callable[[Any], Any]


@dataclass(frozen=True)
class SiteDraws:
    """One site in one block of cells: its distribution and its value.

    Attributes
    ----------
    fn
        The site's distribution, given the draws of its parents.
    value
        Draws, shape ``(n_samples, B, ...)`` of a local site, ``(n_samples, ...)`` of a global one.
    local
        Whether there is one value a cell.
    """

    fn: Any
    value: torch.Tensor
    local: bool

    def predict(self) -> torch.Tensor:
        """Draw anew from the site's distribution: a posterior predictive draw, shape as ``value``."""
        return self.fn.sample()

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """Parameters of the distribution on their natural scale, or its mean and variance if it names none."""
        fn = self.fn
        while not hasattr(fn, "parameters_table") and hasattr(fn, "base_dist"):
            fn = fn.base_dist  # what lies within a mask or an event
        named = getattr(fn, "parameters_table", None)
        return {"mean": self.fn.mean, "variance": self.fn.variance} if named is None else named


class Drawer:
    """Draw sites of a model from the posterior that its guide describes.

    Parameters
    ----------
    model, guide
        Pyro programs of one argument, the cells.
    max_plate_nesting
        Plates nested in the model; the plate of draws lies outside them.
    classes_of_model_alone
        Whether the model sums over discrete sites that the guide does not draw: they are drawn given all else then.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        *,
        max_plate_nesting: int = 1,
        classes_of_model_alone: bool = False,
    ) -> None:
        self.model = model
        self.guide = guide
        self.dim = -1 - max_plate_nesting
        self.classes_of_model_alone = classes_of_model_alone

    @torch.no_grad()
    def block(
        self,
        cells: Any,
        sites: Sequence[str],
        *,
        n_samples: int = 1,
        counterfactuals: Sequence[Any] | None = None,
        decoding: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> list[dict[str, SiteDraws]]:
        """Draw ``sites`` for one block of cells.

        Parameters
        ----------
        cells
            B cells, as measured: what the guide sees.
        sites
            Names of sample or deterministic sites of the model. The model runs no further than the last of them.
        n_samples
            Number of draws.
        counterfactuals
            What the model sees instead of ``cells``: one version for each set of values asked for. The guide runs
            once for all of them, on ``cells``.
        decoding
            Entered around the model, to restrict it to some features.

        Returns
        -------
        list of dict
            For each counterfactual, the draws of each site.

        Raises
        ------
        QueryError
            If the model has no such site.
        """
        guide_trace = self.guide_trace(cells, n_samples)
        if self.classes_of_model_alone:
            draw_classes(self._enumerated(cells, guide_trace, n_samples), guide_trace, n_plates=-self.dim)
        results = []
        for version in [cells] if counterfactuals is None else counterfactuals:
            with decoding():
                model_trace = self.model_trace(version, guide_trace, n_samples, sites)
            missing = [name for name in sites if name not in model_trace.nodes]
            if missing:
                raise _unknown_site(missing[0], self.sites(cells))
            results.append({name: _site(model_trace.nodes[name], n_samples, len(cells)) for name in sites})
        return results

    @torch.no_grad()
    def class_probabilities(self, cells: Any, *, n_samples: int = 1) -> dict[str, torch.Tensor]:
        """Return the posterior of each class that only the model has, shape ``(B, n_classes)``, by name.

        Exact where the guide draws nothing, else an average over draws.

        Parameters
        ----------
        cells
            B cells, as measured.
        n_samples
            Number of draws of the guide.
        """
        guide_trace = self.guide_trace(cells, n_samples)
        found = class_posterior(
            self._enumerated(cells, guide_trace, n_samples), guide_trace, n_plates=-self.dim
        )
        return {name: probabilities.mean(0) for name, probabilities in found.items()}

    def _enumerated(self, cells: Any, guide_trace: Any, n_samples: int) -> Any:
        """Run the model on the guide's draws, with all values of the classes that only the model has."""
        with poutine.enum(first_available_dim=self.dim - 1):
            return self.model_trace(cells, guide_trace, n_samples)

    @torch.no_grad()
    def guide_latents(self, cells: Any) -> dict[str, Any]:
        """Return the posterior of each local latent given the cells, as distributions over B cells."""
        trace: Any = poutine.trace(self.guide).get_trace(cells)
        return {
            name: site["fn"]
            for name, site in trace.nodes.items()
            if is_latent(site) and is_local(site) and not site["infer"].get("is_auxiliary")
        }

    @torch.no_grad()
    def sites(self, cells: Any) -> dict[str, str]:
        """Name every site that can be asked for, and its kind: latent, observed or deterministic."""
        trace = self.model_trace(cells, self.guide_trace(cells, 1), 1, ())
        return {name: _kind(site) for name, site in trace.nodes.items() if _is_quantity(site)}

    def _plate(self, n_samples: int) -> pyro.plate:
        return pyro.plate(DRAWS, n_samples, dim=self.dim)

    def guide_trace(self, cells: Any, n_samples: int) -> Any:
        """Run the guide with a plate of draws around it.

        Parameters
        ----------
        cells, n_samples
            Cells as measured, and the number of draws.
        """
        with poutine.trace() as tracer, self._plate(n_samples):
            self.guide(cells)
        return tracer.trace

    def model_trace(
        self, cells: Any, guide_trace: Any, n_samples: int, sites: Iterable[str] | None = None
    ) -> Any:
        """Run the model on the guide's draws.

        Parameters
        ----------
        cells, n_samples
            As the model is to see them, and the number of draws.
        guide_trace
            What the guide drew.
        sites
            Run until the last of these. Of no names: to the end, computing every deterministic site; None: to the end,
            without those that are only computed on request.
        """
        recording = nullcontext() if sites is None else Record(sites)
        with poutine.trace() as tracer, recording, poutine.replay(trace=guide_trace):

            def draw() -> None:
                with self._plate(n_samples):
                    self.model(cells)

            run_until(draw, sites or ())
        return tracer.trace


def _site(site: Site, n_samples: int, n_cells: int) -> SiteDraws:
    fn, value, local = site["fn"], site["value"], is_local(site)
    batch_shape = (n_samples, n_cells) if local else (n_samples,)
    n_batch = value.dim() - fn.event_dim
    idle = [dim for dim in range(1, n_batch) if value.shape[dim] == 1][: max(0, n_batch - len(batch_shape))]
    shape = batch_shape + tuple(value.shape[n_batch:])
    try:
        # A value that does not depend on the draws, or on the cells, has a shorter or thinner shape.
        return SiteDraws(fn, value.squeeze(idle).expand(shape), local)
    except RuntimeError:
        raise QueryError(
            f"Site {site['name']!r} has shape {tuple(value.shape)} for {n_samples} draws of {n_cells} cells; expected "
            f"one that broadcasts to {shape}. Let the model's operations broadcast over leading dimensions, as in "
            "(z.unsqueeze(-2) @ weights).squeeze(-2)."
        ) from None


def _is_quantity(site: Site) -> bool:
    return site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"


def _kind(site: Site) -> str:
    if is_observed(site):
        return "observed"
    return "deterministic" if site["infer"].get("_deterministic") else "latent"


def _unknown_site(name: str, known: Mapping[str, str]) -> QueryError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return QueryError(f"The model has no site {name!r}; it has {list_some(known, 20)}.{hint}")
