"""Describes a network's architecture as JSON and rebuilds it: classes by name, attributes as plain data, no code."""

import dataclasses
import importlib
import inspect
import json
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastgate.models.gated import Closed, Cut, GatedModule, gated_class, plain_class
from fastgate.pruning.reads import Reads

# modules are rebuilt from these packages; user-defined classes are passed to load(..., classes=...)
_PACKAGES = ("fastgate", "torch.nn", "torchvision", "timm")

# files of torch.nn with modules that have no children and whose constructors only compute shapes. No other constructor
# may be called by a file: some load weights, contact a hub, or create any number of layers.
_CONSTRUCTED = frozenset(
    f"torch.nn.modules.{name}"
    for name in (
        "activation", "batchnorm", "channelshuffle", "conv", "distance", "dropout", "flatten", "fold", "instancenorm",
        "linear", "loss", "normalization", "padding", "pixelshuffle", "pooling", "rnn", "sparse", "upsampling",
    )
)  # fmt: skip
_NOT_CONSTRUCTED = (nn.MultiheadAttention, nn.RNNBase, nn.modules.lazy.LazyModuleMixin)

# far beyond any real network: anything deeper or larger is a denial-of-service attempt
_MAX_DEPTH = 100
_MAX_MODULES = 100_000

# attributes that every module has; all others come from its class
_BASE_ATTRIBUTES = frozenset(vars(nn.Module()))

_MISSING = object()

# types of values that JSON lacks, by the key under which they are written
_SEQUENCES = {"tuple": tuple, "size": torch.Size, "set": set, "frozenset": frozenset}
_MAPPINGS = {"dict": dict, "ordered_dict": OrderedDict}


