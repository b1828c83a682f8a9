"""What some models learn and answer, as checksums: ``python -m tests.models.reproducing NAME ...`` prints them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys

import numpy as np
import pandas as pd
import torch

import pyrocell
from pyrocell.testing.asking import state_of
from pyrocell.testing.questions import questions
from tests.models.test_contract import CASES


def digest(thing):
    """Say in one number what something holds, to the last bit."""
    found = hashlib.sha256()
    feed(thing, found)
    return found.hexdigest()


def feed(thing, found):
    found.update(type(thing).__name__.encode())
    if isinstance(thing, pd.DataFrame | pd.Series):
        feed(thing.reset_index().to_dict("list"), found)
    elif isinstance(thing, dict):
        for key, value in thing.items():
            found.update(str(key).encode())
            feed(value, found)
    elif isinstance(thing, list | tuple):
        for value in thing:
            feed(value, found)
    elif isinstance(thing, np.ndarray | torch.Tensor):
        found.update(np.ascontiguousarray(thing).tobytes())
    elif dataclasses.is_dataclass(thing) or hasattr(thing, "__dict__"):
        feed(vars(thing), found)
    else:
        found.update(repr(thing).encode())


def told(name):
    """Train a model, and sum up its parameters, its history and every answer."""
    case = CASES[name]
    model = case.train(case.make(seed=3))
    found = {"parameters": digest(state_of(model)), "history": digest(model.history.drop(columns="seconds"))}
    found |= {verb: digest(ask()) for verb, ask in questions(model, case.arguments).items()}
    return found


if __name__ == "__main__":
    pyrocell.settings.progress = False
    print(json.dumps({name: told(name) for name in sys.argv[1:]}))
