"""Steps from a tape: the same bits as plain ones, or none at all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.distributions import Normal
from torch import nn
from torch.nn import functional

from pyrocell import settings
from pyrocell.data import Cells
from pyrocell.distributions import NonZeros
from pyrocell.errors import PyrocellWarning
from pyrocell.infer import tape
from pyrocell.infer.checkpoint import read_checkpoint
from pyrocell.infer.elbo import Elbo
from pyrocell.infer.plan import TrainingPlan
from pyrocell.infer.streams import RandomStream
from pyrocell.infer.trainer import Trainer
from pyrocell.nn.products import linear
from tests.infer.autoencoder import N_CELLS, N_GENES, N_LATENT, Autoencoder, cells_of, minibatches


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """Record early, and whatever the length of training."""
    monkeypatch.setattr(settings, "progress", False)
    with pyro.validation_enabled(False), tape.recorded_at_once():
        yield


def trainer_of(module: Any, *, extra: Any = None, max_epochs: int = 8, **options: Any) -> Trainer:
    return Trainer(
        Elbo(module.model, module.guide, extra_terms=extra),
        module,
        TrainingPlan(**options),
        stream=RandomStream(0),
        shuffle=np.random.default_rng(0),
        lr=0.02,
        max_epochs=max_epochs,
        n_epochs_kl_warmup=5,
        early_stopping=False,
        steps_per_epoch=4,
    )


def train(make: Callable[[], Any], *, taped: bool, extra: Any = None, **options: Any) -> tuple[Any, Trainer]:
    module = make()
    trainer = trainer_of(module, extra=extra, record_step=taped, **options)
    trainer.fit(minibatches)
    return module, trainer


def assert_same(make: Callable[[], Any], *, works: bool = True, extra: Any = None, **options: Any) -> Trainer:
    """Train with and without tapes: every parameter and running statistic and the history agree to the bit."""
    plain, without = train(make, taped=False, extra=extra, **options)
    module, trainer = train(make, taped=True, extra=extra, **options)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name
    told = [t.progress.rows for t in (without, trainer)]
    for row, other in zip(*told, strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == {
            k: v for k, v in other.items() if k != "seconds"
        }
    assert isinstance(trainer.evaluate, tape.TapedStep)
    assert trainer.evaluate.works is works
    return trainer


def test_training_from_tapes_gives_the_same_bits():
    trainer = assert_same(Autoencoder)
    replays = sorted(each.n_replays for each in trainer.evaluate._tapes.values())
    assert replays == [6, 22]  # 10 and 20 cells


def test_a_replayed_step_does_not_run_the_model():
    module, _ = train(Autoencoder, taped=True)
    plain, _ = train(Autoencoder, taped=False)
    # For either size one plain step, one recorded and taken again, then comparisons at 1, 2, 4, 8, 16 and at 1, 2, 4
    # replays and at the last step.
    assert len(plain.calls) == 32
    assert len(module.calls) == 2 + 4 + 5 + 4


@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 0.1}, {"optimizer": "adamw"}, {"precision": "bfloat16"}]
)
def test_options_act_on_replayed_steps_too(options):
    assert_same(Autoencoder, **options)


def test_terms_beside_the_bound_are_replayed():
    def penalty(cells: Any, sites: Any) -> dict[str, torch.Tensor]:
        return {"far": 0.1 * sites["z"]["value"].square().mean()}

    assert "far_train" in assert_same(Autoencoder, extra=penalty).progress.rows[-1]


def test_frozen_entries_stay_frozen():
    class HalfFrozen(Autoencoder):
        def __init__(self) -> None:
            super().__init__()
            self.decode.requires_grad_(False)
            self.weight.register_hook(
                lambda grad: grad.masked_fill(torch.arange(N_GENES).unsqueeze(1) < 6, 0.0)
            )
            self.idle = nn.Parameter(torch.ones(2))

    assert_same(HalfFrozen)


def test_one_gradient_of_two_parameters_is_clipped_once():
    class Twins(Autoencoder):
        def __init__(self) -> None:
            super().__init__()
            self.second_bias = nn.Parameter(torch.zeros(8))

        def seen(self, counts: torch.Tensor) -> torch.Tensor:
            return super().seen(counts)

        def guide(self, cells: Any) -> None:
            with pyro.plate("cells", cells.n_total, subsample=cells.rows, dim=-1):
                sums = linear(self.seen(cells.counts), self.weight, self.bias) + self.second_bias
                pyro.sample("z", Normal(self.location(self.hidden(sums)), 0.5).to_event(1))

    assert_same(Twins, max_grad_norm=0.01)


def test_bad_steps_are_skipped_as_plain_ones_are():
    class Explodes(Autoencoder):
        def seen(self, counts: torch.Tensor) -> torch.Tensor:
            seen = super().seen(counts)
            return torch.where(counts.sum() % 4 == 0, torch.nan, 1.0) * seen

    with pytest.warns(PyrocellWarning, match="skipped"):
        trainer = assert_same(Explodes, max_bad_steps=1000)
    assert sum(row["skipped_steps"] for row in trainer.progress.rows) > 3


def test_resume_from_within_tapes_is_exact(tmp_path):
    whole, _ = train(Autoencoder, taped=True, checkpoint=tmp_path / "whole")
    first = trainer_of(Autoencoder(), checkpoint=tmp_path / "half", checkpoint_every=5)
    first.max_epochs = 5
    first.fit(minibatches)
    module = Autoencoder()
    second = trainer_of(module, checkpoint=tmp_path / "half")
    read_checkpoint(second, tmp_path / "half")
    second.fit(minibatches)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


# ------------------------------------------------------------------------------------------------ what no tape can hold


class ReadsAValue(Autoencoder):
    def seen(self, counts: torch.Tensor) -> torch.Tensor:
        return super().seen(counts) * (1.0 if counts.sum().item() % 2 else 0.5)


class BranchesOnAValue(Autoencoder):
    def seen(self, counts: torch.Tensor) -> torch.Tensor:
        seen = super().seen(counts)
        return seen if counts.sum() % 2 == 0 else -seen


class ChoosesCells(Autoencoder):
    def guide(self, cells: Any) -> None:
        super().guide(cells)
        large = cells.library[cells.library > 5.0]
        pyro.factor("large", 0.01 * self.bias.sum() * len(large), has_rsample=True)


class GoesThroughNumpy(Autoencoder):
    def seen(self, counts: torch.Tensor) -> torch.Tensor:
        return super().seen(counts) * float(counts.numpy().mean())


class WritesElsewhere(Autoencoder):
    def __init__(self) -> None:
        super().__init__()
        self.kept = [torch.zeros(())]

    def seen(self, counts: torch.Tensor) -> torch.Tensor:
        self.kept[0].add_(1.0)
        return super().seen(counts) / self.kept[0]


class Counts(Autoencoder):
    """Does something else from its hundredth step on, and counts them itself."""

    n_steps = 0

    def seen(self, counts: torch.Tensor) -> torch.Tensor:
        self.n_steps += 1
        return super().seen(counts) * (2.0 if self.n_steps > 100 else 1.0)


class NormalisesElsewhere(Autoencoder):
    def __init__(self) -> None:
        super().__init__()
        self.statistics = [torch.zeros(N_GENES), torch.ones(N_GENES)]

    def seen(self, counts: torch.Tensor) -> torch.Tensor:
        return functional.batch_norm(super().seen(counts), *self.statistics, training=True)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ReadsAValue, "get value out of a tracing tensor"),
        (BranchesOnAValue, "get value out of a tracing tensor"),
        (ChoosesCells, "depends on values"),
        (GoesThroughNumpy, "gave other numbers"),
        (WritesElsewhere, "neither new nor a buffer"),
        (NormalisesElsewhere, "neither new nor a buffer"),
        (Counts, "changes Python's values 'n_steps'"),
    ],
)
def test_what_depends_on_values_is_never_replayed(model, reason, caplog):
    with caplog.at_level(logging.INFO, logger=settings.logger.name):
        if model in (WritesElsewhere, NormalisesElsewhere, Counts):
            train(model, taped=True)  # it was run once in vain, and what it keeps nobody else can restore
        else:
            assert_same(model, works=False)
    assert reason in caplog.text


class Switches(Autoencoder):
    """A model whose Python changes its ways when somebody sets ``strength``."""

    strength = 1.0

    def seen(self, counts: torch.Tensor) -> torch.Tensor:
        return super().seen(counts) * self.strength


def test_a_model_that_changes_its_ways_is_found_out_at_the_next_comparison():
    module = Switches()
    trainer = trainer_of(module, max_epochs=3)
    trainer.fit(minibatches)
    assert trainer.evaluate.works
    module.strength, trainer.max_epochs = 2.0, 8
    with pytest.warns(PyrocellWarning, match=r"after 8 replays .*record_step=False"):
        trainer.fit(minibatches)
    assert not trainer.evaluate.works


@pytest.mark.parametrize("late", [130, 395])
def test_no_change_stays_unnoticed(late):
    """Comparisons are never more than 128 replays apart, and the last step is one."""
    module = Switches()
    trainer = trainer_of(module, max_epochs=100)
    add = trainer.tally.add

    def add_and_change(terms: Any) -> None:
        add(terms)
        if trainer.progress.step == late:
            module.strength = 2.0

    trainer.tally.add = add_and_change
    with pytest.warns(PyrocellWarning, match="the two differ"):
        trainer.fit(minibatches)


def test_tapes_are_compared_often():
    due = [n for n in range(1, 600) if tape._is_due(n)]
    assert due == [1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512]


def test_a_gradient_that_is_a_buffer_leaves_it_alone():
    class GivesABuffer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
            ctx.kept = kept
            return (x * kept).sum()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
            return ctx.kept, None

    class Aliases(Autoencoder):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.full((8,), 100.0))
            self.pulled = nn.Parameter(torch.zeros(8))  # by nothing else: its gradient is the buffer itself

    def pull(cells: Any, sites: Any) -> dict[str, torch.Tensor]:
        return {"pull": GivesABuffer.apply(module_of["now"].pulled, module_of["now"].kept)}

    module_of: dict[str, Any] = {}

    def make() -> Any:
        module_of["now"] = Aliases()
        return module_of["now"]

    assert_same(make, extra=pull, max_grad_norm=0.1)
    assert module_of["now"].kept.tolist() == [100.0] * 8


@pytest.mark.parametrize("share", [0.24, 0.25, 0.26])
def test_both_sides_of_a_choice_have_a_tape(share):
    """Products read non-zeros alone where they are few: some minibatches are on this side of it, some on the other."""
    drawn = np.random.default_rng(0).random((160, 600)) < share

    def many(rng: np.random.Generator | None) -> Iterator[Cells]:
        for rows in np.split(rng.permutation(160), 8):
            there = np.nonzero(drawn[rows])
            index = NonZeros.of_entries(*there, np.ones(len(there[0]), np.float32), n_rows=20, n_columns=600)
            library = torch.from_numpy(drawn[rows].sum(1, keepdims=True).astype(np.float32))
            yield Cells({"counts": index, "library": library}, torch.from_numpy(rows), 160)

    class Wide(Autoencoder):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((600, 8), 0.01))
            self.decode = nn.Linear(N_LATENT, 600)
            self.log_theta = nn.Parameter(torch.zeros(600))

    modules = [Wide(), Wide()]
    with torch.random.fork_rng():
        modules[1].load_state_dict(modules[0].state_dict())
    for module, record in zip(modules, (False, True), strict=True):
        trainer = trainer_of(module, max_epochs=12, record_step=record)
        trainer.fit(many)
    assert trainer.evaluate.works
    assert len(trainer.evaluate._tapes) == (2 if share == 0.25 else 1)
    for name, value in modules[0].state_dict().items():
        assert torch.equal(value, modules[1].state_dict()[name]), name


def test_an_error_of_the_model_is_raised_as_its_own():
    class Fails(Autoencoder):
        def guide(self, cells: Any) -> None:
            super().guide(cells)
            if len(self.calls) > 1:
                raise ZeroDivisionError("of the model")

    with pytest.raises(ZeroDivisionError, match="of the model"):
        train(Fails, taped=True)


def test_short_trainings_are_not_recorded(monkeypatch):
    with monkeypatch.context() as patch:  # undone before what the fixture undoes
        patch.setattr(tape._when, "steps_to_come", 200)
        _, short = train(Autoencoder, taped=True)
        _, long = train(Autoencoder, taped=True, max_epochs=80)
    assert not short.evaluate._tapes
    assert len(long.evaluate._tapes) == 1  # the smaller last minibatch comes too seldom


def test_a_minibatch_that_comes_again_is_not_replayed():
    kept = [cells_of(np.arange(N_CELLS))]
    trainer = trainer_of(Autoencoder())
    trainer.fit(lambda _: iter(kept))
    assert not trainer.evaluate._tapes
