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


def _is_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _class_name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def describe(module: nn.Module) -> dict[str, Any]:
    """The architecture of a module tree as JSON values, without the values of its tensors.

    Modules of `torch.nn` without children are described by their constructor's arguments. All others by what makes
    their forward: class, attributes that are numbers, strings, None or lists of these, own parameters and buffers, and
    children in order.

    Raises:
        ValueError: a `torch.nn` module whose constructor arguments cannot be read back, or a buffer outside state_dict.
    """
    cls = type(module)
    if cls.__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential | nn.ModuleList):
        arguments = {}
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if name in ("self", "device", "dtype") or variadic:
                continue
            value = getattr(module, name, None) is not None if name == "bias" else getattr(module, name, inspect)
            if not _is_json(value):
                raise ValueError(f"cannot describe {cls.__name__}: its argument {name!r} is not a plain value")
            arguments[name] = value
        return {"class": _class_name(cls), "arguments": arguments}
    # safetensors holds what state_dict holds; anything else would be lost without a word
    unsaved = [n for n in module._buffers if n in module._non_persistent_buffers_set and module._buffers[n] is not None]
    if unsaved:
        raise ValueError(f"cannot describe {cls.__name__}: its buffer {unsaved[0]!r} is not in state_dict")

    def shapes(tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            name: None if t is None else {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
            for name, t in tensors.items()
        }

    return {
        "class": _class_name(cls),
        "attributes": {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_") and name != "training" and _is_json(value)
        },
        "parameters": shapes(module._parameters),
        "buffers": shapes(module._buffers),
        "children": {name: None if m is None else describe(m) for name, m in module._modules.items()},
    }


def build(description: dict[str, Any], classes: Iterable[type[nn.Module]] = ()) -> nn.Module:
    """The module tree that :func:`describe` described, with tensors of the right shapes and unset values."""
    cls = _find_class(description["class"], {_class_name(c): c for c in classes})
    if "arguments" in description:
        return cls(**description["arguments"])
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, value in description["attributes"].items():
        setattr(module, name, value)

    def empty(spec: dict[str, Any] | None) -> torch.Tensor | None:
        return None if spec is None else torch.zeros(spec["shape"], dtype=getattr(torch, spec["dtype"]))

    for name, spec in description["parameters"].items():
        tensor = empty(spec)
        module.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
    for name, spec in description["buffers"].items():
        module.register_buffer(name, empty(spec))
    for name, child in description["children"].items():
        module.add_module(name, None if child is None else build(child, classes))
    return module


def _find_class(name: str, own: dict[str, type[nn.Module]]) -> type[nn.Module]:
    if name in own:
        return own[name]
    module_name, _, qualname = name.partition(":")
    if not any(module_name == p or module_name.startswith(f"{p}.") for p in _PACKAGES):
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
    architecture = describe(model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if len({t.data_ptr() for t in tensors.values() if t.numel()}) < sum(1 for t in tensors.values() if t.numel()):
        raise ValueError("model: expected every tensor once, got tensors that share memory; clone the shared ones")
    # found out now, while the network is still at hand, and not when it is loaded
    own = {type(m) for m in model.modules()}
    _load_tensors(build(architecture, own), tensors)
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
        module = build(json.loads(metadata["architecture"]), classes)
        _load_tensors(module, tensors)
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: its architecture cannot be rebuilt here ({error})") from error
    return module.eval()


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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a .safetensors file, got damaged or other data ({error})") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{path}: expected format {FORMAT!r} version {VERSION}, got {metadata.get('format')!r} version "
            f"{metadata.get('version')!r}; write it with fastgate.save"
        )
    return metadata, tensors


def _load_tensors(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    # assign: dtypes and values are those of the file, and no tensor is copied twice
    requires_grad = {name: p.requires_grad for name, p in module.named_parameters()}
    module.load_state_dict(tensors, strict=True, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(requires_grad[name])
