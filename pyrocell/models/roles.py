"""Verbs that exist only on models which declare the role they need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import update_wrapper
from typing import TYPE_CHECKING, Any, TypeVar

__all__ = ["capabilities", "needs", "verbs"]

Method = TypeVar("Method", bound=Callable[..., Any])

# Methods for authors of models and for the engine: no verbs.
_PLUMBING = frozenset(
    {
        "asking",
        "attach",
        "drawer",
        "elbo",
        "extra_terms",
        "finish",
        "guide",
        "model",
        "note_training",
        "plate",
        "require_data",
        "require_same_cells",
        "require_trained",
        "restrict_features",
        "running",
    }
)

if TYPE_CHECKING:

    def needs(*roles: str) -> Callable[[Method], Method]:
        """Return the method as it is, for type checkers."""

else:

    class needs:
        """Make a method exist only where each of ``roles`` is declared as a class attribute.

        On other models it is no attribute at all (``hasattr`` is false), so nothing is inherited that raises when
        it is called.

        Parameters
        ----------
        *roles
            Names of class attributes that must not be None, such as ``"latent_site"``.
        """

        def __init__(self, *roles: str) -> None:
            self.roles = roles

        def __call__(self, method: Method) -> needs:
            """Take the method."""
            self.method = method
            update_wrapper(self, method)
            return self

        def missing(self, owner: type) -> list[str]:
            """Return the roles that a model class does not declare."""
            return [role for role in self.roles if getattr(owner, role, None) is None]

        def __get__(self, instance: object, owner: type) -> Any:
            missing = self.missing(owner)
            if missing:
                raise AttributeError(
                    f"{owner.__name__} has no {self.method.__name__}: it declares no {' and no '.join(missing)}."
                )
            return self.method.__get__(instance, owner)


def verbs(model_class: type) -> dict[str, bool]:
    """List every verb that depends on a role, or does in a class above, and whether the model has it."""
    found = {}
    for base in reversed(model_class.__mro__):
        for name, value in vars(base).items():
            if hasattr(value, "roles") and hasattr(value, "missing"):
                found[name] = not value.missing(model_class)
            elif name in found:  # defined anew by a class below, which needs no role for it
                found[name] = True
    return found


def capabilities(models: Sequence[type]) -> dict[str, dict[str, bool]]:
    """Say which model has which verb: every public method that any of them has, in the order of classes and files.

    Parameters
    ----------
    models
        Model classes.

    Returns
    -------
    dict
        For each verb, by name of the model, whether it has it: a verb that depends on a role as declared, any other
        where a class defines it.
    """
    declared = {model: verbs(model) for model in models}
    names = dict.fromkeys(name for model in models for name in [*_public_methods(model), *declared[model]])
    return {
        name: {model.__name__: declared[model].get(name, name in _public_methods(model)) for model in models}
        for name in names
    }


def _public_methods(model_class: type) -> list[str]:
    found: dict[str, None] = {}
    for base in reversed(model_class.__mro__):
        if base.__module__.startswith("pyrocell"):
            found |= dict.fromkeys(name for name in vars(base) if _is_method(model_class, name))
    return list(found)


def _is_method(model_class: type, name: str) -> bool:
    thing = getattr(model_class, name, None)
    return (
        callable(thing) and not isinstance(thing, type) and not name.startswith("_") and name not in _PLUMBING
    )
