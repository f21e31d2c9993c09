"""Comparing and timing the candidates for a kind of call on a device.

Every candidate runs on random inputs of that kind. One that differs from the PyTorch reference, raises, or gives
non-finite results is ruled out with a warning; the others are timed in turn, and the fastest is chosen if it gains 5 %
over PyTorch. Candidates are timed launched one by one, where the host may be the bottleneck (on an H200 a residual of a
CIFAR network takes PyTorch 50 us of kernels and 160 us of launches, ours 23 and 600), and replayed from a CUDA graph.
"""

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

REFERENCE = "torch"
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


def measure(kind: Kind, device: torch.device, timer: Timer) -> Choice | None:
    """Compare and time the candidates for a kind of call; None if memory is insufficient.

    The caller's global random state and modes (gradients, autocast) neither change nor have an effect.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            return _measure(kind, device, timer)
    except torch.OutOfMemoryError:
        return None


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
