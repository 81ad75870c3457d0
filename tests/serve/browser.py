"""A headless Chromium, driven by the WebDriver protocol of its chromedriver."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = "needs Chromium and its chromedriver: apt-get install chromium chromium-driver"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name of a reference to an element
KEYS = {
    "right": "\ue014", "left": "\ue012", "down": "\ue015", "home": "\ue011", "end": "\ue010", "tab": "\ue004",
    "escape": "\ue00c", "enter": "\ue007",
}  # fmt: skip
CONTROL = "\ue009"


class Browser:
    """One window."""

    def __init__(self, driver: str, profile: Path, width: int, height: int) -> None:
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        arguments += [f"--user-data-dir={profile}", f"--window-size={width},{height}", "--force-color-profile=srgb"]
        options = {"binary": CHROMIUM, "args": arguments}
        wanted = {
            "capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        }
        self.driver = driver
        self.session = self._send("POST", f"{driver}/session", wanted)["sessionId"]

    def _send(self, method: str, url: str, body: Any = None) -> Any:
        raw = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, raw, {"content-type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.loads(response.read())["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.loads(error.read())["value"]["message"]) from None

    def command(self, method: str, path: str, body: Any = None) -> Any:
        return self._send(method, f"{self.driver}/session/{self.session}{path}", body)

    def open(self, url: str) -> None:
        self.command("POST", "/url", {"url": url})

    def js(self, script: str, *arguments: Any) -> Any:
        """The value that a script returns."""
        return self.command("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def element(self, selector: str) -> str:
        found = self.command("POST", "/element", {"using": "css selector", "value": selector})
        return f"/element/{found[ELEMENT]}"

    def click(self, selector: str) -> None:
        self.command("POST", f"{self.element(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Replace what a field holds."""
        field = self.element(selector)
        self.command("POST", f"{field}/clear", {})
        self.command("POST", f"{field}/value", {"text": text})

    def choose(self, name: str, index: int) -> None:
        """Choose an option of a list."""
        self.js(
            "const list = document.getElementById(arguments[0]); list.selectedIndex = arguments[1];"
            "list.dispatchEvent(new Event('change'))",
            name,
            index,
        )

    def press(self, *keys: str) -> None:
        """Press keys one after the other, where the focus is."""
        each = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self.command("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": each}]})

    def press_with_control(self, key: str) -> None:
        value = KEYS.get(key, key)
        names = (("keyDown", CONTROL), ("keyDown", value), ("keyUp", value), ("keyUp", CONTROL))
        each = [{"type": kind, "value": name} for kind, name in names]
        self.command("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": each}]})

    def hover(self, selector: str) -> None:
        reference = {ELEMENT: self.element(selector).removeprefix("/element/")}
        moves = [{"type": "pointerMove", "duration": 0, "origin": reference, "x": 0, "y": 0}]
        self.command("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": moves}]})

    def wait(self, script: str, seconds: float = 60.0) -> Any:
        """Wait until a script returns something true."""
        until = time.monotonic() + seconds
        while not (found := self.js(script)):
            assert time.monotonic() < until, f"never true: {script}"
            time.sleep(0.05)
        return found

    def resize(self, width: int, height: int) -> None:
        self.command("POST", "/window/rect", {"width": width, "height": height})

    def prefer(self, scheme: str) -> None:
        """Emulate the wish for light or dark colours."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        body = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}}
        self.command("POST", "/goog/cdp/execute", body)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.command("GET", "/screenshot")))

    def console(self) -> list[str]:
        """What the page complained about."""
        return [entry["message"] for entry in self.command("POST", "/se/log", {"type": "browser"})]


@contextmanager
def browser(profile: Path, width: int = 1200, height: int = 1000) -> Iterator[Browser]:
    """A browser while the context lasts."""
    assert DRIVER is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until(lambda: bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5)))
        found = Browser(f"http://127.0.0.1:{port}", profile, width, height)
        yield found
        found.command("DELETE", "")
    finally:
        process.terminate()
        process.wait(20)


def _wait_until(answers: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with suppress(OSError):
            if answers():
                return
        time.sleep(0.05)
    raise AssertionError("chromedriver does not answer")
