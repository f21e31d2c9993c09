"""Names of networks: parsing, and the errors for unknown ones."""

import difflib
import importlib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from fastgate.training.weights import first_line

KINDS = "resnetDEPTH (CIFAR: 20, 32, 44, 56, 110, any 6n + 2), torchvision:NAME, timm:NAME or package.module:function"
# kernel size of the first convolution for small images
SMALL_STEM = "3x3"
_OPTIONS = {
    "cifar": ("width", "widths", "shortcut"),
    "torchvision": ("layers", "width", "widths", "stem"),
    "timm": ("layers", "width", "widths"),
    "own": (),
}


@dataclass(frozen=True)
class NetworkName:
    """A parsed name: `kind` is a key of `_OPTIONS`, `base` the name within that kind."""

    kind: str
    base: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        written = {
            key: ",".join(map(str, value)) if isinstance(value, tuple) else value for key, value in self.options.items()
        }
        prefix = f"{self.kind}:" if self.kind in ("torchvision", "timm") else ""
        return prefix + self.base + ("?" if written else "") + "&".join(f"{k}={v}" for k, v in written.items())


def parse_name(name: str, options: Mapping[str, Any] | None) -> NetworkName:
    """Parse a name; its options are those of its query and `options`.

    Raises:
        ValueError: a name of no known kind, or an option that this kind does not have.
    """
    text, _, query = name.partition("?")
    try:
        given = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError as error:
        raise ValueError(f"network: expected options like ?layers=2,1,1,1&width=0.75, got {name!r}") from error
    kind, colon, base = text.partition(":")
    if not colon:
        kind, base = "cifar", text
        if not _is_cifar(base):
            raise unknown_network(name, None, base)
    elif kind not in _OPTIONS or kind == "own":
        kind, base = "own", text
        if not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", text):
            raise unknown_network(name, None, text.rpartition(":")[2])
    elif kind == "cifar" and not _is_cifar(base):
        raise unknown_network(name, kind, base)
    given += list((options or {}).items())
    if twice := [key for i, (key, _) in enumerate(given) if key in dict(given[:i])]:
        raise ValueError(f"network: expected every option once, got {twice[0]} twice for {name!r}")
    for key, _ in given:
        if key not in _OPTIONS[kind]:
            known = ", ".join(_OPTIONS[kind]) or f"none for {base}"
            raise ValueError(f"network: expected options among {known}, got {key!r}")
    found = {key: _option(key, value) for key, value in given}
    if "width" in found and "widths" in found:
        raise ValueError(f"network: expected width (a factor) or widths (channels), got both for {name!r}")
    return NetworkName(kind, base, found)


def _option(key: str, value: Any) -> Any:
    """The checked value of an option; text, as in a query, is converted."""
    if key == "shortcut":
        return str(value)
    if key == "stem":
        if value != SMALL_STEM:
            raise ValueError(f"network: expected the option stem to be {SMALL_STEM} (or left out), got {value!r}")
        return value
    try:
        if key == "width":
            number = float(value)
            if 0 < number < math.inf:
                return number
        else:
            numbers = tuple(operator.index(int(n) if isinstance(n, str) else n) for n in _split(value))
            if all(number > 0 for number in numbers):
                return numbers
    except (TypeError, ValueError):
        pass
    wanted = "a positive factor such as 0.75" if key == "width" else "positive whole numbers such as 2,1,1,1"
    raise ValueError(f"network: expected the option {key} to be {wanted}, got {value!r}")


def _split(value: Any) -> Sequence[Any]:
    return value.split(",") if isinstance(value, str) else tuple(value)


def _is_cifar(base: str) -> bool:
    return bool(re.fullmatch(r"resnet\d+", base)) and cifar_depth(base) >= 8 and cifar_depth(base) % 6 == 2


def cifar_depth(base: str) -> int:
    """The depth in a name: 110 for resnet110."""
    return int(base.removeprefix("resnet"))


def unknown_network(name: str, kind: str | None, base: str, detail: str = "") -> ValueError:
    """The error for an unknown name, with similar names of one kind or all kinds."""
    known = {"cifar": lambda: [f"resnet{depth}" for depth in (20, 32, 44, 56, 110)], **_LISTS}
    by_base: dict[str, list[str]] = {}
    for each, names in known.items():
        if kind in (None, each):
            for found in names():
                by_base.setdefault(found, []).append(str(NetworkName(each, found)))
    close = [full for found in difflib.get_close_matches(base, by_base) for full in by_base[found]]
    hint = f"did you mean {', '.join(close[:4])}?" if close else "no known name is similar"
    return ValueError(f"network: expected {KINDS}, got {name!r}{detail}; {hint}")


def torchvision_names() -> list[str]:
    """Names of torchvision's networks for image classification."""
    models = import_package("torchvision").models
    return list(models.list_models(module=models))  # detection, segmentation, ... have modules of their own


def _timm_names() -> list[str]:
    try:
        return list(import_package("timm").list_models())
    except ValueError:
        return []  # not installed: nothing to suggest


_LISTS: dict[str, Callable[[], list[str]]] = {"torchvision": torchvision_names, "timm": _timm_names}


def import_package(name: str) -> Any:
    """Import torchvision or timm; a `ValueError` with the remedy if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"network: {name}:NAME needs the package {name} ({first_line(error)}); pip install {name}"
        ) from error
