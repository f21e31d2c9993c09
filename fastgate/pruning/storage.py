"""Networks as one .safetensors file: the tensors, and the architecture as JSON in the metadata. Never pickle."""

import importlib
import inspect
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import nn

from fastgate.files import write_atomically

FORMAT = "fastgate-network"
VERSION = 1
# modules are rebuilt from these packages; classes of the user's own are named in load(..., classes=...)
_PACKAGES = ("fastgate", "torch.nn", "torchvision", "timm")


# attributes that every module has; all others belong to its class
_BASE_ATTRIBUTES = frozenset(vars(nn.Module()))


def _encode(value: Any) -> Any:
    """A plain value as JSON, tuples kept apart from lists; raises TypeError for anything else."""
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a {type(value).__name__} is not a plain value")


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(_decode(item) for item in value["tuple"])
    return [_decode(item) for item in value] if isinstance(value, list) else value


def _class_name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _is_known(module_name: str) -> bool:
    return any(module_name == package or module_name.startswith(f"{package}.") for package in _PACKAGES)


def describe(module: nn.Module) -> dict[str, Any]:
    """The architecture of a module tree as JSON values, without the values of its tensors.

    Modules of `torch.nn` without children are described by their constructor's arguments. All others by what makes
    their forward: class, attributes that are numbers, strings, None, or lists and tuples of these, own parameters and
    buffers, and children in order.

    Raises:
        ValueError: a `torch.nn` module whose constructor arguments cannot be read back, a buffer outside state_dict, or
            an attribute of a class of your own that is not a plain value.
    """
    cls = type(module)
    if cls.__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential | nn.ModuleList):
        arguments = {}
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if name in ("self", "device", "dtype") or variadic:
                continue
            try:
                value = getattr(module, name)
                arguments[name] = value is not None if name == "bias" else _encode(value)
            except (AttributeError, TypeError) as error:
                raise ValueError(f"cannot describe {cls.__name__}: its argument {name!r}: {error}") from error
        return {"class": _class_name(cls), "arguments": arguments}
    # safetensors holds what state_dict holds; anything else would be lost without a word
    unsaved = [n for n in module._buffers if n in module._non_persistent_buffers_set and module._buffers[n] is not None]
    if unsaved:
        raise ValueError(f"cannot describe {cls.__name__}: its buffer {unsaved[0]!r} is not in state_dict")
    attributes = {}
    for name, value in vars(module).items():
        if name in _BASE_ATTRIBUTES:
            continue
        try:
            attributes[name] = _encode(value)
        except TypeError as error:
            # torchvision and timm keep constructors and the like, which their forward does not use
            if not _is_known(cls.__module__):
                raise ValueError(
                    f"cannot describe {cls.__name__}: its attribute {name!r}: {error}; make it a module, a buffer or a "
                    "plain value"
                ) from error

    def shapes(tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            name: None if t is None else {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
            for name, t in tensors.items()
        }

    return {
        "class": _class_name(cls),
        "attributes": attributes,
        "parameters": shapes(module._parameters),
        "buffers": shapes(module._buffers),
        "children": {name: None if m is None else describe(m) for name, m in module._modules.items()},
    }


def build(description: dict[str, Any], classes: Iterable[type[nn.Module]] = ()) -> nn.Module:
    """The module tree that :func:`describe` described, with tensors of the right shapes and unset values."""
    return _build(description, {_class_name(c): c for c in classes})


def _build(description: dict[str, Any], own: dict[str, type[nn.Module]]) -> nn.Module:
    cls = _find_class(description["class"], own)
    if "arguments" in description:
        return cls(**{name: _decode(value) for name, value in description["arguments"].items()})
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, value in description["attributes"].items():
        setattr(module, name, _decode(value))

    def empty(spec: dict[str, Any] | None) -> torch.Tensor | None:
        return None if spec is None else torch.zeros(spec["shape"], dtype=getattr(torch, spec["dtype"]))

    for name, spec in description["parameters"].items():
        tensor = empty(spec)
        module.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
    for name, spec in description["buffers"].items():
        module.register_buffer(name, empty(spec))
    for name, child in description["children"].items():
        module.add_module(name, None if child is None else _build(child, own))
    return module


def _find_class(name: str, own: dict[str, type[nn.Module]]) -> type[nn.Module]:
    if name in own:
        return own[name]
    module_name, _, qualname = name.partition(":")
    if not _is_known(module_name):
        raise ValueError(f"network: its class {name} is not of {', '.join(_PACKAGES)}; pass load(path, classes=[...])")
    found: Any = importlib.import_module(module_name)
    for part in qualname.split("."):
        found = getattr(found, part)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"network: expected a class of modules, got {name}")
    return found


