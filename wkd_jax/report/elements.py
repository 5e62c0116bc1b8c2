"""What the sections of a report are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from markupsafe import Markup


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawing and what it shows."""

    caption: str
    svg: Markup


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under a head. The first `text_columns` columns are text, the others right-aligned numbers."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclasses.dataclass(frozen=True)
class Card:
    """A number at the top of the page."""

    label: str
    value: str
    remark: str = ""
