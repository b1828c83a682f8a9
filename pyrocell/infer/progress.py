"""What a user sees while training."""

from __future__ import annotations

from typing import Any

from pyrocell import settings

__all__ = ["ProgressBar"]


class ProgressBar:
    """A bar that says loss, speed and time left, or nothing when progress is off."""

    def __init__(self, total: int, initial: int) -> None:
        self._bar: Any = None
        # A bar that is off would start tqdm's thread all the same, and take a lock that forks share.
        if settings.progress:
            from tqdm.std import tqdm

            self._bar = tqdm(total=total, initial=initial, unit="epoch", dynamic_ncols=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, row: dict[str, float]) -> None:
        """Advance by one epoch."""
        if self._bar is None:
            return
        shown = {"loss": f"{row['elbo_train']:.1f}"}
        if "elbo_validation" in row:
            shown["validation"] = f"{row['elbo_validation']:.1f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(1)
