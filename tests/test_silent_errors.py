"""The page of errors that say nothing names tests that exist, for every defect and every model."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import pyrocell
from pyrocell.testing import CHECKS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/developer/silent_errors.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if re.match(r"\| [A-Z]\w+ \|", line)
]


@cache
def functions_of(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_defect_and_every_model_has_a_row():
    names = [row[0] for row in ROWS]
    assert [name for name in names if re.fullmatch(r"W\d+", name)] == [f"W{i}" for i in range(1, 17)]
    assert [name for name in names if re.fullmatch(r"C\d+", name)] == [f"C{i}" for i in range(1, 19)]
    objects = [getattr(pyrocell, name) for name in pyrocell._OBJECTS]
    models = {
        thing.__name__
        for thing in objects
        if isinstance(thing, type) and issubclass(thing, pyrocell.CellModel)
    } - {"CellModel"}
    assert models <= set(names), f"models without a test of their terms: {sorted(models - set(names))}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_guard_exists(row):
    guards = row[-1]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", guards)
    checks = re.findall(r"contract: (.+?)(?=, contract:|, `|$)", guards)
    assert named or checks, f"{row[0]} is guarded by nothing"
    for path, test in named:
        assert test in functions_of(path), f"{row[0]}: there is no {path}::{test}"
    for check in checks:
        assert check in CHECKS, f"{row[0]}: the contract has no check {check!r}"
