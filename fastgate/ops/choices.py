"""Which implementation of an operation `auto` takes on a GPU: measured, once per kind of call, where it runs.

The first eager call of a kind runs every candidate on random inputs of that kind. One that differs from the PyTorch
meaning, raises, or gives what is not finite is ruled out with a warning; the others are timed in turns, and the fastest
is taken if it gains 5 % on PyTorch. They are timed as launched one by one, where the host may be the limit (on an H200
a residual of a CIFAR network takes PyTorch 50 us of kernels and 160 us of launches, ours 23 and 600), and as replayed
from a CUDA graph; the second is what counts inside :func:`for_graphs`.

What was found is remembered in the process and, a file for each kind, in the user's cache folder (`FASTGATE_CACHE`,
else `fastgate` in the system's place for caches), under a name made of all that it depends on: device, driver,
versions, the kernels' sources, modes of the libraries.

Nothing is measured while a graph is captured, inside :func:`looking_up`, or with `FASTGATE_TUNE=off`: what is known is
then used, and where nothing is, PyTorch. What is compiled, traced, transformed or watched by a dispatch mode (fake
tensors, a counter of operations) is PyTorch's alone. On a CPU nothing is measured: operations have rules of their own.
"""

import hashlib
import importlib
import json
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastgate.env import package_version
from fastgate.files import write_atomically
from fastgate.ops.dispatch import transforms_active

REFERENCE = "torch"
FORMAT = "fastgate-choice"
VERSION = 1
MODES = ("eager", "captured")

# a candidate leaves PyTorch behind only if it takes at most this share of its time
_MARGIN = 0.95
# input sets that calls go round, calls in a timing and timings of each candidate
_INPUTS, _CALLS, _ROUNDS = 4, 12, 5
# a result may be off by several times what PyTorch's own is, or by some units in its last place
_TIMES_TORCH, _UNITS, _LEAST = 4, 8, 1e-5

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]


class Kind(Protocol):
    """A kind of call: a frozen dataclass of plain values, which say all that its time depends on."""

    operation: ClassVar[str]

    def make(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        """Random inputs, on the device."""

    def run(self, candidate: str, inputs: dict[str, Any]) -> Outputs:
        """Results and gradients by a candidate; `"torch"` is the PyTorch meaning, which also takes float64."""

    def candidates(self) -> Sequence[str]:
        """All but `"torch"`."""

    def eps(self, dtype: torch.dtype) -> float:
        """The rounding of results of this dtype, as a share of the largest."""
        return float(torch.finfo(dtype).eps)

    def describe(self) -> str:
        """Its sizes in a few words, for tables."""


@dataclass(frozen=True)
class Choice:
    """What was found for a kind of call.

    Attributes:
        chosen: the candidate to take, "eager" and "captured".
        microseconds: per call, "eager" and "captured", by candidate; of those that gave right results.
        differences: the largest one from the float64 meaning, by candidate, as a share of the largest value.
        refused: why a candidate is never taken.
    """

    chosen: dict[str, str]
    microseconds: dict[str, dict[str, float]]
    differences: dict[str, float]
    refused: dict[str, str]


class Timer(Protocol):
    """Tells the microseconds of calls on a device, one after the other."""

    def __call__(self, calls: Sequence[Call]) -> Callable[[], dict[str, float]]:
        """Prepare them; what is returned times them once, "eager" and "captured", per call."""


class CudaTimer:
    """Calls between events: launched one by one, and captured in a CUDA graph, which is the kernels alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, calls: Sequence[Call]) -> Callable[[], dict[str, float]]:
        """Capture the calls; each timing runs and replays them."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for call in calls[:_INPUTS]:  # compiles, allocates
                    call()
                torch.cuda.synchronize()
                # not torch.cuda.graph, which empties the cache of memory each time; threads beside this one go on
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    for call in calls:
                        call()
                finally:
                    graph.capture_end()
            current.wait_stream(stream)
            graph.replay()

        def run() -> None:
            for call in calls:
                call()

        def time(function: Callable[[], None]) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e3 / len(calls)

        def times() -> dict[str, float]:
            with torch.cuda.device(self._device):
                return {"eager": time(run), "captured": time(graph.replay)}

        return times


def make_timer(device: torch.device) -> Timer | None:
    """What times calls on a device; None where nothing is measured."""
    return CudaTimer(device) if device.type == "cuda" else None


class _Memory:
    """What this process knows, by context and kind."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, Kind], Choice | None] = {}  # None: not on disk either
        self.used: dict[str, dict[str, Any]] = {}  # records, by name
        self.pinned: dict[str, Choice] = {}


_memory = _Memory()
_graphs: ContextVar[bool] = ContextVar("graphs", default=False)
_look_up_only: ContextVar[bool] = ContextVar("look_up_only", default=False)
_collected: ContextVar[dict[Kind, None] | None] = ContextVar("collected", default=None)


def choose(kind: Kind, *tensors: Tensor | None) -> str:
    """The candidate for a call of this kind on these tensors' device."""
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
    """The choice for a kind of call, measured now if it is not known."""
    context = _context(device)
    choice = _known(context, kind)
    if choice is None:
        choice = measure(kind, device)
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
    """Whether something watches or rewrites the operations of this call, which it should see as PyTorch's."""
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
    return not (_look_up_only.get() or setting == "off" or _is_capturing())


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def measure(kind: Kind, device: torch.device) -> Choice:
    """Compare and time the candidates of a kind of call, write what was found to disk, and return it.

    Neither the global random state nor the modes of the caller (gradients, autocast) are touched or in the way. Where
    memory does not suffice PyTorch is taken, and that is not written.
    """
    timer = make_timer(device)
    if timer is None:
        raise ValueError(f"device: expected one whose time is measured (CUDA), got {device}")
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            choice = _measure(kind, device, timer)
    except torch.OutOfMemoryError:
        refused = dict.fromkeys(kind.candidates(), "not enough memory to measure it")
        return Choice(dict.fromkeys(MODES, REFERENCE), {}, {}, refused)
    _write(_context(device), kind, choice)
    return choice


def _measure(kind: Kind, device: torch.device, timer: Timer) -> Choice:
    generator = torch.Generator(device).manual_seed(0)
    sets = [kind.make(device, generator) for _ in range(_INPUTS)]
    first = _copied(sets[0])  # a timed call may change its inputs
    oracle = kind.run(REFERENCE, _copied(first, torch.float64))
    differences: dict[str, float] = {}
    allowed: list[float] = []
    refused: dict[str, str] = {}
    timings: dict[str, Callable[[], dict[str, float]]] = {}
    for name in (REFERENCE, *kind.candidates()):
        try:
            got = kind.run(name, _copied(first))
            found = [_difference(one, exact) for one, exact in zip(got, oracle, strict=True)]
            if name == REFERENCE:
                allowed = [
                    max(_TIMES_TORCH * off, _UNITS * kind.eps(one.dtype), _LEAST)
                    for one, off in zip(got, found, strict=True)
                ]
            elif odd := [i for i, (off, limit) in enumerate(zip(found, allowed, strict=True)) if not off <= limit]:
                raise ArithmeticError(
                    f"result {odd[0]} is off by {found[odd[0]]:.2g} of its largest value, PyTorch's allows "
                    f"{allowed[odd[0]]:.2g}"
                )
            differences[name] = max(found, default=0.0)
            timings[name] = timer([partial(kind.run, name, sets[i % _INPUTS]) for i in range(_CALLS)])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or a board comes up with: it must not end the user's run
            if name == REFERENCE:
                raise
            refused[name] = str(error).partition("\n")[0] or type(error).__name__
            warnings.warn(
                f"{kind.operation}: {name!r} is not used on this device: {refused[name]} ({kind})", stacklevel=2
            )
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in timings}
    for _ in range(_ROUNDS):
        for name, time in timings.items():  # in turns, so that all share the board's clocks
            rounds[name].append(time())
    medians = {
        name: {mode: round(statistics.median(times[mode] for times in found), 2) for mode in MODES}
        for name, found in rounds.items()
    }
    return Choice({mode: _fastest(medians, mode) for mode in MODES}, medians, differences, refused)


