"""The interpreter of each side, and one run of one worker in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PEER_REQUIREMENTS", "Side", "default_peer_folder", "own_side", "peer_side", "run_worker"]

PEER_REQUIREMENTS = ("torch==2.13.0", "scvi-tools==1.4.2")
"""Installed in this order, so that scvi-tools takes the torch that pyrocell is measured with."""

_HERE = Path(__file__).resolve().parent
_RESULT = "BENCHMARK-RESULT "


@dataclass(frozen=True)
class Side:
    """A contender: its name, its interpreter and its worker."""

    name: str
    python: Path
    worker: Path
    import_from: Path | None = None


def default_peer_folder() -> Path:
    """Where the environment of scvi-tools is kept between runs: the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pyrocell" / "benchmarks" / PEER_REQUIREMENTS[-1].replace("==", "-")


def _has_requirements(python: Path) -> bool:
    wanted = [requirement.split("==") for requirement in PEER_REQUIREMENTS]
    # A build such as 2.13.0+cpu satisfies 2.13.0, hence the comparison without the local part.
    check = f"all(version(name).split('+')[0] == wanted for name, wanted in {wanted})"
    code = f"from importlib.metadata import version; assert {check}"
    return python.exists() and subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def peer_side(folder: Path, *, timeout: float | None = None) -> Side:
    """Return the scvi-tools side, after making its environment, in so many seconds, where it does not exist yet."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not _has_requirements(python):
        print(f"making the environment of scvi-tools in {folder} (once; some minutes)", file=sys.stderr)
        venv.create(folder, with_pip=True, symlinks=os.name != "nt")
        end = None if timeout is None else time.monotonic() + timeout
        for requirement in PEER_REQUIREMENTS:
            left = None if end is None else max(end - time.monotonic(), 0.0)
            command = [python, "-m", "pip", "install", "--quiet", requirement]
            subprocess.run(command, check=True, timeout=left)
    return Side("scvi-tools", python, _HERE / "_workers" / "peer.py")


def own_side() -> Side:
    """Return the pyrocell side: this interpreter, with this source tree."""
    return Side("pyrocell", Path(sys.executable), _HERE / "_workers" / "own.py", import_from=_HERE.parent)


def _environment(side: Side, threads: int) -> dict[str, str]:
    """Environment of a worker: a fixed number of threads, and no path of the other side."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    for library in ("OMP", "MKL", "OPENBLAS", "NUMBA", "VECLIB_MAXIMUM", "NUMEXPR"):
        environment[f"{library}_NUM_THREADS"] = str(threads)
    if side.import_from is not None:
        environment["PYTHONPATH"] = str(side.import_from)
    return environment | {"CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


def run_worker(side: Side, job: dict[str, Any], *, timeout: float) -> dict[str, Any]:
    """Run one worker; a failure comes back as ``{"failure": text}``, so that the other runs go on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        command = [str(side.python), str(side.worker), str(path)]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=_environment(side, job["threads"]),
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return {"failure": f"no result within {timeout:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode or not lines:
        return {"failure": f"exit status {done.returncode}\n{done.stderr[-3000:]}"}
    result: dict[str, Any] = json.loads(lines[-1].removeprefix(_RESULT))
    return result
