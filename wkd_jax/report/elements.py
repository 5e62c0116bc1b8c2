"""What the pages are made of: the templates, and what the sections of a page hold."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import jinja2
from markupsafe import Markup


def template(name: str) -> jinja2.Template:
    """A template of this package. What it is given is escaped; a name it is not given is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


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
