"""Pictures of a diagnosis: all checks at a glance, or what is behind one of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from pyrocell.errors import QueryError, list_some
from pyrocell.plotting.figures import _BLUE, _GREY, _RED, _axes, training_curves

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from pyrocell.infer.diagnosis import Diagnosis

__all__ = ["diagnosis"]

_LONGEST = 2.0
"""Values of twice the limit and more are drawn alike."""
_N_FEATURES = 10


def diagnosis(
    found: Diagnosis,
    *,
    what: Literal["checks", "convergence", "dimensions", "features"] = "checks",
    ax: Axes | None = None,
) -> Axes:
    """Draw what ``model.diagnose()`` found.

    Parameters
    ----------
    found
        Its result.
    what
        All checks beside their limits, or what is behind some of them: the loss by epoch, what each dimension of the
        latent holds, the ten features that are predicted worst.
    ax
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
        With what is worth a look in red.

    Raises
    ------
    QueryError
        If ``what`` is none of the four, or the model has no such thing.
    """
    choices = {
        "checks": _checks,
        "convergence": lambda ax, found: training_curves(found.history.to_frame("elbo_train"), ax=ax),
        "dimensions": _dimensions,
        "features": _features,
    }
    if what not in choices:
        raise QueryError(f"what is {what!r}; expected one of {list_some(choices)}.")
    if what in ("dimensions", "features") and getattr(found, what) is None:
        kind = {"dimensions": "latent", "features": "likelihood"}[what]
        raise QueryError(f"there are no {what} to draw: the model has no {kind}. Draw 'checks'.")
    return choices[what](_axes(ax), found)


def _checks(ax: Axes, found: Diagnosis) -> Axes:
    """Bars from 0 to each value as a share of its limit."""
    table = found.table.iloc[::-1]
    share = (table["value"] / table["limit"]).to_numpy(float)
    flagged = table["is_flagged"].to_numpy(bool)
    unknown = np.isnan(share)
    places = np.arange(len(table))
    shown = np.where(unknown, _LONGEST, np.clip(share, 0.01, _LONGEST))
    colors = np.where(flagged, _RED, _BLUE)
    ax.barh(places[~unknown], shown[~unknown], color=colors[~unknown], height=0.6)
    edges = np.where(flagged, _RED, _GREY)
    ax.barh(
        places[unknown], shown[unknown], color="none", edgecolor=edges[unknown], height=0.6, linestyle="--"
    )
    for place, value, empty in zip(places, table["value"], unknown, strict=True):
        text = "cannot be told" if empty else f"{value:.2g}"
        ax.text(_LONGEST * 1.02, float(place), text, va="center", fontsize="small")
    ax.axvline(1, color="black", linewidth=0.8, linestyle="--")
    ax.set(xlim=(0, _LONGEST), xticks=[0, 1, 2], xticklabels=["0", "limit", "twice"])
    ax.set_yticks(places, [str(name) for name in table.index])
    ax.set_title(f"{flagged.sum()} of {len(table)} checks are worth a look")
    return ax


def _dimensions(ax: Axes, found: Diagnosis) -> Axes:
    assert found.dimensions is not None  # the caller has looked
    table: pd.DataFrame = found.dimensions.sort_values("explained", ascending=False, kind="stable")
    dead = table["is_dead"].to_numpy(bool)
    places = np.arange(len(table))
    for chosen, color, label in ((~dead, _BLUE, "in use"), (dead, _RED, "dead")):
        if chosen.any():
            ax.bar(places[chosen], table["explained"].to_numpy()[chosen], color=color, label=label)
    # A dead dimension has no height of its own to be seen by.
    ax.plot(places[dead], np.full(dead.sum(), 0.01), "v", color=_RED, markersize=4)
    if len(table) <= 30:
        ax.set_xticks(places, [str(i) for i in table.index])
    ax.set(xlabel="dimension", ylabel="share of variance between cells", ylim=(0, 1))
    unknown = table["explained"].isna().all()
    title = f"{(~dead).sum()} of {len(table)} dimensions of the latent are in use"
    ax.set_title("too few cells to tell" if unknown else title)
    ax.legend(frameon=False, fontsize="small")
    return ax


def _features(ax: Axes, found: Diagnosis) -> Axes:
    assert found.features is not None  # the caller has looked
    table = found.features.iloc[:_N_FEATURES].iloc[::-1]
    colors = np.where(table["is_misfit"], _RED, _BLUE)
    ax.barh(np.arange(len(table)), table["ks_pit"], color=colors, height=0.6)
    ax.set_yticks(np.arange(len(table)), [str(name) for name in table.index])
    ax.set(xlabel="distance of predicted from observed", title="Features predicted worst")
    ax.set_xlim(0, max(0.5, float(table["ks_pit"].max()) * 1.05))
    return ax
