"""Processes that start, act, fail and differ together."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from wkd_jax.training import processes

ROOT = pathlib.Path(__file__).parents[2]

PROGRAM = """
import jax
from wkd_jax.training import processes

processes.initialize()
index = jax.process_index()

def report(name, act):
    try:
        print(name, act(), flush=True)
    except (ValueError, OSError) as error:
        print(name, type(error).__name__, error, flush=True)

def refuse(kind):
    raise kind("no such thing")

report("gather", lambda: processes.gather("é" * (3 * index)))
report("first", lambda: processes.first(lambda: {"from": index}))
report("first fails", lambda: processes.first(lambda: refuse(OSError)))
report("everywhere", lambda: processes.everywhere(lambda: index))
report("one fails", lambda: processes.everywhere(lambda: refuse(ValueError) if index else index))
report("agree", lambda: processes.agree("the data set", "1000 images"))
report("differ", lambda: processes.agree("the data set", f"{1000 - index} images"))
"""


def test_two_processes():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    running = []
    for index in range(2):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        words = [sys.executable, "-c", PROGRAM]
        running.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[0] for process in running]
    lines = [[line for line in text.splitlines() if not line.startswith("[Gloo]")] for text in said]
    expected = [
        "gather ['', 'ééé']",
        "first {'from': 0}",
        "first fails OSError no such thing",
        "everywhere {index}",
        "one fails ValueError process 1: no such thing",
        "agree None",
        "differ ValueError the data set differs between processes: process 0 has 1000 images, process 1 has 999 "
        "images. Give all of them the same files",
    ]
    for index in range(2):
        assert lines[index] == [line.replace("{index}", str(index)) for line in expected]


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1234")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID set, JAX_NUM_PROCESSES not"):
        processes.initialize()


def test_nowhere_is_refused(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="did not find each other.*leave --distributed out for one process"):
        processes.initialize()
