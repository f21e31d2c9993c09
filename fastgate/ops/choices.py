"""Choice of the implementation of an operation that `auto` uses on a GPU, measured once per kind of call.

The first eager call of a kind runs every candidate on random inputs of that kind. A candidate that differs from the
PyTorch reference, raises, or gives non-finite results is ruled out with a warning; the others are timed in turn, and
the fastest is chosen if it gains 5 % over PyTorch. Candidates are timed launched one by one, where the host may be the
bottleneck (on an H200 a residual of a CIFAR network takes PyTorch 50 us of kernels and 160 us of launches, ours 23 and
600), and replayed from a CUDA graph; inside :func:`for_graphs` the latter counts.

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

# a candidate beats PyTorch only if it takes at most this fraction of its time
_MARGIN = 0.95
# input sets to cycle through, calls per timing, and timings per candidate
_INPUTS, _CALLS, _ROUNDS = 4, 12, 5
# allowed error: a multiple of PyTorch's own, or some units in the last place
_TIMES_TORCH, _UNITS, _LEAST = 4, 8, 1e-5

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]


class Kind(Protocol):
    """A kind of call: a frozen dataclass of the plain values that determine its run time."""

    operation: ClassVar[str]

    def make(self, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
        """Random inputs, on the device."""

    def run(self, candidate: str, inputs: dict[str, Any]) -> Outputs:
        """Results and gradients of a candidate; `"torch"` is the PyTorch reference, which also takes float64."""

    def candidates(self) -> Sequence[str]:
        """All but `"torch"`."""

    def eps(self, dtype: torch.dtype) -> float:
        """Relative rounding error of results of this dtype."""
        return float(torch.finfo(dtype).eps)

    def describe(self) -> str:
        """A short description of its sizes, for tables."""


@dataclass(frozen=True)
class Choice:
    """The measured choice for a kind of call.

    Attributes:
        chosen: the candidate to use, "eager" and "captured".
        microseconds: time per call, "eager" and "captured", of each candidate with correct results.
        differences: largest difference of each candidate from the float64 reference, relative to the largest value.
        refused: reason why a candidate is never used.
    """

    chosen: dict[str, str]
    microseconds: dict[str, dict[str, float]]
    differences: dict[str, float]
    refused: dict[str, str]


class Timer(Protocol):
    """Measures the microseconds of consecutive calls on a device."""

    def __call__(self, calls: Sequence[Call]) -> Callable[[], dict[str, float]]:
        """Prepare the calls; the returned function times them once, "eager" and "captured", per call."""


class CudaTimer:
    """Times calls with CUDA events: launched one by one, and replayed from a CUDA graph, without launch overhead."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, calls: Sequence[Call]) -> Callable[[], dict[str, float]]:
        """Capture the calls; each timing runs and replays them."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for call in calls[:_INPUTS]:  # compile and allocate
                    call()
                torch.cuda.synchronize()
                # not torch.cuda.graph, which empties the memory cache each time; other threads can continue
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
    """The timer for a device; None if nothing is measured there."""
    return CudaTimer(device) if device.type == "cuda" else None


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
    return not (_look_up_only.get() or setting == "off" or _is_capturing())


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def measure(kind: Kind, device: torch.device) -> Choice:
    """Compare and time the candidates for a kind of call, store the choice on disk, and return it.

    The caller's global random state and modes (gradients, autocast) neither change nor have an effect. If memory is
    insufficient, PyTorch is chosen, and the choice is not stored.
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
                    f"result {odd[0]} is off by {found[odd[0]]:.2g} of its largest value, with {allowed[odd[0]]:.2g} "
                    "allowed"
                )
            differences[name] = max(found, default=0.0)
            timings[name] = timer([partial(kind.run, name, sets[i % _INPUTS]) for i in range(_CALLS)])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no failure of a compiler or GPU may end the user's run
            if name == REFERENCE:
                raise
            refused[name] = str(error).partition("\n")[0] or type(error).__name__
            warnings.warn(
                f"{kind.operation}: {name!r} is not used on this device: {refused[name]} ({kind})", stacklevel=2
            )
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in timings}
    for _ in range(_ROUNDS):
        for name, time in timings.items():  # in turn, so that clock changes affect all equally
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
    """The largest difference relative to the largest value; nan if something is not finite."""
    if got.shape != exact.shape:
        raise ArithmeticError(f"a result has shape {list(got.shape)}, PyTorch's has {list(exact.shape)}")
    if got.numel() == 0:
        return 0.0
    scale = max(float(exact.detach().abs().max()), 1e-30)
    return float((got.detach().double() - exact.detach()).abs().max()) / scale


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
