"""``setup_anndata``: made from a model's fields, and kept as one JSON record in ``adata.uns``."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from pyrocell.data.base import Argument, Field, named_fields
from pyrocell.data.slots import Slots
from pyrocell.errors import SetupError, list_some

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["complete_setup", "make_setup_anndata", "read_setup"]

_KEY = "pyrocell"
_FORMAT = 1


def arguments_of(fields: Mapping[str, Field]) -> dict[str, Argument]:
    """Return the arguments of all fields by name, each once, required ones first."""
    found = {
        argument.name: argument for item in named_fields(fields).values() for argument in item.arguments()
    }
    return dict(sorted(found.items(), key=lambda item: (not item[1].required, item[0] == "allow_noninteger")))


def complete_setup(fields: Mapping[str, Field], setup: Mapping[str, Any]) -> dict[str, Any]:
    """Return a set-up with a value for every argument of the fields.

    Raises a SetupError if the set-up has arguments that no field knows, or lacks a required one.
    """
    arguments = arguments_of(fields)
    unknown = sorted(set(setup) - set(arguments))
    missing = [name for name, argument in arguments.items() if argument.required and setup.get(name) is None]
    if unknown or missing:
        raise SetupError(
            f"The set-up has unknown arguments {unknown} and lacks {missing}; the model takes "
            f"{', '.join(arguments)}. Call setup_anndata of the model's class again."
        )
    return {name: setup.get(name, argument.default) for name, argument in arguments.items()}


def make_setup_anndata(fields: Mapping[str, Field], model_name: str) -> Callable[..., None]:
    """Make the function ``setup_anndata(adata, *, ...)`` of a model.

    Parameters
    ----------
    fields
        The fields of the model, by name; they make the signature and the documentation.
    model_name
        Name of the model's class, under which the record is kept.

    Returns
    -------
    Callable
        It checks that layers and columns exist, writes the record under ``adata.uns["pyrocell"]``, and changes nothing
        else.
    """
    arguments = arguments_of(fields)
    signature = _signature(arguments)

    def _setup_anndata(*args: Any, **given: Any) -> None:
        bound = _bind(signature, args, given, f"{model_name}.setup_anndata")
        bound.apply_defaults()
        adata, setup = bound.args[0], bound.kwargs
        slots = Slots(adata)
        for item in named_fields(fields).values():
            item.check_setup(slots, setup)
        _write_setup(adata, model_name, {n: v for n, v in setup.items() if v != arguments[n].default})

    _setup_anndata.__signature__ = signature  # type: ignore[attr-defined]
    _setup_anndata.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()} | {
        "return": None
    }
    _setup_anndata.__doc__ = _documentation(arguments, model_name)
    _setup_anndata.__name__ = "setup_anndata"
    _setup_anndata.__qualname__ = f"{model_name}.setup_anndata"
    return _setup_anndata


def _signature(arguments: Mapping[str, Argument]) -> inspect.Signature:
    empty = inspect.Parameter.empty
    first = inspect.Parameter("adata", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="AnnData")
    rest = [
        inspect.Parameter(
            argument.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=empty if argument.required else argument.default,
            annotation=argument.type,
        )
        for argument in arguments.values()
    ]
    return inspect.Signature([first, *rest], return_annotation=None)


def _bind(
    signature: inspect.Signature, args: tuple[Any, ...], given: dict[str, Any], name: str
) -> inspect.BoundArguments:
    unknown = [key for key in given if key not in signature.parameters]
    if unknown:
        close = get_close_matches(unknown[0], signature.parameters, n=1)
        guess = f" Did you mean {close[0]!r}?" if close else ""
        takes = ", ".join(signature.parameters)
        raise TypeError(f"{name}() has no argument {list_some(unknown)}.{guess} It takes {takes}.")
    try:
        return signature.bind(*args, **given)
    except TypeError as error:
        raise TypeError(f"{name}() got wrong arguments: {error}. Its signature is {signature}.") from None


def _documentation(arguments: Mapping[str, Argument], model_name: str) -> str:
    lines = [
        f"Say where the data for {model_name} are in an AnnData.",
        "",
        'Writes one record, ``adata.uns["pyrocell"]``, and changes nothing else. Call it again to choose otherwise.',
        "",
        "Parameters",
        "----------",
        "adata : AnnData",
        "    Cells in rows, features (genes) in columns.",
    ]
    for argument in arguments.values():
        optional = "optional" if argument.default is None else f"default {argument.default}"
        default = "" if argument.required else f", {optional}"
        lines.append(f"{argument.name} : {argument.type.replace(' | None', '')}{default}")
        lines += textwrap.wrap(
            argument.doc, 100, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )
    lines += [
        "",
        "Raises",
        "------",
        "SetupError",
        "    If a layer or column is not there; the message lists what is.",
    ]
    return "\n".join(lines)


def _write_setup(adata: AnnData, model_name: str, setup: dict[str, Any]) -> None:
    if adata.is_view and adata.isbacked:
        raise SetupError(
            "This is a view of a backed AnnData, which nothing can be written into. Set up the AnnData itself and "
            "take the view afterwards (the record goes with it), or load the view with .to_memory()."
        )
    record = _read_record(adata) or {"format": _FORMAT, "setups": {}}
    record["setups"][model_name] = setup
    adata.uns[_KEY] = json.dumps(record)


def _read_record(adata: AnnData) -> dict[str, Any] | None:
    text = adata.uns.get(_KEY)
    if text is None:
        return None
    try:
        record: dict[str, Any] = json.loads(text)
        readable = isinstance(record["setups"], dict) and record["format"] <= _FORMAT
    except (TypeError, KeyError, json.JSONDecodeError):
        readable = False
    if not readable:
        raise SetupError(
            f"adata.uns[{_KEY!r}] is no record of this version of pyrocell. Delete it (del adata.uns[{_KEY!r}]) and "
            "call setup_anndata again."
        )
    return record


def read_setup(adata: AnnData, model_name: str) -> dict[str, Any]:
    """Return the arguments that ``setup_anndata`` of a model was given.

    Parameters
    ----------
    adata
        Data that were set up.
    model_name
        Name of the model's class.

    Raises
    ------
    SetupError
        If the data were not set up for this model.
    """
    setups = (_read_record(Slots(adata).adata) or {"setups": {}})["setups"]
    if model_name not in setups:
        others = f" They are set up for {list_some(setups)}." if setups else ""
        raise SetupError(
            f"The data are not set up for {model_name}.{others} Call {model_name}.setup_anndata(adata, ...) first; "
            "concatenating AnnData objects loses the record."
        )
    return dict(setups[model_name])
