"""What to install where something is missing: the package alone brings what the losses need, extras bring the rest.

Nothing is checked beforehand: who has the few packages that a module imports can use it. A command that meets a missing
one says so in a line.
"""

from __future__ import annotations

import sys
from types import TracebackType

_EXTRA = {"faster_coco_eval": "detection", "tensorflow": "prepare"}  # others: train


def install(extra: str) -> str:
    """The command that installs an extra.

    Example:
      >>> install("train")
      "pip install 'wkd-jax[train]' (in a checkout of it: pip install -e '.[train]')"
    """
    return f"pip install 'wkd-jax[{extra}]' (in a checkout of it: pip install -e '.[{extra}]')"


def missing(error: BaseException) -> str | None:
    """The sentence for an import of this package that failed because nothing of that name is installed.

    Args:
      error: As raised.

    Returns:
      None if it is anything else, such as another package that fails to import its own.

    Example:
      >>> error = ModuleNotFoundError("No module named 'flax'", name="flax")
      >>> missing(error) is None  # not raised by an import of ours
      True
    """
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    package, trace = error.name.partition(".")[0], error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    importer = trace.tb_frame.f_globals.get("__spec__") if trace else None
    if package == "wkd_jax" or not importer or importer.name.partition(".")[0] != "wkd_jax":
        return None
    name = importer.name.removesuffix(".__main__")
    return f"{package} is not installed, which {name} needs: {install(_EXTRA.get(package, 'train'))}"


def explain() -> None:
    """Has the interpreter say that sentence, where one ends a command, in the place of a traceback."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sentence = missing(error)
        if sentence:
            sys.stderr.write(f"error: {sentence}\n")
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook
