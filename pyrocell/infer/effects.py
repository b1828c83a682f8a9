"""Pyro effects that keep cross-cutting concerns out of the models: warm-up, recording, early exit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch.distributions import Distribution

__all__ = [
    "CELLS",
    "NO_WARMUP",
    "AtMean",
    "CellPlate",
    "OnDevice",
    "Record",
    "Site",
    "Until",
    "Warmup",
    "enumerates",
    "is_latent",
    "is_local",
    "is_observed",
    "kl_weighted",
    "lazy_deterministic",
    "run_until",
]

Site = Any
"""One entry of a Pyro trace; Pyro's own type of it says that every key may be missing."""

NO_WARMUP: Any = {"warmup": False}
"""``infer=NO_WARMUP`` on a site, in model and guide, keeps its KL weight at one throughout."""


def kl_weighted(weight: float) -> Any:
    """Return what to give a local latent as ``infer=``, in model and guide, for a KL term of this weight in the loss.

    Bounds and likelihoods that are reported keep weight one, and so do posterior draws: a site under
    ``poutine.scale`` would change them all.
    """
    return {"kl_weight": weight}


CELLS = "cells"
"""Name of the plate of cells, the same in every model and guide."""


class CellPlate(pyro.plate):
    """Plate of cells in which parameters of single cells always follow the rows of the minibatch.

    Pyro takes such parameters as they lie when a minibatch holds all cells, also if these come in another order.

    Parameters
    ----------
    n_total
        Number of cells that the minibatch stands for.
    rows
        Positions of the minibatch in them, int64, shape (n_cells,).
    """

    def __init__(self, n_total: int, rows: torch.Tensor) -> None:
        super().__init__(CELLS, n_total, subsample=rows, dim=-1)
        self._rows = rows

    def _postprocess_message(self, msg: Any) -> None:
        super()._postprocess_message(msg)
        if self.subsample_size < self.size or msg["type"] not in ("param", "subsample"):
            return
        value, event_dim = msg["value"], msg["kwargs"].get("event_dim")
        if event_dim is None or value.dim() <= event_dim or value.shape[-1 - event_dim] == 1:
            return
        msg["value"] = value.index_select(-1 - event_dim, self._rows.to(value.device))


def is_local(site: Site) -> bool:
    """Whether a site has one value per cell, that is, lies inside the plate of cells."""
    return any(frame.name == CELLS for frame in site["cond_indep_stack"])


def is_latent(site: Site) -> bool:
    """Whether a site is an unobserved random variable (not a plate's subsample)."""
    return bool(site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site))


def is_observed(site: Site) -> bool:
    """Whether a site is data: observed, and not a value recorded by ``deterministic``."""
    return site["type"] == "sample" and site["is_observed"] and not site["infer"].get("_deterministic")


def enumerates(site: Site) -> bool:
    """Whether a discrete latent is summed over rather than drawn."""
    return is_latent(site) and site["infer"].get("enumerate") is not None


def warms_up(site: Site) -> bool:
    """Whether KL warm-up applies: unobserved, local, and not opted out of; an enumerated site must opt in."""
    return bool(is_latent(site) and is_local(site) and site["infer"].get("warmup", not enumerates(site)))


class Warmup(Messenger):
    """Weigh the KL term of every local latent by ``weight``; to be put around model *and* guide.

    A site opts out with ``infer=NO_WARMUP``, in the model and in the guide (SCVI's library).
    An analytic KL takes the guide's scale and a sampled one takes both, hence both sides, always.

    Parameters
    ----------
    weight
        Factor in [0, 1]; a tensor of no dimensions is welcome, so that a schedule needs no host copy.
    """

    def __init__(self, weight: float | torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        warm = warms_up(msg)
        weighted = is_latent(msg) and is_local(msg) and "kl_weight" in msg["infer"]
        if warm or weighted:
            msg["infer"] = {**msg["infer"], "scale_before_warmup": msg["scale"]}
            weight = msg["infer"].get("kl_weight", 1.0) * (self.weight if warm else 1.0)
            msg["scale"] = msg["scale"] * weight


class AtMean(Messenger):
    """Put every latent of the guide that is not enumerated at its mean; to be put around guide and model."""

    def _pyro_sample(self, msg: Any) -> None:
        if is_latent(msg) and msg["value"] is None and not enumerates(msg):
            msg["value"] = msg["fn"].mean


class OnDevice(Messenger):
    """Move distributions that were written with plain numbers, or held since the model was made, to the model's device.

    Parameters
    ----------
    device
        Where the parameters of the model are.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            msg["fn"] = _moved(msg["fn"], self.device)


def _moved(distribution: Any, device: torch.device) -> Any:
    changed: dict[str, Any] = {}
    for name, value in vars(distribution).items():
        if isinstance(value, torch.Tensor) and value.device.type != device.type:
            changed[name] = _sent(value, device)
        elif isinstance(value, Distribution) and (moved := _moved(value, device)) is not value:
            changed[name] = moved
    if not changed:
        return distribution
    new = copy.copy(distribution)
    vars(new).update(changed)
    return new


def _sent(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the device; a plain number, however far it was expanded, is written there without any copy."""
    if value.numel() and value.untyped_storage().nbytes() <= value.element_size():
        number = value.flatten()[0].item()
        return torch.full((), number, dtype=value.dtype, device=device).expand(value.shape)
    return value.to(device)


class Record(Messenger):
    """Ask for values that a model only computes when somebody looks (see `lazy_deterministic`).

    Parameters
    ----------
    sites
        Names wanted; empty for all.
    """

    def __init__(self, sites: Iterable[str] = ()) -> None:
        super().__init__()
        self.sites = frozenset(sites)

    def wants(self, name: str) -> bool:
        """Whether a site is to be computed."""
        return not self.sites or name in self.sites


def lazy_deterministic(name: str, value: Callable[[], torch.Tensor], *, event_dim: int) -> None:
    """Name a quantity that queries can ask for, at no cost while training.

    Parameters
    ----------
    name
        Name of the site.
    value
        Called to compute the value, only under a `Record` that wants it.
    event_dim
        Number of trailing dimensions that belong to one cell's value; Pyro's default breaks plates.
    """
    if any(isinstance(effect, Record) and effect.wants(name) for effect in _PYRO_STACK):
        pyro.deterministic(name, value(), event_dim=event_dim)


class _Reached(Exception):
    """The last site asked for has its value."""


class Until(Messenger):
    """Stop the run as soon as every site asked for has a value: what comes after is never computed.

    Parameters
    ----------
    sites
        Names of the sites.
    """

    def __init__(self, sites: Iterable[str]) -> None:
        super().__init__()
        self.sites = frozenset(sites)
        self.missing = set(self.sites)

    def __enter__(self) -> Any:
        self.missing = set(self.sites)
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        self.missing.discard(msg["name"])
        if self.sites and not self.missing:
            raise _Reached


def run_until(fn: Callable[..., Any], sites: Iterable[str], *args: Any) -> None:
    """Run a program until it has passed every site asked for.

    Parameters
    ----------
    fn
        The program.
    sites
        Names of the sites; to the end of the program if there are none.
    *args
        Arguments of the program.
    """
    try:
        with Until(sites):
            fn(*args)
    except _Reached:
        pass
