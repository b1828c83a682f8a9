"""Training curves, latents, differences and predictive checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from pyrocell.errors import QueryError, list_some
from pyrocell.plotting.tables import _called, _groups, _named_alike, _one_comparison, _unit

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

    from pyrocell.infer.criticism import PredictiveCheck

__all__ = ["latent", "predictive_check", "training_curves", "volcano"]

# Colours that stay apart for colour-blind readers; the long list is for many categories.
_BLUE, _RED, _GREY = "#0072b2", "#d55e00", "#b5b5b5"
_FEW = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#000000")
_MISSING = "#dddddd"
# Rows of names above a volcano, and the width of a character as a share of the axis.
_LABEL_ROWS, _LABEL_CHARACTER = 5, 0.021
_HIGHEST = 16
"""Rates below 1e-16 are drawn alike."""


def training_curves(history: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the loss of every epoch, on the cells trained on and, where measured, on those held out.

    Parameters
    ----------
    history
        ``model.history``: one row per epoch, columns ``elbo_train`` and perhaps ``elbo_validation`` (nats per
        cell).
    ax
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        With one line per curve.

    Raises
    ------
    QueryError
        If the history has no epochs.
    """
    if not len(history) or "elbo_train" not in history:
        raise QueryError("there is no history to draw: train the model first, then give model.history.")
    ax = _axes(ax)
    ax.plot(history.index, history["elbo_train"], color=_BLUE, label="training cells")
    shown = [history["elbo_train"]]
    if "elbo_validation" in history and history["elbo_validation"].notna().any():
        held_out = history["elbo_validation"].dropna()
        marker = "o" if len(held_out) < 30 else None
        ax.plot(held_out.index, held_out, color=_RED, label="held-out cells", marker=marker, markersize=4)
        shown.append(held_out)
        ax.legend(frameon=False)
    _zoom_on_the_end(ax, shown)
    ax.set(xlabel="epoch", ylabel="negative ELBO, nats per cell", title="Training")
    return ax


def latent(
    adata: AnnData, *, basis: str = "X_umap", color: str | None = None, ax: Axes | None = None
) -> Axes:
    """Scatter cells over two dimensions of a representation, coloured by a column of ``obs`` or by a gene.

    Parameters
    ----------
    adata
        Data with the representation in ``obsm``.
    basis
        Key in ``obsm``, shape (n_cells, >= 2); the prefix ``X_`` may be left out.
    color
        Column of ``obs``, or name of a gene; ``None`` for one colour.
    ax
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        With a legend for categories, or a colour bar for numbers.

    Raises
    ------
    QueryError
        If the representation or the column does not exist.
    """
    key = basis if basis in adata.obsm else f"X_{basis}"
    if key not in adata.obsm:
        raise QueryError(
            f"there is no {basis!r} in adata.obsm; it has {list_some(adata.obsm.keys()) or 'nothing'}."
        )
    points = np.asarray(adata.obsm[key])[:, :2]
    ax = _axes(ax)
    size = float(np.clip(12_000 / max(len(points), 1), 0.5, 14))
    if color is None:
        ax.scatter(points[:, 0], points[:, 1], s=size, color=_BLUE, linewidths=0, rasterized=True)
    else:
        _scatter(ax, points, _values(adata, color), size)
    name = key.removeprefix("X_")
    name = name.upper() if name == "umap" else name
    ax.set(xlabel=f"{name} 1", ylabel=f"{name} 2", title=color or "Cells", xticks=[], yticks=[])
    return ax


