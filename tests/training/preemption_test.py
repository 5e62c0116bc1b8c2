"""What counts as being told to stop: SIGTERM, and a metadata server's word."""

import contextlib
import http.server
import os
import signal
import threading
import time

import pytest

from wkd_jax.training import preemption


def wait_for(notice, seconds=5.0):
    end = time.monotonic() + seconds
    while not notice.received() and time.monotonic() < end:
        time.sleep(0.01)
    return notice.received()


def test_sigterm_is_noticed_and_stays_noticed():
    before = signal.getsignal(signal.SIGTERM)
    with preemption.watch() as notice:
        assert not notice.received()
        notice.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.received() and notice.received()
        with pytest.raises(preemption.Preempted, match="before training began"):
            notice.check()
    assert signal.getsignal(signal.SIGTERM) is before
    with preemption.watch() as notice:
        assert not notice.received()


@contextlib.contextmanager
def metadata(values):
    """A metadata server; a key that `values` lacks is not found."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            key = self.path.removeprefix("/computeMetadata/v1/instance/")
            asked.append((key, self.headers["Metadata-Flavor"]))
            self.send_response(200 if key in values else 404)
            self.end_headers()
            self.wfile.write(values.get(key, "").encode())

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("key", "value"), [("preempted", "TRUE"), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")]
)
def test_the_metadata_server_is_believed(monkeypatch, key, value):
    monkeypatch.setattr(preemption, "_INTERVAL", 0.02)
    values = {"preempted": "FALSE", "maintenance-event": "NONE"}
    with metadata(values) as (address, asked):
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        with preemption.watch() as notice:
            time.sleep(0.2)
            assert not notice.received() and ("preempted", "Google") in asked
            values[key] = value
            assert wait_for(notice)


def test_an_event_that_was_announced_before_the_run_began_does_not_stop_it_again(monkeypatch):
    monkeypatch.setattr(preemption, "_INTERVAL", 0.02)
    values = {"preempted": "FALSE", "maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE"}
    with metadata(values) as (address, _):
        monkeypatch.setenv("GCE_METADATA_HOST", address)
        with preemption.watch() as notice:
            time.sleep(0.2)
            assert not notice.received()
            values["preempted"] = "TRUE"
            assert wait_for(notice)


def test_a_server_without_the_keys_or_none_at_all_is_no_reason_to_stop(monkeypatch):
    monkeypatch.setattr(preemption, "_INTERVAL", 0.02)
    for address in ("127.0.0.1:1", None):
        with metadata({}) as (empty, _):
            monkeypatch.setenv("GCE_METADATA_HOST", address or empty)
            with preemption.watch() as notice:
                time.sleep(0.2)
                assert not notice.received()
