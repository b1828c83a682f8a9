"""The training loop: it finds the optimum, survives bad steps, and resumes to the bit."""

from __future__ import annotations

import logging

import numpy as np
import pyro
import pytest
import torch

from pyrocell import settings
from pyrocell.data import Cells
from pyrocell.errors import LoadError, PyrocellWarning, TrainingError
from pyrocell.infer.checkpoint import read_checkpoint
from pyrocell.infer.elbo import Elbo
from pyrocell.infer.plan import TrainingPlan
from pyrocell.infer.progress import ProgressBar
from pyrocell.infer.split import chosen_rows, default_kl_warmup, default_max_epochs, split_cells
from pyrocell.infer.streams import RandomStream
from pyrocell.infer.tally import Tally
from pyrocell.infer.trainer import Trainer
from tests.infer.toys import Conjugate, toy_minibatches


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(settings, "progress", False)
    with pyro.validation_enabled(False):  # as models train
        yield


@pytest.fixture
def x():
    return 1.5 + torch.randn(200, generator=torch.Generator().manual_seed(123)) * 2**0.5


def make(x, max_epochs=20, plan=None, **options):
    toy = Conjugate(0.0, exact=False)
    settings_ = {"lr": 0.02, "n_epochs_kl_warmup": 0, "early_stopping": False, "steps_per_epoch": 4} | options
    trainer = Trainer(
        Elbo(toy.model, toy.guide),
        toy,
        plan or TrainingPlan(eps=1e-8),
        stream=RandomStream(0),
        shuffle=np.random.default_rng(0),
        max_epochs=max_epochs,
        **settings_,
    )
    return toy, trainer


def test_finds_the_optimum(x):
    toy, trainer = make(x, max_epochs=100)
    history = trainer.fit(toy_minibatches(x, 50), toy_minibatches(x, 100))
    assert toy.mu.item() == pytest.approx(x.mean().item(), abs=0.1)
    assert toy.slope.item() == pytest.approx(0.5, abs=0.1)
    assert history["elbo_validation"].iloc[-1] == pytest.approx(-toy.log_evidence(x).mean().item(), abs=0.12)
    assert history["elbo_train"].iloc[-1] < history["elbo_train"].iloc[0]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", lambda groups: torch.optim.SGD(groups, lr=0.01)])
def test_optimizers(x, optimizer):
    _, trainer = make(x, plan=TrainingPlan(optimizer=optimizer))
    history = trainer.fit(toy_minibatches(x, 50))
    assert history["elbo_train"].iloc[-1] < history["elbo_train"].iloc[0]


def test_resume_equals_the_uninterrupted_run(x, tmp_path):
    whole, trainer = make(x, max_epochs=12)
    straight = trainer.fit(toy_minibatches(x, 30), toy_minibatches(x, 100))
    _, first = make(x, max_epochs=5, plan=TrainingPlan(eps=1e-8, checkpoint=tmp_path, checkpoint_every=5))
    first.fit(toy_minibatches(x, 30), toy_minibatches(x, 100))
    resumed, second = make(x, max_epochs=12)
    read_checkpoint(second, tmp_path)
    history = second.fit(toy_minibatches(x, 30), toy_minibatches(x, 100))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert history["elbo_train"].equals(straight["elbo_train"])
    assert len(history) == 12


def test_resume_with_other_options_is_refused(x, tmp_path):
    _, first = make(x, max_epochs=2, plan=TrainingPlan(checkpoint=tmp_path))
    first.fit(toy_minibatches(x, 50))
    _, second = make(x, lr=0.5)
    with pytest.raises(LoadError, match="same options"):
        read_checkpoint(second, tmp_path)


def test_injected_bad_gradient_is_skipped_counted_and_named(x, caplog):
    toy, trainer = make(x, max_epochs=4)
    calls = iter(range(100))
    toy.mu.register_hook(lambda grad: grad * float("nan") if next(calls) == 5 else grad)
    with (
        caplog.at_level(logging.WARNING, logger="pyrocell"),
        pytest.warns(PyrocellWarning, match="1 training step"),
    ):
        history = trainer.fit(toy_minibatches(x, 50))
    assert history["skipped_steps"].tolist() == [0, 1, 0, 0]
    assert "'mu'" in caplog.text
    assert all(p.isfinite().all() for p in toy.parameters())


