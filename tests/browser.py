"""Headless Chromium by the WebDriver protocol, for tests of pages: real pointers and keys, no library."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import PATIENCE, is_there, until

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of an element's id
KEYS = {
    "left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015", "home": "\ue011", "end": "\ue010",
    "tab": "\ue004", "escape": "\ue00c", "enter": "\ue007",
}  # fmt: skip
CONTROL = "\ue009"


class Browser:
    """One window. Only this machine is there: every host name fails."""

    def __init__(self, address: str, width: int, height: int) -> None:
        options = {
            "binary": shutil.which("chromium"),
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--force-color-profile=srgb",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                f"--window-size={width},{height}",
            ],
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._address = f"{address}/session"
        session = self._send("", {"capabilities": {"alwaysMatch": wanted}})
        self._address += f"/{session['sessionId']}"

    def _send(self, path: str, body: dict[str, Any] | None = None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._address + path, data=data, method=method, headers={"Content-Type": "application/json"}
        )
        local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with local.open(request, timeout=PATIENCE) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.loads(error.read())["value"]["message"]) from None

    def open(self, page: Path | str) -> None:
        """Load a file, or an address."""
        self._send("/url", {"url": page if isinstance(page, str) else page.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self._send("/execute/sync", {"script": script, "args": list(arguments)})

    def find(self, selector: str) -> str:
        """The id of the first element that a CSS selector finds."""
        return self._send("/element", {"using": "css selector", "value": selector})[ELEMENT]

    def text(self, selector: str) -> str:
        """What an element shows."""
        return self._send(f"/element/{self.find(selector)}/text", method="GET")

    def wait(self, script: str) -> Any:
        """Wait until a script returns something true."""
        return until(lambda: self.run(script), every=0.05, what=script)

    def click(self, selector: str) -> None:
        self._send(f"/element/{self.find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Replace what a field holds."""
        field = f"/element/{self.find(selector)}"
        self._send(f"{field}/clear", {})
        self._send(f"{field}/value", {"text": text})

    def choose(self, selector: str, index: int) -> None:
        """Choose an option of a list."""
        self.run(
            "const list = document.querySelector(arguments[0]); list.selectedIndex = arguments[1];"
            "list.dispatchEvent(new Event('change'))",
            selector,
            index,
        )

    def point_at(self, selector: str, *, click: bool = False, x: int = 0, y: int = 0) -> None:
        """Move the pointer to an element, x and y pixels from its centre, and perhaps click."""
        element = self.find(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", {ELEMENT: element})
        time.sleep(0.1)  # for the event of that scroll, which hides what the pointer showed
        actions: list[dict[str, Any]] = [
            {"type": "pointerMove", "duration": 50, "origin": {ELEMENT: element}, "x": x, "y": y}
        ]
        if click:
            actions += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        self._send("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": actions}]})

    def press(self, *keys: str, control: bool = False) -> None:
        """Press keys one after the other, where the focus is: a name in `KEYS`, or a character."""
        pressed = [(kind, KEYS.get(key, key)) for key in keys for kind in ("keyDown", "keyUp")]
        if control:
            pressed = [("keyDown", CONTROL), *pressed, ("keyUp", CONTROL)]
        actions = [{"type": kind, "value": value} for kind, value in pressed]
        self._send("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def resize(self, width: int, height: int) -> None:
        self._send("/window/rect", {"width": width, "height": height})

    def prefer(self, scheme: str) -> None:
        """Wish for "light" or "dark" colours."""
        self._chrome("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def media(self, kind: str, width: int, height: int) -> None:
        """Lay the page out for "print" on so many pixels; "" and 0 for the window again."""
        self._chrome("Emulation.setEmulatedMedia", media=kind)
        self._chrome(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def picture(self) -> bytes:
        """All of the page as PNG."""
        taken = self._chrome("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(taken["data"])

    def printed(self) -> bytes:
        """What the print command makes of the page, as PDF on A4."""
        self._chrome("Emulation.setEmulatedMedia", media="")
        return base64.b64decode(self._send("/print", {"page": {"width": 21.0, "height": 29.7}, "background": True}))

    def _chrome(self, command: str, **settings: Any) -> Any:
        """A command of Chromium's own protocol."""
        return self._send("/goog/cdp/execute", {"cmd": command, "params": settings})

    def complaints(self) -> list[str]:
        """What the page's console has said so far."""
        return [entry["message"] for entry in self._send("/se/log", {"type": "browser"})]

    def misfits(self) -> list[str]:
        """What no page may have: complaints, anything loaded, content wider than the window, tables that are cut."""
        loaded = self.run("return performance.getEntriesByType('resource').map(e => e.name)")
        over = self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
        cut = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
        found = [*self.complaints(), *(f"loads {name}" for name in loaded)]
        found += [f"{over} pixels wider than the window"] if over else []
        return found + ([f"{number} tables are cut"] if (number := self.run(cut)) else [])

    def close(self) -> None:
        self._send("", method="DELETE")


@contextmanager
def browser(width: int, height: int) -> Iterator[Browser]:
    """A browser; skips the test where there is none."""
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)} on the path (Debian: chromium, chromium-driver)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: is_there(port), every=0.05)
        window = Browser(f"http://127.0.0.1:{port}", width, height)
        try:
            yield window
        finally:
            window.close()
    finally:
        driver.terminate()
        driver.wait(PATIENCE)
