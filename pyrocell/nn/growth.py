"""Carry the weights of a fitted network over to one that was built for more categories."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from pyrocell.nn.covariates import InjectedLinear

__all__ = ["inherit"]

_CONSTRAINED = "_unconstrained"  # what Pyro appends to the name of a constrained parameter


@torch.no_grad()
def inherit(module: nn.Module, old: nn.Module, tables: Collection[str] = ()) -> dict[str, Tensor]:
    """Copy every weight of a fitted module into one of the same parts that knows more categories.

    The known categories keep their rows, so that what the module says of them does not change by a bit. New rows
    start at the mean of the known ones: an average batch. A covariate that the old network dropped, because it had
    one level, gets a row of zeros for that level, and new rows that start at zero.

    Parameters
    ----------
    module
        The module for more categories, as built; changed in place.
    old
        The fitted module.
    tables
        Names of the parameters and buffers outside of `InjectedLinear`, whole or up to a dot, that grow with the
        categories. Along the dimensions that grew, the old entries come first. New entries of a buffer, which was
        made from the data, stay as built.

    Returns
    -------
    dict of str to Tensor
        For each parameter with new entries, which of its entries are new (bool, shape of the parameter).

    Raises
    ------
    ValueError
        If a tensor has another shape and is not among ``tables``; the message names it.
    """
    new: dict[str, Tensor] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, InjectedLinear):
            found = _inherit_rows(layer, _part(old, name))
            new |= {f"{name}.{key}" if name else key: mask for key, mask in found.items()}
    parameters, known = dict(module.named_parameters()), old.state_dict()
    for name, tensor in module.state_dict().items():
        if name in new:
            continue
        if name not in known:
            mask = torch.ones_like(tensor, dtype=torch.bool)
        elif tensor.shape == known[name].shape:
            tensor.copy_(known[name])
            continue
        else:
            _require_table(name, tensor, known[name], tables)
            mask = _grow(tensor, known[name], fill=name in parameters)
        if name in parameters:
            new[name] = mask
    return {name: mask for name, mask in new.items() if bool(mask.any())}


def _part(module: nn.Module, name: str) -> InjectedLinear | None:
    """Return the layer of this name, or None where the old module has no such part."""
    return dict(module.named_modules()).get(name)


def _inherit_rows(layer: InjectedLinear, old: InjectedLinear | None) -> dict[str, Tensor]:
    """Fill the rows of categories; return which entries are new."""
    new: dict[str, Tensor] = {}
    if old is None:
        return new
    if layer.table is not None:
        new["table"] = torch.zeros_like(layer.table, dtype=torch.bool)
        for i, offset in zip(layer.one_hot, layer.offsets, strict=True):
            rows = slice(offset, offset + layer.covariates.sizes[i])
            known = old.table[_rows_of(old, i)] if old.table is not None and i in old.one_hot else None
            new["table"][rows] = _fill_rows(layer.table[rows], known)
    if layer.embedding is not None and layer.embedding_weight is not None:
        known = None if old.embedding is None else old.embedding.weight
        new["embedding.weight"] = _fill_rows(layer.embedding.weight, known)
        new["embedding_weight"] = torch.full_like(layer.embedding_weight, known is None, dtype=torch.bool)
        if old.embedding_weight is not None:
            layer.embedding_weight.copy_(old.embedding_weight)
    return new


def _rows_of(layer: InjectedLinear, covariate: int) -> slice:
    offset = layer.offsets[layer.one_hot.index(covariate)]
    return slice(offset, offset + layer.covariates.sizes[covariate])


def _fill_rows(rows: Tensor, known: Tensor | None) -> Tensor:
    """Fill a table; without a known one, its first level is the only one that there was."""
    if known is not None:
        return _grow(rows, known, fill=True)
    rows.zero_()
    new = torch.ones_like(rows, dtype=torch.bool)
    new[0] = False
    return new


def _grow(tensor: Tensor, known: Tensor, *, fill: bool) -> Tensor:
    """Copy the known entries to the front, fill the others with their mean if asked; return which are new."""
    new = torch.ones_like(tensor, dtype=torch.bool)
    front = tuple(slice(0, size) for size in known.shape)
    grown = [
        i for i, (size, before) in enumerate(zip(tensor.shape, known.shape, strict=True)) if size > before
    ]
    if fill and grown:
        tensor.copy_(known.mean(grown, keepdim=True).expand_as(tensor))
    tensor[front] = known
    new[front] = False
    return new


def _require_table(name: str, tensor: Tensor, known: Tensor, tables: Collection[str]) -> None:
    plain = name.removesuffix(_CONSTRAINED)
    listed = any(plain == table or name.startswith(f"{table}.") for table in tables)
    larger = tensor.dim() == known.dim() and all(
        a >= b for a, b in zip(tensor.shape, known.shape, strict=True)
    )
    if not (listed and larger):
        raise ValueError(
            f"{plain!r} has shape {tuple(known.shape)}, and {tuple(tensor.shape)} with the new categories; its rows "
            "cannot be told apart."
        )
