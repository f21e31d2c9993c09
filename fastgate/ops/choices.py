"""Choice of the implementation of an operation that `auto` uses on a GPU, measured once per kind of call.

The first eager call of a kind compares and times its candidates, see :mod:`fastgate.ops.measurement`. What counts is
the time of calls launched one by one, and inside :func:`for_graphs` that of a CUDA graph's replay.

Choices are cached in the process and, one file per kind, in the user's cache folder (`FASTGATE_CACHE`, otherwise
`fastgate` in the system's cache folder). The file name depends on everything that affects a choice: device, driver,
versions, kernel sources, library modes.

Nothing is measured while a graph is being captured, inside :func:`looking_up`, or with `FASTGATE_TUNE=off`: a cached
choice is then used, or PyTorch if there is none. Calls that are compiled, traced, transformed or observed by a dispatch
mode (fake tensors, an operation counter) always use PyTorch. On a CPU nothing is measured: operations follow fixed
rules.
"""

import hashlib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastgate.env import package_version
from fastgate.files import write_atomically
from fastgate.ops.dispatch import transforms_active
from fastgate.ops.measurement import MODES, REFERENCE, Choice, Kind, make_timer, measure
from fastgate.transfers import is_capturing

FORMAT = "fastgate-choice"
VERSION = 1


class _Memory:
    """The choices known to this process, by context and kind."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, Kind], Choice | None] = {}  # None: not on disk either
        self.used: dict[str, dict[str, Any]] = {}  # records, by name
        self.pinned: dict[str, Choice] = {}


_memory = _Memory()
_graphs: ContextVar[bool] = ContextVar("graphs", default=False)
_look_up_only: ContextVar[bool] = ContextVar("look_up_only", default=False)
_collected: ContextVar[dict[Kind, None] | None] = ContextVar("collected", default=None)


def choose(kind: Kind, *tensors: Tensor | None) -> str:
    """The candidate to use for a call of this kind on these tensors' device."""
    device = next(tensor.device for tensor in tensors if tensor is not None)
    if _is_recorded(tensors) or make_timer(device) is None:
        return REFERENCE
    context = _context(device)
    choice = _known(context, kind)
    if (collected := _collected.get()) is not None:
        collected[kind] = None
    elif choice is None and _may_measure():
        choice = find(kind, device)
    return REFERENCE if choice is None else choice.chosen["captured" if _graphs.get() else "eager"]


def find(kind: Kind, device: torch.device) -> Choice:
    """The choice for a kind of call, measured now if it is not known.

    Raises:
        ValueError: a device on which nothing is measured.
    """
    context = _context(device)
    choice = _known(context, kind)
    if choice is None:
        timer = make_timer(device)
        if timer is None:
            raise ValueError(f"device: expected one whose time is measured (CUDA), got {device}")
        choice = measure(kind, device, timer)
        if choice is None:  # not stored: there may be more memory next time
            refused = dict.fromkeys(kind.candidates(), "not enough memory to measure it")
            choice = Choice(dict.fromkeys(MODES, REFERENCE), {}, {}, refused)
        else:
            _write(context, kind, choice)
        _use(context, kind, choice)
    return choice


def _known(context: str, kind: Kind) -> Choice | None:
    key = (context, kind)
    if key not in _memory.found:
        name = _name(context, kind)
        _memory.found[key] = choice = _memory.pinned.get(name) or _read(name)
        if choice is not None:
            _use(context, kind, choice)
    return _memory.found[key]


def _use(context: str, kind: Kind, choice: Choice) -> None:
    _memory.found[context, kind] = choice
    _memory.used[_name(context, kind)] = _record(context, kind, choice)


