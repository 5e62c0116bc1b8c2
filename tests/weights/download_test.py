"""Downloads against a server on this machine that can be told to fail."""

import hashlib
import http.server
import os
import pathlib
import ssl
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from wkd_jax.weights import download
from wkd_jax.weights.download import DownloadError, fetch

CONTENT = bytes(range(256)) * 5000  # more than one chunk
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = f"resnet18-{SHA256[:8]}.pth"


class Server(http.server.ThreadingHTTPServer):
    """Answers with `CONTENT`, after one fault of `faults` each time."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.requests, self.content = [], [], CONTENT
        self.together = threading.Barrier(1)  # so many requests are answered at once
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append(self.path)
        server.together.wait(timeout=60)
        fault = server.faults.pop(0) if server.faults else "none"
        if isinstance(fault, int):
            self.send_error(fault)
        elif fault == "reset":
            self.connection.shutdown(2)
        elif fault == "silent":
            time.sleep(0.5)
        elif fault == "redirect":
            self.send_response(302)
            self.send_header("Location", f"/elsewhere/{self.path.rsplit('/')[-1]}")
            self.end_headers()
        elif fault == "broken chunk":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100\r\nshort")
        else:
            self.send(fault)

    def send(self, fault):
        content = {"wrong": b"\0" * len(CONTENT), "html": b"<html>Sign in</html>"}.get(fault, self.server.content)
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if fault == "html" else "application/octet-stream")
        if fault != "no length":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:700_000] if fault == "short" else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def pauses():
    return []


def files(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_file_is_downloaded_once(server, tmp_path, pauses):
    path = fetch(f"{server.url}/models/{NAME}", cache=tmp_path, sleep=pauses.append)
    assert path.parent == tmp_path / "weights"
    assert path.name.endswith(NAME)
    assert path.read_bytes() == CONTENT
    assert fetch(f"{server.url}/models/{NAME}", cache=tmp_path) == path
    assert server.requests == [f"/models/{NAME}"]
    assert pauses == []
    assert files(tmp_path) == [path.name]


def test_others_may_read_a_file_as_the_umask_says(server, tmp_path):
    old = os.umask(0o022)
    try:
        path = fetch(f"{server.url}/{NAME}", cache=tmp_path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_equal_names_of_different_urls_are_different_files(server, tmp_path):
    first = fetch(f"{server.url}/resnet/ckpt_epoch_240.pth", cache=tmp_path)
    server.content = b"another network"
    second = fetch(f"{server.url}/vgg/ckpt_epoch_240.pth", cache=tmp_path)
    assert first.read_bytes() == CONTENT
    assert second.read_bytes() == b"another network"


@pytest.mark.parametrize("fault", ["short", "wrong", "reset", "silent", "broken chunk", 500, 503, 429, 408])
def test_a_fault_that_may_pass_is_tried_again(server, tmp_path, pauses, monkeypatch, fault):
    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    server.faults = [fault, fault]
    path = fetch(f"{server.url}/{NAME}", cache=tmp_path, sleep=pauses.append)
    assert path.read_bytes() == CONTENT
    assert pauses == [1.0, 2.0]
    assert files(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("short", "only 700000 of 1280000 bytes came"),
        ("wrong", f"not {SHA256[:8]} as its name"),
        ("reset", "the connection broke: RemoteDisconnected"),
        ("broken chunk", "the connection broke: IncompleteRead"),
        (503, "the server answers 503"),
    ],
)
def test_a_fault_that_stays_leaves_nothing(server, tmp_path, pauses, fault, says):
    server.faults = [fault] * 10
    with pytest.raises(DownloadError) as error:
        fetch(f"{server.url}/{NAME}", cache=tmp_path, sleep=pauses.append)
    for part in (f"{server.url}/{NAME}", says, "last of 4 attempts", "give the path"):
        assert part in str(error.value)
    assert len(server.requests) == 4
    assert pauses == [1.0, 2.0, 4.0]
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("fault", "says"), [(404, "answers 404"), (403, "answers 403"), (401, "answers 401"), ("html", "a web page")]
)
def test_a_fault_that_cannot_pass_is_not_tried_again(server, tmp_path, pauses, fault, says):
    server.faults = [fault] * 10
    with pytest.raises(DownloadError, match=says) as error:
        fetch(f"{server.url}/{NAME}", cache=tmp_path, sleep=pauses.append)
    assert f"{server.url}/{NAME}" in str(error.value)
    assert "give the path" in str(error.value)
    assert len(server.requests) == 1
    assert files(tmp_path) == []


def test_a_server_that_is_not_there(tmp_path, pauses, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        url = server.url
    with pytest.raises(DownloadError, match="cannot be reached"):
        fetch(f"{url}/{NAME}", cache=tmp_path, sleep=pauses.append)
    assert len(pauses) == 3


def test_a_damaged_cached_file_is_downloaded_again(server, tmp_path):
    path = fetch(f"{server.url}/{NAME}", cache=tmp_path)
    path.write_bytes(CONTENT[:-1])
    assert fetch(f"{server.url}/{NAME}", cache=tmp_path) == path
    assert path.read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_damaged_cached_file_is_not_used_when_the_server_is_gone(server, tmp_path, pauses):
    path = fetch(f"{server.url}/{NAME}", cache=tmp_path)
    path.write_bytes(CONTENT[:-1])
    server.faults = [404]
    with pytest.raises(DownloadError):
        fetch(f"{server.url}/{NAME}", cache=tmp_path)


@pytest.mark.parametrize("name", ["model.pth", "model_final_280758.pkl", "net-1234567.pt", f"net-{SHA256[:8]}.txt"])
def test_names_without_a_hash_are_not_compared(server, tmp_path, name):
    server.content = b"whatever"
    assert fetch(f"{server.url}/{name}", cache=tmp_path).read_bytes() == b"whatever"


@pytest.mark.parametrize("suffix", ["pth", "pt", "npz", "safetensors", "pkl"])
@pytest.mark.parametrize("digits", [8, 10, 64])
def test_names_with_a_hash_are_compared(server, tmp_path, suffix, digits):
    assert fetch(f"{server.url}/a/net-{SHA256[:digits]}.{suffix}", cache=tmp_path).read_bytes() == CONTENT
    wrong = SHA256[: digits - 1] + ("0" if SHA256[digits - 1] != "0" else "1")
    with pytest.raises(DownloadError, match=f"not {wrong}"):
        fetch(f"{server.url}/a/net-{wrong}.{suffix}", cache=tmp_path, sleep=lambda seconds: None)


def test_the_hash_can_stand_behind_the_url(server, tmp_path):
    url = f"{server.url}/model.pth"
    path = fetch(f"{url}#sha256={SHA256.upper()}", cache=tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.requests == ["/model.pth"]
    path.write_bytes(b"damaged")
    assert fetch(f"{url}#sha256={SHA256.upper()}", cache=tmp_path).read_bytes() == CONTENT
    with pytest.raises(DownloadError, match="not 00000000 as its name or #sha256 says"):
        fetch(f"{url}#sha256=00000000", cache=tmp_path, sleep=lambda seconds: None)


def test_a_hash_behind_the_url_overrides_a_name_that_only_looks_like_one(server, tmp_path):
    path = fetch(f"{server.url}/net-20200824.pth#sha256={SHA256}", cache=tmp_path)
    assert path.name.endswith("net-20200824.pth")


def test_one_url_with_and_without_a_hash_are_two_files(server, tmp_path):
    """Else a damaged file, that nobody can tell from a whole one without the hash, would be used."""
    fetch(f"{server.url}/model.pth#sha256={SHA256}", cache=tmp_path).write_bytes(b"damaged")
    assert fetch(f"{server.url}/model.pth", cache=tmp_path).read_bytes() == CONTENT


def test_a_body_without_length_and_redirects(server, tmp_path):
    server.faults = ["redirect", "no length"]
    path = fetch(f"{server.url}/{NAME}", cache=tmp_path)
    assert path.read_bytes() == CONTENT
    assert server.requests == [f"/{NAME}", f"/elsewhere/{NAME}"]


def test_a_query_is_sent_and_is_no_part_of_the_name(server, tmp_path):
    path = fetch(f"{server.url}/{NAME}?raw=true", cache=tmp_path)
    assert path.name.endswith(NAME)
    assert server.requests == [f"/{NAME}?raw=true"]


def test_an_encrypted_url_must_stay_so(monkeypatch, server, tmp_path):
    plain = urllib.request.urlopen(f"{server.url}/{NAME}")
    monkeypatch.setattr(urllib.request, "urlopen", lambda request, timeout: plain)
    with pytest.raises(DownloadError, match=r"leads to http://127.* not encrypted"):
        fetch(f"https://example.org/{NAME}", cache=tmp_path)


def test_a_failed_handshake_is_a_download_error(monkeypatch, tmp_path, pauses):
    def urlopen(request, timeout):
        raise urllib.error.URLError(ssl.SSLCertVerificationError("self-signed certificate"))

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(DownloadError, match="self-signed certificate"):
        fetch(f"https://example.org/{NAME}", cache=tmp_path, sleep=pauses.append)


def test_google_storage_is_asked_over_https(monkeypatch, tmp_path, server):
    asked = []

    def urlopen(request, timeout):
        asked.append(request.full_url)
        raise urllib.error.HTTPError(request.full_url, 404, "Not Found", {}, None)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(DownloadError, match="404 Not Found"):
        fetch("gs://vit_models/augreg/S_16-res_224.npz", cache=tmp_path)
    assert asked == ["https://storage.googleapis.com/vit_models/augreg/S_16-res_224.npz"]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("weights/model.pth", "give the path of a local file"),
        ("/weights/model.pth", "give the path of a local file"),
        ("file:///etc/passwd", "not an https"),
        ("ftp://host/model.pth", "not an https"),
        ("https://host", "does not lead to a file"),
        ("https://host/folder/", "does not lead to a file"),
        ("https:///model.pth", "does not lead to a file"),
        ("https://[::1/model.pth", "is not a URL"),
        ("https://host/my model.pth", "has characters"),
        ("https://host/modèle.pth", "has characters"),
        ("https://host/model.pth\r\nHost: other", "model.pth"),
        ("https://host/model.pth#sha256=xyz", "need sha256="),
        ("https://host/model.pth#v1", "need sha256="),
    ],
)
def test_what_is_no_url_of_a_file(url, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        fetch(url, cache=tmp_path)


@pytest.mark.parametrize(
    "name", ["%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..", "%00.pth", "a" * 300 + ".pth", "x;y=[bold].pth"]
)
def test_no_name_leaves_the_cache(server, tmp_path, name):
    path = fetch(f"{server.url}/{name}", cache=tmp_path)
    assert path.resolve().parent == (tmp_path / "weights").resolve()


def test_where_the_cache_is(monkeypatch, tmp_path, server):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("WKD_JAX_CACHE", raising=False)
    url = f"{server.url}/{NAME}"
    assert fetch(url).parent == tmp_path / "home" / ".cache" / "wkd_jax" / "weights"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch(url).parent == tmp_path / "xdg" / "wkd_jax" / "weights"
    monkeypatch.setenv("WKD_JAX_CACHE", str(tmp_path / "ours"))
    assert fetch(url).parent == tmp_path / "ours" / "weights"


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="set WKD_JAX_CACHE"):
        fetch("https://host/model.pth", cache=tmp_path / "file")


def test_a_full_disk_is_not_tried_again(server, tmp_path, pauses, monkeypatch):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        fetch(f"{server.url}/{NAME}", cache=tmp_path, sleep=pauses.append)
    assert pauses == []
    assert files(tmp_path) == []


def test_what_killed_processes_left_is_removed(server, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    old, new = folder / ".a.part", folder / ".b.part"
    for path in (old, new):
        path.write_bytes(b"half")
    yesterday = time.time() - 100_000
    os.utime(old, (yesterday, yesterday))
    fetch(f"{server.url}/{NAME}", cache=tmp_path)
    assert not old.exists()
    assert new.exists()


def test_processes_may_fetch_one_file_at_once(server, tmp_path):
    server.together = threading.Barrier(3)
    program = "import sys; from wkd_jax.weights.download import fetch; print(fetch(sys.argv[1], cache=sys.argv[2]))"
    command = [sys.executable, "-c", program, f"{server.url}/{NAME}", str(tmp_path)]
    root = pathlib.Path(__file__).parents[2]
    processes = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert len(paths) == 1
    assert pathlib.Path(paths.pop()).read_bytes() == CONTENT
    assert len(server.requests) == 3
    assert len(files(tmp_path)) == 1


def test_progress_is_shown_on_a_terminal_only(server, tmp_path, capfd, monkeypatch):
    fetch(f"{server.url}/{NAME}", cache=tmp_path / "a")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    fetch(f"{server.url}/{NAME}", cache=tmp_path / "b")
    shown = capfd.readouterr()
    assert NAME in shown.err
    assert shown.out == ""


@pytest.mark.parametrize(
    ("name", "digits"),
    [
        ("resnet34-b627a593.pth", "b627a593"),
        ("s-0123456789abcdef.npz", "0123456789abcdef"),
        ("net-20200824.pth", ""),  # a date
        ("step-00010000.pth", ""),
        ("net-b627.pth", ""),
    ],
)
def test_hashes_in_names(name, digits):
    assert download._parse(f"https://example.org/{name}").sha256 == digits
