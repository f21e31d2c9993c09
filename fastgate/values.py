"""Nested inputs and outputs of networks: calling a model with them, and comparing two of them."""

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

# calls a network with a special calling convention: (model, inputs) -> outputs
Forward = Callable[[nn.Module, Any], Any]

_EXACT = (bool, int, str, bytes, type(None), torch.dtype, torch.device)


def call(model: nn.Module, inputs: Any, forward: Forward | None = None) -> Any:
    """Call the model: a mapping gives keyword arguments, a plain tuple positional ones, anything else one argument.

    A list is a single argument, such as the images of a detection network. If `forward` is given,
    `forward(model, inputs)` is called instead.
    """
    if forward is not None:
        return forward(model, inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if type(inputs) is tuple:  # not a named one, such as a PackedSequence
        return model(*inputs)
    return model(inputs)


def inputs_of(batch: Any, forward: Forward | None = None) -> Any:
    """The inputs in a batch of a loader: its first item if it is a tuple or list, all of it for a given `forward`."""
    return batch[0] if forward is None and isinstance(batch, tuple | list) else batch


def to_device_of(model: nn.Module, values: Any, *, copied: bool = False) -> Any:
    """Move every tensor in nested values to the model's device; `copied`: into new memory that no model can change.

    Tensors are found in mappings, lists, tuples and dataclasses; other objects are moved by their method `to`, if any.
    """
    device = device_of(model)

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device or leaf.device, copy=copied)
        if not hasattr(leaf, "to"):
            return leaf
        leaf = copy.deepcopy(leaf) if copied else leaf
        return leaf if device is None else leaf.to(device)

    return _map(values, move)


def device_of(model: nn.Module) -> torch.device | None:
    """Device of the model's first parameter or buffer that holds data; None if the model has neither."""
    tensors = [*model.parameters(), *model.buffers()]
    return next((tensor.device for tensor in tensors if not tensor.is_meta), tensors[0].device if tensors else None)


def tensors_in(values: Any) -> list[Tensor]:
    """Every tensor in nested values, in order."""
    found: list[Tensor] = []

    def note(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        return leaf

    _map(values, note)
    return found


def with_tensors(values: Any, tensors: Iterable[Tensor]) -> Any:
    """Replace the tensors in nested values, in the order of :func:`tensors_in`."""
    rest = iter(tensors)
    return _map(values, lambda leaf: next(rest) if isinstance(leaf, Tensor) else leaf)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to every leaf and keep the containers."""
    if isinstance(value, Mapping):
        mapped: Any = copy.copy(value) if isinstance(value, MutableMapping) else dict(value)
        for key, item in value.items():
            mapped[key] = _map(item, change)
        return mapped
    if type(value) in (list, tuple):
        return type(value)(_map(item, change) for item in value)
    if hasattr(value, "to"):  # a tensor, or what knows which of its tensors move, such as a PackedSequence
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(_map(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        mapped = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(mapped, field.name, _map(getattr(value, field.name), change))
        return mapped
    return change(value)


def difference(expected: Any, got: Any) -> float:
    """Largest absolute difference between two nested values of the same structure.

    Floating-point and complex numbers differ by their distance. Unequal integers, bools and strings differ infinitely,
    as a class index has no distance. NaN and infinities differ infinitely from everything but themselves; numbers that
    are NaN in both are skipped, with a warning.

    Raises:
        ValueError: different structures or shapes, values that cannot be compared, or no numbers to compare.
    """
    worst, compared, unknown = 0.0, 0, 0
    for path, a, b in _pairs(expected, got, "outputs"):
        if not isinstance(a, Tensor):
            worst = max(worst, 0.0 if a == b else math.inf)
            compared += isinstance(a, int)
            continue
        apart, both_nan = _tensor_difference(path, a, b)
        worst, compared = max(worst, apart), compared + a.numel() - both_nan
        if both_nan:
            unknown += both_nan
            warnings.warn(
                f"{path}: {both_nan} of {a.numel()} numbers are NaN in both networks and were not compared",
                RuntimeWarning,
                stacklevel=3,
            )
    if not compared and worst == 0:
        found = f"only {unknown} that are NaN in both" if unknown else "none"
        raise ValueError(
            f"outputs: expected numbers to compare, got {found}; use other inputs, or forward=, a function (model, "
            "inputs) that returns tensors"
        )
    return worst


def _pairs(a: Any, b: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the leaves of both values in pairs, with their paths; floats and complex numbers as tensors."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            raise ValueError(f"{path}: expected the same keys, got {_listed(a)} and {_listed(b)}")
        for key in a:
            yield from _pairs(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            raise ValueError(f"{path}: expected the same length, got {len(a)} and {len(b)}")
        for i, (item, other) in enumerate(zip(a, b, strict=True)):
            yield from _pairs(item, other, f"{path}[{i}]")
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        yield path, a, b
    elif isinstance(a, float | complex) and isinstance(b, float | complex):
        dtype = torch.complex128 if isinstance(a, complex) or isinstance(b, complex) else torch.float64
        yield path, torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype)
    elif isinstance(a, _EXACT) and isinstance(b, _EXACT) and (a is None) == (b is None):
        yield path, a, b
    elif type(a) is type(b) and dataclasses.is_dataclass(a) and not isinstance(a, type):
        for field in dataclasses.fields(a):
            yield from _pairs(getattr(a, field.name), getattr(b, field.name), f"{path}.{field.name}")
    elif type(a) is not type(b):
        raise ValueError(f"{path}: expected values of the same type, got {type(a).__name__} and {type(b).__name__}")
    else:
        raise ValueError(
            f"{path}: cannot compare two values of type {type(a).__name__}; use forward=, a function (model, inputs) "
            "that returns tensors, or containers of them"
        )


def _listed(mapping: Mapping[Any, Any]) -> str:
    return "[" + ", ".join(repr(key) for key in mapping) + "]"


def _tensor_difference(path: str, a: Tensor, b: Tensor) -> tuple[float, int]:
    """(largest absolute difference, count of numbers that are NaN in both and skipped)."""
    if a.shape != b.shape:
        raise ValueError(f"{path}: expected the same shape, got {list(a.shape)} and {list(b.shape)}")
    a, b = _dense(a), _dense(b).to(a.device)
    inexact = [tensor.is_floating_point() or tensor.is_complex() for tensor in (a, b)]
    if inexact[0] != inexact[1]:
        raise ValueError(f"{path}: expected dtypes of one kind, got {a.dtype} and {b.dtype}")
    if a.numel() == 0:
        return 0.0, 0
    if not inexact[0]:
        return (math.inf if bool((a != b).any()) else 0.0), 0
    dtype = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = a.to(dtype), b.to(dtype)
    both_nan = a.isnan() & b.isnan()
    apart = (a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    apart = apart.masked_fill((a == b) | both_nan, 0.0)  # inf - inf is NaN
    return float(apart.max()), int(both_nan.sum())


def _dense(tensor: Tensor) -> Tensor:
    if tensor.is_quantized:
        return tensor.dequantize()
    return tensor if tensor.layout is torch.strided else tensor.to_dense()
