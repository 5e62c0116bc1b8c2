"""How numbers and settings are written in a report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals; a dash for one that is not known.

    Example:
      >>> fixed(76.126), fixed(float("nan")), fixed(-1.0, 1)
      ('76.13', '–', '−1.0')
    """
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 2) -> str:
    """A difference, with its sign.

    Example:
      >>> signed(0.5), signed(-1.25)
      ('+0.50', '−1.25')
    """
    return ("+" if value > 0 else "") + fixed(value, digits)


def compact(value: float) -> str:
    """A count in few characters.

    Example:
      >>> compact(250), compact(12_500), compact(3e6)
      ('250', '12.5k', '3M')
    """
    for divisor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= divisor:
            return f"{value / divisor:.4g}{letter}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """A time span in its two largest units.

    Example:
      >>> duration(42.3), duration(3700), duration(200_000)
      ('42 s', '1 h 1 min', '2 d 7 h')
    """
    if not math.isfinite(seconds):
        return "–"
    total = round(seconds)
    for size, unit, smaller, smaller_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if total >= size:
            return f"{total // size} {unit} {total % size // smaller} {smaller_unit}"
    return f"{total} s"


def flat(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The leaves of a nested mapping as (dotted key, text).

    Example:
      >>> flat({"a": {"b": 1, "c": None}, "d": {}})
      [('a.b', '1'), ('a.c', 'null'), ('d', '{}')]
    """
    leaves = []
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            leaves += flat(value, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", leaf(value)))
    return leaves


def leaf(value: Any) -> str:
    """A setting as text.

    Example:
      >>> leaf("sgd"), leaf(None), leaf([30, 60])
      ('sgd', 'null', '[30, 60]')
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
