"""Networks as .safetensors files: the tensors, and the architecture as JSON in the metadata. No pickle."""

import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import nn

from fastgate.digests import KEY, check_digest, digest
from fastgate.files import write_atomically
from fastgate.pruning.architecture import build, check_rebuilt, describe, own_classes

FORMAT = "fastgate-network"
VERSION = 2
_WITHOUT_DIGEST = 1  # the version of files that cannot be checked for damage
_RESERVED = ("format", "version", "architecture", KEY)


def save(model: nn.Module, path: str | os.PathLike[str], *, metadata: dict[str, str] | None = None) -> None:
    """Save a network to a `.safetensors` file from which :func:`load` rebuilds it, bit-equal, in any process.

    The file contains the state_dict and all other buffers; its metadata contains the architecture as JSON and the
    strings in `metadata`.

    Raises:
        ValueError: a network that could not be rebuilt exactly (an attribute in use that is not a plain value, a
            forward hook, a parametrization), tensors that share memory, or a path that does not end in .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path: expected a name ending in .safetensors, got {path.name}")
    if taken := [key for key in (metadata or {}) if key in _RESERVED]:
        raise ValueError(f"metadata: {taken[0]!r} is reserved for fastgate; use another key")
    if scripted := [type(m).__name__ for m in model.modules() if isinstance(m, torch.jit.ScriptModule)]:
        raise ValueError(f"model: expected plain modules, got {scripted[0]}; save it before scripting it")
    outside = _outside_state(model)
    state = {**model.state_dict(), **outside}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_meta:
            raise ValueError(f"model: expected dense tensors with values in its state_dict, got {value} as {name!r}")
    places = [tensor.untyped_storage().data_ptr() for tensor in state.values() if tensor.numel()]
    if len(set(places)) < len(places):
        raise ValueError("model: expected every tensor once, got tensors that share memory; clone the shared ones")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        description = describe(model)
    except (AttributeError, RuntimeError, TypeError) as error:  # such as modules that contain each other
        raise ValueError(f"model: expected plain modules, got others ({error})") from error
    try:
        architecture = {
            "network": description,
            "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
            "non_persistent": list(outside),
            "strides": {name: tensor.stride() for name, tensor in state.items() if _is_permuted(tensor)},
        }
        text = json.dumps(architecture)
        # checked now, while the original network is available, not when the file is loaded
        check_rebuilt(model, _rebuild(json.loads(text), tensors, own_classes(model)))
    except Exception as error:  # classes of the network may raise anything
        raise ValueError(f"model: it cannot be rebuilt from its description ({error}), so it is not saved") from error
    header = {**(metadata or {}), "format": FORMAT, "version": str(VERSION), "architecture": text}
    header[KEY] = digest([header, tensors])
    data = save_tensors(tensors, header)
    write_atomically(path, lambda file: file.write(data))


def _outside_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The non-persistent buffers, by name."""
    found = {}
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None:
                found[f"{path}.{name}" if path else name] = buffer
    return found


def _is_permuted(tensor: torch.Tensor) -> bool:
    """Whether a tensor is dense but not contiguous, such as channels_last."""
    return tensor.stride() != torch.empty(tensor.shape, device="meta").stride() and _is_dense(
        tensor.shape, tensor.stride()
    )


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    step = 1
    for along, size in sorted((along, size) for along, size in zip(stride, shape, strict=True) if size != 1):
        if along != step:
            return False
        step *= size
    return step > 0


def load(path: str | os.PathLike[str], *, classes: Iterable[type[nn.Module]] = ()) -> nn.Module:
    """Load a network saved by :func:`save`: on the CPU, in eval mode, every tensor bit-equal.

    No code in the file is executed: classes come from fastgate, torch.nn, torchvision and timm, or from `classes`, and
    only constructors of torch.nn layers are called. Memory is allocated only for the tensors in the file.

    Args:
        path: the .safetensors file.
        classes: your own module classes that the network uses.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is not a network of this library, or needs classes that were not passed.
    """
    metadata, tensors = _read(Path(path))
    try:
        return _rebuild(json.loads(metadata["architecture"]), tensors, classes).eval()
    except Exception as error:  # a forged description can fail in any way
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
            raise ValueError(f"{path}: {error}") from error
        raise ValueError(f"{path}: its architecture cannot be rebuilt here ({error})") from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that were passed to :func:`save` as `metadata`."""
    metadata, _ = _read(Path(path))
    return {key: value for key, value in metadata.items() if key not in _RESERVED}


def _read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a network file written by fastgate.save, found none")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # cloned: get_tensor returns views of the mapped file; if it changed, so would they (or the process crash)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a .safetensors file, got damaged or other data ({error})") from error
    version = metadata.get("version") if metadata.get("format") == FORMAT else None
    if version == str(_WITHOUT_DIGEST) and KEY not in metadata:
        warnings.warn(f"{path}: a network file of an earlier version, which cannot be checked for damage", stacklevel=3)
    elif version == str(VERSION):
        wanted = metadata.pop(KEY, None)
        check_digest(path, [metadata, tensors], wanted)
    else:
        raise ValueError(
            f"{path}: expected format {FORMAT!r} version {VERSION}, got {metadata.get('format')!r} version "
            f"{metadata.get('version')!r}; write it with fastgate.save"
        )
    return metadata, tensors


def _rebuild(
    architecture: dict[str, Any], tensors: dict[str, torch.Tensor], classes: Iterable[type[nn.Module]]
) -> nn.Module:
    module = build(architecture["network"], classes)
    tensors = dict(tensors)
    for name, stride in architecture.get("strides", {}).items():  # not in older files
        tensor = tensors[name]
        if not _is_dense(tensor.shape, stride):
            raise ValueError(f"network: expected strides of a dense tensor {list(tensor.shape)}, got {stride}")
        tensors[name] = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
    state = OrderedDict(tensors)
    # names and shapes are current, so modules must not convert the state as if it came from an earlier version
    state._metadata = {  # type: ignore[attr-defined]
        path: {"version": part._version} for path, part in module.named_modules(remove_duplicate=False)
    }
    # assign: keeps dtypes, values and strides of the file, and copies no tensor twice
    module.load_state_dict(state, strict=True, assign=True)
    for name in architecture.get("non_persistent", ()):
        path, _, leaf = name.rpartition(".")
        module.get_submodule(path).get_buffer(leaf)
        module.get_submodule(path)._non_persistent_buffers_set.add(leaf)
    frozen = set(architecture["frozen"])
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return module
