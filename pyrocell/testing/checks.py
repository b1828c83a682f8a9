"""The promises, one function each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch

from pyrocell import settings
from pyrocell.data.turned import rows_are_features
from pyrocell.errors import DataError, NotTrainedError
from pyrocell.infer.effects import is_latent, is_local
from pyrocell.infer.plan import TrainingPlan
from pyrocell.models.roles import verbs
from pyrocell.testing.asking import answers, assert_same, has_gaussian_posterior, loss_at_mean, state_of
from pyrocell.testing.cases import ModelCase
from pyrocell.testing.containers import parts_of, read_backed, with_parts, write
from pyrocell.testing.isolation import check_interleaved, check_life, check_reload
from pyrocell.testing.questions import is_answer
from pyrocell.testing.recovery import check_bad_step, check_resume, check_tapes
from pyrocell.testing.trust import TRUST_FUNCTIONS

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["CHECK_FUNCTIONS"]


def _check_loss_falls(case: ModelCase) -> None:
    history = case.train(case.make(), max_epochs=max(8, case.max_epochs), n_epochs_kl_warmup=0).history
    assert np.isfinite(history["elbo_train"]).all(), "the loss is not finite"
    assert history["elbo_train"].iloc[-1] < history["elbo_train"].iloc[0], "the loss does not fall"
    assert history["skipped_steps"].sum() == 0, "steps were skipped"


def _check_gradients(case: ModelCase) -> None:
    model = case.make()
    dataset = model.require_data(None)
    cells = dataset.cells(np.arange(dataset.n_cells if model.full_batch else 32))
    model.module.train()
    with model.stream.active(), model.running():
        model.elbo()(cells, with_extra=True).loss.backward()
    dead = [
        name for name, p in model.module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert not dead, f"no gradient reaches {dead}"


def _check_minibatches(case: ModelCase) -> None:
    if case.model_class.full_batch:
        return
    model = case.make()
    rows = np.arange(96)
    n_cells = model.require_data(None).n_cells
    parts = [loss_at_mean(model, part) for part in np.split(rows, 4)]
    whole = loss_at_mean(model, rows)
    assert torch.allclose(torch.stack(parts).mean(), whole, rtol=1e-5), (
        "minibatch losses do not average to the whole"
    )
    gradients = [
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(loss, [*model.module.parameters()], allow_unused=True)
                if g is not None
            ]
        )
        for loss in (torch.stack(parts).mean(), whole)
    ]
    scale = gradients[1].abs().max()
    assert torch.allclose(gradients[0] / scale, gradients[1] / scale, atol=1e-4), (
        "minibatch gradients are biased"
    )
    assert n_cells >= 96, "give the case at least 96 cells"


def _check_order(case: ModelCase) -> None:
    model = case.trained
    order = np.random.default_rng(0).permutation(model.require_data(None).n_cells)
    if has_gaussian_posterior(model):
        straight, shuffled = (
            np.asarray(model.get_latent_representation(indices=rows)) for rows in (None, order)
        )
        assert_same({"z": straight[order]}, {"z": shuffled}, 1e-5)
    assert torch.allclose(loss_at_mean(model, order), loss_at_mean(model, np.sort(order)), rtol=1e-5), (
        "the loss depends on cell order"
    )


def _check_sites(case: ModelCase) -> None:
    model = case.trained
    cells = model.require_data(None).cells(np.arange(5))
    with model.asking():
        kinds = model.drawer().sites(cells)
    named = (model.latent_site, model.expression_site, model.library_site, model.observed_site)
    roles = {site for site in named if site is not None}
    missing = sorted((set(case.sites) | roles) - set(kinds))
    assert not missing, f"sites {missing} do not exist; the model has {sorted(kinds)}"
    for site in sorted(set(case.sites) | roles):
        one, many = (model.posterior(site, indices=[3, 1], n_samples=m, return_mean=False) for m in (1, 3))
        assert many.shape == (3, *one.shape), f"{site}: shapes {many.shape} of 3 draws, {one.shape} of one"
        shape = tuple(case.sites.get(site, one.shape[1:]))
        assert one.shape == (2, *shape), f"{site}: shape {one.shape[1:]} of a cell, documented {shape}"


def _check_files(case: ModelCase) -> None:
    model = case.trained
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder, overwrite=True)
        empty = type(model).load(folder)
    assert_same(answers(model), answers(empty, adata=model.require_data(None).adata))


def _check_features(case: ModelCase) -> None:
    model = case.trained
    data, rng = case.data(), np.random.default_rng(0)
    # Where the rows are features, the columns, which are aligned by name, are cells.
    axis = 0 if rows_are_features(case.model_class.fields) else 1
    shuffled = with_parts(data, lambda part: _taken(part, rng.permutation(part.shape[axis]), axis))
    assert_same(answers(model), answers(model, adata=shuffled))
    for name in model.data.setup.get("modalities", {"": ""}).values():
        names = (parts_of(data)[name].obs_names, parts_of(data)[name].var_names)[axis]
        gone = str(names[3])
        try:
            some = partial(_taken, chosen=np.flatnonzero(names != gone), axis=axis)
            answers(model, adata=with_parts(data, some, [name]))
        except DataError as error:
            assert gone in str(error), f"the error does not name the missing feature {gone!r}: {error}"
        else:
            raise AssertionError("data without one of the features were accepted")


def _taken(part: AnnData, chosen: np.ndarray, axis: int) -> AnnData:
    return (part[chosen] if axis == 0 else part[:, chosen]).copy()


def _check_categories(case: ModelCase) -> None:
    for key in (
        value for name, value in case.setup.items() if name.endswith("_key") and isinstance(value, str)
    ):
        adata = case.data()
        if key not in adata.obs or adata.obs[key].dtype.kind == "f":
            continue
        adata.obs[key] = adata.obs[key].astype(str)
        adata.obs.loc[adata.obs_names[0], key] = "never seen"
        try:
            answers(case.trained, adata=adata)
        except DataError as error:
            assert "never seen" in str(error), f"the error does not name the unseen category: {error}"
        else:
            raise AssertionError(f"an unseen category of {key!r} was accepted")


def _check_seed(case: ModelCase) -> None:
    models = [case.train(case.make(seed=seed)) for seed in (7, 7, 8)]
    assert_same(state_of(models[0]), state_of(models[1]))
    assert_same(answers(models[0]), answers(models[1]))
    assert any(not np.array_equal(v, state_of(models[2])[k]) for k, v in state_of(models[0]).items()), (
        "the seed has no effect"
    )


def _check_containers(case: ModelCase) -> None:
    from scipy import sparse

    reference = answers(case.trained)
    for convert in (sparse.csr_matrix, sparse.csc_array, lambda x: sparse.csr_matrix(x).toarray()):
        data = case.data()
        for part in parts_of(data).values():
            part.X = convert(part.X)
            for layer in list(part.layers):
                part.layers[layer] = convert(part.layers[layer])
        assert_same(reference, answers(case.trained, adata=data))
    with tempfile.TemporaryDirectory() as folder:
        backed = read_backed(write(case.data(), folder))
        try:
            assert_same(reference, answers(case.trained, adata=backed))
        finally:
            backed.file.close()


def _check_one_cell(case: ModelCase) -> None:
    if case.model_class.full_batch:
        return
    model = case.make()
    n = 65 if not model.has_local_parameters else model.require_data(None).n_cells
    size = 64 if not model.has_local_parameters else n - 1
    plan = TrainingPlan(train_indices=range(n))
    history = case.train(model, batch_size=size, plan=plan, max_epochs=1).history
    assert np.isfinite(history["elbo_train"]).all() and history["skipped_steps"].sum() == 0, (
        "a minibatch of one cell fails"
    )
    assert answers(model, indices=[4])["get_elbo"].shape == (1,), "one cell cannot be asked about"


def _check_untrained(case: ModelCase) -> None:
    model = case.make()
    denoised = ("get_normalized_expression", "get_normalized_accessibility")
    for verb in ("get_elbo", "get_latent_representation", *denoised):
        if hasattr(model, verb):
            try:
                getattr(model, verb)()
            except NotTrainedError:
                continue
            raise AssertionError(f"{verb} answers from untrained parameters")


def _check_verbs(case: ModelCase) -> None:
    model = case.trained
    for name, present in verbs(case.model_class).items():
        assert hasattr(model, name) == present == (name in dir(model)), (
            f"{name}: declared {present}, found otherwise"
        )


def _check_every_verb(case: ModelCase) -> None:
    for verb, answer in case.told.items():
        assert is_answer(answer), f"{verb} answers {answer!r}"


def _check_mapping(case: ModelCase) -> None:
    key = case.setup.get("batch_key")
    if key is None or not hasattr(case.model_class, "load_query_data"):
        return
    model, query = case.trained, case.data()
    known, before = state_of(model), answers(model, adata=case.data())
    query.obs[key] = np.where(np.arange(query.n_obs) % 2, "a new batch", query.obs[key].astype(str))
    saved, settings.seed = settings.seed, model.stream.seed
    try:
        mapped = case.model_class.load_query_data(query, model)
    finally:
        settings.seed = saved
    if mapped.trainable:
        fresh = state_of(mapped)
        case.train(mapped, plan=replace(case.model_class.default_plan, weight_decay=0.1))
        still = [name for name in mapped.trainable if np.array_equal(fresh[name], state_of(mapped)[name])]
        assert not still, f"nothing of the query reaches its new entries of {still}"
    assert_same(known, state_of(model))
    after = answers(mapped, adata=case.data())
    for found in (before, after):
        found.pop("get_elbo")  # it has a share of the KL of parameters, of which the new batches have more
    assert_same(before, after, 1e-6)
    with tempfile.TemporaryDirectory() as folder:
        mapped.save(folder, overwrite=True)
        assert_same(answers(mapped), answers(type(mapped).load(folder, query)))


def _check_plate(case: ModelCase) -> None:
    model = case.make()
    cells = model.require_data(None).cells(np.arange(4))
    with model.running(), model.stream.active():
        model_trace: Any = pyro.poutine.trace(model.elbo().model).get_trace(cells)
    outside = [
        n for n, s in model_trace.nodes.items() if is_latent(s) and not is_local(s) and n in case.sites
    ]
    assert not outside, f"documented sites {outside} lie outside the plate of cells"


CHECK_FUNCTIONS: dict[str, Callable[[ModelCase], None]] = {
    "loss is finite and falls": _check_loss_falls,
    "gradients reach every parameter": _check_gradients,
    "minibatches are unbiased": _check_minibatches,
    "order of cells is irrelevant": _check_order,
    "sites exist with their shapes": _check_sites,
    "sites lie in the plate of cells": _check_plate,
    "save and load give identical answers": check_reload,
    "a model without data answers about those given": _check_files,
    "features are aligned by name": _check_features,
    "unseen categories are refused": _check_categories,
    "same seed, same result": _check_seed,
    "sparse, dense and backed data agree": _check_containers,
    "a minibatch of one cell works": _check_one_cell,
    "a whole life leaves nothing behind": check_life,
    "models trained in turn equal each alone": check_interleaved,
    "a step that is not finite leaves no trace": check_bad_step,
    "an interrupted training resumes to the bit": check_resume,
    "steps from a tape are the plain ones to the bit": check_tapes,
    "untrained models do not answer": _check_untrained,
    "verbs follow roles": _check_verbs,
    "queries are mapped without moving the reference": _check_mapping,
    "every verb answers": _check_every_verb,
    **TRUST_FUNCTIONS,
}
