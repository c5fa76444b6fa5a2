"""A real Chromium without a window, driven through its debugging pipe (the Chrome DevTools protocol): no driver to
download, no port, and nothing but this process can reach it."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60.0

_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps"),
    # Frames stay in the tab's process, where a script can be evaluated in them.
    "--disable-features=IsolateSandboxedIframes",
    *("--disable-extensions", "--mute-audio", "--force-color-profile=srgb", "--remote-debugging-pipe"),
)
_KEYS = {"Enter": ("\r", 13), " ": (" ", 32), "Tab": ("", 9), "Escape": ("", 27), "Home": ("", 36), "End": ("", 35)}
_KEYS |= {"ArrowLeft": ("", 37), "ArrowUp": ("", 38), "ArrowRight": ("", 39), "ArrowDown": ("", 40)}


class Page:
    """One tab.

    Attributes:
        requests: Addresses of everything that the tab has asked for, in order.
        problems: What its console and its policies have complained about, and scripts' errors.
    """

    def __init__(self, process: subprocess.Popen[bytes], send: int, receive: int) -> None:
        self._process = process
        self._send = send
        self._receive = receive
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self._loaded = False
        self.requests: list[str] = []
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its answer."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._send, data) :]
        deadline = time.monotonic() + PATIENCE
        while True:
            found = self._next(deadline)
            if found.get("id") == number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                answer: dict[str, Any] = found["result"]
                return answer

    def open(self, address: str) -> None:
        """Go to a page, and wait until its scripts have run once; another place of the same page is no load."""
        self.requests.clear()
        self.problems.clear()
        self._loaded = False
        if "loaderId" not in self.call("Page.navigate", url=address):
            return
        deadline = time.monotonic() + PATIENCE
        while not self._loaded:
            self._next(deadline)

    def evaluate(self, script: str, context: int | None = None) -> Any:
        """The value of an expression in the page, or in a `frame`, as JSON gives it; promises are waited for.

        Raises:
            RuntimeError: The script fails.
        """
        found = self.call(
            "Runtime.evaluate",
            expression=script,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
            **({} if context is None else {"contextId": context}),
        )
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"])[:2000])
        return found["result"].get("value")

    def frame(self) -> int:
        """Where to evaluate in the page's first frame; it sees the frame's elements and not its scripts' names."""
        (found,) = self.call("Page.getFrameTree")["frameTree"]["childFrames"]
        world = self.call("Page.createIsolatedWorld", frameId=found["frame"]["id"])
        return int(world["executionContextId"])

    def wait(self, script: str, seconds: float = PATIENCE) -> None:
        """Until an expression in the page is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(script):
            if time.monotonic() > deadline:
                raise TimeoutError(script)
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """Scroll an element into view and click its middle, as a mouse does."""
        x, y = self.middle(selector)
        self.click_at(x, y)

    def click_at(self, x: float, y: float) -> None:
        """Click a point of the window."""
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover_at(self, x: float, y: float) -> None:
        """Move the mouse to a point of the window."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def key(self, name: str) -> None:
        """Press a key where the focus is."""
        text, code = _KEYS[name]
        fields = {"key": name, "code": "Space" if name == " " else name, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **fields)
        self.call("Input.dispatchKeyEvent", type="keyUp", **fields)

    def size(self, width: int, height: int, *, phone: bool = False, scale: float = 1) -> None:
        """The window's size, in the page's pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )

    def theme(self, name: str) -> None:
        """What the reader's system prefers: light or dark."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self, *, whole: bool = True) -> bytes:
        """The page as a PNG: all of it, or what the window shows."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(found["data"])

    def middle(self, selector: str) -> tuple[float, float]:
        """Scroll an element into view; where its middle is in the window."""
        box = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "if (!e) return null; e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        if box is None:
            raise LookupError(selector)
        return box[0], box[1]

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._receive], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium does not answer")
            data = os.read(self._receive, 1 << 20)
            if not data:
                raise RuntimeError(f"Chromium ended with status {self._process.wait(10)}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, said: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(said["exceptionDetails"])[:2000])
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(said["args"])[:2000])
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")


@contextmanager
def chromium() -> Iterator[Page]:
    """A fresh Chromium with one tab; it ends with the block."""
    assert CHROMIUM is not None
    inner_in, outer_out = os.pipe()
    outer_in, inner_out = os.pipe()
    with tempfile.TemporaryDirectory(prefix="chromium", ignore_cleanup_errors=True) as home:

        def pipes() -> None:
            # Chromium reads commands from 3 and writes answers to 4; copies first, as either may be the other's number.
            reading, writing = os.dup(inner_in), os.dup(inner_out)
            os.dup2(reading, 3)
            os.dup2(writing, 4)

        process = subprocess.Popen(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={home}/profile", "about:blank"],
            env={**os.environ, "HOME": home},
            preexec_fn=pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(inner_in)
        os.close(inner_out)
        try:
            yield Page(process, outer_out, outer_in)
        finally:
            # It ends when nobody holds the other end of its pipe.
            os.close(outer_out)
            os.close(outer_in)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
