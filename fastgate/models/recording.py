"""Records what a module computes, operation by operation, while it runs once on real tensors.

Unlike symbolic tracing, it supports any Python code. A recording is valid for that run only: its mode, sizes and
arguments.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}


@dataclass(eq=False)
class Value:
    """A tensor at one point of the run; after an in-place change it becomes another value.

    Attributes:
        tensor: the tensor itself; if it was changed in place later, it has its final contents.
        maker: the step that produced it; None for an input, a parameter or a constant.
        readers: the steps that read it.
    """

    tensor: Tensor
    maker: "Step | None" = None
    readers: "list[Step]" = field(default_factory=list)
    stale: bool = False

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        return self.tensor.shape


@dataclass(eq=False)
class Step:
    """One operation: a call of a module, or of a PyTorch function outside all such modules.

    Attributes:
        name: the module's name in the recorded module; None for a function.
        function: the function; None for a module.
        args, kwargs: the arguments, with tensors replaced by `Value`.
        result: the return value.
        inputs, outputs: the values in the arguments and in the result.
        number: index among the steps.
        scope: name of the module in whose forward it runs; "" for the recorded one.
    """

    name: str | None
    function: Callable[..., Any] | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any = None
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    number: int = 0
    scope: str = ""

    @property
    def label(self) -> str:
        """Name for messages: the module's or the function's."""
        return self.name or str(getattr(self.function, "__name__", "an operation"))

    @property
    def adds(self) -> bool:
        """Whether it is an addition."""
        return self.function is not None and self.function.__name__ in _SUMS

    @property
    def is_sum(self) -> bool:
        """Whether it adds two values of the same shape."""
        return (
            self.adds
            and len(self.inputs) == 2
            and len(self.outputs) == 1
            and all(value.shape == self.outputs[0].shape for value in self.inputs)
            and self.kwargs.get("alpha", 1) == 1
        )


@dataclass(eq=False)
class Recording:
    """A recorded run.

    Attributes:
        steps: the operations in order.
        inputs, outputs: the input and output values.
        result: the return value.
        entered: (name, first argument) of every module that ran, except those inside a single step.
    """

    steps: list[Step]
    inputs: list[Value]
    outputs: list[Value]
    result: Any
    entered: list[tuple[str, Value]]

    def ancestors(self, value: Value) -> set[Value]:
        """All values from which this one was computed, itself included."""
        found, pending = {value}, [value]
        while pending:
            maker = pending.pop().maker
            new = {v for v in maker.inputs if v not in found} if maker is not None else set()
            found |= new
            pending += new
        return found


def values_in(nested: Any) -> Iterator[Value]:
    """The values in nested tuples, lists and dictionaries, in order."""
    if isinstance(nested, Value):
        yield nested
    elif isinstance(nested, tuple | list):
        for item in nested:
            yield from values_in(item)
    elif isinstance(nested, dict):
        for item in nested.values():
            yield from values_in(item)


def replace(nested: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to every leaf of nested tuples, lists and dictionaries."""
    if type(nested) in (tuple, list):
        return type(nested)(replace(item, change) for item in nested)
    if type(nested) is dict:
        return {key: replace(item, change) for key, item in nested.items()}
    if isinstance(nested, tuple) and hasattr(nested, "_make"):
        return nested._make(replace(item, change) for item in nested)
    return change(nested)


def record(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    is_leaf: Callable[[nn.Module], bool] = lambda _: True,
    override: Callable[[Step, Callable[[], Any]], Any] = lambda _, run: run(),
) -> Recording:
    """Run a module and record its steps.

    Args:
        module: the module to run.
        args, kwargs: its arguments.
        is_leaf: whether a called module is recorded as a single step; other modules are entered, unless called by a
            leaf. Default: every module called directly is one step.
        override: called with each step (with its name, function and inputs) and a function that runs it; returns the
            result. For a module step, the module has already run.

    Raises:
        ValueError: a value is read after one that shares its memory was changed in place.
    """
    recorder = _Recorder(override)
    given = list(recorder.wrap((args, kwargs or {})))
    with ExitStack() as stack:
        for name, part in module.named_modules():
            if part is not module:
                enter, leave = recorder.hooks(name) if is_leaf(part) else recorder.scope_hooks(name)
                # prepended, as other hooks may compute its weights
                stack.callback(part.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove)
                stack.callback(part.register_forward_hook(leave, with_kwargs=True, always_call=True).remove)
        stack.enter_context(recorder)
        result = module(*args, **(kwargs or {}))
    return Recording(recorder.steps, given, list(values_in(recorder.values_of(result))), result, recorder.entered)


