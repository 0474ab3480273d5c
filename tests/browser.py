"""A headless Chromium that tests drive by its DevTools protocol over two pipes; it needs no network."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# The browser speaks on its descriptors 3 and 4.
LAUNCH = (
    "import fcntl, os, sys\n"
    "ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]\n"
    "os.dup2(ends[0], 3), os.dup2(ends[1], 4), os.execv(sys.argv[3], sys.argv[3:])"
)
FLAGS = (
    "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--force-device-scale-factor=1",
    "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
)  # fmt: skip
PATIENCE_S = 120


def find_chromium() -> str | None:
    """Return the path of an installed Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page: what it logs of trouble is in `complaints`."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.send(method, parameters, self.session)

    def hear(self, message: dict[str, Any]) -> None:
        """Note what an event says of errors."""
        content = message.get("params", {})
        if message["method"] == "Runtime.exceptionThrown":
            details = content["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        if message["method"] == "Log.entryAdded" and content["entry"]["level"] == "error":
            self.complaints.append(content["entry"]["text"])
        if message["method"] == "Runtime.consoleAPICalled" and content["type"] in ("error", "assert"):
            self.complaints.append(str(content["args"]))

    def open(self, path: Path, width: int = 1400, height: int = 900) -> None:
        """Open a file and wait until it is loaded."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.wait(f"location.protocol === 'file:' && document.readyState === 'complete' && "
                  f"location.pathname.endsWith({json.dumps(path.name)})")  # fmt: skip

    def ask(self, expression: str) -> Any:
        """Return the value of an expression."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression holds."""
        until = time.monotonic() + PATIENCE_S
        while not self.ask(expression):
            assert time.monotonic() < until, f"never true: {expression}; {self.complaints}"
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        """Press keys, named as in KeyboardEvent.key, one after the other."""
        for key in keys:
            code: dict[str, Any] = {"key": key} | ({"text": key} if len(key) == 1 else {})
            if key == "Enter":
                code["text"] = "\r"
            if key in ("Tab", "Escape", "Enter"):
                code["windowsVirtualKeyCode"] = {"Tab": 9, "Escape": 27, "Enter": 13}[key]
            self.send("Input.dispatchKeyEvent", type="keyDown", **code)
            self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def photograph(self) -> np.ndarray:
        """Return what is visible, `(H, W, 3)`."""
        picture = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


class Browser:
    """A running Chromium; `folder` holds its profile."""

    def __init__(self, path: str, folder: Path) -> None:
        (from_test, to_browser), (from_browser, to_test) = os.pipe(), os.pipe()
        command = [sys.executable, "-I", "-c", LAUNCH, str(from_test), str(to_test), path]
        self.process = subprocess.Popen(
            [*command, *FLAGS, f"--user-data-dir={folder}"],
            pass_fds=(from_test, to_test), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(from_test)
        os.close(to_test)
        self.write, self.read = to_browser, from_browser
        self.rest = b""
        self.numbers = itertools.count(1)
        self.pages: dict[str, Page] = {}

    def new_page(self) -> Page:
        target = self.send("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        self.pages[session] = page = Page(self, session)
        return page

    def send(self, method: str, parameters: dict[str, Any], session: str = "") -> dict[str, Any]:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        text = json.dumps(message | ({"sessionId": session} if session else {}))
        content = text.encode() + b"\0"
        while content:
            content = content[os.write(self.write, content) :]
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            page = self.pages.get(answer.get("sessionId", ""))
            if page and "method" in answer:
                page.hear(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.read], [], [], PATIENCE_S)
            assert ready, "Chromium says nothing"
            part = os.read(self.read, 2**20)
            assert part, "Chromium ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def close(self) -> None:
        try:
            self.send("Browser.close", {})
        except (AssertionError, OSError):
            self.process.kill()
        os.close(self.write)
        os.close(self.read)
        self.process.wait(PATIENCE_S)


@contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """Start Chromium with a profile in `folder`, and end it."""
    path = find_chromium()
    assert path is not None
    browser = Browser(path, folder)
    try:
        yield browser
    finally:
        browser.close()
