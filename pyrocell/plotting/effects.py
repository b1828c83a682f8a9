"""Pictures of differences: effects with their intervals, and calls over many groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pyrocell.errors import QueryError, list_some
from pyrocell.plotting.figures import _BLUE, _GREY, _RED, _axes
from pyrocell.plotting.tables import _called, _groups, _named_alike, _one_comparison, _unit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

__all__ = ["calls", "effects"]


def effects(
    table: pd.DataFrame,
    features: Sequence[str] | None = None,
    *,
    group: str | None = None,
    n_features: int = 20,
    ax: Axes | None = None,
) -> Axes:
    """Draw the effect of some features with its credible interval, one row each.

    Parameters
    ----------
    table
        Result of ``differential_expression`` or ``differential_accessibility`` in mode ``"population"``, or in mode
        ``"change"`` with intervals.
    features
        Names of the features to draw; by default the surest of those called, or the surest of all.
    group
        Which comparison to draw when the table holds several: a value of ``group1`` or ``comparison``.
    n_features
        How many to draw where they are not named.
    ax
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        Ordered by effect, called features in colour; a hollow square is what the counts alone say, relative to
        the majority where the effects are.

    Raises
    ------
    QueryError
        If the table holds several comparisons and ``group`` does not say which, has no intervals, or lacks a feature.
    """
    rows = _one_comparison(_named_alike(table), group)
    prefix = "lfc" if "lfc_mean" in rows else "effect"
    ends = next(
        (
            pair
            for pair in ((f"{prefix}_low", f"{prefix}_high"), (f"{prefix}_hdi_low", f"{prefix}_hdi_high"))
            if set(pair) <= set(rows)
        ),
        None,
    )
    if ends is None:
        raise QueryError(
            "the table has no credible intervals; make it with mode='population', or with "
            "DifferentialOptions(credible_interval=0.9)."
        )
    rows = _chosen(rows, features, n_features, f"{prefix}_mean")
    mean, low, high = (rows[name].to_numpy(float) for name in (f"{prefix}_mean", *ends))
    called, place = _called(rows), np.arange(len(rows))
    ax = _axes(ax)
    ax.axvline(0, color="black", linewidth=0.8, linestyle="--")
    colors = np.where(called, np.where(mean > 0, _RED, _BLUE), _GREY)
    ax.hlines(place, low, high, color=colors, linewidth=1.6)
    ax.scatter(mean, place, s=22, color=colors, zorder=3)
    if f"{prefix}_raw" in rows:
        raw = rows[f"{prefix}_raw"]
        if f"{prefix}_offset" in rows:  # effects are relative to what most features have in common
            raw = raw - rows[f"{prefix}_offset"].fillna(0.0)
        ax.scatter(raw, place, s=16, marker="s", facecolors="none", edgecolors="black", linewidths=0.7)
    ax.set_yticks(place, [str(name) for name in rows.index], fontsize="small")
    first, second = _groups(rows)
    ax.set(xlabel=f"{_unit(rows, f'{prefix}_mean')}, with interval", title=f"{first} against {second}")
    return ax


def _chosen(rows: pd.DataFrame, features: Sequence[str] | None, n_features: int, effect: str) -> pd.DataFrame:
    """Pick the rows to draw, the smallest effect first."""
    if features is not None:
        missing = [name for name in features if name not in rows.index]
        if missing:
            raise QueryError(f"the table has no features {list_some(missing)}; expected names of its index.")
        rows = rows.loc[list(features)]
    else:
        rows = rows[rows[effect].notna()]
        called = rows[_called(rows)]
        rows = (called if len(called) else rows).head(n_features)
    return rows.sort_values(effect)


def calls(
    table: pd.DataFrame,
    features: Sequence[str] | None = None,
    *,
    n_each: int = 5,
    largest: float = 3.0,
    ax: Axes | None = None,
) -> Axes:
    """Draw a heat map of effects, features by comparisons, in which what was not called is left pale.

    Parameters
    ----------
    table
        Result of ``differential_expression`` or ``differential_accessibility`` with several comparisons.
    features
        Names of the features to draw; by default the ``n_each`` surest of those called up in each comparison.
    n_each
        How many of each comparison.
    largest
        Effect at which the colour is full.
    ax
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        One column for each comparison, a colour bar for the effect, and a dot where a feature was called.

    Raises
    ------
    QueryError
        If the table has no effects, or lacks a feature.
    """
    table = _named_alike(table)
    effect = next((name for name in ("lfc_mean", "effect_mean") if name in table), None)
    if effect is None:
        raise QueryError("a heat map of calls needs the column 'lfc_mean' or 'effect_mean'.")
    called = pd.Series(_called(table), index=table.index)
    if features is None:
        up = table[(called & (table[effect] > 0)).to_numpy()]
        best = up.groupby("comparison", sort=False).head(n_each)
        features = list(dict.fromkeys(best.index)) or list(dict.fromkeys(table.index))[:n_each]
    missing = [name for name in features if name not in table.index]
    if missing:
        raise QueryError(f"the table has no features {list_some(missing)}; expected names of its index.")
    columns = list(dict.fromkeys(table["comparison"]))
    sizes, found = (
        pd.DataFrame({"feature": table.index, "comparison": table["comparison"].to_numpy(), "value": values})
        .drop_duplicates(["feature", "comparison"])
        .pivot(index="feature", columns="comparison", values="value")
        .loc[list(features), columns]
        for values in (table[effect].to_numpy(float), called.to_numpy(float))
    )
    return _heat_map(_axes(ax), sizes, found.to_numpy() > 0, largest, _unit(table, effect))


def _heat_map(ax: Axes, sizes: pd.DataFrame, called: np.ndarray, largest: float, unit: str) -> Axes:
    values = np.nan_to_num(sizes.to_numpy(float))
    shown = ax.imshow(
        values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", alpha=np.where(called, 1.0, 0.25)
    )
    rows, columns = np.nonzero(called)
    ax.scatter(columns, rows, s=4, color="black", linewidths=0)
    # "B cell vs rest" in each column is "B cell" with the rest said once
    names = [str(name).removesuffix(" vs rest") for name in sizes.columns]
    ax.set_xticks(np.arange(len(names)), names, rotation=45, ha="right", fontsize="small")
    ax.set_yticks(np.arange(len(sizes)), [str(name) for name in sizes.index], fontsize="x-small")
    ax.figure.colorbar(shown, ax=ax, shrink=0.7, label=unit)
    ax.set_title("Effects; a dot where called")
    return ax