class _Recorder(TorchFunctionMode):
    def __init__(self, override: Callable[[Step, Callable[[], Any]], Any]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.override = override
        self._current: dict[int, Value] = {}
        self._all: list[Value] = []  # also keeps every tensor alive, so that ids are unique
        self.entered: list[tuple[str, Value]] = []
        self._scopes: list[str] = []
        self._running: list[str] = []
        self._started: tuple[Step, list[int]] | None = None

    def wrap(self, nested: Any) -> Iterator[Value]:
        """Create values for tensors from outside."""
        yield from values_in(self.values_of(nested))

    def values_of(self, nested: Any) -> Any:
        return replace(nested, lambda leaf: self._value(leaf) if isinstance(leaf, Tensor) else leaf)

    def _value(self, tensor: Tensor) -> Value:
        value = self._current.get(id(tensor))
        if value is None:
            value = self._add(tensor, None)
        if value.stale:
            raise ValueError("it reads a tensor after one that shares its memory was changed in place")
        return value

    def _add(self, tensor: Tensor, maker: Step | None) -> Value:
        value = self._current[id(tensor)] = Value(tensor, maker)
        self._all.append(value)
        return value

    def _begin(self, step: Step) -> list[int]:
        step.number = len(self.steps)
        step.scope = self._scopes[-1] if self._scopes else ""
        step.args, step.kwargs = self.values_of(step.args), self.values_of(step.kwargs)
        step.inputs = list(dict.fromkeys(values_in((step.args, step.kwargs))))
        return [value.tensor._version for value in step.inputs]

    def _end(self, step: Step, versions: list[int], run: Callable[[], Any]) -> Any:
        result = self.override(step, run)
        given = {id(value.tensor): value for value in step.inputs}
        changed = [
            value for value, version in zip(step.inputs, versions, strict=True) if value.tensor._version != version
        ]

        def fresh(leaf: Any) -> Any:
            # a step that returns its input returns a view instead, so that input and output are distinct tensors
            if isinstance(leaf, Tensor) and id(leaf) in given and given[id(leaf)] not in changed:
                return leaf.view_as(leaf)
            return leaf

        result = replace(result, fresh)
        outputs: list[Tensor] = []
        replace(result, lambda leaf: outputs.append(leaf) if isinstance(leaf, Tensor) else None)
        if not outputs and not changed:
            return result  # for example, a size or a dtype
        for value in step.inputs:
            value.readers.append(step)
        memory = {value.tensor.untyped_storage().data_ptr() for value in changed}
        for value in self._all if memory else ():
            if value.tensor.untyped_storage().data_ptr() in memory and self._current.get(id(value.tensor)) is value:
                value.stale = True
        step.result = result
        outputs += [value.tensor for value in changed if all(value.tensor is not tensor for tensor in outputs)]
        step.outputs = [self._add(tensor, step) for tensor in outputs]
        self.steps.append(step)
        return result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._running:
            return func(*args, **(kwargs or {}))
        step = Step(None, func, args, kwargs or {})
        versions = self._begin(step)
        return self._end(step, versions, lambda: func(*args, **(kwargs or {})))

    def hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., Any]]:
        """Pre-forward and forward hooks for a module recorded as one step."""

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._running:
                step = Step(name, None, args, kwargs)
                with torch._C.DisableTorchFunction():
                    self._started = step, self._begin(step)
                self.entered += [(name, value) for value in step.inputs[:1]]
            self._running.append(name)

        def leave(_: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
            self._running.pop()
            if self._running or self._started is None or result is None:
                return None
            (step, versions), self._started = self._started, None
            with torch._C.DisableTorchFunction():
                return self._end(step, versions, lambda: result)

        return enter, leave

    def scope_hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        """Pre-forward and forward hooks for a module whose operations are separate steps."""

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._running:
                with torch._C.DisableTorchFunction():
                    self.entered += [(name, value) for value in list(values_in(self.values_of((args, kwargs))))[:1]]
            self._scopes.append(name)

        def leave(*_: Any) -> None:
            self._scopes.pop()

        return enter, leave
