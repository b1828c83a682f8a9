"""What all tests find: a job in the background ignores interruptions from the keyboard, which some tests send."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
