"""Modules that use a child's weight without calling the child: `F.linear(x, self.proj.weight)`, a Mamba block's
`causal_conv1d(x, self.conv1d.weight)`.

The child's rule would never see such a use. Whether there is one is read in the source of the parent's forward, and of
the methods that it calls: a child whose weight they use, and which they neither call nor hand on; or do that too, in
another branch perhaps, where the parent has parameters of its own and is run by forward-mode AD for these in any case.
What only asks for a weight's dtype or device is no use. Where the source cannot be had, or says it otherwise, the first
step finds that the scores of the child are missing, and names it.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

from .layers import SET_ON

_ASKS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "stride", "is_meta", "is_cuda"}
_ASKS |= {"requires_grad", "data", "detach", "grad", "type", "data_ptr", "element_size", "is_contiguous"}
_ASKS |= {"is_floating_point", "is_sparse", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}
_LIKE = {"to", "type_as"}  # x.to(weight)


def borrowers(modules: dict[str, nn.Module], owned: dict[str, Any]) -> dict[str, str]:
    """Path of a child that owns parameters -> path of its parent, which uses them without calling it."""
    found = {}
    for path in owned:
        parent, _, child = path.rpartition(".")
        cls = type(modules[parent])
        read_in = _read.__wrapped__ if SET_ON in vars(cls) else _read  # of a class that goes with its modules
        read, called = read_in(cls) if path else ((), ())
        if child in read and (child not in called or parent in owned):
            found[path] = parent
    return found


@functools.cache
def _read(cls: type) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the children whose weights or biases a class's forward uses, and of those that it calls, or hands on to
    what may call them; in the methods that it calls as well."""
    read: set[str] = set()
    called: set[str] = set()
    waiting, done = ["forward"], set()
    while waiting:
        done.add(name := waiting.pop())
        for tree in _sources(cls, name):
            asked = {id(node) for outer in ast.walk(tree) for node in _only_asked(outer)}
            weights = {id(node.value): node for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            for node in ast.walk(tree):
                child, outer = _of_self(node), weights.get(id(node))
                if child is None or id(node) in asked:
                    continue
                if outer is None or outer.attr not in ("weight", "bias", *_ASKS):
                    called.add(child)
                    waiting += {child} - done - set(waiting)
                elif outer.attr not in _ASKS and isinstance(outer.ctx, ast.Load) and id(outer) not in asked:
                    read.add(child)
    return frozenset(read), frozenset(called)


def _sources(cls: type, name: str) -> Iterator[ast.AST]:
    """The source of a class's method, and of those that it overrides; of none of torch's."""
    for base in cls.__mro__:
        method = vars(base).get(name)
        if callable(method) and base.__module__.partition(".")[0] != "torch":
            with contextlib.suppress(OSError, TypeError, SyntaxError):
                yield ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method))))


def _only_asked(node: ast.AST) -> list[ast.AST]:
    """What stands in a node as `x.dtype`, `isinstance(x, ...)`, `y.to(x)` or `x is None` has it."""
    if isinstance(node, ast.Attribute) and node.attr in _ASKS:
        return [node.value]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr"):
        return list(node.args)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _LIKE:
        return list(node.args)
    if isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
        return [node.left]
    return []


def _of_self(node: ast.AST) -> str | None:
    """The name of an attribute of `self`, if the node is one."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None
