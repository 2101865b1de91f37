"""Headless Chromium, driven through its DevTools protocol over two pipes, without a driver or package."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60.0  # seconds
KEYS = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}


class Refused(Exception):
    """The browser refused a command."""


class Chromium:
    """A browser with its own profile; use it as a context manager."""

    def __init__(self, profile: Path):
        assert CHROMIUM is not None
        read_child, self._write = os.pipe()
        self._read, write_child = os.pipe()
        flags = [
            "--headless=new",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--remote-debugging-pipe",
        ]
        flags += [f"--user-data-dir={profile}", "--disable-background-networking", "--force-color-profile=srgb"]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []
        # It reads from descriptor 3 and writes to 4. Other shells than bash take one digit behind the &.
        shell = ["bash", "-c", f'exec "$@" 3<&{read_child} 4>&{write_child}', "bash", CHROMIUM, *flags, "about:blank"]
        self._log = (profile.parent / f"{profile.name}.log").open("wb")
        self.process = subprocess.Popen(
            shell, pass_fds=(read_child, write_child), stdout=self._log, stderr=self._log, start_new_session=True
        )
        os.close(read_child)
        os.close(write_child)
        self._buffer, self._sent = b"", 0

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self.call("Browser.close")
            self.process.wait(10)
        except (Refused, OSError, EOFError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self._read)
        os.close(self._write)
        self._log.close()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._sent:
            pass
        if "error" in answer:
            raise Refused(f"{method}: {answer['error']}")
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], PATIENCE)[0]:
                raise TimeoutError(f"no response from Chromium for {PATIENCE} s")
            piece = os.read(self._read, 1 << 20)
            if not piece:
                raise EOFError("Chromium has ended")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def tab(self, url: str) -> "Tab":
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        tab.call("Page.enable")
        tab.call("Emulation.setDeviceMetricsOverride", width=1280, height=800, deviceScaleFactor=1, mobile=False)
        tab.call("Emulation.setFocusEmulationEnabled", enabled=True)  # every tab receives keys
        tab.go(url)
        return tab


class Tab:
    """One page. `js` evaluates an expression, `wait` waits until one is true."""

    def __init__(self, browser: Chromium, session: str):
        self.browser, self.session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = PATIENCE) -> None:
        end = time.monotonic() + seconds
        while not self._is_true(condition):
            assert time.monotonic() < end, (
                f"never true: {condition}; the page says: {self.js('document.body.innerText')}"
            )
            time.sleep(0.02)

    def _is_true(self, condition: str) -> bool:
        try:
            return bool(self.js(condition))
        except Refused:
            return False  # the page was left meanwhile

    def press(self, key: str, ctrl: bool = False) -> None:
        """Press a key through the browser's input, so that the focused element receives it."""
        one = len(key) == 1
        about = {
            "key": key,
            "code": f"Key{key.upper()}" if one else key,
            "windowsVirtualKeyCode": ord(key.upper()) if one else KEYS[key],
            "modifiers": 2 if ctrl else 0,
        }
        text = {"text": "\r" if key == "Enter" else key} if (one or key == "Enter") and not ctrl else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def write(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        box = f"document.querySelector('{selector}').getBoundingClientRect()"
        x, y = self.js(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
