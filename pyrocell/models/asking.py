"""One question to a fitted model: which cells, which features, under which circumstances, in which blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from pyrocell.data import Cells
from pyrocell.data.filling import Filled, FilledTable, Filling, Out
from pyrocell.data.sinks import Asked
from pyrocell.errors import QueryError
from pyrocell.infer.draws import SiteDraws
from pyrocell.models.chosen import chosen_cells, chosen_features
from pyrocell.models.given import circumstances_of
from pyrocell.nn import FeatureLinear, select_features

if TYPE_CHECKING:
    from anndata import AnnData

    from pyrocell.models.core import ModelCore

__all__ = ["Finish", "Question"]

# A block of draws of this many numbers stays in the processor's cache; larger ones are slower, not faster.
_BLOCK_NUMBERS = 2**21
_SMALLEST_BLOCK = 16

Extract = Callable[[SiteDraws], torch.Tensor]
Trace = Mapping[str, SiteDraws]
Finish = Callable[[np.ndarray, Cells], np.ndarray]


class Question:
    """Cells, features and circumstances of one query, checked before any work, and the loop over blocks.

    Parameters
    ----------
    model
        The model asked.
    adata, indices, batch_size
        Cells: data, positions or mask, and block size.
    given
        Fields to set in the model; lists are averaged over.
    features
        Names of the features wanted; None for all.
    field
        Field that the features belong to; by default the first one that the model observes.
    """

    def __init__(
        self,
        model: ModelCore,
        adata: AnnData | None,
        indices: Sequence[int] | np.ndarray | None,
        *,
        given: Mapping[str, Any] | None = None,
        features: Sequence[str] | None = None,
        field: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        model.require_trained()
        self.model = model
        self.dataset = model.require_data(adata)
        self.rows = chosen_cells(indices, self.dataset.n_cells)
        if len(self.rows) == 0:
            raise QueryError("No cells were asked for; give at least one index.")
        if batch_size is not None and batch_size < 1:
            raise QueryError(f"batch_size is {batch_size}; expected at least 1, or None.")
        self.circumstances = list(circumstances_of(model, given or {}))
        self.batch_size = batch_size
        self.over(field or model.feature_field, features)

    def over(self, field: str, features: Sequence[str] | None = None) -> Question:
        """Turn to the features of a field, or some of them by name; returns the question itself."""
        names = self.model.data.names(field)
        self.field = field
        others = {other: self.model.data.names(other) for other in self.model.observed_sites.values()}
        self.features = None if features is None else chosen_features(features, names, others)
        self.feature_names = list(names) if features is None else list(features)
        self.n_features = len(names)
        return self

    @property
    def _n_wide(self) -> int:
        """Features of all kinds: the same blocks, hence the same draws, whichever kind is asked for."""
        fields = {*self.model.observed_sites.values(), self.field}
        return max(1, sum(self.model.data.size(field) for field in fields))

    def about(self, rows: np.ndarray, given: Mapping[str, Any] | None = None) -> Question:
        """Return the same question about other cells, under other circumstances."""
        other = copy(self)
        other.rows = rows
        other.circumstances = list(circumstances_of(self.model, given or {}))
        return other

    def block_size(self, n_samples: int) -> int:
        """Return the number of cells to work on at once."""
        return self.batch_size or max(_SMALLEST_BLOCK, _BLOCK_NUMBERS // (n_samples * self._n_wide))

    def blocks(self, size: int | None = None) -> Iterator[tuple[slice, Cells]]:
        """Yield the cells in blocks, each with its place in the result."""
        size = size or self.block_size(1)
        start, device = 0, self.model.device
        for cells in self.dataset.minibatches(self.rows, size, device=device, n_total=self.dataset.n_cells):
            yield slice(start, start + len(cells)), cells
            start += len(cells)

    def traces(
        self, sites: Sequence[str], n_samples: int
    ) -> Iterator[tuple[slice, slice, Cells, list[dict[str, SiteDraws]]]]:
        """Yield draws of the sites by blocks of cells and of draws; one trace for each circumstance."""
        if n_samples < 1:
            raise QueryError(f"n_samples is {n_samples}; expected at least 1.")
        drawer, decoding = self.model.drawer(), self._decoding(sites)
        n_at_once = max(1, min(n_samples, _BLOCK_NUMBERS // (_SMALLEST_BLOCK * self._n_wide)))
        for place, cells in self.blocks(self.block_size(n_at_once)):
            versions = [given(cells) for given in self.circumstances]
            for start in range(0, n_samples, n_at_once):
                n = min(n_at_once, n_samples - start)
                traces = drawer.block(cells, sites, n_samples=n, counterfactuals=versions, decoding=decoding)
                yield place, slice(start, start + n), cells, traces

    def _restricts(self, sites: Sequence[str]) -> bool:
        """Whether the decoder computes only the features asked for.

        Only the profile is known to be restricted as a whole; other sites may mix it with parameters of all features.
        """
        over: dict[str | None, str] = {self.model.accessibility_site: self.model.accessibility_field}
        over.update(self.model.expression_sites)
        if self.features is None or self.field not in map(over.get, sites):
            return False
        parts = self.model.module.modules()
        return any(isinstance(part, FeatureLinear) and part.field == self.field for part in parts)

    def _decoding(self, sites: Sequence[str]) -> Callable[[], AbstractContextManager[Any]]:
        only = self.features if self._restricts(sites) else None
        return lambda: select_features(self.model.module, only, self.field)

    def draws(self, sites: Sequence[str], n_samples: int) -> Iterator[tuple[Cells, dict[str, SiteDraws]]]:
        """Yield all joint draws of some sites, a block of cells at a time, under the only circumstance."""
        drawer = self.model.drawer()
        self.require_one_circumstance()
        for _, cells in self.blocks(self.block_size(n_samples)):
            versions = [self.circumstances[0](cells)]
            yield cells, drawer.block(cells, sites, n_samples=n_samples, counterfactuals=versions)[0]

    def require_one_circumstance(self) -> None:
        """Refuse an average over circumstances where one value of each field is meant."""
        if len(self.circumstances) > 1:
            raise QueryError("Several values were given where one is meant; ask for each value in turn.")

    def array(
        self,
        site: str,
        extract: Extract,
        *,
        n_samples: int,
        return_mean: bool,
        scale: Callable[[Cells, Trace], torch.Tensor] | None = None,
        beside: Sequence[str] = (),
        finish: Finish | None = None,
        out: Out = None,
    ) -> Filled:
        """Collect one site of all cells.

        Parameters
        ----------
        site
            Name of the site.
        extract
            Takes the value wanted out of the draws of a block.
        n_samples, return_mean
            Number of draws, and whether to average over them.
        scale
            Number to multiply each cell by, from its data and the other sites.
        beside
            Other sites that ``scale`` needs.
        finish
            What is done, in place or not, to the values of a block of cells in the end.
        out
            Where the values go; by default into a new array.

        Returns
        -------
        ndarray or what was given as ``out``
            ``(n_cells, ...)``, or ``(n_samples, n_cells, ...)`` where more than one draw is kept.
        """
        averaged = return_mean or n_samples == 1
        with self.filling(out, None if averaged else n_samples) as filling:
            total: np.ndarray | None = None
            for place, which, cells, traces in self.traces([site, *beside], n_samples):
                values = [extract(trace[site]) for trace in traces]
                if scale is not None:
                    factors = [scale(cells, trace) for trace in traces]
                    values = [value * factor for value, factor in zip(values, factors, strict=True)]
                value = self._wanted(torch.stack(values).mean(0) if len(values) > 1 else values[0], site)
                local = traces[0][site].local
                if not local and place.start > 0:
                    break  # one value for all cells: the first block of them has told it
                found = (value.sum(0) / n_samples if averaged else value).float().cpu().numpy()
                if averaged:
                    # Added up here: reading a sink back may be slow, and each block is written once.
                    found = total = found if total is None else total + found
                    if which.stop < n_samples:
                        continue
                    total = None
                found = found if finish is None else finish(found, cells)
                filling.add(found, place if local else None, None if averaged else which)
            return filling.kept()

    def values(
        self,
        site: str,
        n_samples: int = 1,
        *,
        return_mean: bool = True,
        finish: Finish | None = None,
        out: Out = None,
    ) -> Filled:
        """Collect the values of a site as they are; see `array`."""
        options: dict[str, Any] = {"return_mean": return_mean, "finish": finish, "out": out}
        return self.array(site, lambda draws: draws.value, n_samples=n_samples, **options)

    def filling(self, out: Out, n_draws: int | None = None) -> Filling:
        """Check where an answer is to go, and return what takes it there."""
        inputs = {value for value in self.dataset.schema.setup.values() if isinstance(value, str)}
        data, own = self.dataset, self.model.dataset
        asked = Asked(
            data.adata, self.rows, data.n_cells, self.feature_names, n_draws, inputs, own and own.adata
        )
        return Filling(out, asked)

    def arrays(
        self, site: str, extract: Callable[[SiteDraws], dict[str, torch.Tensor]], *, n_samples: int
    ) -> dict[str, np.ndarray]:
        """Collect several tensors of one site, averaged over draws; see `array`."""
        results: dict[str, np.ndarray] = {}
        for place, _, _, traces in self.traces([site], n_samples):
            for name, value in extract(traces[0][site]).items():
                value = self._wanted(value, site)
                out = results.setdefault(name, np.zeros((len(self.rows), *value.shape[2:]), dtype=np.float32))
                out[place] += (value.sum(0) / n_samples).cpu().numpy()
        return results

    def _wanted(self, value: torch.Tensor, site: str) -> torch.Tensor:
        """Keep the features asked for, unless only these were computed."""
        if self.features is None or self._restricts([site]):
            return value
        if value.shape[-1] != self.n_features:
            raise QueryError(
                f"Site {site!r} has no features to choose from: its last dimension is {value.shape[-1]}."
            )
        return value[..., self.features]

    def gaussians(self, site: str) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor] | None]:
        """Yield mean and variance of a Gaussian posterior by blocks, or None where the guide has no closed form."""
        drawer = self.model.drawer()
        for place, cells in self.blocks():
            fn = drawer.guide_latents(cells).get(site)
            if fn is None or not fn.has_rsample or not bool((fn.variance > 0).any()):
                yield None  # a transform of a latent, or a point
                return
            yield place, fn.mean.cpu(), fn.variance.cpu()

    def latent_moments(self, site: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Return mean and variance of a Gaussian posterior, or None where the guide has no closed form."""
        blocks = list(self.gaussians(site))
        moments = [block[1:] for block in blocks if block is not None]
        if len(moments) < len(blocks):
            return None
        mean, variance = (torch.cat(parts).numpy() for parts in zip(*moments, strict=True))
        return mean, variance

    def latent_mean(self, site: str, out: Out = None) -> Filled | None:
        """Collect the mean of a Gaussian posterior as `array` does, or return None where there is no closed form."""
        with self.filling(out) as filling:
            for block in self.gaussians(site):
                if block is None:
                    return None
                filling.add(block[1].float().numpy(), block[0])
            return filling.kept()

    def answer(self, values: Any, out: Out, *, return_numpy: bool = False) -> FilledTable:
        """Return what a verb gives back: what it wrote to, an array, or by default a table."""
        return values if out is not None or return_numpy or values.ndim == 3 else self.table(values)

    def table(self, values: np.ndarray) -> pd.DataFrame:
        """Give an array of cells by features its names."""
        return pd.DataFrame(
            values, index=self.dataset.obs_names[self.rows], columns=self.feature_names, copy=False
        )
