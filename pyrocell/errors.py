"""One family of errors and warnings; every message says what was given, what was expected, and what to do."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "DataError",
    "LoadError",
    "NotTrainedError",
    "PyrocellError",
    "PyrocellWarning",
    "QueryError",
    "SaveError",
    "SetupError",
    "TrainingError",
    "list_some",
]


class PyrocellError(Exception):
    """Base of all errors that pyrocell raises on purpose."""


class SetupError(PyrocellError, ValueError):
    """The set-up names something that the data do not have, or is missing."""


class DataError(PyrocellError, ValueError):
    """The data cannot be used as they are: bad counts, missing values, features that do not match."""


class QueryError(PyrocellError, ValueError):
    """A question names a site, feature, group, category or cell that does not exist."""


class NotTrainedError(PyrocellError, RuntimeError):
    """A model was asked for results before it was trained."""


class TrainingError(PyrocellError, RuntimeError):
    """Training cannot start or cannot go on."""


class LoadError(PyrocellError, ValueError):
    """A saved model cannot be read: missing, truncated, foreign, newer, or of another class."""


class SaveError(PyrocellError, OSError):
    """A model or checkpoint cannot be written, such as to a full disk; what was there before is untouched."""


class PyrocellWarning(UserWarning):
    """Something is legal but probably not meant."""


def list_some(items: Iterable[object], limit: int = 5) -> str:
    """Spell out some items and count the rest, for error messages.

    Parameters
    ----------
    items
        What to name.
    limit
        How many to name at most.
    """
    items = list(items)
    shown = ", ".join(repr(item) for item in items[:limit])
    hidden = len(items) - limit
    return f"{shown} and {hidden} more" if hidden > 0 else shown
