"""Probes what can be metered on this machine by observing its devices for some seconds."""

import importlib.metadata
import os
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from fastgate.energy import cuda, rapl
from fastgate.energy.errors import EnergyError
from fastgate.energy.nvml import Board, Session
from fastgate.energy.sources import Clock

_POLL_SECONDS = 0.001
# a counter and the integral of the power agree if they differ by no more than this
_AGREEMENT = 0.10


def probe(seconds: float = 5.0, clock: Clock | None = None) -> dict[str, Any]:
    """Observe every GPU and CPU package for `seconds`; leave the machine idle meanwhile to measure its idle power.

    Raises:
        ValueError: `seconds` is not above 0.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: expected a duration above 0, got {seconds!r}")
    clock = clock or Clock()
    return {
        "seconds": seconds,
        "nvidia_ml_py": _version(),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "cuda_device_order": os.environ.get("CUDA_DEVICE_ORDER"),
        "gpu": _probe_gpus(seconds, clock),
        "cpu": _probe_cpu(),
    }


def _version() -> str | None:
    try:
        return importlib.metadata.version("nvidia-ml-py")
    except importlib.metadata.PackageNotFoundError:
        return None


def _probe_gpus(seconds: float, clock: Clock) -> dict[str, Any]:
    try:
        session = Session()
    except EnergyError as error:
        return {"available": False, "reason": str(error), "devices": []}
    try:
        boards, refused = session.boards()
        try:
            visible, reason = [board.uuid for board in cuda.visible_boards(boards)], None
        except EnergyError as error:
            visible, reason = None, str(error)
        watched = _watch(boards, seconds, clock)
        return {
            "available": True,
            "driver": session.version("nvmlSystemGetDriverVersion"),
            "nvml": session.version("nvmlSystemGetNVMLVersion"),
            "visible_to_cuda": visible,
            "reason": reason,
            "refused": refused,
            "devices": [_describe(board, *readings) for board, readings in zip(boards, watched, strict=True)],
        }
    finally:
        session.close()


# (time, millijoules) and (time, watts) of one board
_Readings = tuple[list[tuple[float, int]], list[tuple[float, float]]]


def _watch(boards: Sequence[Board], seconds: float, clock: Clock) -> list[_Readings]:
    """Read counters and power of all boards in turn until the time is over; unreadable ones stay empty."""
    watched: list[_Readings] = [([], []) for _ in boards]
    end = clock.now() + seconds
    while boards and clock.now() < end:
        for board, (energies, powers) in zip(boards, watched, strict=True):
            try:
                energies.append((clock.now(), board.read_millijoules()))
            except EnergyError:
                energies.clear()
            try:
                powers.append((clock.now(), board.read_milliwatts() / 1000))
            except EnergyError:
                powers.clear()
        clock.sleep(_POLL_SECONDS)
    return watched


def _describe(board: Board, energies: list[tuple[float, int]], powers: list[tuple[float, float]]) -> dict[str, Any]:
    pids = board.process_ids()
    return {
        "uuid": board.uuid,
        "name": board.name,
        "pci": board.pci_bus_id,
        "mig_slices": board.mig_uuids() if board.is_mig() else None,
        "processes": None if pids is None else len(pids),
        "temperature_celsius": board.temperature_celsius(),
        "power_limit_watts": board.power_limit_watts(),
        "counter": _describe_counter(board, energies),
        "power": {name: watts is not None for name, watts in board.power_readings().items()},
        "idle_watts": _describe_power([watts for _, watts in powers]),
        "cross_check": _cross_check(energies, powers),
    }


def _describe_counter(board: Board, energies: list[tuple[float, int]]) -> dict[str, Any]:
    if not energies:
        try:
            board.read_millijoules()
        except EnergyError as error:
            return {"available": False, "reason": str(error)}
    changes = [(moment, after - before) for (_, before), (moment, after) in pairwise(energies) if after != before]
    gaps = [later - earlier for (earlier, _), (later, _) in pairwise(changes)]
    return {
        "available": True,
        "tick_seconds": statistics.median(gaps) if gaps else None,
        "ticks_seen": len(gaps),
        "smallest_step_joules": min(step for _, step in changes) / 1000 if changes else None,
    }


def _describe_power(watts: list[float]) -> dict[str, Any] | None:
    if not watts:
        return None
    return {
        "mean": statistics.fmean(watts),
        "deviation": statistics.pstdev(watts),
        "lowest": min(watts),
        "highest": max(watts),
        "readings": len(watts),
    }


def _cross_check(energies: list[tuple[float, int]], powers: list[tuple[float, float]]) -> dict[str, Any] | None:
    """Compare the joules of the counter with the integral of the power, from the counter's first change to its last."""
    changes = [now for before, now in pairwise(energies) if now[1] != before[1]]
    if len(changes) < 2 or not powers:
        return None
    (begin, first), (end, last) = changes[0], changes[-1]
    counted = (last - first) / 1000
    inside = [power for power in powers if begin <= power[0] <= end]
    added = sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in pairwise(inside))
    span = inside[-1][0] - inside[0][0] if len(inside) > 1 else 0.0
    if span <= 0:
        return None
    # the samples do not quite reach either end
    integral = added * (end - begin) / span
    difference = counted / integral - 1 if integral > 0 else None
    return {
        "counter_joules": counted,
        "integral_joules": integral,
        "difference": difference,
        "agrees": difference is not None and abs(difference) <= _AGREEMENT,
    }


def _probe_cpu() -> dict[str, Any]:
    found = {name: str(folder) for name, folder in rapl.zones().items()}
    try:
        metered = [package.key for package in rapl.packages()]
    except EnergyError as error:
        return {"available": False, "reason": str(error), "zones": found}
    return {"available": True, "metered": metered, "zones": found}
