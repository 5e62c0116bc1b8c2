"""All commands of the package under one name.

    wkd-jax COMMAND --help                what a command does, its arguments, examples
    wkd-jax train --config digits_wkd     a first run: minutes on two CPU cores
    wkd-jax --config digits_wkd           the same, `train` may be left out

Without installation: python -m wkd_jax COMMAND.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

from wkd_jax import __version__, command, extras, registry


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code of the command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    lines = [f"  {name:<14} {what}" for name, (_, what) in command.COMMANDS.items()]
    parser = command.Parser(
        prog="wkd-jax",
        usage="wkd-jax COMMAND ...",
        description=__doc__,
        epilog="\n".join(["commands:", *lines]),
    )
    parser.add_argument("--version", action="version", version=__version__, help="print the version")
    parser.add_argument("command", metavar="COMMAND", help="one of those below; its arguments follow it")
    if argv and argv[0].startswith("--") and argv[0] not in ("--help", "--version"):
        argv = ["train", *argv]
    if not argv:
        parser.print_help()
        return 2
    name = parser.parse_args(argv[:1]).command
    if name not in command.COMMANDS:
        parser.error(registry.unknown("command", name, command.COMMANDS))
    module = command.COMMANDS[name][0]
    try:
        if importlib.util.find_spec(module).submodule_search_locations:  # type: ignore[union-attr]
            module += ".__main__"
        run = importlib.import_module(module).main
    except ModuleNotFoundError as error:
        sentence = extras.missing(error)
        if not sentence:
            raise
        sys.stderr.write(f"error: {sentence}\n")
        return 1
    return run(argv[1:], prog=f"wkd-jax {name}")


if __name__ == "__main__":
    sys.exit(main())