def _fastest(microseconds: Mapping[str, Mapping[str, float]], mode: str) -> str:
    name = min(microseconds, key=lambda name: microseconds[name][mode])
    return name if microseconds[name][mode] <= _MARGIN * microseconds[REFERENCE][mode] else REFERENCE


def _copied(inputs: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Inputs that a call may change, floating-point ones in another dtype."""

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(dtype or value.dtype, copy=True).requires_grad_(value.requires_grad)

    return {name: copied(value) for name, value in inputs.items()}


def _difference(got: Tensor, exact: Tensor) -> float:
    """The largest difference as a share of the largest value; nan where something is not finite."""
    if got.shape != exact.shape:
        raise ArithmeticError(f"a result of {list(got.shape)} where PyTorch has one of {list(exact.shape)}")
    if got.numel() == 0:
        return 0.0
    scale = max(float(exact.detach().abs().max()), 1e-30)
    return float((got.detach().double() - exact.detach()).abs().max()) / scale


# what a choice depends on besides the kind of call


@cache
def _sources() -> str:
    """A hash of the kernels' sources and of their launchers."""
    folder = Path(importlib.import_module("fastgate.kernels").__path__[0])
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _board(device: torch.device) -> dict[str, Any]:
    """What stays for the life of the process."""
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
    """NVML's, which torch does not tell; None where NVML is missing, as in some containers."""
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
    """All that a choice depends on besides the kind of call, as text."""
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


# where choices are kept


def folder() -> Path:
    """Where choices are kept on disk; it need not be there."""
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
    """How many choices are kept on disk."""
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
            f"choices are measured again in every process: {path.parent} cannot be written ({error}); set "
            "FASTGATE_CACHE to a folder that can",
            stacklevel=2,
        )


def _read(name: str) -> Choice | None:
    """What another process found; None where nothing is, or what is there is damaged: it is then measured anew."""
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


# runs whose choices are to stay


def used() -> list[dict[str, Any]]:
    """The choices that are pinned or that this process has met, as plain values for a file of the run."""
    return [_memory.used[name] for name in sorted(_memory.used)]


def pin(records: Iterable[Mapping[str, Any]]) -> None:
    """Take these choices, from :func:`used`, before anything on disk: a choice fixes the order of sums, hence bits.

    Raises:
        ValueError: they are not what `used` gives.
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
    """What is called inside is captured in CUDA graphs, or warms up for that: kernels count, launches do not."""
    token = _graphs.set(captured)
    try:
        yield
    finally:
        _graphs.reset(token)


@contextmanager
def looking_up() -> Iterator[None]:
    """Nothing is measured inside: several processes would choose each on its own."""
    token = _look_up_only.set(True)
    try:
        yield
    finally:
        _look_up_only.reset(token)


@contextmanager
def collecting() -> Iterator[dict[Kind, None]]:
    """Note the kinds of calls that are made inside, and measure none: of what is not known PyTorch is taken."""
    found: dict[Kind, None] = {}
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)
