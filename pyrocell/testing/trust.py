"""Promises about what users can rely on: rows in the order asked for, a diagnosis of what the model has."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from pyrocell.infer.plan import TrainingPlan
from pyrocell.testing.asking import answers, assert_same, has_gaussian_posterior, terms_at_mean
from pyrocell.testing.cases import ModelCase
from pyrocell.testing.containers import read_backed, write

if TYPE_CHECKING:
    from pyrocell.models.base import CellModel

__all__ = ["TRUST_FUNCTIONS"]

# Not in order, one of them twice.
_ROWS = np.array([7, 2, 11, 3, 2])


def _check_rows(case: ModelCase) -> None:
    model = case.trained
    if not model.full_batch:
        whole, some = (_bound_of_cells(model, rows) for rows in (np.arange(20), _ROWS))
        assert_same({"bound": whole[_ROWS]}, {"bound": some}, 1e-5)
    if has_gaussian_posterior(model):
        moments = model.get_latent_representation(return_dist=True)
        asked = model.get_latent_representation(indices=_ROWS, return_dist=True)
        for all_cells, few in zip(moments, asked, strict=True):
            assert_same({"latent": np.asarray(all_cells)[_ROWS]}, {"latent": np.asarray(few)}, 1e-5)
    if hasattr(model, "get_normalized_expression"):
        table: Any = model.get_normalized_expression(indices=_ROWS)
        names = list(model.require_data(None).obs_names[_ROWS])
        tables = table if isinstance(table, tuple) else (table,)  # such as RNA and proteins
        assert all(list(part.index) == names for part in tables), "rows are misnamed"
    in_memory = answers(model, indices=_ROWS)
    with tempfile.TemporaryDirectory() as folder:
        backed = read_backed(write(case.data(), folder))
        try:
            assert_same(in_memory, answers(model, adata=backed, indices=_ROWS))
        finally:
            backed.file.close()


def _bound_of_cells(model: CellModel, rows: np.ndarray) -> np.ndarray:
    terms = terms_at_mean(model, rows)
    return (terms.reconstruction + terms.kl_local).detach().numpy()


def _check_diagnosis(case: ModelCase) -> None:
    model = case.trained
    found = model.diagnose()
    expected = {"convergence"}
    if model.latent_site is not None:
        expected |= {"posterior collapse", "dead dimensions", "library size in the latent"}
        if "batch" in model.fields and model.data.size("batch") > 1:
            expected.add("batch in the latent")
    if model.observed_site is not None:
        expected.add("predictive fit")
    assert set(found.table.index) == expected, (
        f"checks {list(found.table.index)}; expected {sorted(expected)}"
    )
    assert found.table["advice"].str.endswith(".").all(), "a check gives no advice"
    assert (found.dimensions is None) == (model.latent_site is None)
    if found.features is not None:
        wide = sum(model.data.size(field) for field in model.observed_sites.values())
        assert len(found.features) == wide, f"{len(found.features)} features are diagnosed; expected {wide}"
    pd.testing.assert_frame_equal(found.table, model.diagnose().table)


def _check_probabilities(case: ModelCase) -> None:
    model = case.trained
    tables: dict[str, Any] = {}
    predict: Any = getattr(model, "predict", None)
    if predict is not None and "soft" in inspect.signature(predict).parameters:
        tables["predict"] = predict(soft=True)
    if hasattr(model, "get_proportions"):
        tables["get_proportions"] = model.get_proportions()
    if model.mapping_site is not None:
        tables[model.mapping_site] = model.posterior(model.mapping_site)
    for name, table in tables.items():
        shares = np.asarray(table, dtype=np.float64)
        assert (shares >= 0).all() and np.allclose(shares.sum(1), 1, atol=1e-5), f"{name} does not sum to one"


def _check_half_precision(case: ModelCase) -> None:
    model = case.make()
    dataset = model.require_data(None)
    cells = dataset.cells(np.arange(dataset.n_cells if model.full_batch else 32))
    model.module.train()
    products = TrainingPlan(precision="bfloat16").products(model.device)
    with model.stream.active(), model.running(), products:
        terms = model.elbo()(cells, with_extra=True)
        terms.loss.backward()
    for name, value in {"loss": terms.loss, **terms.sites}.items():
        assert value.dtype == torch.float32, f"{name} is {value.dtype} under autocast"
        assert value.isfinite().all(), f"{name} is not finite under autocast"
    broken = [
        name
        for name, p in model.module.named_parameters()
        if p.grad is not None and not p.grad.isfinite().all()
    ]
    assert not broken, f"the gradients of {broken} are not finite under autocast"


TRUST_FUNCTIONS: dict[str, Callable[[ModelCase], None]] = {
    "rows come in the order asked for": _check_rows,
    "the diagnosis speaks of what the model has": _check_diagnosis,
    "probabilities sum to one": _check_probabilities,
    "likelihoods stay float32 in half precision": _check_half_precision,
}
