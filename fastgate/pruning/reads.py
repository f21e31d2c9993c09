"""Static analysis of which attributes the code of a network can read; nothing is executed."""

import ast
import contextlib
import functools
import inspect
import sys
import textwrap
from collections.abc import Container, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

# methods that are not part of using a network (forward passes, training, its own methods)
_NOT_IN_USE = frozenset(("__init__", "__repr__", "extra_repr", "__setstate__", "__getstate__", "__dir__"))


@dataclass(frozen=True)
class _Source:
    """Names that occur in one function."""

    attributes: frozenset[str]  # x.name, and strings that may be passed to getattr
    names: frozenset[str]  # global and local names
    dotted: frozenset[tuple[str, str]]  # (name, attribute) of name.attribute
    computed: bool  # it reads attributes by computed names,
    computed_own: bool  # or does so only for its own first argument, self


class Reads:
    """The attributes that a network's code may read.

    The analysis starts from the methods that run a module (forward, special methods, and others of `nn.Module`), and in
    classes from outside `packages` from every public method. It follows all methods and functions that these mention.
    It does not distinguish objects: `x.name` reads `name` of every object. If a name is computed or source is missing,
    every attribute counts as read. The result is conservative: an attribute not reported as read is never read.
    """

    def __init__(self, model: nn.Module, packages: Container[str]) -> None:
        classes = {cls for module in model.modules() for cls in type(module).__mro__} - set(nn.Module.__mro__)
        self._members: dict[str, list[tuple[type, Any]]] = {}
        roots = set()
        for base in classes:
            known = base.__module__.partition(".")[0] in packages
            for name, value in vars(base).items():
                self._members.setdefault(name, []).append((base, value))
                public = hasattr(nn.Module, name) or not (known or name.startswith("_")) or name.startswith("__")
                if public and name not in _NOT_IN_USE:
                    roots.add(name)
        self._names: set[str] = set()
        self._everything = False
        self._whole_classes: set[type] = set()  # all of whose attributes count as read
        pending = [found for name in roots for found in self._reach(name)]
        seen: set[tuple[type | None, FunctionType]] = set()
        while pending and not self._everything:
            cls, function = pending.pop()
            if (cls, function) in seen:
                continue
            seen.add((cls, function))
            source = _read_source(function)
            self._everything = source.computed or (source.computed_own and cls is None)
            if source.computed_own and cls is not None:
                self._whole_classes.add(cls)
            for name in source.attributes - self._names:
                pending += self._reach(name)
            pending += ((None, other) for other in _mentioned_functions(function, source))

    def may_read(self, module: nn.Module, name: str) -> bool:
        """Whether any code of the network may read this attribute of this module."""
        return self._everything or name in self._names or not self._whole_classes.isdisjoint(type(module).__mro__)

    def _reach(self, name: str) -> Iterator[tuple[type | None, FunctionType]]:
        self._names.add(name)
        for cls, value in self._members.get(name, ()):
            for function in _functions_of(value):
                yield cls, function


def _functions_of(value: Any) -> Iterator[FunctionType]:
    """The functions behind a value found in a class or in a function's globals."""
    if isinstance(value, property):
        for accessor in (value.fget, value.fset):
            yield from _functions_of(accessor)
    elif isinstance(value, staticmethod | classmethod):
        yield from _functions_of(value.__func__)
    elif isinstance(value, functools.partial | functools.cached_property | functools.partialmethod):
        yield from _functions_of(value.func)
    elif isinstance(value, FunctionType):
        yield value


def _mentioned_functions(function: FunctionType, source: _Source) -> Iterator[FunctionType]:
    """Functions, and methods of plain classes, in the function's globals, to which it may pass the module."""
    scope = function.__globals__
    values = [scope[name] for name in source.names if name in scope]
    values += [
        getattr(scope[name], attribute, None)
        for name, attribute in source.dotted
        if isinstance(scope.get(name), ModuleType)
    ]
    for cell in function.__closure__ or ():  # a decorator's wrapper holds the function itself
        with contextlib.suppress(ValueError):  # an empty cell
            values.append(cell.cell_contents)
    for value in values:
        package = (getattr(value, "__module__", None) or "").partition(".")[0]
        # these packages do not know attributes of other packages' modules
        if package in ("torch", "numpy", "fastgate") or package in sys.stdlib_module_names:
            continue
        if isinstance(value, type) and not issubclass(value, nn.Module):
            for member in vars(value).values():
                yield from _functions_of(member)
        else:
            yield from _functions_of(value)


def _read_source(function: FunctionType) -> _Source:
    code, nothing = function.__code__, frozenset[Any]()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, SyntaxError):
        return _Source(nothing, nothing, nothing, computed=True, computed_own=False)
    own_name = code.co_varnames[0] if code.co_argcount else None
    attributes, names, dotted, read_whole = set(), set(), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            attributes.add(node.attr)
            base = node.value.id if isinstance(node.value, ast.Name) else None
            if base is not None:
                dotted.add((base, node.attr))
            if node.attr in ("__dict__", "__getattribute__"):
                read_whole.add(base)
        elif isinstance(node, ast.Name):
            names.add(node.id)
            if node.id in ("vars", "attrgetter"):
                read_whole.add(None)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            attributes.add(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            source, name = (*node.args[:2], None, None)[:2]
            if not isinstance(name, ast.Constant):
                read_whole.add(source.id if isinstance(source, ast.Name) else None)
    return _Source(
        frozenset(attributes),
        frozenset(names),
        frozenset(dotted),
        computed=not read_whole <= {own_name} - {None},
        computed_own=own_name in read_whole,
    )