def _is_recorded(tensors: Iterable[Tensor | None]) -> bool:
    """Whether something records or rewrites the operations of this call and should see PyTorch's."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or transforms_active()
        or _get_current_dispatch_mode() is not None
        or any(tensor is not None and type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


def _may_measure() -> bool:
    setting = os.environ.get("FASTGATE_TUNE", "on")
    if setting not in ("on", "off"):
        raise ValueError(f"the environment variable FASTGATE_TUNE: expected on or off, got {setting!r}")
    return not (_look_up_only.get() or setting == "off" or is_capturing())


# context of a choice, besides the kind of call


@cache
def _sources() -> str:
    """Hash of the sources of the kernels and their launchers."""
    folder = Path(importlib.import_module("fastgate.kernels").__path__[0])
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _board(device: torch.device) -> dict[str, Any]:
    """The part of the context that does not change during the process."""
    versions = {name: package_version(name) for name in ("fastgate", "torch", "triton")}
    found: dict[str, Any] = {"device": device.type, "versions": versions, "sources": _sources()}
    if device.type == "cuda":
        found |= {
            "device": torch.cuda.get_device_name(device),
            "capability": list(torch.cuda.get_device_capability(device)),
            "driver": _driver_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _driver_version() -> str | None:
    """The driver version from NVML, as torch does not report it; None if NVML is missing, as in some containers."""
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            return str(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _context(device: torch.device) -> str:
    """Everything that a choice depends on besides the kind of call, as text."""
    cudnn: Any = torch.backends.cudnn
    return _describe_context(
        device,
        torch.are_deterministic_algorithms_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        cudnn.conv.fp32_precision,
        torch.backends.cuda.matmul.fp32_precision,
        os.environ.get("FASTGATE_TURING_MMA", ""),
    )


@cache
def _describe_context(device: torch.device, *modes: Any) -> str:
    return json.dumps({**_board(device), "modes": modes}, sort_keys=True)


# storage of choices


def folder() -> Path:
    """The folder in which choices are stored; it need not exist."""
    if chosen := os.environ.get("FASTGATE_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fastgate"


def kept() -> int:
    """Number of choices stored on disk."""
    return sum(1 for _ in folder().glob("choice-*.json"))


def _name(context: str, kind: Kind) -> str:
    return _name_of(json.loads(context), _describe(kind))


def _name_of(context: Mapping[str, Any], kind: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([context, kind], sort_keys=True).encode()).hexdigest()[:32]


def _describe(kind: Kind) -> dict[str, Any]:
    return {"operation": kind.operation, **asdict(kind)}  # type: ignore[call-overload]


def _record(context: str, kind: Kind, choice: Choice) -> dict[str, Any]:
    head = {"format": FORMAT, "version": VERSION, "context": json.loads(context), "kind": _describe(kind)}
    return {**head, **asdict(choice)}


def _path(name: str) -> Path:
    return folder() / f"choice-{name}.json"


def _write(context: str, kind: Kind, choice: Choice) -> None:
    path = _path(_name(context, kind))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(_record(context, kind, choice), indent=1) + "\n")
    except OSError as error:
        warnings.warn(
            f"kernel choices are measured again in every process: {path.parent} is not writable ({error}); set "
            "FASTGATE_CACHE to a writable folder",
            stacklevel=2,
        )


def _read(name: str) -> Choice | None:
    """A choice stored by another process; None if there is none, or if it is damaged and must be measured again."""
    try:
        record = json.loads(_path(name).read_text())
        return _parse(record) if _name_of(record["context"], record["kind"]) == name else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _parse(record: Mapping[str, Any]) -> Choice:
    if record["format"] != FORMAT or record["version"] != VERSION:
        raise ValueError(f"expected {FORMAT} version {VERSION}, got {record['format']!r} {record['version']!r}")
    choice = Choice(
        {mode: str(record["chosen"][mode]) for mode in MODES},
        {str(name): {mode: float(us[mode]) for mode in MODES} for name, us in record["microseconds"].items()},
        {str(name): float(off) for name, off in record["differences"].items()},
        {str(name): str(why) for name, why in record["refused"].items()},
    )
    if unknown := set(choice.chosen.values()) - {REFERENCE, *choice.microseconds}:
        raise ValueError(f"expected a choice that was measured, got {unknown.pop()!r}")
    return choice


# recording and pinning the choices of a run


def used() -> list[dict[str, Any]]:
    """The choices that are pinned or were used by this process, as plain values for a file of the run."""
    return [_memory.used[name] for name in sorted(_memory.used)]


def pin(records: Iterable[Mapping[str, Any]]) -> None:
    """Prefer these choices, from :func:`used`, to those on disk; they fix the order of sums and thus the exact bits.

    Raises:
        ValueError: they do not come from `used`.
    """
    pinned, used = {}, {}
    for record in records:
        try:
            name = _name_of(record["context"], record["kind"])
            pinned[name], used[name] = _parse(record), dict(record)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"choices: expected records that fastgate wrote, got one with {error!r}") from error
    _memory.pinned, _memory.used, _memory.found = pinned, used, {}


@contextmanager
def for_graphs(captured: bool = True) -> Iterator[None]:
    """Context for calls captured in CUDA graphs, and their warmup: choices go by kernel time without launches."""
    token = _graphs.set(captured)
    try:
        yield
    finally:
        _graphs.reset(token)


@contextmanager
def looking_up() -> Iterator[None]:
    """Context in which nothing is measured, for several processes, each of which would choose differently."""
    token = _look_up_only.set(True)
    try:
        yield
    finally:
        _look_up_only.reset(token)


@contextmanager
def collecting() -> Iterator[dict[Kind, None]]:
    """Context that collects the kinds of calls made inside without measuring; unknown kinds use PyTorch."""
    found: dict[Kind, None] = {}
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)
