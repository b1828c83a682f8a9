"""The benchmarks' own arithmetic, and the check against scvi-tools: it must be able to fail."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Import a file of ``benchmarks/`` by name, and forget it and its siblings afterwards."""
    names = {path.stem for path in FOLDER.glob("*.py")}
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def check(module, monkeypatch):
    check = module("check")
    few = check.simulate(20, 10, density=0.5)
    monkeypatch.setattr(check, "simulate", lambda *_: few)  # the workers of these tests count nothing
    peer = replace(check.own_side(), name="scvi-tools")
    monkeypatch.setattr(check, "peer_side", lambda *_, **__: peer)
    return check


def result(*, seconds: float, peak: int = 0) -> dict:
    """What a worker prints, with all stages of one length."""
    stages = ("train", "latent", "de_groups")
    return {
        "seconds": {stage: [seconds] for stage in stages},
        "cpu_seconds": {stage: [seconds] for stage in stages},
        "epoch_seconds": [seconds, seconds],
        "peak_bytes": {"all": peak, "train": peak},
        "baseline_bytes": 2**20,
        "errors": {},
    }


def test_a_ratio_falls_when_it_is_a_third_below_the_stored_one(check):
    stored = {"training": 3.0, "latent": 1.5}
    assert check.fallen({"training": 2.01, "latent": 1.01}, stored) == []
    assert check.fallen({"training": 30.0, "latent": 1.5}, stored) == []
    (complaint,) = check.fallen({"training": 1.99, "latent": 1.5}, stored)
    assert "training" in complaint and "1.99" in complaint and "3.00" in complaint
    assert len(check.fallen({"training": 0.1, "latent": 0.1}, stored)) == 2


def test_a_ratio_that_is_not_a_number_has_fallen(check):
    assert check.fallen({"training": float("nan")}, {"training": 3.0})


def test_a_ratio_that_is_no_longer_measured_is_not_passed_over(check):
    with pytest.raises(ValueError, match=r"measured \['training'\], stored \['latent', 'training'\]"):
        check.fallen({"training": 3.0}, {"training": 3.0, "latent": 1.5})


def test_the_stored_values_are_those_that_the_check_measures(check):
    stored = json.loads(check.EXPECTED.read_text())
    assert set(stored["ratios"]) == {metric.title for metric in check.METRICS}
    assert all(value > 0 for value in stored["ratios"].values())
    assert stored["machine"]["processor"] and "scvi-tools==1.4.2" in stored["machine"]["peer"]


@pytest.fixture
def run(check, monkeypatch, tmp_path):
    """Run the check with stored values, and with workers that take as long as told."""

    def call(stored: dict[str, float], peer_seconds: list[float | None], repeats: int = 1) -> int:
        (tmp_path / "expected.json").write_text(json.dumps({"ratios": stored}))
        told = iter(peer_seconds)

        def pairs(case, sides, job, options):
            seconds = next(told)
            peer = {"failure": "no result within 9 s"} if seconds is None else result(seconds=seconds)
            return {"pyrocell": [result(seconds=1.0)], "scvi-tools": [peer]}

        monkeypatch.setattr(check._runs, "run_pairs", pairs)
        arguments = ["--expected", str(tmp_path / "expected.json"), "--repeats", str(repeats)]
        return check.main([*arguments, "--json", str(tmp_path / "found.json")])

    return call


def test_the_check_fails_on_a_doctored_stored_value(check, run, capsys):
    stored = {metric.title: 3.0 for metric in check.METRICS}
    assert run(stored, [3.0]) == 0
    assert run(stored | {"latent": 6.0}, [3.0, 3.0]) == 1
    printed = capsys.readouterr().out
    assert "FELL by more than a third: latent: scvi-tools takes 3.00 times" in printed and "6.00" in printed


def test_a_ratio_that_fell_once_is_measured_again(check, run):
    stored = {metric.title: 3.0 for metric in check.METRICS}
    assert run(stored, [1.0, 2.9]) == 0
    assert run(stored, [1.0, 1.5]) == 1


def test_a_ratio_has_to_fall_twice(check, run, capsys):
    stored = {metric.title: 3.0 for metric in check.METRICS}
    assert run(stored, [1.0, None]) == 0
    assert "skipped" in capsys.readouterr().out, "one measurement may be a disturbance"
    assert run(stored, [3.0, None], repeats=2) == 0, "the first pair counts"
    assert run(stored, [1.0, None, 1.0, None], repeats=2) == 1


