"""A real headless Chromium, driven over its DevTools protocol: viewports of any width, print, dark mode.

Its own windows are at least 500 pixels wide; the protocol's device metrics are not.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")


class Browser:
    """One page of a running Chromium.

    Args:
        commands: What it reads, file descriptor 3 of its process.
        answers: What it writes, file descriptor 4: JSON that ends with a zero byte.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._number, self._rest, self._session = 0, b"", ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.ask("Page.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        self._number += 1
        request = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            request["sessionId"] = self._session
        os.write(self._commands, json.dumps(request).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == self._number:
                assert "error" not in message, (method, message)
                result: dict[str, Any] = message["result"]
                return result

    def open(self, page: Path, width: int, height: int = 800, dark: bool = False) -> None:
        """Show a file in a viewport of this size, to its end."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", features=scheme)
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression, or of the promise that it gives."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key, such as Tab (9)."""
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, whole: bool = False) -> bytes:
        """A PNG of the viewport, or of the `whole` page."""
        return base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def pdf(self) -> bytes:
        """The page in print, with the paper that it asks for."""
        return base64.b64decode(self.ask("Page.printToPDF", preferCSSPageSize=True, printBackground=False)["data"])

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            found = os.read(self._answers, 1 << 20)
            assert found, "chromium has ended"
            self._rest += found
        first, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A Chromium with an empty `profile` folder; ends with the block."""
    assert CHROMIUM is not None
    commands, answers = os.pipe(), os.pipe()

    def give_descriptors() -> None:
        # by way of higher ones, as a pipe may be 3 or 4 itself
        os.dup2(os.dup2(commands[0], 100), 3)
        os.dup2(os.dup2(answers[1], 101), 4)

    words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        [CHROMIUM, *words, f"--user-data-dir={profile}"],
        preexec_fn=give_descriptors,  # the only way to give a process descriptors 3 and 4
        close_fds=False,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands[0])
    os.close(answers[1])
    try:
        yield Browser(commands[1], answers[0])
    finally:
        os.close(commands[1])
        os.close(answers[0])
        process.kill()
        process.wait()


def pages_of(pdf: bytes) -> int:
    """How many pages a PDF has, its compressed object streams read too."""
    found = [pdf]
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL):
        try:
            found.append(zlib.decompress(stream))
        except zlib.error:
            continue
    return sum(len(re.findall(rb"/Type\s*/Page\b(?!s)", part)) for part in found)
