"""Checkpoints: all that the next step depends on, so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyrocell import files, settings
from pyrocell.errors import LoadError, SaveError, TrainingError
from pyrocell.infer.sound import check_state, check_stream, with_prefix

if TYPE_CHECKING:
    from pyrocell.infer.trainer import Trainer

__all__ = ["Progress", "leave_checkpoint", "read_checkpoint", "refuse_to_replace", "write_checkpoint"]

# State of the usual optimizers that has an entry for each of a parameter.
_OF_EACH_ENTRY = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, no number")
    return value


@dataclass
class Progress:
    """Where training stands: all that a checkpoint needs beside tensors."""

    epochs_before: int = 0
    """Epochs of the model before this training."""
    epoch: int = 0
    step: int = 0
    best: float = math.inf
    best_epoch: int = -1
    stale: int = 0
    bad_in_a_row: int = 0
    within: int = 0
    """Steps of the present epoch that are taken: above zero where training was interrupted between them."""
    tally: dict[str, Any] = field(default_factory=dict)
    """What they added up to."""
    seconds: float = 0.0
    """How long they took."""
    culprits: list[str] = field(default_factory=list)
    """What was not finite in the steps that were skipped: each once, the first few."""
    rows: list[dict[str, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values: ``null`` for what is not finite, which JSON has no word for."""
        rows = [{name: _or_null(value) for name, value in row.items()} for row in self.rows]
        return {**vars(self), "best": _or_null(self.best), "rows": rows}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Progress:
        """Return what a record says, each entry of the kind that it has here.

        Parameters
        ----------
        record
            Of a checkpoint.

        Raises
        ------
        TypeError, ValueError
            If it is damaged.
        """
        found = cls(**record)
        found.best = math.inf if found.best is None else found.best
        found.rows = [
            {name: math.nan if value is None else value for name, value in row.items()} for row in found.rows
        ]
        for name, default in vars(cls()).items():
            value = getattr(found, name)
            if isinstance(default, float):
                _number(name, value)
            elif type(value) is not type(default):
                raise TypeError(f"progress: {name} is {value!r}")
            if isinstance(value, int) and value < min(default, 0):
                raise ValueError(f"progress: {name} is {value}")
        if not all(isinstance(name, str) for name in found.culprits):
            raise TypeError("progress: culprits are not all names")
        for row in found.rows:
            for name, value in row.items():
                _number(name, value)
            if missing := {"epoch", "skipped_steps"} - set(row):
                raise ValueError(f"progress: a row of the history lacks {sorted(missing)}")
        return found


def refuse_to_replace(folder: str | Path | None, resume: str | Path | None) -> None:
    """Keep the checkpoint of another training: a new one would write over it, at the first interruption.

    Parameters
    ----------
    folder
        Where checkpoints of the training are to be written, if anywhere.
    resume
        Folder of the checkpoint that it goes on from, if any.

    Raises
    ------
    TrainingError
        If there is a checkpoint that the training does not go on from.
    """
    if folder is None or not files.holds(folder, "checkpoint"):
        return
    if resume is None or Path(resume).resolve() != Path(folder).resolve():
        raise TrainingError(
            f"{folder} holds the checkpoint of another training, which this one would write over. To go on from it, "
            f"give resume={str(folder)!r}; to start anew, choose another folder for TrainingPlan.checkpoint, or "
            "remove that one."
        )


def write_checkpoint(trainer: Trainer, folder: str | Path) -> None:
    """Write parameters, optimizer, random states, history and the best weights so far."""
    tensors = {f"module.{name}": t for name, t in trainer.module.state_dict().items()}
    tensors |= {f"best.{name}": t for name, t in (trainer.best_state or {}).items()}
    tensors["stream"] = torch.get_rng_state()  # the model's stream is active while it trains
    scalars: dict[str, Any] = {}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                scalars[f"{index}.{key}"] = value
    record = {
        "kind": "checkpoint",
        "options": trainer.options,
        "progress": trainer.progress.to_json(),
        # Within an epoch that at its beginning: the same order comes again, and the steps taken are left out.
        "shuffle": trainer.order_of_epoch if trainer.progress.within else trainer.shuffle.bit_generator.state,
        "optimizer": {"scalars": scalars, "lr": [float(g["lr"]) for g in trainer.optimizer.param_groups]},
        "plateau": {name: None if value == math.inf else value for name, value in _plateau(trainer).items()},
    }
    files.write_folder(folder, "checkpoint", tensors, record)


