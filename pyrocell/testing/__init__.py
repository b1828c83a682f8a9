"""The contract that every model keeps: run it over a model of your own with `check_model`.

In a test suite, one test for each promise reads best::

    @pytest.mark.parametrize("check", pyrocell.testing.CHECKS)
    def test_contract(check):
        pyrocell.testing.run_check(check, ModelCase(MyModel, make_data, setup={"batch_key": "batch"}))
"""

from __future__ import annotations

from pyrocell.testing.cases import ModelCase
from pyrocell.testing.checks import CHECK_FUNCTIONS

__all__ = ["CHECKS", "ModelCase", "check_model", "run_check"]

CHECKS = tuple(CHECK_FUNCTIONS)
"""Names of all checks, in order."""


def check_model(case: ModelCase) -> None:
    """Run every check of the contract over one model.

    Parameters
    ----------
    case
        The model and its data.

    Raises
    ------
    AssertionError
        If the model breaks a promise; the message names the check.
    """
    for name in CHECKS:
        run_check(name, case)


def run_check(name: str, case: ModelCase) -> None:
    """Run one check by name; see `CHECKS`.

    Parameters
    ----------
    name
        Name of the check.
    case
        The model and its data.
    """
    try:
        CHECK_FUNCTIONS[name](case)
    except AssertionError as error:
        raise AssertionError(f"{case.model_class.__name__} breaks the contract {name!r}: {error}") from error
