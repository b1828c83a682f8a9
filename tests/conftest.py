"""Numba's cache misses changes in other files, so the tests keep one for each state of the sources."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

_SOURCES = Path(__file__).parents[1] / "pyrocell" / "distributions"
_DIGEST = hashlib.sha256(b"".join((_SOURCES / f"{n}.py").read_bytes() for n in ("compiled", "elementary")))
os.environ.setdefault(
    "NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"pyrocell-numba-{_DIGEST.hexdigest()[:16]}")
)
