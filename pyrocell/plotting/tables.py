"""Reading tables of differences, whichever verb made them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from pyrocell.errors import QueryError, list_some

__all__ = []

_OTHER_NAMES = {"effect_size": "effect_mean", "prob_da": "proba_de", "proba_da": "proba_de"}
"""What accessibility and abundance call the columns of expression."""


def _named_alike(table: pd.DataFrame) -> pd.DataFrame:
    """Give a table of accessibility or abundance the names of one of expression."""
    names = _OTHER_NAMES | {
        str(name): str(name).replace("is_da", "is_de", 1) for name in table if str(name).startswith("is_da")
    }
    if not _is_log_ratio(table):
        names["emp_effect"] = "effect_raw"  # of shares of open cells, in the unit of the effect
    return table.rename(columns=names)


def _is_log_ratio(table: pd.DataFrame) -> bool:
    """Whether effects are ratios, which tables of accessibility do not say in the names of effects."""
    return "lfc_mean" in table or "effect_pseudobulk" in table or "pseudocounts" in table


def _unit(table: pd.DataFrame, effect: str) -> str:
    """Name what an effect is measured in."""
    return "log2 fold change" if effect == "lfc_mean" or _is_log_ratio(table) else "difference"


def _one_comparison(table: pd.DataFrame, group: str | None) -> pd.DataFrame:
    """Pick the rows of one comparison."""
    if group is not None:
        chosen = np.zeros(len(table), dtype=bool)
        for name in ("group1", "comparison"):
            if name in table:
                chosen |= (table[name].astype(str) == group).to_numpy()
        if not chosen.any():
            known = list(table["group1"].unique()) if "group1" in table else []
            raise QueryError(
                f"the table has no comparison of {group!r}; it has {list_some(known) or 'none'}."
            )
        table = table[chosen]
    if "comparison" in table and table["comparison"].nunique() > 1:
        raise QueryError(
            f"the table holds {table['comparison'].nunique()} comparisons: "
            f"{list_some(table['comparison'].unique())}; say which to draw with group=."
        )
    return table


def _groups(rows: pd.DataFrame) -> tuple[str, str]:
    if len(rows) and {"group1", "group2"} <= set(rows):
        return str(rows["group1"].iloc[0]), str(rows["group2"].iloc[0])
    return "group 1", "group 2"


def _called(rows: pd.DataFrame) -> np.ndarray:
    """Which features the table calls different, by its own decision column."""
    columns = [name for name in rows if str(name).startswith("is_de")]
    called = rows[columns[0]] if columns else rows["proba_de"] > 0.95
    return called.to_numpy(dtype=bool)
