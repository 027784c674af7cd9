"""A headless Chromium, driven over a pipe by the DevTools protocol: no driver, no port, no package."""

from __future__ import annotations

import base64
import json
import os
import selectors
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

__all__ = ["Browser", "find_browser"]

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 60.0
_PAUSE = 0.2


def find_browser() -> str:
    """The path of a Chromium.

    Raises:
        FileNotFoundError: There is none.
    """
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise FileNotFoundError(f"No browser found: install one of {', '.join(_NAMES)}.")
    return found


class Browser:
    """One page of a browser; it ends with the ``with`` block.

    Args:
        width: Of the page, in CSS pixels.
        height: The same.
    """

    def __init__(self, width: int = 1280, height: int = 800) -> None:
        self.width = width
        self.height = height
        self._number = 0
        self._received = b""
        self._session: str | None = None

    def __enter__(self) -> Self:
        path = find_browser()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        arguments = ["--headless=new", "--remote-debugging-pipe", "--no-first-run", "--hide-scrollbars"]
        arguments += ["--disable-gpu", "--no-sandbox", f"--user-data-dir={self._profile.name}", "about:blank"]
        # the protocol's pipes are the descriptors 3 and 4
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["sh", "-c", script, "sh", path, *arguments],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            target = self.send("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            self.resize(self.height)
            scheme = {"name": "prefers-color-scheme", "value": "light"}
            self.send("Emulation.setEmulatedMedia", features=[scheme])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._write)  # it ends when nobody talks to it
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        self._profile.cleanup()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for what it returns.

        Raises:
            RuntimeError: The browser says that it failed, or has ended.
            TimeoutError: It does not answer.
        """
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _SECONDS
        while True:
            answer = self._next_message(deadline)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _next_message(self, deadline: float) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._read, selectors.EVENT_READ)
            while b"\0" not in self._received:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"The browser has not answered for {_SECONDS:.0f} seconds.")
                part = os.read(self._read, 1 << 20)
                if not part:
                    raise RuntimeError("The browser has ended.")
                self._received += part
        text, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def open(self, url: str) -> None:
        """Go to an address; ``wait_for`` says when it is there."""
        self.send("Page.enable")
        self.send("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression on the page; of a promise, what it resolves to.

        Raises:
            RuntimeError: It throws.
        """
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait_for(self, condition: str, seconds: float = _SECONDS) -> None:
        """Wait until a JavaScript expression is true.

        Raises:
            TimeoutError: It does not become true.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                if self.run(condition):
                    return
            except RuntimeError:
                if self._process.poll() is not None:
                    raise
            if time.monotonic() > deadline:
                raise TimeoutError(f"{condition} is not true after {seconds:.0f} seconds.")
            time.sleep(_PAUSE)

    def resize(self, height: int) -> None:
        """Change the height of the page's window."""
        size = {"width": self.width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def screenshot(self, path: Path, top: float = 0, height: float | None = None) -> Path:
        """Save a picture of the page's whole width.

        Args:
            path: A PNG.
            top: Where it begins, in CSS pixels from the top of the document.
            height: Of the picture; by default the window's.
        """
        clip = {"x": 0, "y": top, "width": self.width, "height": height or self.height, "scale": 1}
        found = self.send("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(found["data"]))
        return path
