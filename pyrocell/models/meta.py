"""How a model object comes into being: arguments recorded, random stream in place, parts checked."""

from __future__ import annotations

import inspect
from typing import Any

from pyrocell import settings
from pyrocell.data import Field, Schema, make_setup_anndata, make_setup_mudata
from pyrocell.infer.memory import keep_freed_memory
from pyrocell.infer.streams import RandomStream

__all__ = ["ModelMeta"]


class ModelMeta(type):
    """Collect the fields of a model class, and wrap its construction."""

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)
        cls.fields: dict[str, Field] = {
            key: value
            for base in reversed(cls.__mro__)
            for key, value in vars(base).items()
            if isinstance(value, Field)
        }
        construct: Any = cls.__init__  # type: ignore[misc]
        parameters = list(inspect.signature(construct).parameters.values())[1:]
        cls.__signature__ = inspect.Signature(parameters)  # help() and editors show the model's own arguments
        cls.setup_anndata = staticmethod(make_setup_anndata(cls.fields, name))
        cls.setup_mudata = staticmethod(make_setup_mudata(cls.fields, name))

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a model from data."""
        return cls.build(args, kwargs, seed=settings.seed, schema=None)

    def build(cls, args: tuple[Any, ...], kwargs: dict[str, Any], *, seed: int, schema: Schema | None) -> Any:
        """Make a model, from data or (to load a saved one) from a schema alone.

        Everything random in the constructor comes from the model's own stream. Constructor arguments are recorded
        here, once, so that save, load and repr need no code in a model.
        """
        try:
            bound = cls.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"{cls.__name__}: {error}. It takes {', '.join(cls.__signature__.parameters)}."
            ) from None
        bound.apply_defaults()
        keep_freed_memory()
        model: Any = cls.__new__(cls)  # type: ignore[call-overload]
        model.__dict__["constructor"] = dict(list(bound.arguments.items())[1:])
        model.__dict__["stream"] = RandomStream(seed)
        model.__dict__["data"] = schema
        with model.stream.active(), model.running():
            model.__init__(*args, **kwargs)
            model.finish()
        return model