def _encode(value: Any) -> Any:
    """Encode a plain value as JSON such that its exact type is kept; raises TypeError for anything else."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_encode(item) for item in value]
    for key, sequence in _SEQUENCES.items():
        if type(value) is sequence:
            items = [_encode(item) for item in value]
            # the order of a set differs between processes and between equal sets
            return {key: sorted(items, key=repr) if isinstance(value, set | frozenset) else items}
    for key, mapping in _MAPPINGS.items():
        if type(value) is mapping:
            return {key: [[_encode(k), _encode(v)] for k, v in value.items()]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, Enum) and _is_known(type(value).__module__):
        return {"enum": [_class_name(type(value)), value.name]}
    raise TypeError(f"a {type(value).__name__} is not a plain value")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    [(key, content)] = value.items()
    if key in _SEQUENCES:
        return _SEQUENCES[key](_decode(item) for item in content)
    if key in _MAPPINGS:
        return _MAPPINGS[key]((_decode(k), _decode(v)) for k, v in content)
    if key == "dtype":
        return _find_dtype(content)
    if key == "enum":
        return _find_class(content[0], Enum).__members__[content[1]]
    raise KeyError(f"a value of kind {key!r}")


def _class_name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _is_known(module_name: str) -> bool:
    return any(module_name == package or module_name.startswith(f"{package}.") for package in _PACKAGES)


def own_classes(model: nn.Module) -> set[type[nn.Module]]:
    """The classes of a network that have to be passed to :func:`build`."""
    classes = {plain_class(module) for module in model.modules()}
    return {cls for cls in classes if not _is_known(cls.__module__)}


def describe(model: nn.Module) -> dict[str, Any]:
    """Describe the architecture of a module tree as JSON values, without the values of its tensors.

    Modules of `torch.nn` without children are described by their constructor's arguments if these reproduce them. All
    others are described by what determines their forward: class, plain attributes, own parameters and buffers, and
    children in order. Other attributes are left out if no code of the network can read them (such as constructors that
    torchvision and timm store); otherwise the network cannot be described.

    Raises:
        ValueError: an attribute in use that is not a plain value, a buffer outside state_dict, a forward hook.
    """
    reads: list[Reads] = []  # computed at most once, on demand

    def may_be_read(module: nn.Module, name: str) -> bool:
        if not reads:
            reads.append(Reads(model, [package.partition(".")[0] for package in _PACKAGES]))
        return reads[0].may_read(module, name)

    def describe_module(name: str, module: nn.Module) -> dict[str, Any]:
        cls = plain_class(module)
        _check_describable(name, module)
        is_plain = cls is type(module) and _is_constructed(cls)
        if is_plain and (arguments := _constructor_arguments(module)) is not None:
            return {"class": _class_name(cls), "arguments": arguments}
        attributes = {}
        for key, value in _own_attributes(module).items():
            try:
                attributes[key] = _encode(value)
            except TypeError as error:
                if may_be_read(module, key):
                    remedy = (
                        "save its state_dict() and build the network in code"
                        if _is_known(cls.__module__)
                        else "make it a module, a buffer or a plain value"
                    )
                    raise ValueError(
                        f"cannot describe {cls.__name__}{_at(name)}: its attribute {key!r}: {error}, and its code may "
                        f"use it; {remedy}"
                    ) from error
        gated = {"gated": _encode_gated(module.gated)} if isinstance(module, GatedModule) else {}
        return {
            **gated,
            "class": _class_name(cls),
            "attributes": attributes,
            "parameters": _shapes(module._parameters),
            "buffers": _shapes(module._buffers),
            "children": {
                key: None if child is None else describe_module(f"{name}.{key}" if name else key, child)
                for key, child in module._modules.items()
            },
        }

    return describe_module("", model)


def _at(name: str) -> str:
    return f" {name!r}" if name else ""


def _check_describable(name: str, module: nn.Module) -> None:
    """Reject what a file cannot store, and warn of what it leaves out."""
    cls = type(module)
    where = f"{cls.__name__}{_at(name)}"
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(
            f"cannot describe {where}: its forward hook, which may change its output, would be lost; remove the hook "
            "first (with its handle's remove(), or the remove function of weight_norm, spectral_norm or prune)"
        )
    if parametrize.is_parametrized(module):
        raise ValueError(
            f"cannot describe {where}: its parametrizations are code, which is not saved; fold them into its tensors "
            "first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    if module._backward_hooks or module._backward_pre_hooks:
        warnings.warn(f"{where}: its backward hooks are not saved", stacklevel=2)


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    # the __getstate__ of gates leaves out the last forward's tensors
    state = module.__getstate__() if type(module).__module__.startswith("fastgate.") else vars(module)
    hidden = {"gated"} if isinstance(module, GatedModule) else set()
    return {name: value for name, value in state.items() if name not in _BASE_ATTRIBUTES | hidden}


def _encode_gated(gated: Closed | Cut) -> list[Any]:
    """Encode the description of a gated module: its kind and its fields."""
    return [type(gated).__name__, _encode(dataclasses.asdict(gated))]


def _decode_gated(value: list[Any]) -> Closed | Cut:
    kind, fields = value
    return {"Closed": Closed, "Cut": Cut}[kind](**_decode(fields))


def _constructor_arguments(module: nn.Module) -> dict[str, Any] | None:
    """Constructor arguments of a torch.nn module; None if they do not reproduce it."""
    if module._modules:
        return None
    arguments = {}
    for name in _argument_names(type(module)):
        try:
            value = getattr(module, name)
            is_tensor = name == "bias" and isinstance(value, torch.Tensor | None)
            arguments[name] = value is not None if is_tensor else _encode(value)
        except (AttributeError, TypeError):
            return None
    try:
        with torch.device("meta"):
            twin = _construct(type(module), arguments)
    except (RuntimeError, TypeError, ValueError):
        return None
    return None if any(_differences(module, twin)) else arguments


def _is_constructed(cls: type) -> bool:
    """Whether a class is described by its constructor's arguments."""
    return cls.__module__ in _CONSTRUCTED and not issubclass(cls, _NOT_CONSTRUCTED)