def volcano(
    table: pd.DataFrame, *, group: str | None = None, n_labels: int = 12, ax: Axes | None = None
) -> Axes:
    """Draw the size of every feature's difference against the evidence for it.

    Parameters
    ----------
    table
        Result of ``differential_expression`` or ``differential_accessibility``, one row per feature, named by its
        index.
    group
        Which comparison to draw when the table holds several: a value of ``group1`` or ``comparison``.
    n_labels
        How many of the features called are named, the largest differences first.
    ax
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        With features called up in group 1 in red, and down in blue.

    Raises
    ------
    QueryError
        If the table holds several comparisons and ``group`` does not say which, or if it has no effect sizes.
    """
    rows = _one_comparison(_named_alike(table), group)
    effect = next((name for name in ("lfc_mean", "effect_mean") if name in rows), None)
    if effect is None or "proba_de" not in rows:
        raise QueryError(
            "a volcano plot needs the columns 'lfc_mean' and 'proba_de'; make the table with mode='population' or "
            "mode='change'."
        )
    rows = rows[rows[effect].notna()]  # what was not tested has no effect
    x, (y, y_name, y_ticks) = rows[effect].to_numpy(float), _evidence(rows)
    called = _called(rows)
    ax = _axes(ax)
    up, down = called & (x > 0), called & (x <= 0)
    first, second = _groups(rows)
    for chosen, color, label in (
        (~called, _GREY, "not called"),
        (up, _RED, f"higher in {first} ({up.sum()})"),
        (down, _BLUE, f"lower in {first} ({down.sum()})"),
    ):
        ax.scatter(
            x[chosen], y[chosen], s=10, color=color, linewidths=0, alpha=0.75, label=label, rasterized=True
        )
    limit = 1.15 * max(np.abs(x).max(initial=0), 0.1)
    ax.set_xlim(-limit, limit)
    top = y_ticks[-1]
    ax.set_ylim(-0.03 * top, 1.3 * top)
    ax.set_yticks(y_ticks)
    ax.set(xlabel=f"mean {_unit(rows, effect)}", ylabel=y_name, title=f"{first} against {second}")
    names = [str(name) for name in rows.index]
    _name_points(ax, x, y / top, names, np.flatnonzero(called), n_labels=n_labels, top=top)
    ax.legend(
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=3,
        fontsize="small",
        markerscale=2,
    )
    return ax


def predictive_check(
    check: PredictiveCheck,
    *,
    what: Literal["mean", "variance", "zero_fraction", "calibration"] = "variance",
    ax: Axes | None = None,
) -> Axes:
    """Draw what a model predicts against what was observed.

    Parameters
    ----------
    check
        Result of ``posterior_predictive_check``.
    what
        A statistic of every feature, or ``"calibration"`` for the histogram of the probability integral
        transform.
    ax
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        Features near the diagonal, or bars near 1, speak for the model.

    Raises
    ------
    QueryError
        If ``what`` is none of the four.
    """
    choices = ("mean", "variance", "zero_fraction", "calibration")
    if what not in choices:
        raise QueryError(f"what is {what!r}; expected one of {list_some(choices)}.")
    ax = _axes(ax)
    if what == "calibration":
        return _calibration(ax, check)
    observed, predicted = check.features[f"observed_{what}"], check.features[f"predicted_{what}"]
    bounds = check.features[[f"predicted_{what}_lower", f"predicted_{what}_upper"]].to_numpy().T
    logarithmic = what != "zero_fraction"
    # A logarithmic axis has no room for zero or less.
    shown = (observed > 0) & (predicted > 0) & (bounds[0] > 0) if logarithmic else observed.notna()
    x, y, bounds = observed[shown].to_numpy(), predicted[shown].to_numpy(), bounds[:, shown]
    errors = np.maximum([y - bounds[0], bounds[1] - y], 0)
    ax.errorbar(x, y, yerr=errors, fmt="none", ecolor=_BLUE, elinewidth=0.6, alpha=0.25)
    ax.scatter(x, y, s=7, color=_BLUE, linewidths=0, alpha=0.7, rasterized=True)
    if logarithmic:
        ax.set(xscale="log", yscale="log")
    both = np.concatenate([x, y]) if len(x) else np.array([0.1, 1.0])
    ax.plot([both.min(), both.max()], [both.min(), both.max()], color="black", linewidth=0.8, linestyle="--")
    name = what.replace("_", " ")
    ax.set(
        xlabel=f"observed {name}", ylabel=f"predicted {name}", title=f"{name.capitalize()} of each feature"
    )
    return ax


