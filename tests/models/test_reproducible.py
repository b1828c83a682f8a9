"""The same seed gives the same bits in another process: parameters, latents, tables of differential expression."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.models import reproducing
from tests.models.test_contract import CASES

FEW = ["SCVI"]


def elsewhere(names, hash_seed):
    """Ask another process, in which sets and dicts of text have another order.

    Sums depend on the number of threads, which scanpy's UMAP changes for the process of the tests.
    """
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-m", "tests.models.reproducing", *names],
        cwd=Path(__file__).parents[2],
        env=os.environ | threads | {"PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def compare(one, two):
    different = [
        f"{name}: {what}" for name in one for what in one[name] if one[name][what] != two[name][what]
    ]
    assert not different, different
    assert {"parameters", "history", "get_elbo"} <= set(one["SCVI"])
    assert {"get_latent_representation", "differential_expression", "manifest"} <= set(one["SCVI"])


def test_two_processes_agree_to_the_bit():
    compare({name: reproducing.told(name) for name in FEW}, elsewhere(FEW, hash_seed=12345))


@pytest.mark.slow
def test_two_processes_agree_to_the_bit_on_every_model():
    compare(*(elsewhere(list(CASES), hash_seed) for hash_seed in (1, 2)))


def test_the_digest_sees_one_bit():
    x = np.linspace(0, 1, 5)
    for one, two in (
        (x, np.nextafter(x, 2)),
        (pd.DataFrame({"a": x}), pd.DataFrame({"a": np.nextafter(x, 2)})),
        ({"a": [1, (2.0,)]}, {"a": [1, (np.nextafter(2.0, 3),)]}),
        ({"a": 1}, {"b": 1}),
        (pd.Series(x), pd.Series(x, index=list("abcde"))),
    ):
        assert reproducing.digest(one) == reproducing.digest(one) != reproducing.digest(two)
