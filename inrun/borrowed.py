"""Modules that use a child's weight without calling the child: `F.linear(x, self.proj.weight)`, a Mamba block's
`causal_conv1d(x, self.conv1d.weight)`.

The child's rule would never see such a use. Whether there is one is read in the source of the parent's methods: a child
whose weight they use and which none of them calls; or calls, perhaps in another branch, where the parent has parameters
of its own and is run by forward-mode AD for these in any case. What only asks for a weight's dtype or device, or makes,
loads or ties one, is no use. Where the source cannot be had, or says it otherwise, the first step finds that the scores
of the child are missing, and names it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

from torch import nn

_ASKS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "is_meta", "is_cuda", "requires_grad", "data"}
_NO_USE = (
    "__init__",
    "init",
    "_init",
    "reset",
    "get",
    "set",
    "tie",
    "_tie",
    "load",
    "_load",
    "resize",
    "prune",
    "extra",
)


def borrowers(modules: dict[str, nn.Module], owned: dict[str, Any]) -> dict[str, str]:
    """Path of a child that owns parameters -> path of its parent, which uses them without calling it."""
    found = {}
    for path in owned:
        parent, _, child = path.rpartition(".")
        read, called = _read(type(modules[parent])) if path else ((), ())
        if child in read and (child not in called or parent in owned):
            found[path] = parent
    return found


@functools.cache
def _read(cls: type) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the children whose weights or biases a class's methods use, and of those that they call."""
    found: set[str] = set()
    called: set[str] = set()
    for name, method in ((n, m) for base in cls.__mro__ if not _is_torchs(base) for n, m in vars(base).items()):
        if name.startswith(_NO_USE) or not inspect.isfunction(method := inspect.unwrap(method)):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):
            continue
        asked = {id(node) for outer in ast.walk(tree) for node in _only_asked(outer)}
        found.update(child for node in ast.walk(tree) if id(node) not in asked and (child := _child_of(node)))
        called.update(child for node in ast.walk(tree) if isinstance(node, ast.Call) and (child := _of_self(node.func)))
    return frozenset(found), frozenset(called)


def _is_torchs(cls: type) -> bool:
    return cls is object or cls.__module__.partition(".")[0] == "torch"


def _only_asked(node: ast.AST) -> list[ast.AST]:
    """What stands in a node as `x.dtype`, `isinstance(x, ...)` or `x is None` has it."""
    if isinstance(node, ast.Attribute) and node.attr in _ASKS:
        return [node.value]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr"):
        return list(node.args)
    if isinstance(node, ast.Compare) and all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
        return [node.left]
    return []


def _child_of(node: ast.AST) -> str | None:
    """The child's name, if the node is `self.child.weight` or `self.child.bias`, to be read."""
    if isinstance(node, ast.Attribute) and node.attr in ("weight", "bias") and isinstance(node.ctx, ast.Load):
        return _of_self(node.value)
    return None


def _of_self(node: ast.AST) -> str | None:
    """The name of an attribute of `self`, if the node is one."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None
