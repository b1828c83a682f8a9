"""Training a model: exact resume, splits, seeds, early stopping, interruption, and who keeps the data."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import pyrocell
from pyrocell import SCVI, TrainingPlan
from pyrocell.data import synthetic_iid
from pyrocell.errors import LoadError, NotTrainedError, PyrocellWarning, TrainingError

LOSSES = ["elbo_train", "reconstruction_train", "kl_local_train", "kl_global_train"]
COLUMNS = [*LOSSES, "kl_weight", "lr", "seconds", "skipped_steps"]
VALIDATION = ["elbo_validation", "reconstruction_validation", "kl_local_validation"]
OPTIONS = {"n_hidden": 8, "n_latent": 3, "gene_likelihood": "nb", "use_observed_lib_size": False}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


def data(n_cells=120, seed=0):
    adata = synthetic_iid(n_cells=n_cells, n_genes=20, n_proteins=0, n_regions=0, label_effect=1.0, seed=seed)
    SCVI.setup_anndata(adata, batch_key="batch")
    return adata


def make(seed=0, n_cells=120, **options):
    before, pyrocell.settings.seed = pyrocell.settings.seed, seed
    try:
        return SCVI(data(n_cells), **(OPTIONS | options))
    finally:
        pyrocell.settings.seed = before


def state(model):
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def same(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(value, two[name]) for name, value in one.items())


class Interrupting(torch.optim.Adam):
    """Adam that is stopped from outside at a certain step."""

    def __init__(self, parameters, after):
        super().__init__(parameters, lr=1e-3, eps=0.01)
        self.left = after

    def step(self, closure=None):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().step(closure)


# ------------------------------------------------------------------------------------- defaults of a class


class Brisk(SCVI):
    """A model that likes to be trained otherwise."""

    default_lr, default_lr_decay = 5e-3, 0.0
    default_batch_size, default_early_stopping = 32, True
    default_plan = TrainingPlan(optimizer="adamw", weight_decay=0.1, patience=2)
    max_epochs_cap, kl_warmup_cap = 9, 3


def make_brisk():
    adata = data()
    Brisk.setup_anndata(adata, batch_key="batch")
    return Brisk(adata, **OPTIONS)


def test_a_class_has_its_own_training_defaults(tmp_path):
    plan = TrainingPlan(optimizer="adamw", weight_decay=0.1, patience=2, checkpoint=tmp_path)
    given = {"lr": 5e-3, "batch_size": 32, "early_stopping": True, "n_epochs_kl_warmup": 3}
    told, silent, plain = make_brisk(), make_brisk(), make_brisk()
    told.train(9, plan=plan, **given)
    silent.train()
    plain.train(9, plan=TrainingPlan(), lr=1e-3, batch_size=128, early_stopping=False, n_epochs_kl_warmup=5)
    assert same(state(told), state(silent))
    assert not same(state(told), state(plain))
    assert silent.history["lr"].eq(5e-3).all() and "elbo_validation" in silent.history
    resumed = make_brisk()
    resumed.train(9, resume=tmp_path)  # the same options, one run told and one by default
    assert same(state(resumed), state(told))
    with pytest.raises(LoadError, match=r"lr.*0\.005"):
        make_brisk().train(9, lr=1e-3, resume=tmp_path)


class Short(SCVI):
    """SCVI with its own schedule, and few epochs."""

    max_epochs_cap = 8


def make_short():
    adata = data()
    Short.setup_anndata(adata, batch_key="batch")
    return Short(adata, **OPTIONS)


def test_train_without_arguments_takes_the_schedule_of_the_class():
    """The same as the schedule in words; the last of the 8 steps is at the last point of the line."""
    assert 0 < SCVI.default_lr_decay < 1
    told, silent = make_short(), make_short()
    told.train(8, lr=SCVI.default_lr, plan=TrainingPlan(lr_decay=SCVI.default_lr_decay))
    silent.train()
    assert same(state(told), state(silent))
    falling = 8 * SCVI.default_lr_decay
    expected = [SCVI.default_lr * min(1, (8 - epoch) / falling) for epoch in range(8)]
    assert silent.history["lr"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    "given", [{"lr": 2e-3}, {"plan": TrainingPlan(lr_plateau=True)}, {"plan": TrainingPlan(lr_decay=0.0)}]
)
def test_a_learning_rate_that_is_chosen_does_not_fall_by_default(given):
    model = make_short()
    model.train(3, **given)
    assert model.history["lr"].tolist() == [given.get("lr", SCVI.default_lr)] * 3


def test_an_optimizer_of_the_user_keeps_its_learning_rate():
    model = make_short()
    model.train(4, plan=TrainingPlan(optimizer=lambda groups: torch.optim.Adam(groups, lr=3e-3)))
    assert model.history["lr"].tolist() == [3e-3] * 4


def test_patience_that_cannot_act_is_told(caplog):
    model = make_short()
    model.train(8, early_stopping=True)  # 4 epochs of warm-up, then 4
    assert "patience is 45, and 4 epochs follow the warm-up" in caplog.text
    caplog.clear()
    model.train(8, early_stopping=True, plan=TrainingPlan(patience=2))
    model.train(8)
    assert "patience" not in caplog.text


def test_options_of_the_plan_leave_the_schedule_of_the_class():
    model = make_short()
    model.train(4, plan=TrainingPlan(validate_every=1))
    assert model.history["lr"].iloc[-1] < model.history["lr"].iloc[0] == SCVI.default_lr


def test_early_stopping_by_default_needs_no_validation_cells():
    model = make_brisk()
    model.train(4, train_size=1.0)
    assert len(model.history) == 4
    with pytest.raises(TrainingError, match="early_stopping needs validation cells"):
        model.train(4, train_size=1.0, early_stopping=True)


# ------------------------------------------------------------------------------------------------ resume

RUN = {"lr": 5e-3, "batch_size": 32, "n_epochs_kl_warmup": 3, "early_stopping": True, "train_size": 0.8}


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_resume_equals_the_uninterrupted_run(tmp_path, optimizer):
    plan = {"patience": 50, "lr_plateau": True, "lr_patience": 1, "optimizer": optimizer}
    whole = make()
    whole.train(12, plan=TrainingPlan(**plan), **RUN)
    first = make()
    first.train(5, plan=TrainingPlan(**plan, checkpoint=tmp_path), **RUN)
    resumed = make()
    resumed.train(12, plan=TrainingPlan(**plan), resume=tmp_path, **RUN)
    assert not same(state(first), state(whole))
    assert same(state(resumed), state(whole))
    pd.testing.assert_frame_equal(
        resumed.history.drop(columns="seconds"), whole.history.drop(columns="seconds")
    )
    assert torch.equal(resumed.stream.state, whole.stream.state)
    np.testing.assert_array_equal(resumed.get_elbo(return_mean=False), whole.get_elbo(return_mean=False))


def test_resume_restores_the_best_weights_of_before(tmp_path):
    """The best epoch may lie before the checkpoint."""
    plan = {"patience": 4}
    run = RUN | {"lr": 0.3, "n_epochs_kl_warmup": 0}
    whole = make()
    whole.train(40, plan=TrainingPlan(**plan), **run)
    best = int(whole.history["elbo_validation"].idxmin())
    assert best + 4 < len(whole.history) + 1 < 41
    first = make()
    first.train(best + 2, plan=TrainingPlan(**plan, checkpoint=tmp_path), **run)
    resumed = make()
    resumed.train(40, plan=TrainingPlan(**plan), resume=tmp_path, **run)
    assert len(resumed.history) == len(whole.history)
    assert same(state(resumed), state(whole))


def test_resume_after_an_interruption_in_the_same_session(tmp_path):
    """History has each epoch once."""
    whole = make()
    run = {"lr": 5e-3, "batch_size": 32, "n_epochs_kl_warmup": 3}
    whole.train(6, **run)
    model = make()
    plan = TrainingPlan(checkpoint=tmp_path, checkpoint_every=2)
    model.train(4, plan=plan, **run)
    model.train(6, plan=plan, resume=tmp_path, **run)
    assert list(model.history.index) == list(range(6))
    assert same(state(model), state(whole))


def test_resume_of_a_second_training(tmp_path):
    """The record of a first training survives a resume of the second, and so do the bits."""
    whole = make()
    whole.train(2, batch_size=32)
    whole.save(tmp_path / "first")
    run = {"lr": 5e-3, "batch_size": 32, "n_epochs_kl_warmup": 0}
    whole.train(4, **run)
    again = SCVI.load(tmp_path / "first", data())
    again.train(2, plan=TrainingPlan(checkpoint=tmp_path / "second"), **run)
    resumed = SCVI.load(tmp_path / "first", data())
    resumed.train(4, resume=tmp_path / "second", **run)
    assert same(state(resumed), state(whole))
    assert list(resumed.history.index) == list(range(6))


def test_a_checkpoint_is_two_files_without_pickle(tmp_path):
    model = make()
    plan = TrainingPlan(checkpoint=tmp_path / "c", checkpoint_every=2)
    model.train(3, batch_size=64, plan=plan)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "checkpoint.json",
        "checkpoint.safetensors",
    ]
    record = json.loads((tmp_path / "c" / "checkpoint.json").read_text())
    assert record["progress"]["epoch"] == 3  # the last epoch is written, whatever checkpoint_every is


def test_resume_when_nothing_is_left_to_do(tmp_path):
    model = make()
    model.train(3, batch_size=64, plan=TrainingPlan(checkpoint=tmp_path), n_epochs_kl_warmup=1)
    again = make()
    again.train(3, batch_size=64, resume=tmp_path, n_epochs_kl_warmup=1)
    assert same(state(model), state(again)) and len(again.history) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 1e-4},
        {"batch_size": 16},
        {"train_size": 0.5},
        {"early_stopping": False},
        {"n_epochs_kl_warmup": 1},
        {"plan": TrainingPlan(optimizer="adamw")},
        {"plan": TrainingPlan(weight_decay=0.1)},
        {"plan": TrainingPlan(train_indices=range(50), validation_indices=range(50, 60))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_resume_with_other_options_is_refused(tmp_path, change):
    make().train(2, plan=TrainingPlan(checkpoint=tmp_path), **RUN)
    again = make()
    before = state(again)
    with pytest.raises(LoadError, match="same options"):
        again.train(4, resume=tmp_path, **(RUN | change))
    assert same(before, state(again)) and not again.is_trained


def test_resume_with_another_seed_is_refused(tmp_path):
    """Another seed splits the cells otherwise: validation cells would have been trained on."""
    make(seed=0).train(2, plan=TrainingPlan(checkpoint=tmp_path), **RUN)
    with pytest.raises(LoadError, match="seed"):
        make(seed=1).train(4, resume=tmp_path, **RUN)


def test_resume_of_another_model_is_refused(tmp_path):
    make().train(2, plan=TrainingPlan(checkpoint=tmp_path), **RUN)
    with pytest.raises(LoadError, match=r"constructor\.n_hidden.*9"):
        make(n_hidden=9).train(4, resume=tmp_path, **RUN)


def test_resume_with_other_constructor_arguments_of_the_same_sizes_is_refused(tmp_path):
    make().train(2, plan=TrainingPlan(checkpoint=tmp_path), **RUN)
    with pytest.raises(LoadError, match=r"constructor\.dropout_rate"):
        make(dropout_rate=0.4).train(4, resume=tmp_path, **RUN)


def test_resume_with_other_data_of_the_same_sizes_is_refused(tmp_path):
    make().train(2, plan=TrainingPlan(checkpoint=tmp_path), **RUN)
    other = make()
    other.dataset.adata.X[100, int(other.dataset.adata.X[100].indices[0])] += 1
    before = state(other)
    with pytest.raises(LoadError, match=r"'data': '[0-9a-f]{64}'.*SHA-256 of the data"):
        other.train(4, resume=tmp_path, **RUN)
    assert same(before, state(other))
    # Whoever does not want the data read once more answers for them.
    other.train(4, resume=tmp_path, plan=TrainingPlan(hash_data=False), **RUN)


@pytest.mark.parametrize("name", ["checkpoint.json", "checkpoint.safetensors"])
def test_a_truncated_checkpoint_is_refused(tmp_path, name):
    make().train(2, plan=TrainingPlan(checkpoint=tmp_path), **RUN)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:200])
    with pytest.raises(LoadError, match=name):
        make().train(4, resume=tmp_path, **RUN)


@pytest.mark.parametrize("field", ["options", "progress", "shuffle", "optimizer", "plateau"])
@pytest.mark.parametrize("value", [None, {"a": 1}, "x"], ids=["null", "object", "text"])
def test_a_damaged_checkpoint_is_refused(tmp_path, field, value):
    make().train(2, plan=TrainingPlan(checkpoint=tmp_path), **RUN)
    path = tmp_path / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(LoadError, match="checkpoint"):
        make().train(4, resume=tmp_path, **RUN)


def test_a_folder_without_checkpoint(tmp_path):
    with pytest.raises(LoadError, match="does not exist"):
        make().train(2, resume=tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ split


def test_the_split_covers_each_cell_once():
    model = make()
    model.train(1, train_size=0.7)
    both = np.concatenate([model.train_indices, model.validation_indices])
    assert sorted(both) == list(range(120)) and len(model.train_indices) == 84
    model.train(1, train_size=0.5, validation_size=0.2)
    assert (len(model.train_indices), len(model.validation_indices)) == (60, 24)


def test_training_again_keeps_the_split():
    model = make()
    model.train(1)
    before = model.train_indices.copy()
    model.train(1)
    np.testing.assert_array_equal(before, model.train_indices)


def test_given_indices_are_the_only_cells_used(monkeypatch):
    model = make()
    seen = {True: set(), False: set()}
    forward = model.encoder.forward
    reference = model.dataset.cells(np.arange(120)).counts

    def spy(counts, *rest):
        same_row = (reference[None] == counts[:, None]).all(-1)
        seen[model.module.training] |= set(same_row.int().argmax(1).tolist())
        return forward(counts, *rest)

    monkeypatch.setattr(model.encoder, "forward", spy)
    train, validation = [3, 50, 7, 119, 20], [1, 2]
    model.train(2, plan=TrainingPlan(train_indices=train, validation_indices=validation))
    assert seen == {True: set(train), False: set(validation)}
    assert sorted(model.train_indices) == sorted(train) and list(model.validation_indices) == validation


def test_given_indices_may_be_a_mask():
    """A mask is a mask, not positions 0 and 1."""
    model = make()
    mask = np.zeros(120, dtype=bool)
    mask[60:] = True
    model.train(1, plan=TrainingPlan(train_indices=mask, validation_indices=~mask))
    np.testing.assert_array_equal(np.sort(model.train_indices), np.arange(60, 120))
    np.testing.assert_array_equal(np.sort(model.validation_indices), np.arange(60))


@pytest.mark.parametrize(
    ("plan", "name"),
    [
        ({"train_indices": [0, 500]}, "500"),
        ({"train_indices": [-1]}, "-1"),
        ({"train_indices": []}, "train_indices"),
        ({"train_indices": [0.5]}, "train_indices"),
        ({"train_indices": [0, 1], "validation_indices": [500]}, "validation_indices.*500"),
        ({"train_indices": [0, 1, 2], "validation_indices": [2, 3]}, "both.*2"),
        ({"validation_indices": [0, 1]}, "train_indices"),
    ],
)
def test_impossible_indices_are_named(plan, name):
    model = make()
    with pytest.raises(TrainingError, match=name):
        model.train(1, plan=TrainingPlan(**plan))
    assert not model.is_trained


def test_all_cells_for_training():
    model = make()
    model.train(2, train_size=1.0)
    assert len(model.train_indices) == 120 and len(model.validation_indices) == 0
    assert list(model.history.columns) == COLUMNS


# ------------------------------------------------------------------------------------------------ seed


def test_the_seed_is_recorded_and_decides_everything(monkeypatch):
    adata = data()
    models = []
    for seed in (11, 11, 12):
        monkeypatch.setattr(pyrocell.settings, "seed", seed)
        torch.manual_seed(3 * len(models))  # what the user draws elsewhere is of no account
        models.append(SCVI(adata, **OPTIONS))
    monkeypatch.setattr(pyrocell.settings, "seed", 99)  # only models made afterwards
    for model in models:
        model.train(2, batch_size=32)
    assert [model.stream.seed for model in models] == [11, 11, 12]
    assert "seed 11" in repr(models[0])
    assert same(state(models[0]), state(models[1])) and not same(state(models[0]), state(models[2]))
    np.testing.assert_array_equal(
        models[0].get_elbo(return_mean=False), models[1].get_elbo(return_mean=False)
    )
    assert not np.array_equal(models[0].train_indices, models[2].train_indices)


def test_the_users_generators_are_left_alone():
    torch.manual_seed(4)
    np.random.seed(4)  # noqa: NPY002 - the user's global generator
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    model = make()
    model.train(2, batch_size=32, early_stopping=True)
    model.get_normalized_expression(n_samples=2)
    model.differential_expression(groupby="label")
    with pytest.raises(TrainingError):
        model.train(0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_what_the_user_does_between_trainings_is_of_no_account():
    models = [make(), make()]
    for i, model in enumerate(models):
        model.train(1, batch_size=32)
        if i:
            torch.rand(100)
            model.get_elbo()  # asking has its own seed
            model.differential_expression(groupby="label")
        model.train(1, batch_size=32)
    assert same(*map(state, models))


# ------------------------------------------------------------------------------------------------ the run


def test_history_has_the_documented_columns():
    model = make()
    plan = TrainingPlan(validate_every=2)
    model.train(4, lr=1e-3, batch_size=32, plan=plan, n_epochs_kl_warmup=2)
    history = model.history
    assert list(history.columns) == [*COLUMNS, *VALIDATION] and history.index.name == "epoch"
    assert history["elbo_validation"].isna().tolist() == [True, False, True, False]
    parts = history[LOSSES[1:]].sum(axis=1)
    np.testing.assert_allclose(history["elbo_train"], parts, rtol=1e-6)
    assert history["kl_weight"].tolist() == [0.0, 0.5, 1.0, 1.0]
    assert (history["lr"] == 1e-3).all() and (history["seconds"] > 0).all()
    assert (history["skipped_steps"] == 0).all()
    last = model.get_elbo(indices=model.validation_indices)
    assert -history["elbo_validation"].iloc[-1] == pytest.approx(last, rel=0.05)  # nats per cell, other draws


def test_every_column_is_in_the_guide():
    text = "".join(
        path.read_text() for path in (Path(__file__).parents[2] / "docs" / "user_guide").rglob("*.md")
    )
    missing = [name for name in [*COLUMNS, *VALIDATION] if f"`{name}`" not in text]
    assert not missing


def test_training_twice_goes_on():
    model = make()
    model.train(3, batch_size=32, lr=1e-3)
    before = state(model)
    model.train(2, batch_size=32, lr=1e-4)
    assert list(model.history.index) == list(range(5)) and model.history.index.name == "epoch"
    assert model.history["lr"].tolist() == [1e-3] * 3 + [1e-4] * 2
    assert not same(before, state(model))
    difference = max(
        (value - before[name]).abs().max()
        for name, value in state(model).items()
        if value.is_floating_point()
    )
    assert difference < 1.0  # from where it stood, not from new parameters


def test_early_stopping_restores_the_best_weights():
    run = {"lr": 0.3, "batch_size": 32, "n_epochs_kl_warmup": 0}
    model = make()
    model.train(60, early_stopping=True, plan=TrainingPlan(patience=3), **run)
    best = int(model.history["elbo_validation"].idxmin())
    assert len(model.history) == best + 1 + 3 < 60
    until_best = make()
    until_best.train(best + 1, plan=TrainingPlan(validate_every=1), **run)
    assert same(state(model), state(until_best))
    assert not model.module.training


def test_early_stopping_waits_for_warmup():
    model = make()
    plan = TrainingPlan(patience=1)
    model.train(8, early_stopping=True, lr=0.3, batch_size=32, n_epochs_kl_warmup=5, plan=plan)
    assert len(model.history) > 5


def test_half_precision_trains():
    model = make()
    model.train(3, batch_size=32, plan=TrainingPlan(precision="bfloat16"))
    plain = make()
    plain.train(3, batch_size=32)
    assert np.isfinite(model.history[LOSSES]).all(axis=None) and (model.history["skipped_steps"] == 0).all()
    assert all(value.dtype != torch.bfloat16 for value in state(model).values())
    assert not same(state(model), state(plain))
    np.testing.assert_allclose(model.history["elbo_train"], plain.history["elbo_train"], rtol=0.02)


@pytest.mark.parametrize("batch_size", [1000, 107, 1])
def test_minibatches_of_any_size(batch_size):
    model = make(n_cells=30 if batch_size == 1 else 120)
    model.train(1, batch_size=batch_size)
    assert len(model.history) == 1 and np.isfinite(model.history[LOSSES]).all(axis=None)
    assert np.isfinite(model.get_elbo())


def test_default_length_follows_the_number_of_cells(monkeypatch):
    model = make()
    monkeypatch.setattr(type(model), "max_epochs_cap", 2)
    model.train()
    assert len(model.history) == 2 and model.history["kl_weight"].iloc[-1] == 1.0


def test_an_optimizer_of_ones_own():
    model = make()
    before = state(model)
    model.train(2, plan=TrainingPlan(optimizer=lambda p: torch.optim.SGD(p, lr=1e-4)))
    assert not same(before, state(model))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_epochs": 0}, "max_epochs is 0"),
        ({"max_epochs": 2.5}, "max_epochs is 2.5"),
        ({"batch_size": 0}, "batch_size.* 0"),
        ({"batch_size": 12.5}, "batch_size.* 12.5"),
        ({"train_size": 0.0}, "train_size is 0.0"),
        ({"train_size": 1.5}, "train_size is 1.5"),
        ({"train_size": 0.9, "validation_size": 0.2}, "validation_size 0.2"),
        ({"train_size": 1.0, "early_stopping": True}, "early_stopping needs validation cells"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"n_epochs_kl_warmup": -2}, "n_epochs_kl_warmup is -2"),
        ({"device": "gpu"}, "device is 'gpu'"),
    ],
    ids=str,
)
def test_impossible_options_are_named(options, said):
    model = make()
    before = state(model)
    with pytest.raises(TrainingError, match=said):
        model.train(**({"max_epochs": 1} | options))
    assert same(before, state(model)) and not model.is_trained
    model.train(1)  # and nothing is broken


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "adagrad"}, "optimizer is 'adagrad'"),
        ({"precision": "float16"}, "precision is 'float16'"),
        ({"patience": 0}, "patience is 0"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0"),
        ({"min_kl_weight": 2.0}, "min_kl_weight"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
    ],
    ids=str,
)
def test_impossible_plans_are_named(options, said):
    with pytest.raises(TrainingError, match=said):
        TrainingPlan(**options)


# ------------------------------------------------------------------------------------------------ interruption


def test_an_interruption_leaves_a_usable_model(tmp_path):
    model = make()
    plan = TrainingPlan(optimizer=lambda p: Interrupting(p, after=9), validate_every=1)
    with pytest.raises(KeyboardInterrupt):
        model.train(10, batch_size=32, plan=plan)  # 4 minibatches an epoch
    assert model.is_trained and not model.module.training
    assert list(model.history.index) == [0, 1] and model.history["elbo_validation"].notna().all()
    assert np.isfinite(model.get_elbo()) and model.get_latent_representation().shape == (120, 3)
    model.save(tmp_path)
    model.train(2, batch_size=32)
    assert list(model.history.index) == [0, 1, 2, 3]


def test_an_interruption_in_the_first_epoch_is_no_training():
    model = make()
    with pytest.raises(KeyboardInterrupt):
        model.train(2, batch_size=32, plan=TrainingPlan(optimizer=lambda p: Interrupting(p, after=1)))
    assert len(model.history) == 0 and not model.module.training
    with pytest.raises(NotTrainedError, match="has not been trained"):
        model.get_elbo()
    model.train(1)
    assert list(model.history.index) == [0]


def test_an_interruption_gives_the_generators_back():
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        make().train(2, plan=TrainingPlan(optimizer=lambda p: Interrupting(p, after=1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_repeated_bad_steps_leave_the_last_finite_state(caplog):
    model = make()
    model.train(2, batch_size=32)
    good = state(model)
    spoil = next(iter(model.encoder.parameters())).register_hook(lambda grad: grad * float("nan"))
    with (
        caplog.at_level(logging.WARNING, logger="pyrocell"),
        pytest.raises(TrainingError, match=r"3 steps in a row.*encoder.*last finite state.*Lower lr"),
    ):
        model.train(2, batch_size=32, plan=TrainingPlan(max_bad_steps=3))
    spoil.remove()
    assert same(good, state(model)) and not model.module.training
    assert len(model.history) == 2 and np.isfinite(model.get_elbo())


def test_a_skipped_step_is_counted_and_warned_about(caplog):
    model = make()
    steps = iter(range(1000))
    next(iter(model.encoder.parameters())).register_hook(
        lambda grad: grad * float("nan") if next(steps) == 5 else grad
    )
    with (
        caplog.at_level(logging.WARNING, logger="pyrocell"),
        pytest.warns(PyrocellWarning, match=r"1 training step.*skipped_steps"),
    ):
        model.train(3, batch_size=32)
    assert model.history["skipped_steps"].tolist() == [0, 1, 0]
    assert all(value.isfinite().all() for value in state(model).values())


# ------------------------------------------------------------------------------------------------ memory


def test_nothing_keeps_the_data_after_the_model_is_gone():
    adata = data()
    model = SCVI(adata, **OPTIONS)
    model.train(1, batch_size=32)
    model.get_normalized_expression(n_samples=2)
    model.differential_expression(groupby="label")
    watched = weakref.ref(adata), weakref.ref(model), weakref.ref(model.module)
    gc.collect()
    assert watched[0]() is adata
    del adata, model
    gc.collect()
    assert [ref() for ref in watched] == [None, None, None]


def test_data_of_a_question_are_not_kept():
    model = make()
    model.train(1)
    other = data(seed=1)
    model.get_elbo(other)
    watched = weakref.ref(other)
    del other
    gc.collect()
    assert watched() is None