def test_repeated_bad_losses_stop_with_the_site_and_the_last_finite_state(x):
    toy, trainer = make(x, max_epochs=4)
    trainer.fit(toy_minibatches(x, 50))
    good = {name: p.clone() for name, p in toy.state_dict().items()}
    _, again = make(x, plan=TrainingPlan(max_bad_steps=3))
    again.module.load_state_dict(good)
    again.last_finite = again.snapshot()
    spoilt = x.clone()
    spoilt[::2] = float("inf")
    with pytest.raises(TrainingError, match=r"3 steps in a row.*'x'"):
        again.fit(toy_minibatches(spoilt, 50))
    for name, value in again.module.state_dict().items():
        assert torch.equal(value, good[name])


def test_bad_steps_after_a_resume_leave_the_state_of_the_checkpoint(x, tmp_path):
    toy, trainer = make(
        x, max_epochs=4, plan=TrainingPlan(checkpoint=tmp_path, checkpoint_every=4, max_bad_steps=3)
    )
    trainer.fit(toy_minibatches(x, 50))
    good = {name: p.clone() for name, p in toy.state_dict().items()}
    _, again = make(x, max_epochs=8, plan=TrainingPlan(max_bad_steps=3))
    read_checkpoint(again, tmp_path)
    with pytest.raises(TrainingError, match="3 steps in a row"):
        again.fit(toy_minibatches(torch.full_like(x, float("inf")), 50))
    for name, value in again.module.state_dict().items():
        assert torch.equal(value, good[name])


def test_an_epoch_without_a_step_has_no_loss(x):
    _, trainer = make(x, max_epochs=1, plan=TrainingPlan(max_bad_steps=10))
    with pytest.warns(PyrocellWarning, match="training steps"):
        history = trainer.fit(toy_minibatches(torch.full_like(x, float("inf")), 50))
    assert history["elbo_train"].isna().all()


def test_steps_counted_on_the_device_are_those_counted_by_the_host():
    x = torch.linspace(-1, 1, 12)
    toy, _ = make(x)
    elbo, (host, device) = Elbo(toy.model, toy.guide), (Tally(torch.device("cpu")) for _ in range(2))
    good = elbo(Cells({"x": x}, torch.arange(12), 12), 1.0, with_extra=True)
    bad = elbo(Cells({"x": x * float("inf")}, torch.arange(12), 12), 1.0, with_extra=True)
    for tally in (host, device):
        tally.begin()
        tally.add(good)
    for terms in (good, bad, bad, good, bad):
        finite = terms.loss.isfinite()
        host.add(terms) if finite else host.skip()
        device.add_on_device(terms, finite)
    one, two = host.read(), device.read()
    assert one.means == pytest.approx(two.means) and one.skipped == two.skipped == 3
    assert (two.in_a_row, two.longest) == (1, 2) and "'x'" in two.culprit
    device.begin()
    device.add_on_device(good, torch.tensor(True))
    assert (device.read().in_a_row, device.read().skipped, device.read().longest) == (0, 0, 1)


def test_products_of_one_precision_are_asked_for_again_and_again():
    before, products = (
        torch.backends.cuda.matmul.allow_tf32,
        TrainingPlan(precision="tfloat32").products(torch.device("cuda")),
    )
    for _ in range(2):
        with products:
            assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32 == before


def test_running_statistics_survive_a_bad_step(x):
    toy, _ = make(x)
    toy.norm = torch.nn.BatchNorm1d(1)
    plain = toy.guide
    toy.guide = lambda cells: (toy.norm(cells.x[:, None]), plain(cells))[1]
    trainer = Trainer(
        Elbo(toy.model, toy.guide), toy, TrainingPlan(), stream=RandomStream(0), shuffle=np.random.default_rng(0),
        lr=0.01, max_epochs=1, n_epochs_kl_warmup=0, early_stopping=False, steps_per_epoch=4,
    )  # fmt: skip
    spoilt = x.clone()
    spoilt[0] = float("nan")
    with pytest.warns(PyrocellWarning):
        trainer.fit(toy_minibatches(spoilt, 50))
    assert toy.norm.running_mean.isfinite().all() and toy.norm.running_mean.abs() > 0


def test_early_stopping_restores_the_best_weights(x):
    plan = TrainingPlan(eps=1e-8, patience=3)
    toy, trainer = make(x, max_epochs=500, plan=plan, lr=0.3, early_stopping=True)
    history = trainer.fit(toy_minibatches(x, 50), toy_minibatches(x[:20], 20))
    assert len(history) < 500
    best = history["elbo_validation"].idxmin()
    assert best == trainer.progress.best_epoch == len(history) - 1 - 3
    assert all(torch.equal(toy.state_dict()[k], v) for k, v in trainer.best_state.items())


