"""Training that is interrupted, killed, or fed with gradients that are not finite: nothing is lost, and it is said."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

import pyrocell
from pyrocell import SCVI, TrainingPlan
from pyrocell.data import synthetic_iid
from pyrocell.errors import LoadError, PyrocellWarning, SaveError, TrainingError
from pyrocell.infer.guard import FiniteGuard
from pyrocell.infer.interruption import Interruption
from pyrocell.infer.trainer import Trainer
from tests.models import killing
from tests.models.killing import bits, make
from tests.test_files import Killed, stop_at

N_STEPS = killing.N_STEPS


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(pyrocell.settings, "progress", False)
    monkeypatch.setattr(pyrocell.settings, "device", "cpu")


def signal_at(monkeypatch, step, number, times=1):
    """Send this process a signal in the middle of a step."""
    plain, left = Trainer._step, iter(range(step, -(10**6), -1))

    def spied(self, cells, weight):
        if next(left) == 0:
            for _ in range(times):
                signal.raise_signal(number)
        plain(self, cells, weight)

    monkeypatch.setattr(Trainer, "_step", spied)


# ------------------------------------------------------------------------------------------------ interruption


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    before, pyrocell.settings.progress = pyrocell.settings.progress, False
    model = make()
    killing.train(model, tmp_path_factory.mktemp("whole"))
    pyrocell.settings.progress = before
    return bits(model)


@pytest.mark.parametrize(
    ("step", "number", "raised"),
    [
        (1, signal.SIGINT, KeyboardInterrupt),
        (N_STEPS - 1, signal.SIGTERM, SystemExit),
        (3 * N_STEPS + 2, signal.SIGINT, KeyboardInterrupt),
        (3 * N_STEPS + 1, signal.SIGTERM, SystemExit),
    ],
)
def test_a_signal_leaves_a_checkpoint_within_the_epoch(
    tmp_path, monkeypatch, caplog, undisturbed, step, number, raised
):
    model = make()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="pyrocell"):
        signal_at(patch, step, number)
        with pytest.raises(raised) as caught:
            killing.train(model, tmp_path)
    if raised is SystemExit:
        assert caught.value.code == 143
    assert "training was interrupted; go on with resume=" in caplog.text
    done = json.loads((tmp_path / "checkpoint.json").read_text())["progress"]
    assert (
        0 < done["within"] <= N_STEPS and done["epoch"] * N_STEPS + done["within"] == done["step"] == step + 1
    )
    assert len(model.history) == done["epoch"]
    assert not model.module.training and model.is_trained == (done["epoch"] > 0)
    if model.is_trained:
        assert np.isfinite(model.get_elbo())
        model.save(tmp_path / "model")
        assert SCVI.load(tmp_path / "model", model.dataset.adata).get_elbo() == model.get_elbo()
    resumed = make()
    killing.train(resumed, tmp_path, resume=tmp_path)
    assert bits(resumed) == undisturbed


def test_twice_interrupted_within_one_epoch(tmp_path, monkeypatch, undisturbed):
    for resume in (None, tmp_path):
        model = make()
        with monkeypatch.context() as patch:
            signal_at(patch, 0, signal.SIGTERM)
            with pytest.raises(SystemExit):
                killing.train(model, tmp_path, resume=resume)
    assert json.loads((tmp_path / "checkpoint.json").read_text())["progress"]["within"] == 2
    resumed = make()
    killing.train(resumed, tmp_path, resume=tmp_path)
    assert bits(resumed) == undisturbed


def test_the_checkpoint_of_another_training_is_not_written_over(tmp_path, monkeypatch):
    """The same script again, without resume: the first interruption would leave nothing of the training before."""
    killing.train(make(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for resume in (None, tmp_path / "elsewhere"):
        model = make()
        with monkeypatch.context() as patch:
            signal_at(patch, 1, signal.SIGTERM)
            with pytest.raises(TrainingError, match=r"another training.*resume=.*another folder"):
                killing.train(model, tmp_path, resume=resume)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        assert not len(model.history) and not len(model.train_indices)
    killing.train(make(), tmp_path, resume=tmp_path / ".." / tmp_path.name)  # the same folder, said otherwise


def test_without_a_place_for_checkpoints_the_model_is_usable_all_the_same(monkeypatch, tmp_path):
    model = make()
    signal_at(monkeypatch, 6, signal.SIGTERM)
    with pytest.raises(SystemExit):
        model.train(9, batch_size=32)
    assert model.is_trained and np.isfinite(model.get_elbo()) and not list(tmp_path.iterdir())


STALE = {"lr": 0.3, "batch_size": 32, "n_epochs_kl_warmup": 0, "early_stopping": True, "train_size": 0.8}


def signal_after_epoch(monkeypatch, is_last):
    """Send this process SIGTERM in the validation of an epoch: the first, or the one that ends the training."""
    plain = Trainer._judge

    def spied(self, row, value):
        plain(self, row, value)
        if (self.progress.stale >= self.plan.patience) if is_last else self.progress.epoch == 0:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_judge", spied)


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_a_signal_at_the_early_stop_keeps_the_best_weights(tmp_path, monkeypatch, with_checkpoint):
    plan = TrainingPlan(patience=2, checkpoint=tmp_path if with_checkpoint else None, checkpoint_every=1000)
    whole, cut = make(), make()
    whole.train(60, plan=TrainingPlan(patience=2), **STALE)
    assert int(whole.history["elbo_validation"].idxmin()) < len(whole.history) - 1 < 59, "nothing is tried"
    with monkeypatch.context() as patch:
        signal_after_epoch(patch, is_last=True)
        with pytest.raises(SystemExit):
            cut.train(60, plan=plan, **STALE)
    assert bits(cut) == bits(whole)
    if with_checkpoint:
        again = make()
        again.train(60, plan=TrainingPlan(patience=2), resume=tmp_path, **STALE)
        assert bits(again) == bits(whole)


def test_a_signal_after_the_last_step_of_an_epoch_leaves_a_checkpoint(tmp_path, monkeypatch, undisturbed):
    plan = TrainingPlan(
        patience=50, lr_plateau=True, lr_patience=1, checkpoint=tmp_path, checkpoint_every=1000
    )
    model, resumed = make(), make()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_judge", lambda self, row, value: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            model.train(killing.N_EPOCHS, plan=plan, **killing.RUN)
    assert len(model.history) == 1, "another epoch was begun"
    assert json.loads((tmp_path / "checkpoint.json").read_text())["progress"]["epoch"] == 1
    killing.train(resumed, tmp_path, resume=tmp_path)
    assert bits(resumed) == undisturbed


def test_handlers_of_the_user_are_called_and_given_back(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        model = make()
        signal_at(monkeypatch, 2, signal.SIGTERM)
        model.train(2, batch_size=32)  # the handler lets it go on
        assert seen == [signal.SIGTERM] and len(model.history) == 2
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_goes_through_at_once(tmp_path, monkeypatch):
    signal_at(monkeypatch, 5, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        killing.train(make(), tmp_path)
    # The checkpoint of the last complete epoch is what there is.
    assert json.loads((tmp_path / "checkpoint.json").read_text())["progress"]["within"] == 0


def test_a_handler_that_lets_training_go_on_hears_of_each_signal_and_later_ones_wait(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with Interruption() as held:
            for _ in range(2):
                signal.raise_signal(signal.SIGTERM)
            assert len(seen) == 1 and held.asked == signal.SIGTERM  # the second went through, the first waits
            held.deliver()
            assert len(seen) == 2 and held.asked is None
            signal.raise_signal(signal.SIGTERM)
            assert len(seen) == 2, "a later signal was not held back"
        assert len(seen) == 3
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_a_second_signal_raises_is_raised_once():
    with pytest.raises(KeyboardInterrupt) as caught, Interruption() as held:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    assert held.asked is None and caught.value.__context__ is None


def test_ignored_signals_and_other_threads_are_left_alone():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with Interruption() as held:
            signal.raise_signal(signal.SIGTERM)
            assert held.asked is None and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    handlers = []

    def elsewhere():
        with Interruption():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


def test_a_signal_after_the_last_step_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt), Interruption():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(SystemExit), Interruption():
        signal.raise_signal(signal.SIGTERM)
        raise ValueError("and an error on top of it does not keep the process from ending")


def test_a_damaged_place_within_the_epoch_is_refused(tmp_path):
    make().train(1, batch_size=32, n_epochs_kl_warmup=1, plan=TrainingPlan(checkpoint=tmp_path))
    path = tmp_path / "checkpoint.json"
    text = path.read_text()
    for damage in ({"within": 2, "tally": {}}, {"within": 2, "tally": None}, {"within": "x"}, {"within": -1}):
        record = json.loads(text)
        record["progress"] |= damage
        path.write_text(json.dumps(pyrocell.files.sealed(record)))
        with pytest.raises(LoadError, match="damaged"):
            make().train(2, batch_size=32, n_epochs_kl_warmup=1, resume=tmp_path)


def test_a_checkpoint_is_strict_json(tmp_path):
    """Before warm-up is over there is no best epoch yet; an epoch of skipped steps alone has no means."""
    run = {"lr": 5e-3, "batch_size": 200, "train_size": 1.0, "n_epochs_kl_warmup": 2}
    model = make()
    spoil(model, {0})
    with pytest.warns(PyrocellWarning, match="skipped"):
        model.train(1, plan=TrainingPlan(checkpoint=tmp_path), **run)

    def never(word):
        raise AssertionError(f"{word} is no JSON")

    record = json.loads((tmp_path / "checkpoint.json").read_text(), parse_constant=never)
    assert record["progress"]["best"] is None and record["plateau"]["best"] is None
    assert record["progress"]["rows"][0]["elbo_train"] is None
    again = make()
    with pytest.warns(PyrocellWarning, match="skipped"):
        again.train(3, resume=tmp_path, **run)
    assert again.history["elbo_train"].isna().tolist() == [True, False, False]


def damage(folder, change):
    """Change the record of a checkpoint, and seal it again."""
    path = folder / "checkpoint.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(pyrocell.files.sealed(record)))


def put(part, name, value):
    return lambda record: record[part].__setitem__(name, value)


@pytest.mark.parametrize(
    "change",
    [
        *(
            put("progress", name, "x")
            for name in ("epochs_before", "epoch", "step", "best", "stale", "seconds")
        ),
        *(
            put("progress", name, 1.5)
            for name in ("epoch", "best_epoch", "bad_in_a_row", "culprits", "tally")
        ),
        *(put("progress", name, True) for name in ("epoch", "best")),
        put("progress", "epoch", -1),
        put("progress", "culprits", [3]),
        put("progress", "rows", [3]),
        put("progress", "rows", [{"epoch": 0}]),
        put("progress", "rows", [{"epoch": 0, "skipped_steps": "x"}]),
        put("plateau", "best", "x"),
        put("plateau", "num_bad_epochs", {}),
        put("optimizer", "lr", ["x"]),
        put("shuffle", "state", {"state": 2**200, "inc": 1}),
    ],
)
def test_a_refused_resume_leaves_the_model_as_it_is(tmp_path, change):
    killing.train(make(), tmp_path)
    damage(tmp_path, change)
    model = make()
    before = bits_of(model)
    with pytest.raises(LoadError, match="damaged"):
        killing.train(model, tmp_path, resume=tmp_path)
    assert bits_of(model) == before


def bits_of(model):
    state = {name: value.numpy().tobytes() for name, value in model.module.state_dict().items()}
    return state, model.stream.state.numpy().tobytes(), len(model.history), len(model.train_indices)


@pytest.mark.parametrize("part", ["module.", "best.", "optimizer.0.exp_avg", "stream"])
def test_tensors_of_a_checkpoint_that_do_not_fit_change_nothing(tmp_path, part):
    killing.train(make(), tmp_path)
    tensors, record = pyrocell.files.read_folder(tmp_path, "checkpoint")
    name = next(name for name in sorted(tensors) if name.startswith(part))
    pyrocell.files.write_folder(tmp_path, "checkpoint", tensors | {name: torch.zeros(7, 3)}, record)
    model = make()
    before = bits_of(model)
    with pytest.raises(LoadError, match=r"does not fit|do not fit|no state of random numbers"):
        killing.train(model, tmp_path, resume=tmp_path)
    assert bits_of(model) == before


# ------------------------------------------------------------------------------------------------ killed


def kill(folder, n_kills, seed):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.models.killing", str(folder), str(n_kills), str(seed)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


needs_fork = pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system cannot fork")


@needs_fork
def test_killed_trainings_are_resumed_to_the_bit(tmp_path):
    found = kill(tmp_path, 3, seed=1)
    assert found["killed"] == found["survived"] == 3
    assert found["resumed"] >= 1, "no kill came after the first checkpoint: nothing was tried"


@needs_fork
@pytest.mark.slow
def test_twenty_killed_trainings_are_resumed_to_the_bit(tmp_path):
    found = kill(tmp_path, 20, seed=2)
    assert found["killed"] == found["survived"] == 20
    assert found["resumed"] >= 12 and min(found[how] for how in ("step", "write", "time")) >= 6


def test_wherever_saving_is_cut_off_a_whole_model_is_left_with_its_own_data(tmp_path):
    """Two models of two data sets: parameters, record and data of one are never read with those of the other."""
    models = []
    for seed in (0, 1):
        adata = synthetic_iid(n_cells=40, n_genes=20, n_proteins=0, n_regions=0, seed=seed)
        SCVI.setup_anndata(adata, batch_key="batch")
        models.append(SCVI(adata, n_hidden=4, n_latent=2))
        models[-1].train(1)
    told, found = [model.get_elbo() for model in models], []
    for n in range(100):
        models[0].save(tmp_path / f"{n}", save_anndata=True)
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, n, Killed())
            try:
                models[1].save(tmp_path / f"{n}", overwrite=True, save_anndata=True)
            except Killed:
                found.append(told.index(SCVI.load(tmp_path / f"{n}").get_elbo()))
            else:
                break
    assert found == sorted(found) and set(found) == {0, 1} and len(found) > 9, found


# ------------------------------------------------------------------------------------------------ a full disk


def full(monkeypatch, after=0):
    """Let the disk be full when something is written, after some files."""
    write, left = pyrocell.files._write, iter(range(after, -(10**6), -1))

    def fails(path, content):
        if next(left) <= 0:
            write(path, content[:100])
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(pyrocell.files, "_write", fails)


@pytest.mark.parametrize("after", [2, 3])
def test_a_disk_that_fills_up_in_training(tmp_path, monkeypatch, undisturbed, after):
    model = make()
    with monkeypatch.context() as patch:
        full(patch, after)
        with pytest.raises(SaveError, match=r"No space left on device.*free there.*untouched.*Make room"):
            killing.train(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.json", "checkpoint.safetensors"]
    assert len(model.history) == 2 and np.isfinite(model.get_elbo())  # it was in the second epoch's
    resumed = make()
    killing.train(resumed, tmp_path, resume=tmp_path)
    assert bits(resumed) == undisturbed


def test_a_signal_on_a_full_disk_says_that_there_is_no_checkpoint(tmp_path, monkeypatch, caplog):
    model = make()
    killing.train(make(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    plan = TrainingPlan(patience=50, lr_plateau=True, lr_patience=1, checkpoint=tmp_path, checkpoint_every=1)
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, logger="pyrocell"):
        full(patch)
        signal_at(patch, 1, signal.SIGTERM)
        with pytest.raises(SystemExit):
            model.train(killing.N_EPOCHS + 2, plan=plan, resume=tmp_path, **killing.RUN)
    [told] = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "NO checkpoint of this step" in told and "No space left on device" in told
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_signal_does_not_hide_that_training_failed(caplog):
    with caplog.at_level(logging.ERROR, logger="pyrocell"), pytest.raises(SystemExit), Interruption():
        signal.raise_signal(signal.SIGTERM)
        raise SaveError("the disk is full")
    assert "had failed: the disk is full" in caplog.text


def test_data_for_which_there_is_no_room_are_refused_before_they_are_written(tmp_path, monkeypatch):
    """HDF5 brings the process down when the disk fills up while it writes."""
    model = make()
    model.train(1)
    model.save(tmp_path / "model", save_anndata=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    model.train(1)
    nearly = namedtuple("Usage", ["free"])(5000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: nearly)
    monkeypatch.setattr("anndata.io.write_h5ad", None)
    with pytest.raises(SaveError, match=r"No space left for data of 0\.0 MB.*untouched"):
        model.save(tmp_path / "model", overwrite=True, save_anndata=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


# ------------------------------------------------------------------------------------------------ bad steps


def spoil(model, steps):
    """Make the gradient of one parameter infinite in some steps; return its name."""
    name, parameter = next(iter(model.module.named_parameters()))
    count = iter(range(10**6))
    parameter.register_hook(lambda grad: grad * float("inf") if next(count) in steps else grad)
    return name


def test_the_parameter_of_a_bad_gradient_is_named_in_the_warning():
    model = make()
    name = spoil(model, {3, 5})
    with pytest.warns(PyrocellWarning, match=rf"2 training steps were.*'{name}'.*skipped_steps.*lower lr"):
        model.train(3, batch_size=32)
    assert model.history["skipped_steps"].tolist() == [1, 1, 0]
    assert all(value.isfinite().all() for value in model.module.state_dict().values())


def test_with_clipping_too_the_parameter_of_a_bad_gradient_is_named_alone():
    model = make()
    name = spoil(model, {3})
    others = [other for other, _ in model.module.named_parameters() if other != name]
    with pytest.warns(PyrocellWarning, match=rf"1 training step was.*gradients of '{name}'\.") as caught:
        model.train(3, batch_size=32, plan=TrainingPlan(max_grad_norm=1.0))
    assert not any(other in str(caught[0].message) for other in others)


@pytest.mark.parametrize("most", [1e-3, 1e3])
def test_gradients_are_clipped_as_torch_does(most):
    one, two = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    for layer in (one, two):
        layer(torch.ones(4, 3)).square().sum().backward()
    assert FiniteGuard(one, most).is_finite(torch.tensor(0.0))
    torch.nn.utils.clip_grad_norm_(two.parameters(), most)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_gradients_whose_norm_alone_is_infinite_are_skipped_and_said(monkeypatch):
    model = make()
    parameter = next(iter(model.module.parameters()))
    count = iter(range(10**6))
    parameter.register_hook(lambda grad: grad * 0 + 3e38 if next(count) == 1 else grad)
    with pytest.warns(PyrocellWarning, match=r"non-finite norm of the gradient\."):
        model.train(2, batch_size=32, plan=TrainingPlan(max_grad_norm=1.0))


def test_skipped_steps_of_before_a_resume_are_named_too(tmp_path):
    first = make()
    name = spoil(first, {1})
    with pytest.warns(PyrocellWarning, match=name):
        first.train(1, lr=5e-3, batch_size=32, plan=TrainingPlan(checkpoint=tmp_path), n_epochs_kl_warmup=1)
    again = make()
    with pytest.warns(PyrocellWarning, match=rf"1 training step was.*'{name}'"):
        again.train(2, lr=5e-3, batch_size=32, resume=tmp_path, n_epochs_kl_warmup=1)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_repeated_bad_steps_leave_the_best_finite_state(early_stopping, monkeypatch):
    model = make()
    spoil(model, set(range(17, 10**5)))  # in the fifth epoch of four steps
    states, plain = [], Trainer._finish_epoch

    def spied(self, row):
        plain(self, row)
        states.append((row.get("elbo_validation"), self.snapshot()))

    monkeypatch.setattr(Trainer, "_finish_epoch", spied)
    kind = "best" if early_stopping else "last"
    # A learning rate at which the second epoch is not as good as the first.
    with pytest.raises(TrainingError, match=rf"3 steps in a row.*{kind} finite state.*Lower lr"):
        model.train(
            9, lr=0.5, batch_size=27, n_epochs_kl_warmup=0, early_stopping=early_stopping,
            plan=TrainingPlan(max_bad_steps=3),
        )  # fmt: skip
    wanted = min(states, key=lambda s: s[0])[1] if early_stopping else states[-1][1]
    found = model.module.state_dict()
    assert len(states) == 4 and all(torch.equal(value, found[name]) for name, value in wanted.items())
    if early_stopping:
        assert wanted is not states[-1][1], "the last epoch was the best: nothing was tried"