def save(model: nn.Module, path: str | os.PathLike[str], *, metadata: dict[str, str] | None = None) -> None:
    """Write a network to one `.safetensors` file that :func:`load` rebuilds bit-equal, in any process.

    The file holds the state_dict; its metadata holds the architecture as JSON and the strings in `metadata`.

    Raises:
        ValueError: a network that cannot be described (see :func:`describe`), tensors that share memory, or a path that
            does not end in .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path: expected a name ending in .safetensors, got {path.name}")
    if missing := [key for key in (metadata or {}) if key in ("format", "version", "architecture")]:
        raise ValueError(f"metadata: {missing[0]!r} is written by fastgate itself; use another key")
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    architecture = {"network": describe(model), "frozen": frozen}
    state = model.state_dict()
    places = [tensor.untyped_storage().data_ptr() for tensor in state.values() if tensor.numel()]
    if len(set(places)) < len(places):
        raise ValueError("model: expected every tensor once, got tensors that share memory; clone the shared ones")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        # found out now, while the network is still at hand, and not when it is loaded
        _rebuild(architecture, tensors, {type(module) for module in model.modules()})
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"model: its description does not give it back ({error}); it cannot be saved") from error
    header = {
        **(metadata or {}),
        "format": FORMAT,
        "version": str(VERSION),
        "architecture": json.dumps(architecture),
    }
    data = save_tensors(tensors, header)
    write_atomically(path, lambda file: file.write(data))


def load(path: str | os.PathLike[str], *, classes: Iterable[type[nn.Module]] = ()) -> nn.Module:
    """Rebuild a network that :func:`save` wrote: on the CPU, in eval mode, every tensor bit-equal.

    Nothing in the file is executed: classes come from fastgate, torch.nn, torchvision and timm, or from `classes`.

    Args:
        path: the .safetensors file.
        classes: module classes of your own that the network is made of.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not a network of this library, or needs classes that were not passed.
    """
    metadata, tensors = _read(Path(path))
    try:
        return _rebuild(json.loads(metadata["architecture"]), tensors, classes).eval()
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: its architecture cannot be rebuilt here ({error})") from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that were passed to :func:`save` as `metadata`."""
    metadata, _ = _read(Path(path))
    return {key: value for key, value in metadata.items() if key not in ("format", "version", "architecture")}


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a network file written by fastgate.save, found none")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # cloned: get_tensor gives views of the mapped file, which would change (or end the process) with it
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a .safetensors file, got damaged or other data ({error})") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{path}: expected format {FORMAT!r} version {VERSION}, got {metadata.get('format')!r} version "
            f"{metadata.get('version')!r}; write it with fastgate.save"
        )
    return metadata, tensors


def _rebuild(
    architecture: dict[str, Any], tensors: dict[str, torch.Tensor], classes: Iterable[type[nn.Module]]
) -> nn.Module:
    module = build(architecture["network"], classes)
    # assign: dtypes and values are those of the file, and no tensor is copied twice
    module.load_state_dict(tensors, strict=True, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in architecture["frozen"])
    return module
