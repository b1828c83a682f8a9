"""Lists of torch's operations, as recorded from a step: what may be on them, and what can be left out."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from pyrocell.distributions.operators import plain_function

__all__ = ["ShapesAreFixed", "simplify"]

_ATEN = torch.ops.aten
_SAME = (_ATEN.detach.default, _ATEN.alias.default)
"""Operations that return what they are given."""


class ShapesAreFixed(TorchDispatchMode):
    """Raise where the shape of a result depends on values: what follows may hold for these values alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let an operation pass, or raise."""
        depends = torch.Tag.dynamic_output_shape in func.tags
        if depends and (func is not _ATEN.index.Tensor or _has_mask(args[1])):
            raise RuntimeError(f"the shape of the result of {func} depends on values")
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Iterable[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def simplify(recorded: fx.GraphModule, *, may_write: Iterable[Tensor]) -> list[int]:
    """Leave out what has no effect: copies that are none, results that nobody reads, and inputs.

    Random numbers are drawn all the same, for those that come after.

    Parameters
    ----------
    recorded
        Operations as torch recorded them; changed in place.
    may_write
        Tensors from outside that the operations may write to.

    Returns
    -------
    list of int
        Which inputs are left.

    Raises
    ------
    RuntimeError
        If others are written to: a second run would find them changed.
    """
    graph = recorded.graph
    for node in list(graph.nodes):
        if node.target in _SAME:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    owners = _owners(graph)
    _check_writes(recorded, owners, {id(tensor) for tensor in may_write})
    graph.eliminate_dead_code(lambda node: _has_effect(node, owners))
    _multiply_in_place(graph)
    for node in graph.nodes:
        if node.op == "get_attr":  # found at once there, while a module looks in several places
            vars(recorded)[str(node.target)] = getattr(recorded, str(node.target))
        node.target = plain_function(node.target) or node.target
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    used = [i for i, node in enumerate(inputs) if node.users or i == 0]
    for i in set(range(len(inputs))) - set(used):
        graph.erase_node(inputs[i])
    recorded.recompile()
    return [i - 1 for i in used[1:]]


def _multiply_in_place(graph: fx.Graph) -> None:
    """Let slopes that a compiled loop has written be multiplied where they lie: nobody else reads them."""
    for node in graph.nodes:
        if node.target is _ATEN.mul.Tensor and _is_own_result(node.args[0]):
            metas = [each.meta["tensor_meta"] for each in (node, node.args[0])]
            kinds = [(meta.shape, meta.dtype) for meta in metas]
            if len(node.args[0].users) == 1 and kinds[0] == kinds[1]:
                node.target = _ATEN.mul_.Tensor


def _is_own_result(node: Any) -> bool:
    is_part = isinstance(node, fx.Node) and node.target is operator.getitem
    return is_part and plain_function(node.args[0].target) is not None and "tensor_meta" in node.meta


def _owners(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return for each node the one that made the memory in which its result lies."""
    owners: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        parts = [node.args[0]] if node.target is operator.getitem else []
        shared = [*parts, *(argument for argument, _ in _aliased(node))]
        owners[node] = owners[shared[0]] if shared else node
    return owners


def _aliased(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """Yield the arguments whose memory an operation writes to or returns, and whether it writes."""
    if not isinstance(node.target, OpOverload):
        return
    for i, argument in enumerate(node.target._schema.arguments):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None:
            several = value if isinstance(value, list | tuple) else [value]
            yield from ((one, argument.alias_info.is_write) for one in several if isinstance(one, fx.Node))


def _written(node: fx.Node) -> list[fx.Node]:
    written = [argument for argument, writes in _aliased(node) if writes]
    if node.target is _ATEN.native_batch_norm.default and node.args[5]:  # its schema does not say so
        written += [argument for argument in node.args[3:5] if isinstance(argument, fx.Node)]
    return written


def _check_writes(recorded: fx.GraphModule, owners: dict[fx.Node, fx.Node], allowed: set[int]) -> None:
    for node in recorded.graph.nodes:
        for owner in (owners[argument] for argument in _written(node)):
            outside = owner.op == "placeholder" or (
                owner.op == "get_attr" and id(getattr(recorded, str(owner.target))) not in allowed
            )
            if outside:
                raise RuntimeError(
                    f"{node.target} writes to a tensor that is neither new nor a buffer of the module"
                )


def _has_effect(node: fx.Node, owners: dict[fx.Node, fx.Node]) -> bool:
    """Whether an operation whose result nobody reads does anything; those after it are settled."""
    if node.op in ("placeholder", "output"):
        return True
    if not isinstance(node.target, OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return True
    for owner in (owners[argument] for argument in _written(node)):
        if owner.op != "call_function":  # an input, or a tensor from outside
            return True
        relatives = [other for other, of_other in owners.items() if of_other is owner]
        if any(user > node for relative in relatives for user in relative.users):
            return True
    return False
