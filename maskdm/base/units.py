"""Numbers as people read them: 3 h 20 min, 4.68 EFLOP, 1.2 GiB."""

from __future__ import annotations

MINUTE, HOUR, DAY, YEAR = 60, 3600, 86_400, 365 * 86_400
METRIC = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def duration(seconds: float) -> str:
    """A duration in at most two units, rounded as an estimate should be."""
    if seconds < 0.1:
        return "< 0.1 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < MINUTE - 0.5:
        return f"{seconds:.0f} s"
    if seconds < 10 * MINUTE - 0.5:
        return _pair(seconds, MINUTE, "min", 1, "s")
    if seconds < HOUR - MINUTE / 2:
        return f"{seconds / MINUTE:.0f} min"
    if seconds < 10 * HOUR - MINUTE / 2:
        return _pair(seconds, HOUR, "h", MINUTE, "min")
    if seconds < 2 * DAY - HOUR / 2:
        return f"{seconds / HOUR:.0f} h"
    if seconds < 10 * DAY - HOUR / 2:
        return _pair(seconds, DAY, "d", HOUR, "h")
    if seconds < 2 * YEAR:
        return f"{seconds / DAY:,.0f} d"
    return f"{seconds / YEAR:,.1f} years"


def flops(number: float) -> str:
    """A number of FLOPs with a metric prefix: 4.68 EFLOP."""
    return f"{_prefixed(number, METRIC, 1000)}FLOP"


def size(num_bytes: float) -> str:
    """A number of bytes in powers of 1024: 1.2 GiB."""
    return _prefixed(num_bytes, BINARY, 1024)


def _pair(seconds: float, large: int, large_name: str, small: int, small_name: str) -> str:
    whole, rest = divmod(round(seconds / small), large // small)
    return f"{whole} {large_name}" + (f" {rest} {small_name}" if rest else "")


def _prefixed(number: float, prefixes: tuple[str, ...], base: int) -> str:
    exponent = 0
    while float(f"{number:.3g}") >= 1000 and exponent < len(prefixes) - 1:
        number, exponent = number / base, exponent + 1
    return f"{float(f'{number:.3g}'):g} {prefixes[exponent]}"
