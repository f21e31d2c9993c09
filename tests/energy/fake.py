"""Builds the stand-in for libnvidia-ml.so.1 and drives it: boards, watts and time as a test wants them."""

import ctypes
import os
import subprocess
import weakref
from pathlib import Path
from typing import Any

import pynvml

from fastgate.energy import EnergyMeter
from fastgate.energy.nvml import Board, Session
from fastgate.energy.sources import Clock, Sampler

ENSURE_RUNNING = Sampler.ensure_running  # which tests/energy/conftest.py replaces
SOURCE = Path(__file__).with_name("fake_nvml.c")
TICK = 0.1  # seconds, of a board's counter unless said otherwise

T4 = ("GPU-aaaa1111-0000-0000-0000-000000000000", "Tesla T4", "00000000:00:1E.0")
T4_TOO = ("GPU-bbbb2222-0000-0000-0000-000000000000", "Tesla T4", "00000000:00:1F.0")
A100 = ("GPU-aacc3333-0000-0000-0000-000000000000", "NVIDIA A100", "00000000:00:04.0")

SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "fake_reset": ([], None),
    "fake_add_device": (
        [*[ctypes.c_char_p] * 3, ctypes.c_uint, ctypes.c_double, ctypes.c_uint64, ctypes.c_int, ctypes.c_int],
        ctypes.c_int,
    ),
    "fake_set_watts": ([ctypes.c_uint, ctypes.c_double], None),
    "fake_set_counter_mj": ([ctypes.c_uint, ctypes.c_double], None),
    "fake_set_limit_watts": ([ctypes.c_uint, ctypes.c_double], None),
    "fake_set_stalled": ([ctypes.c_uint, ctypes.c_int], None),
    "fake_glitch_energy": ([ctypes.c_uint, ctypes.c_ulonglong], None),
    "fake_glitch_power": ([ctypes.c_uint, ctypes.c_uint], None),
    "fake_set_slowness_us": ([ctypes.c_uint64], None),
    "fake_inject_error": ([ctypes.c_char_p, ctypes.c_int], ctypes.c_int),
    "fake_clear_errors": ([], None),
    "fake_set_error": ([ctypes.c_uint, ctypes.c_int], None),
    "fake_hide": ([ctypes.c_uint, ctypes.c_int], None),
    "fake_set_average": ([ctypes.c_uint, ctypes.c_int], None),
    "fake_set_throttle": ([ctypes.c_uint, ctypes.c_ulonglong], None),
    "fake_add_process": ([ctypes.c_uint, ctypes.c_uint], None),
    "fake_add_slice": ([ctypes.c_uint, ctypes.c_char_p], None),
    "fake_advance_us": ([ctypes.c_uint64], None),
    "fake_now_us": ([], ctypes.c_uint64),
    "fake_references": ([], ctypes.c_uint),
    "fake_initialised": ([], ctypes.c_ulong),
    "fake_calls": ([], ctypes.c_ulong),
    "fake_exact_mj": ([ctypes.c_uint], ctypes.c_double),
    "fake_true_mj": ([ctypes.c_uint], ctypes.c_double),
}


def build(folder: Path, *options: str) -> Path:
    """Compile the stand-in into a folder; a machine without a C compiler fails here, it does not skip."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libnvidia-ml.so.1"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-pthread"]
    flags += ["-Wl,-soname,libnvidia-ml.so.1", *options]
    subprocess.run([os.environ.get("CC", "gcc"), *flags, "-o", str(library), str(SOURCE)], check=True)
    return library


class Fake:
    """The library in this process, under the real bindings."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for name, (arguments, result) in SIGNATURES.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, result
            setattr(self, name.removeprefix("fake_"), function)
        self.library.fake_reset()
        self.clock = VirtualClock(self)
        self._close: list[weakref.ref[Any]] = []

    def install(self) -> None:
        """Let the bindings use this library, as if the loader had found it."""
        pynvml.nvmlLib = self.library
        pynvml._nvmlGetFunctionPointer_cache.clear()

    def uninstall(self) -> None:
        """Let what still uses the library give it back, and the bindings look for a library again."""
        for reference in self._close:
            user = reference()
            if user is not None:
                user.close()
        pynvml.nvmlLib = None
        pynvml._nvmlGetFunctionPointer_cache.clear()

    def board(
        self,
        identity: tuple[str, str, str] = T4,
        watts: float = 17.0,
        *,
        tick: float = TICK,
        counter: bool = True,
        instant: bool = True,
    ) -> int:
        """Add a board; its index in NVML."""
        uuid, name, bus = (text.encode() for text in identity)
        index = self.library.fake_add_device(uuid, name, bus, 6, watts, round(tick * 1e6), counter, instant)
        assert index >= 0
        return int(index)

    def fail(self, function: str, code: int) -> None:
        """Every call of one NVML function fails."""
        assert self.library.fake_inject_error(function.encode(), code) == 0

    def run(self, seconds: float, watts: float | None = None, index: int = 0) -> None:
        """Let time pass, at a new power."""
        if watts is not None:
            self.library.fake_set_watts(index, watts)
        self.library.fake_advance_us(round(seconds * 1e6))

    def settle(self, tick: float = TICK) -> None:
        """Let time pass until the counters have just been renewed."""
        self.library.fake_advance_us(-self.library.fake_now_us() % round(tick * 1e6))

    def meter(self, *arguments: Any, **options: Any) -> EnergyMeter:
        """A meter on virtual time, at a tick of the counters."""
        meter = EnergyMeter(*arguments, clock=self.clock, **options)
        self._close.append(weakref.ref(meter))
        self.settle()
        return meter

    def open_board(self, uuid: str = T4[0]) -> Board:
        """A board below any meter."""
        session = Session()
        self._close.append(weakref.ref(session))
        return Board(session, uuid)


class VirtualClock(Clock):
    """The library's time."""

    def __init__(self, fake: Fake) -> None:
        self._library = fake.library

    def now(self) -> float:
        return float(self._library.fake_now_us()) / 1e6

    def sleep(self, seconds: float) -> None:
        self._library.fake_advance_us(round(seconds * 1e6))