def _axes(ax: Axes | None) -> Axes:
    """Return the axes given, or those of a new figure, without the frame's upper and right line."""
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.subplots(figsize=(5, 4), layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _zoom_on_the_end(ax: Axes, curves: Sequence[pd.Series]) -> None:
    """Leave the first steep epochs out of sight, where they would flatten all that follows."""
    late = pd.concat([curve[curve.index >= 0.1 * curve.index.max()] for curve in curves]).to_numpy()
    late = late[np.isfinite(late)]
    if len(late) > 5:
        margin = 0.05 * max(np.ptp(late), 1e-9)
        ax.set_ylim(late.min() - margin, late.max() + margin)


def _values(adata: AnnData, color: str) -> pd.Series:
    if color in adata.obs:
        return adata.obs[color]
    if color in adata.var_names:
        column = adata[:, color].X
        dense = column.toarray() if hasattr(column, "toarray") else np.asarray(column)
        return pd.Series(dense.ravel())
    raise QueryError(
        f"{color!r} is neither a gene nor a column of adata.obs; those are {list_some(adata.obs)}."
    )


def _scatter(ax: Axes, points: np.ndarray, values: pd.Series, size: float) -> None:
    x, y = points.T
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        numbers = values.to_numpy(float)
        drawn = ax.scatter(x, y, c=numbers, s=size, cmap="viridis", linewidths=0, rasterized=True)
        ax.figure.colorbar(drawn, ax=ax, shrink=0.7)
        return
    # Categories keep the order that the user gave them.
    grouped = pd.Categorical(values)
    codes, names = np.asarray(grouped.codes), list(grouped.categories)
    colors = _palette(len(names))
    palette = np.array([*colors, _MISSING])
    # In random order, so that the category drawn last does not hide the others.
    order = np.random.default_rng(0).permutation(len(points))
    ax.scatter(x[order], y[order], c=palette[codes[order]], s=size, linewidths=0, rasterized=True)
    present = [i for i in range(len(names)) if (codes == i).any()]
    for i in present:
        ax.scatter([], [], s=30, color=colors[i], label=str(names[i]))
    if (codes == -1).any():
        ax.scatter([], [], s=30, color=_MISSING, label="missing")
    ax.legend(
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1, 1),
        fontsize="small",
        ncols=1 + (len(present) - 1) // 20,
        handletextpad=0.2,
        borderaxespad=0,
    )


def _palette(n: int) -> list[str]:
    if n <= len(_FEW):
        return list(_FEW[:n])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if n <= 20:
        return [to_hex(colormaps["tab10" if n <= 10 else "tab20"](i)) for i in range(n)]
    return [to_hex(colormaps["gist_rainbow"](i / n)) for i in range(n)]


def _evidence(rows: pd.DataFrame) -> tuple[np.ndarray, str, list[float]]:
    """Height of each point, what it is, and the ticks: a probability, or the log of a rate."""
    if "lfsr" not in rows:
        return rows["proba_de"].to_numpy(float), "probability of a difference", [0, 0.25, 0.5, 0.75, 1]
    height = -np.log10(np.maximum(rows["lfsr"].to_numpy(float), 10.0**-_HIGHEST))
    top = max(4.0, 4.0 * float(np.ceil(height.max(initial=0) / 4)))  # ticks are whole numbers
    return height, "-log10 of the local false sign rate", [0, top / 4, top / 2, 3 * top / 4, top]


def _name_points(
    ax: Axes,
    x: np.ndarray,
    y: np.ndarray,
    names: Sequence[str],
    chosen: np.ndarray,
    *,
    n_labels: int,
    top: float,
) -> None:
    """Name the largest effects on each side, spread over rows above the cloud with a thin line to each point."""
    order = chosen[np.argsort(-np.abs(x[chosen]), kind="stable")][:n_labels]
    low, high = ax.get_xlim()
    taken: list[list[tuple[float, float]]] = [[] for _ in range(_LABEL_ROWS)]
    for i in order:
        half = 0.5 * _LABEL_CHARACTER * (len(names[i]) + 1) * (high - low)
        centre = float(np.clip(x[i], low + half, high - half))
        start, end = centre - half, centre + half
        free = [row for row in range(_LABEL_ROWS) if all(end <= a or b <= start for a, b in taken[row])]
        if not free:  # no room in any row: better no name than one that cannot be read
            continue
        taken[free[0]].append((start, end))
        ax.annotate(
            names[i],
            (x[i], y[i] * top),
            xytext=(centre, (1.05 + 0.055 * free[0]) * top),
            fontsize="x-small",
            ha="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": _GREY, "shrinkA": 0, "shrinkB": 1},
        )


def _calibration(ax: Axes, check: PredictiveCheck) -> Axes:
    pit = check.pit
    width = (pit["upper"] - pit["lower"]).to_numpy()
    ax.bar(pit["lower"], pit["density"], width=width, align="edge", color=_BLUE, alpha=0.8, edgecolor="white")
    ax.axhline(1, color="black", linewidth=0.8, linestyle="--")
    share = check.summary["coverage_90"]
    ax.set(
        xlabel="probability integral transform",
        ylabel="density (calibrated: 1)",
        title=f"Calibration: 90 % intervals hold {share:.1%}",
        xlim=(0, 1),
    )
    return ax
