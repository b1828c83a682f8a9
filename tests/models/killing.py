"""Trainings that are killed: run as a program, so that what dies is a process.

``python -m tests.models.killing FOLDER N_KILLS SEED`` prints how many of them were resumed to the bits of a training
that nobody disturbed. Each training is a fork of a process of one thread, which has imported everything.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import pyrocell
from pyrocell import SCVI, TrainingPlan, files
from pyrocell.data import synthetic_iid
from pyrocell.errors import LoadError
from pyrocell.infer.trainer import Trainer

N_EPOCHS, N_STEPS = 8, 3
RUN = {"lr": 5e-3, "batch_size": 32, "n_epochs_kl_warmup": 3, "early_stopping": True, "train_size": 0.8}


def make():
    pyrocell.settings.progress, pyrocell.settings.device = False, "cpu"
    adata = synthetic_iid(n_cells=120, n_genes=20, n_proteins=0, n_regions=0, label_effect=1.0, seed=0)
    SCVI.setup_anndata(adata, batch_key="batch")
    return SCVI(adata, n_hidden=8, n_latent=3, gene_likelihood="nb", use_observed_lib_size=False)


def train(model, checkpoint, resume=None):
    plan = TrainingPlan(
        patience=50, lr_plateau=True, lr_patience=1, checkpoint=checkpoint, checkpoint_every=1
    )
    model.train(N_EPOCHS, plan=plan, resume=resume, **RUN)


def bits(model):
    """All that a training decides: parameters, random numbers to come, and the history but for its seconds."""
    parts = {name: value.numpy().tobytes().hex() for name, value in model.module.state_dict().items()}
    parts["stream"] = model.stream.state.numpy().tobytes().hex()
    parts["history"] = model.history.drop(columns="seconds").to_json(double_precision=15)
    return parts


def finish(checkpoint, result):
    """Go on from the last checkpoint, or from the beginning where none was complete, and write down the end."""
    model, began = make(), (checkpoint / "checkpoint.safetensors").exists()
    try:
        train(model, checkpoint, resume=checkpoint)
    except LoadError as error:
        if began or "does not exist" not in str(error):
            raise
        train(model, checkpoint)
    result.write_text(json.dumps({"resumed": began, **bits(model)}))


def die_at_step(n):
    """Kill this process before its n-th step ends."""
    plain, left = Trainer._step, iter(range(n, -1, -1))

    def step(self, cells, weight):
        plain(self, cells, weight)
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer._step = step


def die_in_writing(n):
    """Kill this process in the middle of its n-th file, or between two renames."""
    write, replace, left = files._write, os.replace, iter(range(n, -1, -1))

    def torn(path, content):
        if next(left) == 0:
            with open(path, "wb") as file:
                file.write(content[: len(content) // 2])
                file.flush()
                os.fsync(file.fileno())
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)

    def stopped(source, target):
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    files._write, os.replace = torn, stopped


def in_a_fork(work, *args, kill_after=None):
    """Do some work in a process of its own; say whether it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(*args)
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"a training failed: {status}"
    return status != 0


def disturbed(how, n, checkpoint):
    {"step": die_at_step, "write": die_in_writing, "time": lambda n: None}[how](n)
    train(make(), checkpoint)


def main(folder, n_kills, seed):
    torch.set_num_threads(1)
    draw, whole = random.Random(seed), folder / "whole.json"
    finish(folder / "undisturbed", whole)  # and what training imports is there
    began = time.perf_counter()
    in_a_fork(finish, folder / "undisturbed again", whole)
    seconds, expected = time.perf_counter() - began, json.loads(whole.read_text())
    found = {"killed": 0, "survived": 0, "resumed": 0, "step": 0, "write": 0, "time": 0}
    while found["killed"] < n_kills:
        checkpoint = folder / f"killed {found['killed']} {draw.random()}"
        how = ("step", "write", "time")[found["killed"] % 3]
        n = draw.randrange(N_EPOCHS * N_STEPS if how == "step" else N_EPOCHS * 4)
        after = draw.uniform(0, seconds) if how == "time" else None
        if not in_a_fork(disturbed, how, n, checkpoint, kill_after=after):
            continue  # it was done before
        in_a_fork(finish, checkpoint, folder / "end.json")
        end = json.loads((folder / "end.json").read_text())
        found["resumed"] += end.pop("resumed")
        same = {key: value == expected[key] for key, value in end.items()}
        found["survived"] += all(same.values())
        found["killed"] += 1
        found[how] += 1
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
