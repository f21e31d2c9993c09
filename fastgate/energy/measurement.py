"""`measure_energy`: the energy of a function that can be repeated."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from numbers import Real
from typing import Any

from fastgate.energy.meter import EnergyMeter
from fastgate.energy.results import Energy

Function = Callable[[], Any]

_TICKS_PER_TRIAL = 50
_UNMETERED_SECONDS = 0.05


def measure_energy(
    fn: Function | Sequence[Function] | Mapping[str, Function],
    min_seconds: float = 5.0,
    trials: int = 4,
    warmup: int = 10,
    *,
    meter: EnergyMeter | None = None,
) -> list[Energy]:
    """Measure the energy per call of one function, or of several in turn, so that machine drift affects all equally.

    Every function is first called `warmup` times. A trial then calls one function repeatedly for `min_seconds`, or for
    50 ticks of the slowest counter if that is longer, and synchronizes once, at its end.

    If nothing can be metered, a warning says so immediately, and trials only give a rough time: they have no warmup and
    last for a single call, or for 0.05 s.

    Args:
        fn: a function without arguments; or several, as a sequence or by name.
        min_seconds: minimum duration of a trial.
        trials: trials per function.
        warmup: calls of each function before the first trial.
        meter: default: `EnergyMeter()`.

    Returns:
        One result per trial in the order of measurement: first trial of each function, second trial of each, ...;
        with n functions, the results of the i-th are `results[i::n]`. `items` is the number of calls.

    Raises:
        TypeError, ValueError: nothing to call, or an invalid duration or count.
        WindowClosedError: the meter was closed.
    """
    functions = _named(fn)
    for name, value, least in (("trials", trials, 1), ("warmup", warmup, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if not isinstance(min_seconds, Real) or isinstance(min_seconds, bool):
        raise TypeError(f"min_seconds: expected a number of seconds, got {min_seconds!r}")
    if not min_seconds > 0:
        raise ValueError(f"min_seconds: expected a duration above 0, got {min_seconds!r}")
    if math.isinf(min_seconds):
        raise ValueError("min_seconds: expected a finite duration, got inf, with which no trial would end")
    if meter is not None:
        if not isinstance(meter, EnergyMeter):
            raise TypeError(f"meter: expected an EnergyMeter or None, got {meter!r}")
        return _measure_all(meter, functions, min_seconds, trials, warmup)
    with closing(EnergyMeter()) as own:
        return _measure_all(own, functions, min_seconds, trials, warmup)


def _measure_all(
    meter: EnergyMeter, functions: list[tuple[str, Function]], min_seconds: float, trials: int, warmup: int
) -> list[Energy]:
    meter.check_open()
    if meter.is_readable():
        ticks = [source.tick for source in meter.sources if source.tick is not None]
        seconds = max(min_seconds, _TICKS_PER_TRIAL * max(ticks, default=0.0))
    else:
        warnings.warn(f"measure_energy: nothing can be metered, so joules will be None: {meter}", stacklevel=3)
        seconds, warmup = min(min_seconds, _UNMETERED_SECONDS), 0
    for _, function in functions:
        for _ in range(warmup):
            function()
    return [_measure(meter, name, function, seconds) for _ in range(trials) for name, function in functions]


def _measure(meter: EnergyMeter, name: str, function: Function, seconds: float) -> Energy:
    with meter.window(name) as window:
        calls, end = 0, meter.clock.now() + seconds
        while calls == 0 or meter.clock.now() < end:
            function()
            calls += 1
        window.items = calls
    return window.result


def _named(fn: Any) -> list[tuple[str, Function]]:
    if isinstance(fn, Mapping):
        named = list(fn.items())
    else:
        named = [(_name(f), f) for f in (fn if isinstance(fn, Sequence) else [fn])]
    if not named:
        raise ValueError("fn: expected at least one function, got none")
    for _, function in named:
        if not callable(function):
            raise TypeError(f"fn: expected functions without arguments, got {function!r}")
        if not _takes_nothing(function):
            raise TypeError(
                f"fn: expected functions without arguments, got {_name(function)}, "
                "which requires some: pass `lambda: f(x)` instead"
            )
    return named


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _takes_nothing(function: Any) -> bool:
    # a module takes its forward's arguments
    called = getattr(function, "forward", function)
    try:
        inspect.signature(called).bind()
    except TypeError:
        return False
    except ValueError:  # a built-in without a signature
        return True
    return True
