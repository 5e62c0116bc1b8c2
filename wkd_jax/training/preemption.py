"""Stopping in time: SIGTERM, or Google Cloud's word that the machine goes away, becomes "save now" on all processes.

Cloud TPU preemption, GKE, SLURM (`--signal=TERM@120`) and `kill` all send SIGTERM. A TPU VM that is going to be
maintained or preempted is told by its metadata server first, minutes ahead; that is turned into a SIGTERM here. With
several processes JAX's coordination service agrees on one step at which all of them stop.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
_METADATA = "http://{}/computeMetadata/v1/instance/{}"
_QUIET = {"preempted": "FALSE", "maintenance-event": "NONE"}  # metadata key -> its value while nothing is wrong
_asked = itertools.count(1)  # of the whole process: JAX agrees on one number, and a command may do several runs
_INTERVAL = 5.0  # seconds between questions to the metadata server


class Preempted(Exception):  # noqa: N818
    """The run was told to stop, and did. What it had done is saved."""


class Notice:
    """Whether this run was told to stop.

    Every process has to ask equally often and at the same points of its work.
    """

    def __init__(self) -> None:
        self._signalled = threading.Event()

    def received(self) -> bool:
        """Whether all processes are to stop here. False until then; after that always True."""
        if self._signalled.is_set() or jax.process_count() == 1:
            return self._signalled.is_set()
        if multihost_utils.reached_preemption_sync_point(next(_asked)):
            self._signalled.set()
        return self._signalled.is_set()

    def check(self) -> None:
        """Raises Preempted if all processes are to stop here: for work of which nothing is saved."""
        if self.received():
            raise Preempted("stopped before training began, as it was told to")


@contextlib.contextmanager
def watch() -> Iterator[Notice]:
    """Takes note of SIGTERM as long as the context lasts; what the signal did before is restored after it.

    Example:
      >>> with watch() as notice:
      ...     before = notice.received()
      ...     os.kill(os.getpid(), signal.SIGTERM)
      ...     before, notice.received()
      (False, True)
    """
    notice, restore = Notice(), None
    # With several processes the handler is JAX's: it tells all of them.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
        restore = signal.signal(signal.SIGTERM, lambda number, frame: notice._signalled.set())
    done = threading.Event()
    if server := os.environ.get("GCE_METADATA_HOST") or _on_cloud():
        threading.Thread(target=_ask, args=(server, done), daemon=True).start()
    try:
        yield notice
    finally:
        done.set()
        if restore is not None:
            signal.signal(signal.SIGTERM, restore)


def _on_cloud() -> str | None:
    """The metadata server of a Google Cloud TPU VM; None elsewhere."""
    return "metadata.google.internal" if any(d.platform == "tpu" for d in jax.local_devices()) else None


def _ask(server: str, done: threading.Event) -> None:
    """Sends this process SIGTERM once the metadata server says that the machine goes away.

    An event that is announced already when the run starts has stopped it before: it does not a second time.
    """
    first = True
    known = dict(_QUIET)
    while not done.is_set():
        for key in _QUIET:
            request = urllib.request.Request(_METADATA.format(server, key), headers={"Metadata-Flavor": "Google"})
            try:
                with urllib.request.urlopen(request, timeout=5) as answer:
                    value = answer.read().decode().strip().upper()
            except OSError:  # no such key, or no server: the signal itself still comes
                continue
            if first and key == "maintenance-event":
                known[key] = value
            if value not in ("", _QUIET[key], known[key]):
                os.kill(os.getpid(), signal.SIGTERM)
                return
        first = False
        done.wait(_INTERVAL)
