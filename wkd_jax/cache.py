"""The user's cache: the folder of what can be downloaded or computed again."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping


def folder(environment: Mapping[str, str] = os.environ) -> pathlib.Path:
    """`$WKD_JAX_CACHE`, else `$XDG_CACHE_HOME/wkd_jax`, else `~/.cache/wkd_jax`. It need not be there yet.

    Args:
      environment: The variables.

    Raises:
      ValueError: If `WKD_JAX_CACHE` is a URL.
      OSError: If no variable says where, and the user has no home.

    Example:
      >>> str(folder({"WKD_JAX_CACHE": "/scratch/cache"}))
      '/scratch/cache'
    """
    named = environment.get("WKD_JAX_CACHE")
    if named and "://" in named:
        raise ValueError(f"WKD_JAX_CACHE={named}: must be a folder, such as one on a mounted disk")
    try:
        if named:
            return pathlib.Path(named).expanduser()
        return pathlib.Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "wkd_jax"
    except RuntimeError as error:
        raise OSError(f"there is no folder for a cache ({error}): set WKD_JAX_CACHE to one") from error
