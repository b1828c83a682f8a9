"""The learning rate falls as the formula says, step by step, and nobody else's learning rate is touched."""

from __future__ import annotations

import numpy as np
import pyro
import pytest
import torch

from pyrocell import settings
from pyrocell.errors import LoadError, TrainingError
from pyrocell.infer.checkpoint import read_checkpoint
from pyrocell.infer.elbo import Elbo
from pyrocell.infer.plan import TrainingPlan
from pyrocell.infer.schedule import Decay
from pyrocell.infer.streams import RandomStream
from pyrocell.infer.trainer import Trainer
from tests.infer.toys import Conjugate, toy_minibatches

N_EPOCHS, N_STEPS = 4, 5


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(settings, "progress", False)
    with pyro.validation_enabled(False):  # as models train
        yield


def sgd(*rates):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups)


def rates_of(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (1.0, [1 - step / 20 for step in range(20)]),
        (0.5, [1.0] * 10 + [1 - step / 10 for step in range(10)]),
        (0.1, [1.0] * 18 + [1.0, 0.5]),
        (0.05, [1.0] * 20),
        (0.0, [1.0] * 20),
    ],
)
def test_factors_are_a_straight_line_to_zero_after_the_last_step(share, expected):
    decay = Decay(sgd(1.0), share, max_epochs=N_EPOCHS, steps_per_epoch=N_STEPS)
    assert [decay.factor(step) for step in range(20)] == pytest.approx(expected)


def test_each_group_falls_from_its_own_rate():
    optimizer = sgd(0.3, 0.01)
    decay = Decay(optimizer, 0.5, max_epochs=N_EPOCHS, steps_per_epoch=N_STEPS)
    decay.set_rates(15)
    assert rates_of(optimizer) == pytest.approx([0.15, 0.005])
    decay.set_rates(2)  # the step alone decides
    assert rates_of(optimizer) == pytest.approx([0.3, 0.01])


def test_without_decay_rates_belong_to_others():
    optimizer = sgd(0.3)
    decay = Decay(optimizer, 0.0, max_epochs=N_EPOCHS, steps_per_epoch=N_STEPS)
    optimizer.param_groups[0]["lr"] = 0.2
    decay.set_rates(19)
    assert rates_of(optimizer) == [0.2]


class Noting(torch.optim.SGD):
    """SGD that notes the learning rate of each step."""

    def __init__(self, groups, seen):
        super().__init__(groups, lr=0.02)
        self.seen = seen

    def step(self, closure=None):
        self.seen.append(self.param_groups[0]["lr"])
        return super().step(closure)


def make(plan, max_epochs=N_EPOCHS):
    toy = Conjugate(0.0, exact=False)
    trainer = Trainer(
        Elbo(toy.model, toy.guide), toy, plan, stream=RandomStream(0), shuffle=np.random.default_rng(0),
        lr=0.02, max_epochs=max_epochs, n_epochs_kl_warmup=0, early_stopping=False, steps_per_epoch=N_STEPS,
    )  # fmt: skip
    return toy, trainer


def minibatches():
    x = 1.5 + torch.randn(100, generator=torch.Generator().manual_seed(123))
    return toy_minibatches(x, 20)  # 5 of them


def test_the_trainer_takes_each_step_at_its_rate():
    seen = []
    _, trainer = make(TrainingPlan(lr_decay=0.5, optimizer=lambda groups: Noting(groups, seen)))
    history = trainer.fit(minibatches())
    assert seen == pytest.approx([0.02] * 10 + [0.02 * (1 - step / 10) for step in range(10)])
    assert history["lr"].tolist() == pytest.approx([0.02, 0.02, 0.02 * 0.6, 0.02 * 0.1])  # of the last step


def test_resume_in_the_middle_of_the_fall(tmp_path, monkeypatch):
    """Where an interruption came within an epoch, the steps after it are those of an undisturbed training."""
    plan = TrainingPlan(lr_decay=0.8)
    whole, trainer = make(plan)
    straight = trainer.fit(minibatches())
    _, cut = make(TrainingPlan(lr_decay=0.8, checkpoint=tmp_path))
    step = cut._step

    def interrupted(cells, weight):
        step(cells, weight)
        if cut.progress.step == 12:  # the third step of the third epoch
            cut.interruption.asked = 2

    monkeypatch.setattr(cut, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cut.fit(minibatches())
    resumed, again = make(plan)
    read_checkpoint(again, tmp_path)
    assert again.progress.within == 3
    history = again.fit(minibatches())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert history["lr"].equals(straight["lr"]) and history["elbo_train"].equals(straight["elbo_train"])


def test_a_fall_belongs_to_one_number_of_epochs(tmp_path):
    _, first = make(TrainingPlan(lr_decay=0.5, checkpoint=tmp_path))
    first.fit(minibatches())
    for plan, max_epochs in (
        (TrainingPlan(lr_decay=0.5), 8),
        (TrainingPlan(), 4),
        (TrainingPlan(lr_decay=0.4), 4),
    ):
        _, second = make(plan, max_epochs)
        with pytest.raises(LoadError, match="lr_decay|max_epochs"):
            read_checkpoint(second, tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr_decay": -0.1}, "lr_decay is -0.1"),
        ({"lr_decay": 1.5}, "lr_decay is 1.5"),
        ({"lr_decay": float("nan")}, "lr_decay is nan"),
        ({"lr_decay": 0.5, "lr_plateau": True}, "lr_decay is 0.5 and lr_plateau is on"),
    ],
)
def test_impossible_schedules_are_named(options, said):
    with pytest.raises(TrainingError, match=said):
        TrainingPlan(**options)
