"""Every verb of a model as a question, and answers compared to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from pyrocell.models.roles import capabilities
from pyrocell.testing.asking import has_gaussian_posterior

if TYPE_CHECKING:
    from pyrocell.models.base import CellModel

__all__ = ["difference", "is_answer", "questions"]

# What has a check of its own, or changes the model; class methods make one.
_NO_QUESTIONS = {"setup_anndata", "setup_mudata", "train", "save"}
_GAUSSIAN_ONLY = {"differential_abundance"}


def questions(
    model: CellModel, given: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Callable[[], Any]]:
    """Return every verb of a model that answers, ready to be called.

    Parameters
    ----------
    model
        Trained, with data.
    given
        For a verb, by its name, the arguments without which it cannot be called.
    """
    obs = model.require_data(None).obs
    groups = next((key for key in obs if 1 < obs[key].astype(str).nunique() < 20), None)
    arguments: dict[str, Mapping[str, Any]] = {
        "posterior": {"site": model.observed_site, "n_samples": 2},
        "differential_expression": {"groupby": groups},
        "differential_accessibility": {"groupby": groups},
        "differential_abundance": {"sample_key": groups},
        "get_feature_correlation_matrix": {"n_samples": 2},
        "get_marginal_ll": {"n_samples": 3},
        "posterior_predictive_check": {"n_samples": 3},
        "get_tf_activity": {"motifs": {"one": "TGACTCA"}, "n_background": 4},
        "get_mutation_effects": {"region": str(model.require_data(None).obs_names[0])},
    }
    found: dict[str, Callable[[], Any]] = {}
    for verb, having in capabilities([type(model)]).items():
        makes_a_model = getattr(getattr(model, verb, None), "__self__", None) is type(model)
        if not having[type(model).__name__] or verb in _NO_QUESTIONS or makes_a_model:
            continue
        options = {**arguments, **(given or {})}.get(verb, {})
        if None in options.values():
            continue  # the data have no groups
        if verb in _GAUSSIAN_ONLY and not has_gaussian_posterior(model):
            continue
        found[verb] = lambda verb=verb, options=options: getattr(model, verb)(**options)  # type: ignore[misc]
    return found


def is_answer(answer: Any) -> bool:
    """Whether there is something, and its numbers are finite.

    Tables may lack some, such as a test of a gene without counts: no infinities, as many numbers as are missing at
    least, and some in each column of more than one row.
    """
    if isinstance(answer, tuple | list | dict):
        parts = answer.values() if isinstance(answer, dict) else answer
        return all(map(is_answer, parts))
    if hasattr(answer, "summary"):  # a PredictiveCheck
        return is_answer(np.asarray(answer.summary))
    if hasattr(answer, "table"):  # a record around a table
        return is_answer(answer.table)
    if isinstance(answer, pd.DataFrame):
        numbers = np.asarray(answer.select_dtypes("number"), dtype=float)
        if answer.empty or numbers.size == 0:
            return not answer.empty
        finite = np.isfinite(numbers)
        full = len(answer) == 1 or finite.any(axis=0).all()
        return bool(full and finite.mean() >= 0.5 and not np.isinf(numbers).any())
    if isinstance(answer, pd.Series):
        return not answer.empty and not answer.isna().any()
    values = np.asarray(answer)
    return values.size > 0 and (values.dtype.kind not in "fc" or bool(np.isfinite(values).all()))


def difference(one: Any, two: Any, name: str = "") -> str | None:
    """Say where two things differ: None if they are equal to the last bit; what is no number equals itself.

    Parameters
    ----------
    one, two
        Arrays, tables, tensors, matrices, records, or collections of such.
    name
        What they are.
    """
    if type(one) is not type(two):
        return f"{name}: {type(one).__name__} and {type(two).__name__}"
    if isinstance(one, pd.DataFrame | pd.Series | pd.Index):
        return None if _same_table(one, two) else f"{name}: other values"
    if sparse.issparse(one):
        return None if _same_matrix(one, two) else f"{name}: other values"
    if isinstance(one, np.ndarray | torch.Tensor):
        return None if _same_array(np.asarray(one), np.asarray(two)) else f"{name}: other values"
    if not isinstance(one, str | bytes | Mapping | list | tuple) and hasattr(one, "__dict__"):
        one, two = vars(one), vars(two)
    if isinstance(one, Mapping):
        if list(one) != list(two):
            return f"{name}: {list(one)} and {list(two)}"
        return _first(difference(one[key], two[key], f"{name}[{key!r}]") for key in one)
    if isinstance(one, list | tuple):
        if len(one) != len(two):
            return f"{name}: {len(one)} and {len(two)} entries"
        return _first(difference(*pair, f"{name}[{i}]") for i, pair in enumerate(zip(one, two, strict=True)))
    same = one == two or (one != one and two != two)
    return None if same else f"{name}: {one!r} and {two!r}"


def _first(found: Any) -> str | None:
    return next((one for one in found if one is not None), None)


def _same_array(one: np.ndarray, two: np.ndarray) -> bool:
    return one.dtype == two.dtype and np.array_equal(one, two, equal_nan=one.dtype.kind in "fc")


def _same_matrix(one: Any, two: Any) -> bool:
    return bool(one.shape == two.shape and one.dtype == two.dtype and (one != two).nnz == 0)


def _same_table(one: Any, two: Any) -> bool:
    try:
        if isinstance(one, pd.DataFrame):
            pd.testing.assert_frame_equal(one, two, check_exact=True)
        elif isinstance(one, pd.Series):
            pd.testing.assert_series_equal(one, two, check_exact=True)
        else:
            pd.testing.assert_index_equal(one, two, exact=True)
    except AssertionError:
        return False
    return True
