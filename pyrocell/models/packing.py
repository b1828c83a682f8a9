"""Constructor arguments as JSON values and tensors, arrays and tables among them; no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyrocell.errors import LoadError

__all__ = ["pack", "shortened", "unpack"]

# A dict with this key stands for what JSON has no word for; its value says what.
_KIND = "pyrocell:kind"
_TEXT = ("object", "str", "string")


def pack(value: Any, tensors: dict[str, torch.Tensor], name: str = "constructor") -> Any:
    """Turn a constructor argument into JSON values, putting numbers of arrays among the tensors.

    Parameters
    ----------
    value
        Numbers, text, None, NumPy arrays, tensors, Series and DataFrames of numbers, text or categories, or lists and
        dicts of such.
    tensors
        Filled with the arrays, each under a name that begins with ``name``.
    name
        Which argument this is.

    Raises
    ------
    TypeError
        If it is something else; the message names it.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)  # whoever takes options takes them as a dict too
    if isinstance(value, Mapping):
        return {_key(key): pack(item, tensors, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [pack(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {_KIND: "tensor", "name": name}
    if isinstance(value, np.ndarray):
        return _pack_array(value, tensors, name)
    if isinstance(value, pd.Index | pd.Series | pd.Categorical):
        return _pack_labelled(value, tensors, name)
    if isinstance(value, pd.DataFrame):
        parts = {"columns": value.columns, "index": value.index}
        labels = {part: pack(index, tensors, f"{name}.{part}") for part, index in parts.items()}
        if _is_block(value):
            return {
                _KIND: "frame",
                "block": _pack_array(value.to_numpy(), tensors, f"{name}.block"),
                **labels,
            }
        columns = [value.iloc[:, i].array for i in range(value.shape[1])]
        packed = [_pack_values(column, tensors, f"{name}.{i}") for i, column in enumerate(columns)]
        return {_KIND: "frame", "values": packed, **labels}
    raise _cannot(name, type(value).__name__)


def _is_block(frame: pd.DataFrame) -> bool:
    """Whether all columns are numbers of one type: thousands of genes make one array."""
    kinds = set(frame.dtypes)
    return len(kinds) == 1 and all(isinstance(kind, np.dtype) and kind.kind in "biuf" for kind in kinds)


def _cannot(name: str, what: object) -> TypeError:
    return TypeError(
        f"The constructor argument {name.removeprefix('constructor.')} is of type {what}, which cannot be saved; "
        "expected numbers, strings, None, arrays or tables of numbers or strings, or lists and dicts of them."
    )


def _key(key: object) -> str:
    if str(key) == _KIND:
        raise TypeError(f"A constructor argument has the key {_KIND!r}, which is reserved; use another.")
    return str(key)


def _pack_array(value: np.ndarray, tensors: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
    if value.dtype.kind in "biuf":
        # Files are little-endian, and torch has no type for every width of NumPy's: bytes with a name are exact.
        native = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False)
        tensors[name] = torch.from_numpy(np.frombuffer(native.tobytes(), dtype=np.uint8).copy())
        return {_KIND: "array", "name": name, "dtype": native.dtype.str, "shape": list(value.shape)}
    flat = value.ravel().tolist()
    if value.dtype.kind not in "UO" or not all(item is None or isinstance(item, str) for item in flat):
        raise _cannot(name, f"array of {value.dtype}")
    return {_KIND: "text", "values": flat, "dtype": value.dtype.str, "shape": list(value.shape)}


def _pack_labelled(value: Any, tensors: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
    if isinstance(value, pd.Categorical):
        return _pack_values(value, tensors, name)
    if isinstance(value, pd.MultiIndex):
        raise _cannot(name, "MultiIndex")
    kind = "index" if isinstance(value, pd.Index) else "series"
    packed: dict[str, Any] = {_KIND: kind, "name": pack(value.name, tensors, f"{name}.name")}
    if kind == "series":
        packed["index"] = pack(value.index, tensors, f"{name}.index")
    return {**packed, "values": _pack_values(value.array, tensors, f"{name}.values")}


def _pack_values(values: Any, tensors: dict[str, torch.Tensor], name: str) -> dict[str, Any]:
    """Pack one column of a table."""
    if isinstance(values, pd.Categorical):
        codes = _pack_array(np.asarray(values.codes), tensors, f"{name}.codes")
        categories = pack(values.categories, tensors, f"{name}.categories")
        return {_KIND: "categorical", "codes": codes, "categories": categories, "ordered": values.ordered}
    if (
        type(values) is pd.arrays.NumpyExtensionArray
    ):  # a column of strings is a subclass, with a type to keep
        values = values.to_numpy()
    if isinstance(values.dtype, np.dtype) and values.dtype.kind in "biuf":
        return _pack_array(np.asarray(values), tensors, name)
    texts = [None if pd.isna(item) else item for item in values]
    if values.dtype not in _TEXT or not all(item is None or isinstance(item, str) for item in texts):
        raise _cannot(name, f"column of {values.dtype}")
    return {_KIND: "texts", "values": texts, "dtype": str(values.dtype)}


def unpack(packed: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Make again what `pack` was given; tuples come back as lists.

    Raises
    ------
    LoadError
        If the record is damaged, or tensors are missing.
    """
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if _KIND not in packed:
        return {key: unpack(item, tensors) for key, item in packed.items()}
    try:
        return _unpack_kind(packed, tensors)
    except LoadError:
        raise
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        ImportError,
        MemoryError,
    ) as error:
        raise LoadError(
            f"A constructor argument is damaged ({error!r}); copy the folder or save again."
        ) from error


def _unpack_kind(packed: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    kind, values = packed[_KIND], packed.get("values")
    if kind == "tensor":
        return tensors[packed["name"]]
    if kind == "array":
        stored, dtype = tensors[packed["name"]].numpy().tobytes(), _dtype(packed["dtype"], "biuf")
        return np.frombuffer(stored, dtype=dtype).reshape(packed["shape"]).copy()
    if kind == "text":
        dtype = _dtype(packed["dtype"], "UO")
        longest = max((len(item) for item in values or () if item is not None), default=0)
        if dtype.itemsize > max(1024, 64 * longest):
            raise ValueError(f"texts of at most {longest} letters in entries of {dtype.itemsize} bytes")
        return np.array(values, dtype=dtype).reshape(packed["shape"])
    if kind == "texts":
        return pd.array(list(packed["values"]), dtype=packed["dtype"])
    if kind == "categorical":
        codes, categories = unpack(packed["codes"], tensors), unpack(packed["categories"], tensors)
        return pd.Categorical.from_codes(codes, categories=categories, ordered=packed["ordered"])
    if kind == "index":
        return pd.Index(unpack(values, tensors), name=packed["name"])
    if kind == "series":
        return pd.Series(unpack(values, tensors), unpack(packed["index"], tensors), name=packed["name"])
    if kind == "frame":
        columns, index = unpack(packed["columns"], tensors), unpack(packed["index"], tensors)
        if "block" in packed:
            block = unpack(packed["block"], tensors)
            # One number would be repeated for as many labels as the file names.
            if np.shape(block) != (len(index), len(columns)):
                raise ValueError(
                    f"a block of {np.shape(block)} for {len(index)} rows, {len(columns)} columns"
                )
            return pd.DataFrame(block, index=index, columns=columns)
        found = {i: unpack(column, tensors) for i, column in enumerate(packed["values"])}
        if any(np.shape(column) != (len(index),) for column in found.values()):
            raise ValueError(f"columns of other lengths than the {len(index)} rows")
        frame = pd.DataFrame(found, index=index)
        frame.columns = columns
        return frame
    raise ValueError(f"unknown kind {kind!r}")


def _dtype(name: object, kinds: str) -> np.dtype[Any]:
    """Return a type of numbers or text by the name that `pack` gives it, and of nothing else."""
    dtype = np.dtype(name) if isinstance(name, str) else None
    if dtype is None or dtype.kind not in kinds:
        raise ValueError(f"{name!r} is no type of numbers or text")
    return dtype


def shortened(value: object) -> str:
    """Spell a constructor argument in one line: of arrays and tables, the kind and the shape."""
    if isinstance(value, np.ndarray | torch.Tensor | pd.DataFrame | pd.Series):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    return repr(value)