def leave_checkpoint(trainer: Trainer) -> None:
    """Write a checkpoint before a training is interrupted, if there is a place for one, and log what there is."""
    folder, epoch = trainer.plan.checkpoint, trainer.progress.epoch
    if folder is None:
        settings.logger.warning("epoch %d: training was interrupted; nothing was written", epoch)
        return
    try:
        write_checkpoint(trainer, folder)
    except SaveError as error:  # the request to end goes first, and would hide it
        settings.logger.error(
            "epoch %d: training was interrupted, and there is NO checkpoint of this step; one of before stays. %s",
            epoch,
            error,
        )
        return
    settings.logger.warning("epoch %d: training was interrupted; go on with resume=%r", epoch, str(folder))


def read_checkpoint(trainer: Trainer, folder: str | Path) -> None:
    """Put a trainer where the checkpoint was written.

    Raises
    ------
    LoadError
        If the checkpoint is unreadable or belongs to another model or other options.
    """
    tensors, record = files.read_folder(folder, "checkpoint")
    _check_options(folder, record.get("options"), trainer.options)
    try:
        # What belongs to the model comes last, when all else has turned out sound: a refusal leaves it as it is.
        state, best = with_prefix(tensors, "module."), with_prefix(tensors, "best.")
        for found in (state, best) if best else (state,):
            check_state("The tensors do not fit: the model has other parts or sizes", found, trainer.module)
        check_stream(tensors["stream"])
        progress = Progress.from_json(record["progress"])
        if progress.within:
            trainer.tally.resume(progress.tally)
        _load_optimizer(trainer.optimizer, with_prefix(tensors, "optimizer."), record["optimizer"])
        trainer.plateau.load_state_dict(_plateau_from_json(trainer, record["plateau"]))
        trainer.shuffle.bit_generator.state = record["shuffle"]
    except LoadError as error:
        raise LoadError(f"The checkpoint in {folder} cannot be used. {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise LoadError(
            f"The checkpoint in {folder} is damaged ({error!r}); start anew without resume."
        ) from error
    trainer.module.load_state_dict(state)
    trainer.best_state, trainer.progress, trainer.stream.state = best or None, progress, tensors["stream"]
    trainer.last_finite = trainer.snapshot()


def _check_options(folder: str | Path, written: Any, now: dict[str, Any]) -> None:
    """Raise a LoadError that names the options which differ."""
    if not isinstance(written, dict):
        raise LoadError(
            f"The checkpoint in {folder} lacks its options; it is damaged. Start anew without resume."
        )
    unknown = {"data"} if None in (written.get("data"), now.get("data")) else set()  # without hash_data
    differ = sorted(name for name in {*written, *now} - unknown if written.get(name) != now.get(name))
    if differ:
        then, here = ({name: options.get(name) for name in differ} for options in (written, now))
        raise LoadError(
            f"The checkpoint in {folder} was written with {then}, this call has {here}. Give the same options to go on "
            "exactly ('data' is the SHA-256 of the data), or start anew without resume."
        )


def _plateau(trainer: Trainer) -> dict[str, Any]:
    state = trainer.plateau.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, int | float | list)}


def _plateau_from_json(trainer: Trainer, record: dict[str, Any]) -> dict[str, Any]:
    """Return what belongs to the plateau, each of the kind that it has."""
    now = _plateau(trainer)
    found = {name: record[name] for name in now}
    found |= {name: math.inf for name in ("best", "mode_worse") if name in found and found[name] is None}
    for name, value in found.items():
        known = int | float if isinstance(now[name], int | float) else list
        if not isinstance(value, known):
            raise TypeError(f"plateau: {name} is {value!r}")
    return found


def _load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], record: dict[str, Any]
) -> None:
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in {**tensors, **record["scalars"]}.items():
        index, name = key.split(".", 1)
        shape = parameters[int(index)].shape if name in _OF_EACH_ENTRY else None
        if shape is not None and (not isinstance(value, torch.Tensor) or value.shape != shape):
            raise ValueError(f"optimizer: {key} does not fit a parameter of {tuple(shape)}")
        state["state"].setdefault(int(index), {})[name] = value
    for group, lr in zip(state["param_groups"], record["lr"], strict=True):
        group["lr"] = _number("lr", lr)
    optimizer.load_state_dict(state)