def test_patience_counts_only_after_warmup(x):
    plan = TrainingPlan(patience=1, min_delta=1e9)
    _, trainer = make(x, max_epochs=50, plan=plan, n_epochs_kl_warmup=10, early_stopping=True)
    history = trainer.fit(toy_minibatches(x, 50), toy_minibatches(x, 100))
    assert len(history) == 12  # epochs 0-9 warm up, 10 sets the best, 11 does not beat it
    assert history["kl_weight"].tolist() == pytest.approx([min(1, e / 10) for e in range(12)])


def test_plateau_lowers_the_learning_rate(x):
    plan = TrainingPlan(lr_plateau=True, lr_patience=2, lr_factor=0.5)
    _, trainer = make(x, max_epochs=60, plan=plan, lr=0.3)
    history = trainer.fit(toy_minibatches(x, 50), toy_minibatches(x, 100))
    assert history["lr"].iloc[-1] < 0.3


def test_clipping_bounds_the_step(x):
    plan = TrainingPlan(optimizer=lambda groups: torch.optim.SGD(groups, lr=1.0), max_grad_norm=1e-3)
    toy, trainer = make(x, max_epochs=1, plan=plan)
    before = toy.shift.item()
    trainer.fit(toy_minibatches(x, 200))
    assert 0 < abs(toy.shift.item() - before) <= 1e-3 + 1e-7


def test_networks_decay_and_own_parameters_do_not():
    module = torch.nn.Module()
    module.net, module.log_theta = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.zeros(2))
    optimizer = TrainingPlan(weight_decay=0.5).make_optimizer(module.named_parameters(), 0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(module.log_theta)] == 0.0 and decay[id(module.net.weight)] == 0.5


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"optimizer": "sgd"}, "optimizer"),
        ({"precision": "float16"}, "precision"),
        ({"min_kl_weight": 2.0}, "KL weights"),
        ({"patience": 0}, "patience"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
    ],
)
def test_impossible_options_are_named(options, name):
    with pytest.raises(TrainingError, match=name):
        TrainingPlan(**options)


def test_heuristics():
    assert [default_max_epochs(n) for n in (100, 20_000, 100_000, 10**9)] == [400, 400, 80, 1]
    assert [default_kl_warmup(n) for n in (400, 80, 1, 5000)] == [200, 40, 1, 400]


def test_split_covers_each_cell_once():
    train, validation = split_cells(101, 0.9, None, np.random.default_rng(0))
    assert len(train) == 91 and sorted([*train, *validation]) == list(range(101))
    with pytest.raises(TrainingError, match="train_size is 1.5"):
        split_cells(10, 1.5, None, np.random.default_rng(0))
    with pytest.raises(TrainingError, match=r"rows 12.*0\.\.9"):
        chosen_rows([1, 12], 10, "rows")


def extra_trainer(x, terms):
    (_, trainer), steps = make(x, max_epochs=3), iter(range(1000))
    trainer.elbo.extra_terms = lambda cells, guide: terms(next(steps))
    return trainer


def test_extra_terms_are_summed_by_name_and_are_no_part_of_validation():
    def terms(step):
        names = ("one", "hundred") if step % 2 else ("hundred", "one")
        return {name: torch.tensor({"one": 1.0, "hundred": 100.0}[name]) for name in names}

    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    trainer = extra_trainer(x, terms)
    history = trainer.fit(toy_minibatches(x, 8), toy_minibatches(x, 8))
    assert (history["one_train"] == 1.0).all() and (history["hundred_train"] == 100.0).all()
    assert history["elbo_validation"].iloc[-1] < 10


def test_extra_terms_that_come_and_go_are_refused():
    trainer = extra_trainer(torch.randn(16), lambda step: {"some": torch.tensor(1.0)} if step else {})
    with pytest.raises(TrainingError, match="gave 'some' in this step, and nothing in the first"):
        trainer.fit(toy_minibatches(torch.randn(16), 8))


def test_without_progress_there_is_no_bar(monkeypatch):
    """tqdm takes a lock that forks share: a fork killed while it holds it would stop all the others."""

    def refuse(*_, **__):
        raise AssertionError("a bar was made")

    monkeypatch.setattr("tqdm.std.tqdm", refuse)
    monkeypatch.setattr(settings, "progress", False)
    with ProgressBar(3, 0) as bar:
        bar.show({"elbo_train": 1.0})
    monkeypatch.setattr(settings, "progress", True)
    with pytest.raises(AssertionError, match="a bar was made"):
        ProgressBar(3, 0)
