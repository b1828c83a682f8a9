"""Has pyrocell become slower beside scvi-tools? A small training, latent and DE, compared with stored ratios.

A ratio is the processor seconds of scvi-tools divided by those of pyrocell, one thread each: it depends little on what
else the machine does. The exit status is 1 when a ratio fell by more than a third of its value in ``expected.json``
twice in a row, or when a side failed. Where scvi-tools cannot be installed, or is too slow for ``--limit``, the check
says "skipped" and why, and passes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import _runs
from _cases import Case, simulate, write_case
from _environments import PEER_REQUIREMENTS, Side, own_side, peer_side
from _tables import OWN, PEER, Metric, summary

EXPECTED = Path(__file__).resolve().parent / "expected.json"
ALLOWED_FALL = 1 / 3
LEAST_SECONDS = 120.0
"""With less time than this a side that is only disturbed would look like one that hangs."""
STAGES = ["latent", "de_groups", "train"]
METRICS = [Metric("training", "train", "epoch_cpu"), Metric("latent", "latent", "cpu")]
METRICS += [Metric("DE of groups, change", "de_groups", "cpu")]


def fallen(
    found: Mapping[str, float], stored: Mapping[str, float], allowed: float = ALLOWED_FALL
) -> list[str]:
    """Name the ratios that fell by more than a share of their stored values, with both.

    Parameters
    ----------
    found, stored
        Ratios scvi-tools : pyrocell by name; the larger, the better for pyrocell.
    allowed
        Share of the stored value.

    Returns
    -------
    list of str
        A sentence for each; empty where all is well.

    Raises
    ------
    ValueError
        If the two do not have the same names: a ratio that is no longer measured must not pass for a good one.
    """
    if set(found) != set(stored):
        raise ValueError(
            f"measured {sorted(found)}, stored {sorted(stored)}: store new values with --store where the check changed"
        )
    return [
        f"{name}: scvi-tools takes {found[name]:.2f} times as long as pyrocell, stored is {value:.2f}, "
        f"at least {(1 - allowed) * value:.2f} is asked for"
        for name, value in stored.items()
        if not found[name] >= (1 - allowed) * value  # also where it is not a number
    ]


def best(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Return the better of two measurements of each ratio: noise of a machine passes, a slower program does not."""
    return {name: max(first[name], second[name]) for name in first}


TOO_LATE = "no result within"


class Unmeasured(Exception):
    """A side gave no result; ``excused`` where scvi-tools was too slow, which is not pyrocell's fault."""

    def __init__(self, side: str, text: str) -> None:
        super().__init__(f"{side} gave no result: {text}")
        self.excused = side == PEER and text.startswith(TOO_LATE)


class _OnePair(argparse.Namespace):
    """Options of one pair: a worker may take whatever is left until the deadline."""

    @property
    def timeout(self) -> float:
        return max(self.deadline - time.monotonic(), 1.0)


def ratios(case: Case, sides: list[Side], options: argparse.Namespace) -> dict[str, float]:
    """Measure every ratio; medians over the pairs."""
    told = _runs.job(options, stages=STAGES, epochs=40, inner=5)
    values: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    began = time.monotonic()
    for repeat in range(options.repeats):
        left = options.deadline - time.monotonic()
        if repeat and left < 1.5 * (time.monotonic() - began) / repeat:
            print(f"no time left for pair {repeat + 1}", file=sys.stderr)
            break
        once = _OnePair(repeats=1, seed=options.seed + repeat, deadline=options.deadline)
        pair = _runs.run_pairs(case, sides, told, once)
        if repeat and any(result.get("failure", "").startswith(TOO_LATE) for (result,) in pair.values()):
            break  # the pairs before count
        for name, (result,) in pair.items():
            if "failure" in result or result["errors"]:
                raise Unmeasured(name, result.get("failure") or str(result["errors"]))
            values[name].append(result)
    found = summary(values, METRICS)
    return {metric.title: found[metric.key]["ratio"]["median"] for metric in METRICS}


def _peer(options: argparse.Namespace) -> Side | None:
    """Return scvi-tools' side; None, after saying why, where its environment cannot be had."""
    try:
        return peer_side(options.peer_env, timeout=options.deadline - time.monotonic())
    except (OSError, subprocess.SubprocessError) as error:
        print(f"skipped: the environment of scvi-tools could not be made in {options.peer_env}: {error}")
        return None


def _has_time(options: argparse.Namespace) -> bool:
    """Whether making the environment has left enough of ``--limit``; says so where it has not."""
    left = options.deadline - time.monotonic()
    if left < LEAST_SECONDS:
        print(
            f"skipped: {left:.0f} s are left of {options.limit:.0f}, {LEAST_SECONDS:.0f} are needed; run it again"
        )
    return left >= LEAST_SECONDS


def _store(found: dict[str, float], options: argparse.Namespace) -> None:
    machine = _runs.machine(options)
    kept = {key: machine[key] for key in ("processor", "cpus", "threads", "load_before", "date", "peer")}
    what = "processor seconds of scvi-tools divided by those of pyrocell, one thread each"
    found = {name: round(value, 2) for name, value in found.items()}
    options.expected.write_text(json.dumps({"what": what, "machine": kept, "ratios": found}, indent=1) + "\n")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = _runs.parser(__doc__, "check", repeats=2)
    add = parser.add_argument
    parser.set_defaults(threads=1)
    add("--expected", type=Path, default=EXPECTED, help="stored ratios; default benchmarks/expected.json")
    add("--store", action="store_true", help="write what is found to --expected instead of comparing")
    add("--limit", type=float, default=600, help="seconds for everything, making the environment included")
    options = _runs.finish(parser.parse_args(arguments))
    if options.own_only or options.peer_only:
        raise SystemExit("the check needs both sides")
    options.deadline = time.monotonic() + options.limit
    return options


def _verdict(case: Case, both: list[Side], options: argparse.Namespace) -> int:
    """Measure, compare, measure again where a ratio fell, and say what was found."""
    began = time.monotonic()
    found = ratios(case, both, options)
    took = time.monotonic() - began
    if options.store:
        _store(found, options)
        print(f"stored: {found}")
        return 0
    stored = json.loads(options.expected.read_text())["ratios"]
    if fell := fallen(found, stored):
        print("a ratio fell:", *fell, "measuring once more", sep="\n  ")
        if options.deadline - time.monotonic() < took:
            print(
                "skipped: no time is left for that, and one measurement may be a disturbance; raise --limit"
            )
            return 0
        found = best(found, ratios(case, both, options))
    complaints = fallen(found, stored)
    for name, value in found.items():
        print(f"{name:24} ratio {value:6.2f}   stored {stored[name]:6.2f}")
    options.json.write_text(json.dumps({"found": found, "stored": stored, "fallen": complaints}, indent=1))
    for complaint in complaints:
        print(f"FELL by more than a third: {complaint}")
    return int(bool(complaints))


def main(arguments: list[str] | None = None) -> int:
    """Run the check."""
    options = _options(arguments)
    peer = _peer(options)
    if peer is None or not _has_time(options):
        return 0
    print(f"{OWN} beside {PEER_REQUIREMENTS[-1]}, one thread each, processor time")
    with tempfile.TemporaryDirectory() as folder:
        case = write_case("small", simulate(2000, 1000), Path(folder))
        try:
            return _verdict(case, [own_side(), peer], options)
        except Unmeasured as error:
            print(f"{'skipped' if error.excused else 'FAILED'}: {error}")
            return int(not error.excused)


if __name__ == "__main__":
    sys.exit(main())
