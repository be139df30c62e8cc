"""A Chromium without a window, offline, spoken to by the DevTools protocol over a pipe: no port, no library."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_S = 120.0
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--no-default-browser-check", "--hide-scrollbars", "--force-device-scale-factor=1", "--remote-debugging-pipe",
    # Nothing but this machine can be reached, whatever the page tries.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


def find_chromium() -> str | None:
    """Return where a Chromium is; CHROMIUM names one."""
    return os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


class PageError(AssertionError):
    """The page threw, or what a test asked it to evaluate did."""


class Chromium:
    """One browser with one tab.

    Attributes:
        errors: what the page threw and logged as errors.
        requests: addresses that it asked for.
    """

    def __init__(self, program: str, *, width: int = 1440, height: int = 900) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._folder = tempfile.TemporaryDirectory(prefix="truedag-chromium-", ignore_cleanup_errors=True)
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 32) for end in (theirs_in, theirs_out)]

        def place() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        own = (f"--user-data-dir={self._folder.name}", f"--window-size={width},{height}")
        self._process = subprocess.Popen(
            [program, *_FLAGS, *own, "about:blank"],
            preexec_fn=place, pass_fds=(3, 4), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env={**os.environ, "HOME": self._folder.name},
        )  # fmt: skip
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self._in, self._out = ours_in, ours_out
        self._rest = b""
        self._count = 0
        self._session: str | None = None
        target = self.send(
            "Target.createTarget", {"url": "about:blank", "newWindow": True, "width": width, "height": height}
        )
        attached = self.send("Target.attachToTarget", {"targetId": target["targetId"], "flatten": True})
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._folder.cleanup()

    def send(self, method: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Call a method and return its result; events that come before it are kept."""
        self._count += 1
        number = self._count
        message: dict[str, Any] = {"id": number, "method": method, "params": dict(params or {})}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            answer = self._read(deadline)
            if answer.get("id") == number:
                if "error" in answer:
                    raise PageError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result
            self._take(answer)

    def open(self, address: str) -> None:
        """Go to an address, as if for the first time, and wait until the page says that it is ready."""
        self.send("Page.navigate", {"url": "about:blank"})
        self.requests[:] = [one for one in self.requests if one != "about:blank"]
        self.send("Page.navigate", {"url": address})
        self.wait_for("document.documentElement?.dataset.ready && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Return what an expression comes to, as JSON has it; promises are awaited."""
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.send("Runtime.evaluate", asked)
        if "exceptionDetails" in answer:
            told = answer["exceptionDetails"]
            raise PageError(told.get("exception", {}).get("description", told["text"]))
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"never true: {condition}; errors: {self.errors}"
            time.sleep(0.02)

    def settle(self) -> None:
        """Wait until what was changed is drawn and its link written."""
        self.evaluate(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 20))))"
        )
        self.wait_for("!truedag.app.pending && location.hash.slice(1) === truedag.app.link")

    def press(self, key: str) -> None:
        """Press a key, as a person does."""
        text = key if len(key) == 1 else "\r" if key == "Enter" else ""
        for kind in ("keyDown", "keyUp"):
            shown = {"text": text} if text and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", {"type": kind, "key": key, "code": key, **shown})
        self.settle()

    def click(self, x: float, y: float, *, times: int = 1) -> None:
        """Click where a person would."""
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                place = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": count}
                self.send("Input.dispatchMouseEvent", place)
        self.settle()

    def picture(self, path: Path) -> None:
        """Save what is on screen as PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", {"format": "png"})["data"]))

    def _read(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            left = deadline - time.monotonic()
            ready = select.select([self._in], [], [], max(left, 0))[0]
            assert ready, "Chromium does not answer"
            part = os.read(self._in, 1 << 20)
            assert part, "Chromium has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _take(self, event: Mapping[str, Any]) -> None:
        takers: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
            "Runtime.exceptionThrown": lambda told: self.errors.append(
                told["exceptionDetails"].get("exception", {}).get("description", told["exceptionDetails"]["text"])
            ),
            "Log.entryAdded": lambda told: (
                self.errors.append(told["entry"]["text"]) if told["entry"]["level"] == "error" else None
            ),
            "Network.requestWillBeSent": lambda told: self.requests.append(told["request"]["url"]),
        }
        take = takers.get(event.get("method", ""))
        if take is not None:
            take(event["params"])
