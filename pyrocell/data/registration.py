"""``setup_anndata`` and ``setup_mudata``: made from a model's fields, kept as one JSON record in ``uns``."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from pyrocell.data.base import Argument, Field, named_fields
from pyrocell.data.slots import Slots, is_mudata, open_slots, what_there_is
from pyrocell.data.turned import as_read
from pyrocell.errors import SetupError, list_some

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

__all__ = ["complete_setup", "make_setup_anndata", "make_setup_mudata", "read_setup", "setup_of"]

_KEY = "pyrocell"
_FORMAT = 1
_MODALITIES = "modalities"


def arguments_of(fields: Mapping[str, Field], *, mudata: bool = False) -> dict[str, Argument]:
    """Return the arguments of all fields by name, each once, required ones first."""
    items = named_fields(fields).values()
    of_each = [item.mudata_arguments() if mudata else item.arguments() for item in items]
    found = {argument.name: argument for arguments in of_each for argument in arguments}
    if mudata:
        found = {_MODALITIES: _modalities_argument(fields)} | found
    return dict(sorted(found.items(), key=lambda item: (not item[1].required, item[0] == "allow_noninteger")))


def _modalities_argument(fields: Mapping[str, Field]) -> Argument:
    with_features = {name: item for name, item in fields.items() if item.has_features}
    needed = [repr(name) for name, item in with_features.items() if not item.optional]
    others = [repr(name) for name, item in with_features.items() if item.optional]
    doc = f"Modality of the MuData that holds each kind of data, by name. Needed: {', '.join(needed) or 'none'}."
    if others:
        doc += f" May be left out: {', '.join(others)}."
    return Argument(_MODALITIES, "dict[str, str]", doc, required=True)


def _check_modalities(fields: Mapping[str, Field], modalities: object) -> None:
    """Raise a SetupError unless the modalities are names for the fields with features, all that are needed."""
    with_features = {name: item for name, item in fields.items() if item.has_features}
    example = f"modalities={dict.fromkeys(with_features, '...')!r}"
    if not isinstance(modalities, Mapping) or not all(
        isinstance(text, str) for pair in modalities.items() for text in pair
    ):
        raise SetupError(f"modalities is {modalities!r}; expected names of modalities, such as {example}.")
    unknown = [name for name in modalities if name not in with_features]
    if unknown:
        hint = what_there_is(unknown[0], with_features)
        raise SetupError(f"modalities names {list_some(unknown)}, which the model does not read.{hint}")
    missing = [n for n, item in with_features.items() if not item.optional and n not in modalities]
    if missing:
        raise SetupError(
            f"modalities lacks {list_some(missing)}; give {example}, each with a name of mdata.mod."
        )


def complete_setup(fields: Mapping[str, Field], setup: Mapping[str, Any]) -> dict[str, Any]:
    """Return a set-up with a value for every argument of the fields.

    Raises a SetupError if the set-up has arguments that no field knows, or lacks a required one.
    """
    mudata = _MODALITIES in setup
    arguments = arguments_of(fields, mudata=mudata)
    unknown = sorted(set(setup) - set(arguments))
    missing = [name for name, argument in arguments.items() if argument.required and setup.get(name) is None]
    if unknown or missing:
        raise SetupError(
            f"The set-up has unknown arguments {unknown} and lacks {missing}; the model takes "
            f"{', '.join(arguments)}. Call {_setup_name(mudata=mudata)} of the model's class again."
        )
    if mudata:
        _check_modalities(fields, setup[_MODALITIES])
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
    return _make_setup(fields, model_name, mudata=False)


def make_setup_mudata(fields: Mapping[str, Field], model_name: str) -> Callable[..., None]:
    """Make the function ``setup_mudata(mdata, *, modalities, ...)`` of a model.

    Parameters
    ----------
    fields, model_name
        As for `make_setup_anndata`.

    Returns
    -------
    Callable
        It checks that modalities, layers and columns exist, writes the record under ``mdata.uns["pyrocell"]``, and
        changes nothing else.
    """
    return _make_setup(fields, model_name, mudata=True)


def _setup_name(*, mudata: bool) -> str:
    return "setup_mudata" if mudata else "setup_anndata"


def _make_setup(fields: Mapping[str, Field], model_name: str, *, mudata: bool) -> Callable[..., None]:
    arguments = arguments_of(fields, mudata=mudata)
    signature, name = _signature(arguments, mudata=mudata), _setup_name(mudata=mudata)

    def _setup(*args: Any, **given: Any) -> None:
        bound = _bind(signature, args, given, f"{model_name}.{name}")
        bound.apply_defaults()
        data, setup = bound.args[0], bound.kwargs
        if mudata:
            _require_mudata(data)
            _check_modalities(fields, setup[_MODALITIES])
            setup[_MODALITIES] = dict(setup[_MODALITIES])
        slots = as_read(open_slots(data, setup[_MODALITIES]) if mudata else Slots(data), fields)
        for field, item in named_fields(fields).items():
            item.check_setup(slots.of(field), setup)
        _write_setup(data, model_name, {n: v for n, v in setup.items() if v != arguments[n].default})

    _setup.__signature__ = signature  # type: ignore[attr-defined]
    annotations = {key: p.annotation for key, p in signature.parameters.items()}
    _setup.__annotations__ = annotations | {"return": None}
    _setup.__doc__ = _documentation(arguments, model_name, mudata=mudata)
    _setup.__name__ = name
    _setup.__qualname__ = f"{model_name}.{name}"
    return _setup


def _require_mudata(data: object) -> None:
    if not is_mudata(data):
        raise SetupError(
            f"Got a {type(data).__name__}; expected a MuData. For an AnnData, call setup_anndata; from several, make "
            "one with mudata.MuData({name: adata, ...})."
        )


def _signature(arguments: Mapping[str, Argument], *, mudata: bool) -> inspect.Signature:
    empty = inspect.Parameter.empty
    name, kind = ("mdata", "MuData") if mudata else ("adata", "AnnData")
    first = inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
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


_HEADS = {
    False: (
        "Say where the data for {} are in an AnnData.",
        'Writes one record, ``adata.uns["pyrocell"]``, and changes nothing else. Call it again to choose otherwise.',
        "adata : AnnData",
        "    Cells in rows, features (genes) in columns.",
    ),
    True: (
        "Say where the data for {} are in a MuData.",
        'Writes one record, ``mdata.uns["pyrocell"]``, and changes nothing else. Columns are looked for in '
        '``mdata.obs``, then in ``obs`` of the modalities in use; ``"rna:lane"`` is the column ``lane`` of ``rna``.',
        "mdata : MuData",
        "    Modalities that share cells, matched by name; their order does not matter.",
    ),
}


def _documentation(arguments: Mapping[str, Argument], model_name: str, *, mudata: bool) -> str:
    title, about, first, meaning = _HEADS[mudata]
    lines = [
        title.format(model_name),
        "",
        *textwrap.wrap(about, 112, break_on_hyphens=False),
        "",
        "Parameters",
        "----------",
        first,
        meaning,
    ]
    for argument in arguments.values():
        optional = "optional" if argument.default is None else f"default {argument.default}"
        default = "" if argument.required else f", {optional}"
        lines.append(f"{argument.name} : {argument.type.replace(' | None', '')}{default}")
        lines += textwrap.wrap(
            _for_mudata(argument.doc) if mudata else argument.doc,
            100,
            initial_indent="    ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
    lines += [
        "",
        "Raises",
        "------",
        "SetupError",
        "    If a layer or column is not there; the message lists what is.",
    ]
    return "\n".join(lines)


def _for_mudata(doc: str) -> str:
    """Say where things are in a MuData, in words written for an AnnData."""
    return (
        doc.replace("``adata.obs``", "``mdata.obs``")
        .replace("``adata.layers``", "the modality")
        .replace("``adata.X``", "its ``X``")
    )


def _write_setup(adata: AnnData | MuData, model_name: str, setup: dict[str, Any]) -> None:
    if adata.is_view and adata.isbacked:
        raise SetupError(
            "This is a view of a backed AnnData, which nothing can be written into. Set up the AnnData itself and "
            "take the view afterwards (the record goes with it), or load the view with .to_memory()."
        )
    record = _read_record(adata) or {"format": _FORMAT, "setups": {}}
    record["setups"][model_name] = setup
    adata.uns[_KEY] = json.dumps(record)


def _read_record(adata: AnnData | MuData) -> dict[str, Any] | None:
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


def read_setup(adata: AnnData | MuData, model_name: str) -> dict[str, Any]:
    """Return the arguments that ``setup_anndata``, or ``setup_mudata``, of a model was given.

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
    setups = (_read_record(open_slots(adata).adata) or {"setups": {}})["setups"]
    if model_name not in setups:
        others = f" They are set up for {list_some(setups)}." if setups else ""
        call = "setup_mudata(mdata, modalities=..." if is_mudata(adata) else "setup_anndata(adata, ..."
        raise SetupError(
            f"The data are not set up for {model_name}.{others} Call {model_name}.{call}) first; "
            "concatenating AnnData objects loses the record."
        )
    return dict(setups[model_name])


def setup_of(
    data: AnnData | MuData, known: Mapping[str, Any], fields: Mapping[str, Field], model_name: str
) -> dict[str, Any]:
    """Return where data have what a model reads: as in the data it was made with, if they are of the same kind.

    Parameters
    ----------
    data
        Data to look at; an AnnData where the model was made with a MuData, or the reverse, must be set up itself.
    known
        Set-up of the data that the model was made with.
    fields, model_name
        The fields of the model, by name, and the name of its class.

    Raises
    ------
    SetupError
        If the data are of the other kind and were not set up.
    """
    if is_mudata(data) == (_MODALITIES in known):
        return dict(known)
    return complete_setup(fields, read_setup(data, model_name))
