"""Class similarities in the user's cache, by content: a later run with the same teacher, data and spec finds them."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wkd_jax import cache
from wkd_jax.interrelation.store import Interrelation, digest, load, save


def file(record: Mapping[str, Any]) -> pathlib.Path:
    """Where the similarity of a provenance is, or would be: `interrelation/<digest>.npz` in `wkd_jax.cache.folder()`.

    Raises:
      ValueError: As `wkd_jax.cache.folder`.
      OSError: Likewise.
    """
    return cache.folder() / "interrelation" / f"{digest(record)}.npz"


def find(record: Mapping[str, Any], class_names: Sequence[str], report: Callable[[str], None]) -> Interrelation | None:
    """The similarity that an earlier run left.

    A file that is damaged, or of something else than its name says, is left alone until `keep` replaces it.

    Args:
      record: This run's `provenance`.
      class_names: C names.
      report: Told where it was found, or why what is there is not used.

    Returns:
      It, or None.

    Raises:
      ValueError: As `wkd_jax.cache.folder`.
    """
    try:
        path = file(record)
    except OSError:  # said when there is something to write
        return None
    try:
        found = load(path, record)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        report(f"class similarity: {error}")
        return None
    if found.class_names != tuple(class_names):
        report(f"class similarity: {path} is of other classes than the data set and is computed again")
        return None
    report(f"class similarity: found in the cache, {path}")
    return found


def keep(interrelation: Interrelation, report: Callable[[str], None]) -> None:
    """Leaves a similarity for later runs. A cache that cannot be written is reported, and is no error.

    Raises:
      ValueError: As `wkd_jax.cache.folder`.
    """
    try:
        path = file(interrelation.provenance)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, interrelation)
    except OSError as error:
        report(f"class similarity: not kept for later runs: {error}")
