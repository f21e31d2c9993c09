"""Numbers written for people: three digits and a unit."""

import re
from collections.abc import Iterable

UNKNOWN = "-"  # what is not known, or does not apply

_PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("µ", 1e-6))


def format_si(value: float, unit: str = "") -> str:
    """1353344 -> "1.35 M"; 0.0021, "J" -> "2.1 mJ"."""
    value = float(f"{value:.3g}")  # rounded first: 999,950 is 1 M, not 1000 k
    prefix, size = next(((prefix, size) for prefix, size in _PREFIXES if abs(value) >= size), ("", 1.0))
    return f"{value / size:.3g} {prefix}{unit}".rstrip()


def format_joules(joules: float | None) -> str:
    """Joules with a unit; "unknown" for None, which is never 0."""
    return "unknown" if joules is None else format_si(joules, "J")


def format_seconds(seconds: float) -> str:
    """0.3794 -> "379 ms"; 14.67 -> "14.7 s"; 133 -> "2 min 13 s"; 5000 -> "1 h 23 min"."""
    if seconds < 99.95:
        return format_si(seconds, "s")
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def shorten(remarks: Iterable[str]) -> list[str]:
    """Of remarks that differ only in their numbers the first, with the number of the others."""
    alike: dict[str, list[str]] = {}
    for remark in remarks:
        alike.setdefault(re.sub(r"(?<![\w-])\d+(\.\d+)?(e-?\d+)?(?![\w-])", "#", remark), []).append(remark)
    return [first + (f" (and {len(more)} more like it)" if more else "") for first, *more in alike.values()]
