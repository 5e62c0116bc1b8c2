"""Headless Chromium for tests, by its DevTools protocol over a pipe: the standard library is all it takes."""

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATH = next(filter(None, map(shutil.which, NAMES)), None)
# Chromium reads commands from descriptor 3 and answers on 4, which only a program in between can arrange safely.
_LAUNCH = (
    "import fcntl, os, sys; r, w = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]); "
    "os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
)
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)


class Browser:
    """One page of a running browser; see `opened`."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._buffer, self._count = commands, answers, b"", 0
        self.events: list[dict] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters):
        """The result of a DevTools command to the page."""
        return self._call(method, self._session, **parameters)

    def show(self, page: pathlib.Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Opens a file in a window of this size, in CSS pixels. `events` is then of it alone."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self._until(lambda: self.evaluate("document.readyState + location.href") == "completeabout:blank")
        self.events.clear()
        url = page.absolute().as_uri()
        self.call("Page.navigate", url=url)
        self._until(lambda: self.evaluate("document.readyState + location.href") == f"complete{url}")
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def evaluate(self, expression: str):
        """The value of an expression in the page. The page's own policy on scripts does not matter."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def picture(self, path: pathlib.Path, *, whole: bool = True) -> None:
        """Saves what is seen as PNG: the whole page, or the window alone."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _call(self, method: str, session: str | None = None, **parameters):
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        os.write(self._commands, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            if not select.select([self._answers], [], [], 60)[0]:
                raise TimeoutError("the browser has not answered for a minute")
            if not (read := os.read(self._answers, 1 << 20)):
                raise RuntimeError("the browser has ended")
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _until(self, condition) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError("the page was not loaded within a minute")
            time.sleep(0.02)


@contextlib.contextmanager
def opened():
    """A browser with a profile of its own, ended and removed afterwards."""
    ours, commands = os.pipe()
    answers, theirs = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(ours), str(theirs), PATH, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(ours, theirs),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(ours), os.close(theirs)
        try:
            browser = Browser(commands, answers)
            yield browser
            with contextlib.suppress(RuntimeError, OSError):
                browser._call("Browser.close")
                process.wait(20)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            os.close(commands), os.close(answers)
