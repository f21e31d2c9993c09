"""Weights from files: read without running code in them, and adapted to other numbers of classes and channels."""

import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from fastgate.pruning.storage import FORMAT

Classifier: TypeAlias = nn.Linear | nn.Conv2d

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
# keys under which a checkpoint may keep its tensors
_NESTED = ("state_dict", "model", "model_state_dict")
# exceptions that torch.load raises on damaged or foreign files
DAMAGED = (RuntimeError, EOFError, ValueError, KeyError, AttributeError, OSError, pickle.UnpicklingError)
# former names in torchvision's DenseNets, which its downloads still have
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a file: bare, or under "state_dict", "model" or "model_state_dict". No code in it is run.

    Args:
        path: a .pth, .pt or .bin file of `torch.save`, or a .safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another kind of file, or one that is damaged or has no state dict.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"weights: expected none, default or a file ending in {', '.join(SUFFIXES)}, got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"weights: expected a file, found none at {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                # cloned: get_tensor gives views of the mapped file, which would change with it
                return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, *DAMAGED) as error:
        raise ValueError(
            f"weights: expected tensors in {path}, got a damaged file or other objects ({first_line(error)}); write it "
            "with torch.save(model.state_dict(), path)"
        ) from error
    nested = [content[key] for key in _NESTED if isinstance(content, dict) and isinstance(content.get(key), dict)]
    state = nested[0] if nested else content
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"weights: expected a state dict in {path}, or one under {', '.join(map(repr, _NESTED))}, got "
            f"{_describe(content)}; write it with torch.save(model.state_dict(), path)"
        )
    return state


def _describe(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    return f"a dict with the keys {_some(list(map(str, content)))}" if content else "an empty dict"


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], num_classes: int, source: str, remedy: str
) -> tuple[str, ...]:
    """Load a state dict into a network of `num_classes`; returns notes on how it was adapted.

    A prefix that all names of the file share ("module." of DistributedDataParallel) is dropped. A classifier of another
    number of classes is skipped: the network keeps its own. Weights for three channels are summed for a grey-scale
    network. All other names must match exactly.

    Args:
        model: receives the weights.
        state: tensors by name; not modified.
        num_classes: of the network.
        source: describes the weights in the error.
        remedy: the error's advice to the user.

    Raises:
        ValueError: names or shapes that differ from the network's.
    """
    notes = []
    # load_state_dict reads the versions of modules from `_metadata`
    tensors = OrderedDict((_OLD_DENSENET.sub(r"\1", name), tensor) for name, tensor in state.items())
    if hasattr(state, "_metadata"):
        tensors._metadata = OrderedDict(state._metadata)  # type: ignore[attr-defined]
    own = model.state_dict()
    while (prefix := _shared_prefix(tensors)) and prefix != _shared_prefix(own):
        consume_prefix_in_state_dict_if_present(tensors, prefix)
        notes.append(f"the prefix {prefix!r} of the names in {source} was dropped")

    stem = find_stem(model, 1)
    weight, grey = tensors.get(f"{stem}.weight"), own.get(f"{stem}.weight")
    if weight is not None and grey is not None and weight.shape == (len(grey), 3, *grey.shape[2:]) != grey.shape:
        tensors[f"{stem}.weight"] = weight.sum(1, keepdim=True)
        notes.append(summed_stem(str(stem)))

    for name in find_classifiers(model, num_classes):
        loaded, kept = tensors.get(f"{name}.weight"), own.get(f"{name}.weight")
        if loaded is None or kept is None or loaded.dim() != kept.dim():
            continue
        if len(loaded) != len(kept) and loaded.shape[1:] == kept.shape[1:]:
            for part in ("weight", "bias"):
                if f"{name}.{part}" in own:
                    tensors[f"{name}.{part}"] = own[f"{name}.{part}"]
            notes.append(f"{replaced_classifier(name, len(loaded), num_classes)}, newly initialised")

    wrong = [
        f"{name} {list(tensor.shape)} instead of {list(own[name].shape)}"
        for name, tensor in tensors.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if not wrong:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        wrong = [f"{name} is missing" for name in missing] + [f"{name} is unexpected" for name in unexpected]
    if wrong:
        raise ValueError(f"weights: {source} does not fit the network: {_some(wrong)}; {remedy}")
    return tuple(notes)


def _shared_prefix(state: Mapping[str, Any]) -> str:
    """The first component, with its dot, of all names ("module." of module.conv1.weight, ...); empty if they differ."""
    first = {name.partition(".")[0] if "." in name else "" for name in state}
    return f"{first.pop()}." if len(first) == 1 and "" not in first else ""


def _some(names: list[str]) -> str:
    """Up to four names, and the number of further ones."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def is_fastgate_file(path: str | os.PathLike[str]) -> bool:
    """Whether :func:`fastgate.save` wrote this file, which must be readable."""
    if Path(path).suffix != ".safetensors":
        return False
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("format") == FORMAT


def find_classifiers(model: nn.Module, num_classes: int | None = None) -> dict[str, Classifier]:
    """The layers that output the class scores, by name: those timm reports, else the last with `num_classes` outputs.

    A linear layer takes precedence over a 1x1 convolution. Without `num_classes`, any number of outputs is accepted.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)))
        and num_classes in (None, _classes(module))
    }
    if type(model).__module__.partition(".")[0] == "timm":
        named = cast(Any, model).get_classifier()
        heads = {id(head) for head in (named if isinstance(named, tuple) else (named,))}
        if found := {name: layer for name, layer in layers.items() if id(layer) in heads}:
            return found
    for kind in (nn.Linear, nn.Conv2d):
        if alike := [name for name, layer in layers.items() if isinstance(layer, kind)]:
            return {alike[-1]: layers[alike[-1]]}
    return {}


