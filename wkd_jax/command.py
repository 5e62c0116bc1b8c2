"""What the command lines share: their names, and a parser whose help fits how it was called. Loads nothing heavy."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

COMMANDS = {
    "train": ("wkd_jax.main", "distil a teacher into a student: from a config to a report"),
    "compare": ("wkd_jax.compare", "several methods and seeds in one table, or a table of the paper beside your runs"),
    "configs": ("wkd_jax.configs", "the configs that come with the package; what one is, and all its keys"),
    "report": ("wkd_jax.report", "the report of a run again, or one page that compares several"),
    "data": ("wkd_jax.data", "prepare and check data sets"),
    "weights": ("wkd_jax.weights", "published weights, files of others in, students out"),
    "interrelation": ("wkd_jax.interrelation", "how much class structure a class similarity carries"),
    "models": ("wkd_jax.models", "list the networks: sizes, taps, published accuracies"),
}
"""Of `wkd-jax NAME`: the module that `python -m` runs, and what it does."""


def spelt(text: str, prog: str) -> str:
    """A text with every command in it written the way that `prog` is.

    Example:
      >>> spelt("see python -m wkd_jax.main --help", "wkd-jax models")
      'see wkd-jax train --help'
    """
    if prog.startswith("wkd-jax"):
        for name, (module, _) in COMMANDS.items():
            text = text.replace(f"python -m {module}", f"wkd-jax {name}")
    return text


class Parser(argparse.ArgumentParser):
    """Keeps the lines of descriptions, and takes no abbreviation for an argument."""

    def __init__(self, **settings: Any) -> None:
        settings = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **settings}
        super().__init__(**settings)

    def format_help(self) -> str:
        """The help, commands in it written as this one was."""
        for action in self._actions:  # before lines are broken
            if action.help:
                action.help = spelt(action.help, self.prog)
        return spelt(super().format_help(), self.prog)


def names(what: str, known: Iterable[str]) -> str:
    """A line of names for the end of a help, or several."""
    return textwrap.fill(f"{what}: {', '.join(known)}.", 100, subsequent_indent="  ")


def overrides_of(parser: argparse.ArgumentParser, rest: Sequence[str]) -> list[str]:
    """The "key=value" of each --config.key=value, which is all that may be left of a command line."""
    if unknown := [item for item in rest if not item.startswith("--config.")]:
        parser.error(f"unknown argument {unknown[0]!r}")
    return [item.removeprefix("--config.") for item in rest]