def test_without_a_peer_the_check_is_skipped_by_name(check, monkeypatch, capsys, tmp_path):
    def refuse(*_, **__):
        raise subprocess.CalledProcessError(1, ["pip", "install", "scvi-tools"])

    monkeypatch.setattr(check, "peer_side", refuse)
    assert check.main(["--peer-env", str(tmp_path / "none"), "--json", str(tmp_path / "found.json")]) == 0
    assert "skipped: the environment of scvi-tools could not be made" in capsys.readouterr().out


def test_without_time_the_check_is_skipped_by_name(check, capsys, tmp_path):
    assert check.main(["--limit", "100", "--json", str(tmp_path / "found.json")]) == 0
    assert "s are left of 100, 120 are needed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("side", "failure", "status"),
    [
        ("pyrocell", "no result within 10 s", 1),
        ("pyrocell", "exit status 1", 1),
        ("scvi-tools", "exit status 1", 1),
        ("scvi-tools", "no result within 10 s", 0),
    ],
)
def test_only_a_slow_peer_is_excused(check, monkeypatch, tmp_path, side, failure, status):
    found = {
        "pyrocell": [result(seconds=1.0)],
        "scvi-tools": [result(seconds=3.0)],
        side: [{"failure": failure}],
    }
    monkeypatch.setattr(check._runs, "run_pairs", lambda *_: found)
    assert check.main(["--json", str(tmp_path / "found.json")]) == status


def test_pairs_end_when_time_is_up(check, monkeypatch):
    def slow(*_):
        time.sleep(0.2)
        return {"pyrocell": [result(seconds=1.0)], "scvi-tools": [result(seconds=3.0)]}

    monkeypatch.setattr(check._runs, "run_pairs", slow)
    both = [check.own_side(), check.peer_side()]
    options = argparse.Namespace(repeats=9, seed=0, threads=1, deadline=time.monotonic() + 0.3)
    assert check.ratios(None, both, options)["training"] == 3.0
    assert time.monotonic() < options.deadline + 0.5


def test_a_ratio_is_the_peer_by_pyrocell_of_runs_that_followed_each_other(module):
    tables = module("_tables")
    runs = {
        "pyrocell": [result(seconds=s, peak=3 * 2**20) for s in (1.0, 2.0, 4.0)],
        "scvi-tools": [result(seconds=s, peak=5 * 2**20) for s in (3.0, 6.0, 4.0)],
    }
    row = tables.summary(runs, tables.TRAINING)["train_epoch"]
    assert row["ratio"]["values"] == [3.0, 3.0, 1.0] and row["ratio"]["median"] == 3.0
    printed = tables.table({"train_epoch": row}, tables.TRAINING, {"train_epoch": 4.0})
    assert "MISSED (>= 4)" in printed and "met (>= 2)" in tables.table(
        {"train_epoch": row}, tables.TRAINING, {"train_epoch": 2.0}
    )
    assert tables.summary(runs, tables.MEMORY)["all_growth"]["ratio"]["median"] == 2.0


def test_a_run_that_failed_gives_no_ratio(module):
    tables = module("_tables")
    runs = {"pyrocell": [{"failure": "no"}], "scvi-tools": [result(seconds=1.0)]}
    assert "ratio" not in tables.summary(runs, tables.TRAINING)["train_epoch"]


def test_growth_is_told_from_flat(module):
    """The yardstick is an answer of all genes: 720 MB more for 90,000 cells more."""
    memory = module("memory")

    def table(few, many, n_cells=(10_000, 100_000)):
        found = {
            str(cells): {"growth_bytes": {"a": added}, "n_genes": 2000, "errors": {}}
            for cells, added in zip(n_cells, (few, many), strict=True)
        }
        return memory.growth_table(found).splitlines()[1]

    assert table(130 * 2**20, 141 * 2**20).endswith("0.02   flat")
    assert table(2**20, 5 * 2**20).endswith("0.01   flat"), "ten numbers a cell are few"
    assert table(141 * 2**20, 130 * 2**20).endswith("-0.02   flat")
    assert table(130 * 2**20, 210 * 2**20).endswith("0.12   grows")
    assert table(800 * 2**20, 1520 * 2**20).endswith("grows")
    assert table(0, 2**30, (1000, 3000)).endswith("too few cells to tell")


def test_cells_are_repeated_in_their_order(module):
    few = module("_cases").simulate(30, 20, density=0.5)
    many = module("memory").repeated(few, 70)
    assert many.shape == (70, 20) and many.obs_names.is_unique
    assert (many.X[30:60] != few.X).nnz == 0 and (many.X[60:] != few.X[:10]).nnz == 0
    assert list(many.obs["group"][60:].astype(str)) == list(few.obs["group"][:10].astype(str))
