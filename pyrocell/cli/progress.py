"""What a run tells its user while it works: steps, seconds, warnings."""

from __future__ import annotations

import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pyrocell.errors import PyrocellWarning

__all__ = ["Progress", "paragraph"]


@dataclass
class Progress:
    """What one run has learned about itself: seconds of each step, and warnings."""

    began: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    @contextmanager
    def step(self, name: str, text: str) -> Iterator[None]:
        """Announce a step and time it."""
        start = time.perf_counter()
        print(f"[{start - self.began:6.1f} s] {text}", flush=True)
        with warnings.catch_warnings():
            # Warnings of other packages speak of code that the reader of a command cannot change.
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", PyrocellWarning)
            warnings.showwarning = self._hear  # type: ignore[assignment]
            yield
        self.seconds[name] = time.perf_counter() - start

    def warn(self, message: str) -> None:
        """Tell of something that the user should know, now and in the report."""
        if message not in self.messages:
            self.messages.append(message)
            print(paragraph("warning", message), file=sys.stderr, flush=True)

    def _hear(self, message: Warning | str, *where: object) -> None:
        self.warn(str(message))


def paragraph(head: str, message: str) -> str:
    """Make one readable paragraph of a message."""
    return textwrap.fill(f"{head}: {' '.join(message.split())}", width=98, break_long_words=False)
