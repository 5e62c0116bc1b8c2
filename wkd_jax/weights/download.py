"""Downloads files of weights once, into a cache, and never hands out one that is broken."""

from __future__ import annotations

import hashlib
import http.client
import os
import pathlib
import re
import secrets
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from wkd_jax import cache as cache_lib

_ATTEMPTS = 4
_TIMEOUT = 60.0  # seconds without a byte
_CHUNK = 2**20  # bytes
_STALE = 24 * 3600.0  # seconds after which nobody writes a temporary file any more
_RETRIED = {408, 425, 429}  # beside 5xx: statuses that may differ a moment later
# Eight digits without a letter are a date.
_HASH_IN_NAME = re.compile(r"-(?!\d{8}\.)([0-9a-f]{8,64})\.(?:pth|pt|npz|safetensors|pkl)$")
_FRAGMENT = re.compile(r"sha256=([0-9a-f]{8,64})")


class DownloadError(OSError):
    """A file cannot be downloaded. The message says which, why, and what to do."""


class _TryAgainError(Exception):
    """An attempt failed in a way that the next one may not."""


class _Source(NamedTuple):
    """What a URL says.

    Attributes:
      url: What is asked for: http or https, without fragment.
      name: In the cache. Starts with a hash of the URL, since many files are called alike.
      sha256: The beginning of the file's, in hexadecimal digits; "" if nobody gave it.
    """

    url: str
    name: str
    sha256: str


def fetch(
    url: str, *, cache: str | os.PathLike[str] | None = None, sleep: Callable[[float], None] = time.sleep
) -> pathlib.Path:
    """The file at a URL, from the cache or downloaded into it.

    A file name that ends as in `resnet18-f37072fd.pth` carries the beginning of the file's SHA-256; "#sha256=<digits>"
    after the URL says it for other names, and overrides the name. It is compared after the download and whenever the
    cached file is used. Several processes may fetch one file at once.

    Args:
      url: https://, http:// or gs://bucket/path of a public object. Proxies are those of the environment.
      cache: Files go to `weights/` in it. None: `wkd_jax.cache.folder()`.
      sleep: Waits so many seconds between attempts.

    Raises:
      ValueError: If `url` is not such a URL.
      DownloadError: If the file is not there, is a web page, or several attempts did not get the whole file.
      OSError: If the cache cannot be written.
    """
    source = _parse(url)
    folder = _cache_folder(cache)
    path = folder / source.name
    if path.is_file() and _sha256(path).startswith(source.sha256):
        return path
    _remove_stale(folder)
    for attempt in range(_ATTEMPTS):
        if attempt:
            sleep(2.0 ** (attempt - 1))
        try:
            _download(source, path)
            return path
        except _TryAgainError as error:
            reason = str(error)
    raise _failed(source, f"{reason} (the last of {_ATTEMPTS} attempts)")


def _parse(url: str) -> _Source:
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise ValueError(f"{url!r} is not a URL: {error}") from error
    if parts.scheme not in ("https", "http", "gs"):
        raise ValueError(f"{url!r} is not an https://, http:// or gs:// URL; give the path of a local file as it is")
    path = urllib.parse.unquote(parts.path)
    if not parts.netloc or path.endswith("/") or not path:
        raise ValueError(f"{url!r} does not lead to a file: need scheme://host/path/name")
    if re.search(r"[^\x21-\x7e]", url):
        raise ValueError(f"{url!r} has characters that URLs have not; write a space as %20 and so on")
    in_name, in_fragment = _HASH_IN_NAME.search(path), _FRAGMENT.fullmatch(parts.fragment.lower())
    if parts.fragment and not in_fragment:
        raise ValueError(f"{url!r}: after # need sha256= and 8 to 64 hexadecimal digits")
    found = in_fragment or in_name
    address = parts._replace(fragment="")
    if parts.scheme == "gs":
        address = address._replace(scheme="https", netloc="storage.googleapis.com", path=f"/{parts.netloc}{parts.path}")
    # The fragment counts: what was fetched without a hash is not what is asked for with one.
    prefix = hashlib.sha256(url.encode()).hexdigest()[:12]
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", path.rsplit("/", 1)[1])[-100:]
    return _Source(address.geturl(), f"{prefix}-{readable}", found[1] if found else "")


def _cache_folder(cache: str | os.PathLike[str] | None) -> pathlib.Path:
    folder = (cache_lib.folder() if cache is None else pathlib.Path(cache).expanduser()) / "weights"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{folder} cannot be made ({error}): set WKD_JAX_CACHE to a folder that can") from error
    return folder


def _remove_stale(folder: pathlib.Path) -> None:
    """Removes what killed processes left. A download that goes on writes its file all the time."""
    for path in folder.glob("*.part"):
        try:
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink()
        except OSError:  # another process was faster, or it is another user's
            continue


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(source: _Source, path: pathlib.Path) -> None:
    """One attempt. The file appears under its name when it is whole.

    Raises:
      _TryAgainError: If another attempt may succeed.
      OSError: If not.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        digest = hashlib.sha256()
        with temporary.open("xb") as file:
            for chunk in _body(source):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if not digest.hexdigest().startswith(source.sha256):
            raise _TryAgainError(
                f"its SHA-256 begins {digest.hexdigest()[:12]}, not {source.sha256} as its name or #sha256 says"
            )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _body(source: _Source) -> Iterator[bytes]:
    """The bytes that the server sends, with what goes wrong there sorted into what may pass and what will not."""
    # Compressed on the way, its length and hash would be of something else.
    request = urllib.request.Request(source.url, headers={"User-Agent": "wkd_jax", "Accept-Encoding": "identity"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            yield from _checked(source, response)
    except urllib.error.HTTPError as error:
        if error.code in _RETRIED or error.code >= 500:
            raise _TryAgainError(f"the server answers {error.code} {error.reason}") from error
        raise _failed(source, f"the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _TryAgainError(f"the server cannot be reached: {error.reason}") from error
    except (TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
        raise _TryAgainError(f"the connection broke: {type(error).__name__}: {error}") from error


def _checked(source: _Source, response: Any) -> Iterator[bytes]:
    """The bytes of an answer, if it is what was asked for and all of it."""
    if source.url.startswith("https:") and not response.url.startswith("https:"):
        raise _failed(source, f"it leads to {response.url}, which is not encrypted")
    if response.headers.get_content_type() == "text/html":
        raise _failed(source, "the server sends a web page instead of a file")
    length = response.headers.get("Content-Length")
    total = int(length) if length and length.isdecimal() else None
    received = 0
    with _progress(source.name) as progress:
        task = progress.add_task("", total=total)
        while chunk := response.read(_CHUNK):
            received += len(chunk)
            progress.update(task, completed=received)
            yield chunk
    if total is not None and received != total:
        raise _TryAgainError(f"only {received} of {total} bytes came")


def _progress(name: str) -> Progress:
    console = Console(stderr=True)
    columns = TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _failed(source: _Source, why: str) -> DownloadError:
    return DownloadError(f"{source.url}: {why}. Download it by other means, and give the path of the file")
