"""The ``pyrocell`` command: fit a model to a file of counts, and leave everything one looks at first in a folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pyrocell.cli.arguments import make_parser
from pyrocell.cli.progress import paragraph
from pyrocell.cli.work import run_command
from pyrocell.errors import PyrocellError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None, *, models: Mapping[str, Any] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv
        Arguments; those of the process by default.
    models
        Model classes by name; those of pyrocell by default.

    Returns
    -------
    int
        Exit status: 0 when all went well, 2 after an error in what was asked, 130 when interrupted.
    """
    args = make_parser().parse_args(argv)
    try:
        run_command(args, models)
    except PyrocellError as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"cannot read or write a file: {error}")
    except KeyboardInterrupt:
        _complain("interrupted; nothing more is written.")
        return 130
    return 0


def _complain(message: str) -> int:
    print(paragraph("pyrocell", message), file=sys.stderr, flush=True)
    return 2
