"""Sums of energies over time and over processes. A sum with unknown parts is unknown."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastgate.energy.results import Energy


def add_parts(parts: Sequence[Energy]) -> Energy:
    """Total energy of one or more consecutive windows.

    Its joules are known if those of every device are: no part is unknown, and every counter moved in some part.
    """
    items = add_known([part.items for part in parts])
    return Energy(
        name=parts[-1].name,
        seconds=sum(part.seconds for part in parts),
        items=items,
        per_device=add_devices([(part.per_device, part.microjoules) for part in parts]),
        sources={key: source for part in parts for key, source in part.sources.items()},
        microjoules=add_known([part.microjoules for part in parts]),
        error_bound_joules=add_known([part.error_bound_joules for part in parts]),
        warnings=tuple(dict.fromkeys(warning for part in parts for warning in part.warnings)),
    )


def add_devices(parts: Sequence[tuple[Mapping[str, float | None], int | None]]) -> dict[str, float | None]:
    """Joules by device of consecutive parts, each given with the microjoules of all its devices.

    If those are known, a device without joules is one whose counter has not moved yet: the next part includes it.
    """
    total: dict[str, float | None] = {}
    unknown = {key for devices, sum_ in parts if sum_ is None for key, joules in devices.items() if joules is None}
    for devices, _ in parts:
        for key, joules in devices.items():
            known = [value for value in (total.get(key), joules) if value is not None]
            total[key] = sum(known) if known and key not in unknown else None
    return total


def add_energies(metered: Sequence[tuple[str, Energy]]) -> Energy:
    """Total energy of simultaneous processes, each given with its machine; every device counts once.

    A GPU is identified by its UUID, a CPU package by its machine.
    """
    several = len({machine for machine, _ in metered}) > 1
    devices: dict[str, float | None] = {}
    sources: dict[str, str] = {}
    counted: list[Energy] = []
    # for a device metered by several processes, use one whose energy is known
    for machine, energy in sorted(metered, key=lambda part: part[1].microjoules is None):
        names = {key: f"{machine}/{key}" if several and key.startswith("cpu") else key for key in energy.per_device}
        new = {name: energy.per_device[key] for key, name in names.items() if name not in devices}
        if new or not names:
            counted.append(energy)
        devices |= new
        sources |= {names[key]: source for key, source in energy.sources.items() if names[key] in new}
    known = all(energy.microjoules is not None for energy in counted)
    return Energy(
        name=metered[0][1].name,
        seconds=max(energy.seconds for _, energy in metered),
        items=metered[0][1].items,
        per_device=devices,
        sources=sources,
        microjoules=sum(round((joules or 0.0) * 1e6) for joules in devices.values()) if known else None,
        error_bound_joules=add_known([energy.error_bound_joules for energy in counted]),
        warnings=tuple(dict.fromkeys(warning for _, energy in metered for warning in energy.warnings)),
    )


def add_known(parts: Sequence[Any]) -> Any:
    """The sum; None if any part is None."""
    return None if any(part is None for part in parts) else sum(parts)
