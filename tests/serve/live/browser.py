"""A headless Chromium, driven over its DevTools protocol."""

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from live.service import wait_for

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = f"no browser found ({', '.join(NAMES)}): install one, on Debian and Ubuntu with: apt-get install chromium"
START_LIMIT_S = 60.0
ANSWER_LIMIT_S = 30.0
WIDTH, HEIGHT = 1280, 900
KEYS = {"Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r")}
"""Name -> code, Windows' virtual key code and text, as the protocol wants them."""


class Page:
    """A tab. ``requests``: every URL that it has asked for. ``problems``: errors of its script, and what its
    Content-Security-Policy has refused."""

    def __init__(self, connection: ClientConnection) -> None:
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._connection = connection
        self._number = 0
        for domain in ("Page", "Network", "Runtime", "Log", "Accessibility"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=1, mobile=False)

    def call(self, method: str, **parameters: Any) -> Any:
        """A command of the protocol; its result."""
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._connection.recv(timeout=ANSWER_LIMIT_S))
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self._note(message)

    def open(self, url: str) -> None:
        """Go there; returns once the page's script has run."""
        self.call("Page.navigate", url=url)
        wait_for(lambda: self.run("location.href + document.readyState") == f"{url}complete", f"{url} in the browser")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; of a promise, what it becomes."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        """The text of the first element."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def table(self, selector: str) -> list[list[str]]:
        """The cells of a table, row by row, its head first."""
        rows = f"[...document.querySelectorAll({json.dumps(selector + ' tr')})]"
        cells: list[list[str]] = self.run(f"{rows}.map((row) => [...row.cells].map((cell) => cell.textContent))")
        return cells

    def press(self, key: str) -> None:
        """A key of ``KEYS``, as a person presses it."""
        code, number, text = KEYS[key]
        more = {"text": text} if text else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code, windowsVirtualKeyCode=number, **more)

    def focused(self) -> str:
        """The id of the element that has the keyboard, or its text."""
        return str(self.run("document.activeElement.id || document.activeElement.textContent.trim()"))

    def prefer(self, **features: str) -> None:
        """What the person prefers: ``prefers_reduced_motion="reduce"`` and so on."""
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=listed)

    def screenshot(self, path: Path, selector: str = "body") -> None:
        """A PNG of the first such element, whole."""
        box = self.run(
            f"(({{x, y, width, height}}) => ({{x: x + scrollX, y: y + scrollY, width, height}}))"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=box | {"scale": 1})
        path.write_bytes(base64.b64decode(shot["data"]))

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        match message["method"]:
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            case "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                self.problems.append(details.get("exception", {}).get("description", details["text"]))
            case "Log.entryAdded" if parameters["entry"]["source"] == "security":
                self.problems.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")


@contextmanager
def browser_page() -> Iterator[Page]:
    """A new browser with one empty tab. AssertionError, with how to install one, where there is no browser."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    assert program, MISSING
    with tempfile.TemporaryDirectory(prefix="chromium-") as folder:
        options = ["--headless", "--remote-debugging-port=0", f"--user-data-dir={folder}", "--disable-gpu"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")  # Chromium's sandbox refuses root
        command = [program, *options, "about:blank"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
            try:
                yield from _tab(process, Path(folder) / "DevToolsActivePort")
            finally:
                os.killpg(process.pid, signal.SIGTERM)  # Debian's program is a script that starts the browser
                process.wait(ANSWER_LIMIT_S)


def _tab(process: subprocess.Popen[bytes], port_file: Path) -> Iterator[Page]:
    def port() -> str:
        assert process.poll() is None, f"the browser ended with {process.returncode}"
        return port_file.read_text().partition("\n")[0] if port_file.exists() else ""

    number = wait_for(port, "the browser's DevTools port", START_LIMIT_S)
    tabs = httpx.get(f"http://127.0.0.1:{number}/json/list", timeout=ANSWER_LIMIT_S).json()
    address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
    # Events come while nobody reads: they must neither stop the connection nor count as its end.
    with connect(address, max_size=None, max_queue=None, ping_interval=None) as connection:
        yield Page(connection)
