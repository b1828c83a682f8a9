"""What an epoch adds up: on the device, so that the host waits for it once, when the epoch ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pyrocell.errors import TrainingError, list_some
from pyrocell.infer.elbo import ElboTerms

__all__ = ["Epoch", "Tally"]

_BOUND = ("reconstruction", "kl_local", "kl_global")


@dataclass(frozen=True)
class Epoch:
    """What was added up.

    Attributes
    ----------
    means
        Mean over cells of each term, by name.
    skipped
        Number of steps that were skipped.
    skipped_on_device
        Number of those that the host did not see.
    in_a_row, longest
        Steps that were skipped on the device in a row: at the end, and at most.
    culprit
        What was not finite in them.
    """

    means: dict[str, float]
    skipped: int
    skipped_on_device: int
    in_a_row: int
    longest: int
    culprit: str


class Tally:
    """Sums over the cells of an epoch, and steps that were skipped.

    Parameters
    ----------
    device
        Where the steps are taken.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: list[str] = list(_BOUND)
        self.sites: list[str] = []
        self._allocate()
        self.n_cells = self.skipped = 0

    def _allocate(self) -> None:
        self.sums = torch.zeros(len(self.names), device=self.device)
        # Of steps that the host does not see: cells, skipped ones, skipped ones in a row now and at most.
        self.counters = torch.zeros(4, dtype=torch.int64, device=self.device)
        self.broken = torch.zeros(len(self.sites), dtype=torch.int64, device=self.device)

    def begin(self) -> None:
        """Start an epoch; a row of skipped steps goes on."""
        self.n_cells = self.skipped = 0
        self.sums.zero_()
        self.broken.zero_()
        self.counters[:2] = 0
        self.counters[3] = self.counters[2]

    def add(self, terms: ElboTerms) -> None:
        """Count a step that was taken.

        Parameters
        ----------
        terms
            The bound that was evaluated.
        """
        if not self.sites:  # the first step tells
            self.names, self.sites = [*_BOUND, *terms.extra], list(terms.sites)
            self._allocate()
        if set(terms.extra) != set(self.names[len(_BOUND) :]):
            raise TrainingError(
                f"extra_terms gave {list_some(terms.extra) or 'nothing'} in this step, and "
                f"{list_some(self.names[len(_BOUND) :]) or 'nothing'} in the first; give the same names in every step."
            )
        self.sums += terms.totals(self.names[len(_BOUND) :])
        self.n_cells += len(terms.reconstruction)

    def skip(self) -> None:
        """Count a step that was skipped."""
        self.skipped += 1

    def add_on_device(self, terms: ElboTerms, finite: torch.Tensor) -> None:
        """Count a step, taken or not, in place and without the host; a step must have been counted by `add` before.

        Parameters
        ----------
        terms
            The bound that was evaluated.
        finite
            Whether the step was taken.
        """
        taken = finite.long()
        self.sums += torch.where(
            finite, terms.totals(self.names[len(_BOUND) :]), 0.0
        )  # a product with zero would keep what is no number
        n_cells, skipped, in_a_row, longest = self.counters.unbind()
        n_cells += taken * len(terms.reconstruction)
        skipped += 1 - taken
        in_a_row.add_(1).mul_(1 - taken)
        longest.copy_(torch.maximum(longest, in_a_row))
        self.broken += torch.stack([~term.detach().isfinite() for term in terms.sites.values()])

    def to_json(self) -> dict[str, Any]:
        """Return what was added up so far as JSON values, which keep every digit."""
        counts = {"n_cells": self.n_cells, "skipped": self.skipped}
        parts = {name: getattr(self, name).tolist() for name in ("sums", "counters", "broken")}
        return {"names": self.names, "sites": self.sites, **counts, **parts}

    def resume(self, record: dict[str, Any]) -> None:
        """Go on adding where `to_json` was called.

        Parameters
        ----------
        record
            What it returned.
        """
        self.names, self.sites = list(record["names"]), list(record["sites"])
        self._allocate()
        self.n_cells, self.skipped = int(record["n_cells"]), int(record["skipped"])
        for name in ("sums", "counters", "broken"):
            values = getattr(self, name)
            values.copy_(torch.tensor(record[name], dtype=values.dtype))

    def read(self) -> Epoch:
        """Return what was added up; waits for the device."""
        n_cells, skipped, in_a_row, longest = self.counters.tolist()
        # Without a step that was taken 0 / 0, not 0: that would look like a perfect fit.
        means = (self.sums / (self.n_cells + n_cells)).tolist()
        broken = [name for name, n in zip(self.sites, self.broken.tolist(), strict=True) if n]
        culprit = f"terms of sites {list_some(broken)}" if broken else "gradients"
        skipped_in_all = self.skipped + skipped
        named = dict(zip(self.names, means, strict=True))
        return Epoch(named, skipped_in_all, skipped, in_a_row, longest, culprit)
