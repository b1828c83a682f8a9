"""Spots of a tissue as a table: the genes that they share with single cells, and how dense they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pyrocell.data.preflight import check_names
from pyrocell.errors import DataError, SetupError, list_some

__all__ = ["FEWEST_GENES", "Density", "shared_genes", "spot_density", "spot_values"]

Density = str | Sequence[float] | np.ndarray | pd.Series

FEWEST_GENES = 10
_TOLERANCE = 1e-3


def shared_genes(spots: object, measured: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """Return the genes that single cells and spots have in common, in the order of the single cells.

    Parameters
    ----------
    spots
        Spots in rows, genes in columns, with names.
    measured
        Genes of the single cells.
    wanted
        The genes to choose from; by default all.

    Raises
    ------
    SetupError
        If the spots are no table.
    DataError
        If names repeat, a wanted gene is not there, or too few are shared; the number is named.
    """
    if not isinstance(spots, pd.DataFrame):
        hint = ": give spots.to_df() of it" if hasattr(spots, "to_df") else ""
        raise SetupError(
            f"spatial is a {type(spots).__name__}; expected a DataFrame with spots in rows and genes in columns{hint}."
        )
    check_names(spots.index, "spot", "rename the rows of spatial.")
    check_names(spots.columns, "gene", "rename or sum the columns of spatial.")
    there = {str(name) for name in spots.columns}
    if wanted is not None:
        wanted = [wanted] if isinstance(wanted, str) else [str(name) for name in wanted]
        for side, names in (("single cells", set(measured)), ("spots", there)):
            if missing := [name for name in wanted if name not in names]:
                raise DataError(
                    f"{len(missing)} of the {len(wanted)} genes are not among those of the {side}: "
                    f"{list_some(missing)}. Leave them out of genes=."
                )
    shared = [name for name in measured if name in there and (wanted is None or name in set(wanted))]
    if len(shared) < FEWEST_GENES:
        raise DataError(_too_few(len(shared), measured, there, chosen=wanted is not None))
    return shared


def _too_few(n_shared: int, measured: Sequence[str], there: set[str], *, chosen: bool) -> str:
    whose = "chosen genes are shared by" if chosen else "genes are shared by"
    lower = {name.lower() for name in there}
    alike = sum(name.lower() in lower for name in measured)
    hint = f" Without regard to case {alike} would be: write them alike." if alike > n_shared else ""
    return (
        f"{n_shared} {whose} the single cells ({len(measured)} genes, such as {list_some(measured, 3)}) and the spots "
        f"({len(there)} genes, such as {list_some(sorted(there), 3)}); expected at least {FEWEST_GENES}, better 100 "
        f"and more.{hint} Give both the same kind of gene names (symbols or Ensembl)."
    )


def spot_values(spots: pd.DataFrame, genes: Sequence[str]) -> np.ndarray:
    """Return the values of some genes in the spots, float32, shape (n_spots, n_genes).

    Parameters
    ----------
    spots
        Spots in rows, genes in columns, with names.
    genes
        Names of the genes.

    Raises
    ------
    DataError
        If values are missing, infinite, negative or no numbers, or if a spot has none above zero; it names them.
    """
    table = spots.set_axis(spots.columns.astype(str), axis=1)[list(genes)]
    try:
        values: np.ndarray = table.to_numpy(dtype=np.float32, copy=True)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"spatial holds values that are no numbers ({error}); expected counts of genes."
        ) from error
    for what, wrong in (("NaN or infinite", ~np.isfinite(values)), ("negative", values < 0)):
        if wrong.any():
            rows, cols = np.nonzero(wrong)
            row, col = rows[0], cols[0]
            raise DataError(
                f"spatial has {len(rows)} values that are {what}, the first in spot {spots.index[int(row)]!r} and gene "
                f"{genes[int(col)]!r}. Give raw counts, or normalised values of at least 0."
            )
    empty = values.sum(1) <= 0
    if empty.any():
        raise DataError(
            f"{empty.sum()} spots have no counts over the {len(genes)} genes in use: {list_some(spots.index[empty])}. "
            "Remove them from spatial: nothing can be mapped onto them."
        )
    return values


def spot_density(density: Density, spots: pd.DataFrame) -> np.ndarray:
    """Return the share of the cells that is expected in each spot, float32, shape (n_spots,).

    Parameters
    ----------
    density
        ``"rna_count_based"``, ``"uniform"``, or a share for each spot: a Series with the names of the spots, or numbers
        in their order.
    spots
        Spots in rows, all their genes in columns, with names.

    Raises
    ------
    SetupError
        If it is none of these.
    DataError
        If there is not one share for each spot, if shares are negative or missing, or do not sum to one.
    """
    names, n_spots = spots.index, len(spots)
    if isinstance(density, str):
        if density not in ("rna_count_based", "uniform"):
            raise SetupError(
                f"density is {density!r}; expected 'rna_count_based', 'uniform', None, or a share for each spot."
            )
        everything = [str(name) for name in spots.columns]
        totals = np.ones(n_spots) if density == "uniform" else spot_values(spots, everything).sum(1)
        density = totals / totals.sum()
    if isinstance(density, pd.Series):
        if missing := [name for name in names if name not in density.index]:
            raise DataError(f"density lacks the spots {list_some(missing)}; give a share for each spot.")
        density = density.loc[names]
    shares = np.asarray(density, dtype=np.float64)
    if shares.shape != (n_spots,):
        raise DataError(f"density has shape {shares.shape}; expected one share for each of {n_spots} spots.")
    wrong = ~(np.isfinite(shares) & (shares >= 0))
    if wrong.any():
        raise DataError(f"density is negative or missing for the spots {list_some(names[wrong])}.")
    if abs(shares.sum() - 1) > _TOLERANCE:
        raise DataError(
            f"density sums to {shares.sum():g}; expected shares that sum to 1. Divide it by its sum: density / "
            "density.sum()."
        )
    return shares.astype(np.float32)
