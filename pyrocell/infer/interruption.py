"""Signals that end a training: held back until a step is complete, so that what is left behind is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from pyrocell import settings

__all__ = ["Interruption"]


class Interruption:
    """Hold back an interruption from the keyboard (SIGINT) and a request to end (SIGTERM); to be used with ``with``.

    A second signal goes through at once. Signals that the process ignores stay ignored, and only the main thread can
    hold any back: elsewhere nothing is changed.

    Attributes
    ----------
    asked : int or None
        Number of the signal that came.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.restore()
        if self.asked is not None:  # it came after the last step
            if isinstance(error, Exception):  # the end of the process would hide it
                settings.logger.error("training was interrupted, and had failed: %s", error)
            self.deliver()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked = number
            return
        first, self.asked = self.asked, None  # what the second one raises is not to be raised again
        self._let_through(number, frame)
        self.asked = first  # the handler of the user has let training go on

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, before in self._before.items():
            signal.signal(number, before)

    def deliver(self) -> None:
        """Let the signal do what it would have done: by default KeyboardInterrupt, or SystemExit with status 143."""
        number, self.asked = self.asked, None
        if number is not None:
            self._let_through(number, None)

    def _let_through(self, number: int, frame: FrameType | None) -> None:
        held = [one for one in self._before if signal.getsignal(one) == self._note]
        self.restore()
        self._pass_on(number, frame)
        for one in held:  # the handler of the user has let training go on
            signal.signal(one, self._note)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        handler = self._before[number]
        if callable(handler):
            handler(number, frame)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)  # not the end at once: whoever called may still save the model