def _argument_names(cls: type[nn.Module]) -> list[str]:
    """Constructor arguments that a file may set: neither the device, which would allocate memory, nor the dtype."""
    return [
        name
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if name not in ("self", "device", "dtype")
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _construct(cls: type[nn.Module], arguments: dict[str, Any]) -> nn.Module:
    return cls(**{name: _decode(value) for name, value in arguments.items()})


def _shapes(tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if t is None else {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
        for name, t in tensors.items()
    }


def _differences(module: nn.Module, twin: nn.Module) -> Iterator[str]:
    """Names of attributes and kinds of tensors in which a module differs from its twin, children excluded."""
    ours, theirs = _own_attributes(module), _own_attributes(twin)
    for name in sorted({*ours, *theirs}):
        default = getattr(type(module), name, _MISSING)
        if not _is_same(ours.get(name, default), theirs.get(name, default)):
            yield name
    for kind in ("_parameters", "_buffers"):
        if getattr(module, kind).keys() != getattr(twin, kind).keys():
            yield kind


def _is_plain(value: Any) -> bool:
    try:
        _encode(value)
    except TypeError:
        return False
    return True


def _is_same(value: Any, other: Any) -> bool:
    if value is other or not (_is_plain(value) and _is_plain(other)):
        return value is other
    return json.dumps(_encode(value)) == json.dumps(_encode(other))  # not ==: nan counts as equal to nan


def build(description: dict[str, Any], classes: Iterable[type[nn.Module]] = ()) -> nn.Module:
    """Rebuild a module tree from the result of :func:`describe`, with tensors on the meta device.

    Raises:
        ValueError: a class that is neither from the known packages nor in `classes`.
        AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError: not a valid description.
    """
    _check_size(description)
    with torch.device("meta"):  # uses no random numbers and allocates no memory
        return _build(description, {_class_name(c): c for c in classes})


def _check_size(description: Any) -> None:
    found, level = 0, [description]
    for _ in range(_MAX_DEPTH):
        found += len(level)
        if not level or found > _MAX_MODULES:
            break
        level = [child for module in level for child in module.get("children", {}).values() if child is not None]
    if level:
        raise ValueError(f"network: expected up to {_MAX_MODULES} modules in up to {_MAX_DEPTH} levels, got more")


def _build(description: dict[str, Any], own: dict[str, type[nn.Module]]) -> nn.Module:
    name = description["class"]
    cls = own[name] if name in own else _find_class(name, nn.Module)
    if "arguments" in description:
        arguments = description["arguments"]
        if not _is_constructed(cls):
            raise ValueError(
                f"network: expected no arguments for {name}, whose constructor must not be called, got some"
            )
        if unknown := [key for key in arguments if key not in _argument_names(cls)]:
            raise ValueError(f"network: expected arguments of {name}, got {unknown[0]!r}")
        return _construct(cls, arguments)
    # bypasses the class's own handling of attributes, tensors and children
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for key, value in description["attributes"].items():
        if key in _BASE_ATTRIBUTES or hasattr(nn.Module, key):
            raise ValueError(f"network: expected attributes specific to {name}, got {key!r}, which every module has")
        vars(module)[key] = _decode(value)

    def empty(spec: dict[str, Any] | None) -> torch.Tensor | None:
        return None if spec is None else torch.empty(spec["shape"], dtype=_find_dtype(spec["dtype"]))

    for key, spec in description["parameters"].items():
        tensor = empty(spec)
        nn.Module.register_parameter(module, key, None if tensor is None else nn.Parameter(tensor))
    for key, spec in description["buffers"].items():
        nn.Module.register_buffer(module, key, empty(spec))
    for key, child in description["children"].items():
        nn.Module.add_module(module, key, None if child is None else _build(child, own))
    if "gated" in description:
        module.__class__ = gated_class(cls)
        module.gated = _decode_gated(description["gated"])
    return module


def _find_class(name: str, base: type) -> Any:
    """Find a class of a known package that is derived from `base`."""
    module_name, _, qualname = name.partition(":")
    if not _is_known(module_name):
        raise ValueError(
            f"network: its class {name} is not from {', '.join(_PACKAGES)}; pass it as load(path, classes=[...])"
        )
    if any(part.startswith("__") for part in module_name.split(".")):  # importing __main__ would run a program
        raise ValueError(f"network: expected a class of a module, got {name}")
    found: Any = importlib.import_module(module_name)
    for part in qualname.split("."):
        found = vars(found).get(part)  # getattr could run the module's own code
        if found is None:
            raise ValueError(f"network: its class {name} does not exist in this version of {module_name.split('.')[0]}")
    if not (isinstance(found, type) and issubclass(found, base)):
        kind = "modules" if base is nn.Module else base.__name__
        raise ValueError(f"network: expected a class of {kind}, got {name}")
    if _class_name(found) != name:  # defined elsewhere and only imported there
        raise ValueError(f"network: expected the name {_class_name(found)} of a class, got {name}")
    return found


def _find_dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"expected the name of a dtype, got {name}")
    return found


def check_rebuilt(model: nn.Module, rebuilt: nn.Module) -> None:
    """Compare a described network with the one rebuilt from its description, module by module.

    Raises:
        ValueError: a class or an attribute differs, except attributes that :func:`describe` intentionally left out.
    """
    twins = dict(rebuilt.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        twin = twins[name]
        if type(twin) is not type(module):
            raise ValueError(f"{type(module).__name__}{_at(name)}: another class has its name")
        for key in _differences(module, twin):
            if not (hasattr(module, key) and key not in vars(twin) and not _is_plain(getattr(module, key))):
                raise ValueError(f"{type(module).__name__}{_at(name)}: its {key!r} is not restored")
