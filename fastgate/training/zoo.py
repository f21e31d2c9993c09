"""Networks by name: this library's CIFAR ResNets, those of torchvision and timm, and functions in the user's modules.

A name may carry options as a query: `torchvision:resnet18?layers=2,1,1,1&width=0.75`. For ResNets, `layers` is the
number of blocks per stage, `widths` the channels per stage (in bottlenecks before expansion), and `width` a factor for
all widths. torchvision's stem gets the width of the first stage; timm's keeps its own. For small images, `stem=3x3`
gives torchvision's ResNets a 3x3 first convolution with stride 1. CIFAR ResNets have their depth in the name, and take
`shortcut`.
"""

import difflib
import importlib
import inspect
import operator
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from torch import nn

from fastgate.gates import named_gates
from fastgate.models.resnet import WIDTHS, resnet
from fastgate.training.network_names import (
    NetworkName,
    cifar_depth,
    import_package,
    parse_name,
    torchvision_names,
    unknown_network,
)
from fastgate.training.weights import (
    DAMAGED,
    find_classifiers,
    find_stem,
    first_line,
    is_fastgate_file,
    load_weights,
    read_weights,
    replace_classifier,
    replace_stem,
    replaced_classifier,
    summed_stem,
)


@dataclass(frozen=True)
class Network:
    """A network and its metadata.

    Attributes:
        model: the plain network, in training mode, on the CPU.
        notes: messages for the user.
        mean: per channel, of images in [0, 1], as normalised in the training of the weights; None if unknown.
        std: per channel, as `mean`.
        image_size: side in pixels of the images that the weights were trained on; None if unknown.
        arguments: plain data; `find_network(**arguments)` builds the same architecture, newly initialised.
    """

    model: nn.Module
    notes: tuple[str, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    image_size: int | None
    arguments: dict[str, Any]


class _Preprocessing(NamedTuple):
    """The preprocessing that default weights were trained with."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: int | None = None


class Shape(NamedTuple):
    """Blocks and channels per stage of a ResNet."""

    layers: tuple[int, ...]
    widths: tuple[int, ...]


class NoChannelsError(ValueError):
    """Widths so small that grouped convolutions have no channels left."""


def find_network(
    name: str,
    num_classes: int,
    *,
    weights: str | os.PathLike[str] = "none",
    in_channels: int = 3,
    options: Mapping[str, Any] | None = None,
) -> Network:
    """The network of this name for `num_classes` and images of `in_channels`, with or without weights.

    Args:
        name: `resnet110` or `cifar:resnet110`; `torchvision:resnet18`; `timm:resnet50d`; or `package.module:function`,
            a callable in an importable module or the current directory, called with `num_classes` and `in_channels`
            (or `in_chans`) where it takes them. Options may follow, see :mod:`fastgate.training.zoo`.
        num_classes: number of outputs. A classifier of another size is replaced.
        weights: `"none"`; `"default"`, those that torchvision or timm recommend, downloaded once; or a .pth, .pt, .bin
            or .safetensors file with a state dict. No code in a file is run.
        in_channels: of the images. The first convolution of a network for colour images is replaced if they differ.
        options: further options, as in the query.

    Raises:
        FileNotFoundError: the file of weights does not exist.
        ValueError: an unknown name or option, a missing package, a function that fails, or weights that are damaged or
            belong to another network.
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{argument}: expected a positive whole number, got {value!r}")
    parsed, preprocessing = parse_name(name, options), _Preprocessing()
    if weights == "default":
        model, notes, preprocessing = _build_pretrained(parsed, num_classes, in_channels)
    else:
        model, notes = build(parsed, num_classes, in_channels)
    if gate := next((gate for gate, _ in named_gates(model)), None):
        raise ValueError(f"network: expected {parsed} without gates, got one with {gate!r}; return the plain network")
    if weights not in ("none", "default"):
        notes += _load_file(model, Path(weights), parsed, num_classes)
    arguments = {"name": str(parsed), "num_classes": num_classes, "in_channels": in_channels}
    return Network(model.cpu().train(), notes, *preprocessing, arguments)


def build(parsed: NetworkName, num_classes: int, in_channels: int) -> tuple[nn.Module, tuple[str, ...]]:
    """A network with random weights, and notes for the user."""
    builders = {"cifar": _build_cifar, "torchvision": _build_torchvision, "timm": _build_timm, "own": _build_own}
    return builders[parsed.kind](parsed, num_classes, in_channels)


def shape_of(parsed: NetworkName) -> Shape | None:
    """Blocks and channels per stage with the options applied; None if it is not a ResNet of a known package."""
    own = _own_shape(parsed.kind, parsed.base)
    if own is None:
        return None
    shape = Shape(
        parsed.options.get("layers", own.layers),
        parsed.options.get("widths", scaled(own.widths, parsed.options.get("width", 1.0))),
    )
    for key, values in shape._asdict().items():
        if len(values) != len(own.widths):
            raise ValueError(
                f"network: expected {len(own.widths)} {key} for {parsed.base}, one per stage, got "
                f"{','.join(map(str, values))}"
            )
    return shape


def scaled(widths: tuple[int, ...], factor: float) -> tuple[int, ...]:
    """Widths times a factor, rounded to whole channels."""
    return tuple(max(1, round(factor * width)) for width in widths)


@cache
def _own_shape(kind: str, base: str) -> Shape | None:
    if kind == "cifar":
        return Shape(((cifar_depth(base) - 2) // 6,) * len(WIDTHS), WIDTHS)
    if kind == "own":
        return None
    entry = _entry_of(kind, base)
    if entry.__module__ != f"{kind}.models.resnet":
        return None
    with torch.device("meta"):
        model = entry()
    stages: list[Any] = [model.get_submodule(f"layer{stage}") for stage in range(1, 5)]
    last = [stage[0].conv3 if hasattr(stage[0], "conv3") else stage[0].conv2 for stage in stages]
    return Shape(
        tuple(map(len, stages)),
        tuple(conv.out_channels // stage[0].expansion for conv, stage in zip(last, stages, strict=True)),
    )


def _entry_of(kind: str, base: str) -> Callable[..., nn.Module]:
    """The function of torchvision or timm that builds this network."""
    package = import_package(kind)
    if kind == "timm":
        if not package.is_model(base):
            raise unknown_network(f"timm:{base}", kind, base.partition(".")[0])
        return package.model_entrypoint(base)
    if base not in torchvision_names():
        raise unknown_network(f"torchvision:{base}", kind, base)
    return package.models.get_model_builder(base)


def with_shape(parsed: NetworkName, shape: Shape) -> NetworkName:
    """The name of the network of this shape in the same family; options at their defaults are left out."""
    base = f"resnet{6 * shape.layers[0] + 2}" if parsed.kind == "cifar" else parsed.base
    own = _own_shape(parsed.kind, base)
    options = {key: value for key, value in shape._asdict().items() if value != getattr(own, key)}
    options |= {key: parsed.options[key] for key in ("shortcut", "stem") if key in parsed.options}
    return NetworkName(parsed.kind, base, options)


def _shape_asked_for(parsed: NetworkName) -> Shape | None:
    """The shape that the options request; None without options."""
    if not parsed.options:
        return None
    shape = shape_of(parsed)
    if shape is None:
        raise ValueError(f"network: expected options for a ResNet, got {parsed}, which has no stages to choose")
    return shape


def _check_channels(model: nn.Module, parsed: NetworkName) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.out_channels == 0:
            raise NoChannelsError(f"network: expected wider stages for {parsed}, whose {name} has no channels left")


def _build_cifar(parsed: NetworkName, num_classes: int, in_channels: int) -> tuple[nn.Module, tuple[str, ...]]:
    shape = _shape_asked_for(parsed)
    options = {"shortcut": parsed.options["shortcut"]} if "shortcut" in parsed.options else {}
    widths = WIDTHS if shape is None else shape.widths
    return resnet(cifar_depth(parsed.base), num_classes, in_channels=in_channels, widths=widths, **options), ()


def _build_torchvision(parsed: NetworkName, num_classes: int, in_channels: int) -> tuple[nn.Module, tuple[str, ...]]:
    make, shape = _entry_of(parsed.kind, parsed.base), _shape_asked_for(parsed)
    if shape is None:
        model = make(num_classes=num_classes)
    else:
        with torch.device("meta"):
            model = make(num_classes=num_classes)
        _reshape(model, shape, small="stem" in parsed.options)
        _check_channels(model, parsed)
    if getattr(model, "aux_logits", False):
        raise ValueError(
            f"network: expected one output, got {parsed} with auxiliary classifiers; use a network of timm, such as "
            "timm:inception_v3"
        )
    return model, replace_stem(model, in_channels)


def _reshape(model: Any, shape: Shape, *, small: bool) -> None:
    """Rebuild the layers of a torchvision ResNet with other blocks and widths, in torchvision's order."""
    block = type(model.layer1[0])
    model.inplanes = shape.widths[0]
    size, stride = (3, 1) if small else (7, 2)
    model.conv1 = nn.Conv2d(3, model.inplanes, size, stride, size // 2, bias=False)
    model.bn1 = model._norm_layer(model.inplanes)
    for stage, (blocks, width) in enumerate(zip(*shape, strict=True), 1):
        # the network's own method, which handles groups and bottleneck widths
        setattr(model, f"layer{stage}", model._make_layer(block, width, blocks, stride=1 if stage == 1 else 2))
    model.fc = nn.Linear(model.inplanes, model.fc.out_features)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _build_timm(
    parsed: NetworkName, num_classes: int, in_channels: int, pretrained: bool = False
) -> tuple[nn.Module, tuple[str, ...]]:
    _entry_of(parsed.kind, parsed.base)
    shape = _shape_asked_for(parsed)
    options = {} if shape is None else {"layers": shape.layers, "channels": shape.widths}
    try:
        # not the entry point itself: this one handles the tags of weights
        create = import_package("timm").create_model
        model = create(parsed.base, pretrained, num_classes=num_classes, in_chans=in_channels, **options)
    except (OSError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        what = "with its default weights" if pretrained else "without weights"
        raise ValueError(f"network: timm cannot make {parsed} {what} ({first_line(error)})") from error
    _check_channels(model, parsed)
    return model, ()


def _build_own(parsed: NetworkName, num_classes: int, in_channels: int) -> tuple[nn.Module, tuple[str, ...]]:
    module_name, _, attribute = parsed.base.partition(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            detail = f", but there is no module {error.name} here"
            raise unknown_network(str(parsed), None, attribute, detail) from error
        raise ValueError(
            f"network: {module_name} cannot be imported ({type(error).__name__}: {first_line(error)})"
        ) from error
    try:
        function = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        alike = difflib.get_close_matches(attribute, [name for name, value in vars(module).items() if callable(value)])
        hint = f"; did you mean {', '.join(alike)}?" if alike else ""
        raise ValueError(f"network: {module_name} has no {attribute}{hint}") from error
    if not callable(function) or isinstance(function, nn.Module):
        raise ValueError(
            f"network: expected {parsed} to be a function or class that builds a network, got a "
            f"{type(function).__name__}"
        )
    try:
        arguments = _arguments_for(function, num_classes, in_channels)
        model = function(**arguments)
    except Exception as error:
        raise ValueError(f"network: {parsed} failed ({type(error).__name__}: {first_line(error)})") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"network: expected {parsed} to return a torch.nn.Module, got a {type(model).__name__}")
    notes = () if "num_classes" in arguments else replace_classifier(model, num_classes)
    takes_channels = "in_channels" in arguments or "in_chans" in arguments
    return model, notes if takes_channels else notes + replace_stem(model, in_channels)


def _arguments_for(function: Callable[..., Any], num_classes: int, in_channels: int) -> dict[str, int]:
    """The arguments that a user's function takes; **kwargs is passed only num_classes, whose name is standard."""
    parameters = inspect.signature(function).parameters
    taken = {name: in_channels for name in ("in_channels", "in_chans") if name in parameters}
    if "num_classes" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        taken["num_classes"] = num_classes
    return taken


def _load_file(model: nn.Module, path: Path, parsed: NetworkName, num_classes: int) -> tuple[str, ...]:
    state = read_weights(path)
    remedy = f"is it from a network other than {parsed}?"
    if is_fastgate_file(path):
        remedy = (
            "fastgate.save wrote it with another architecture, perhaps a compact one: rebuild it with fastgate.load"
        )
    return load_weights(model, state, num_classes, str(path), remedy)


def _build_pretrained(
    parsed: NetworkName, num_classes: int, in_channels: int
) -> tuple[nn.Module, tuple[str, ...], _Preprocessing]:
    """A network with the weights that its package recommends, notes, and the weights' preprocessing."""
    if parsed.kind not in ("torchvision", "timm") or parsed.options:
        raise ValueError(
            f"weights: expected default only for networks of torchvision or timm without options, got {parsed}; use "
            "none or a file"
        )
    if in_channels not in (1, 3):
        raise ValueError(f"weights: expected images of 1 or 3 channels for default, got {in_channels}; use none")
    pretrained = _pretrained_torchvision if parsed.kind == "torchvision" else _pretrained_timm
    model, notes, (mean, std, image_size) = pretrained(parsed, num_classes, in_channels)
    if in_channels == 1:  # one grey channel stands for all three
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return model, notes, _Preprocessing(mean, std, image_size)


def _pretrained_torchvision(parsed: NetworkName, num_classes: int, in_channels: int) -> Any:
    model, notes = _build_torchvision(parsed, num_classes, in_channels)
    weights = import_package("torchvision").models.get_model_weights(parsed.base).DEFAULT
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(weights.url).path).name)
    try:
        state = weights.get_state_dict(check_hash=True, weights_only=True)
    except DAMAGED as error:
        remedy = f"delete {cached}" if cached.exists() else f"fetch {weights.url} once, or give a file"
        raise ValueError(f"weights: cannot load the default of {parsed} ({first_line(error)}); {remedy}") from error
    source = f"{type(weights).__name__}.{weights.name}"
    notes += load_weights(model, state, num_classes, source, "update torchvision, or give a file")
    transforms = weights.transforms()
    return model, notes, (tuple(transforms.mean), tuple(transforms.std), transforms.crop_size[0])


def _pretrained_timm(parsed: NetworkName, num_classes: int, in_channels: int) -> Any:
    model, _ = _build_timm(parsed, num_classes, in_channels, pretrained=True)
    config: Any = model.pretrained_cfg
    notes = [] if in_channels == 3 else [summed_stem(str(find_stem(model, 1)))]
    notes += [
        f"{replaced_classifier(name, config['num_classes'], num_classes)}, newly initialised"
        for name in find_classifiers(model, num_classes)
        if config["num_classes"] != num_classes
    ]
    data = importlib.import_module("timm.data").resolve_model_data_config(model)
    return model, tuple(notes), (tuple(data["mean"]), tuple(data["std"]), data["input_size"][-1])