def _classes(layer: Classifier) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def replace_classifier(model: nn.Module, num_classes: int) -> tuple[str, ...]:
    """Replace a network's last layer in place if it has another number of outputs; returns notes on the changes.

    Raises:
        ValueError: there is no linear layer and no 1x1 convolution.
    """
    layers = find_classifiers(model)
    if not layers:
        raise ValueError(
            "network: expected a linear layer or a 1x1 convolution that outputs the class scores, found none; give the "
            "function that builds it a parameter num_classes"
        )
    others = {name: layer for name, layer in layers.items() if _classes(layer) != num_classes}
    for name, layer in others.items():
        bias = layer.bias is not None
        new: Classifier
        if isinstance(layer, nn.Linear):
            new = nn.Linear(layer.in_features, num_classes, bias)
        else:
            new = nn.Conv2d(layer.in_channels, num_classes, 1, bias=bias)
        model.set_submodule(name, new.to(layer.weight))
    return tuple(replaced_classifier(name, _classes(layer), num_classes) for name, layer in others.items())


def find_stem(model: nn.Module, *in_channels: int) -> str | None:
    """Name of the first convolution with one of these numbers of input channels; without numbers, of the first."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and (not in_channels or module.in_channels in in_channels):
            return name
    return None


def replace_stem(model: nn.Module, in_channels: int) -> tuple[str, ...]:
    """Replace the first convolution of a network for colour images in place, for other images; returns notes.

    A network without a convolution of three channels is not changed.

    Raises:
        ValueError: that convolution is not a plain one.
    """
    name = find_stem(model, in_channels, 3)
    old = None if name is None else model.get_submodule(name)
    if name is None or not isinstance(old, nn.Conv2d) or old.in_channels == in_channels:
        return ()
    if old.groups != 1 or old.padding_mode != "zeros":
        raise ValueError(
            f"network: expected a plain first convolution to replace by one of {in_channels} channels, got {old}; give "
            "the function that builds it a parameter in_channels"
        )
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    model.set_submodule(name, new.to(old.weight))
    return (f"the first convolution {name} (3 channels) was replaced by one of {in_channels}",)


def replaced_classifier(name: str, before: int, now: int) -> str:
    """The note on a replaced classifier."""
    return f"the classifier {name} ({before} classes) was replaced by one of {now} classes"


def summed_stem(name: str) -> str:
    """The note on weights for colour images in a grey-scale network."""
    return f"the weights of the first convolution {name} were summed over their 3 channels"
