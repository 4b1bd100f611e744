"""Headless Chromium, driven over its DevTools protocol through a pipe: no driver, no port, no package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DEADLINE_S = 60.0


class Browser:
    """One page of one browser."""

    def __init__(self, commands: int, replies: int):
        self._commands, self._replies, self._rest, self._id = commands, replies, b"", 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; what comes in between is of no interest here."""
        self._id += 1
        command = {"id": self._id, "method": method, "params": params}
        if self._session is not None:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        until = time.monotonic() + DEADLINE_S
        while True:
            message = self._receive(until)
            if message.get("id") == self._id:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._replies], [], [], max(until - time.monotonic(), 0))
            assert ready, f"Chromium said nothing for {DEADLINE_S} s"
            data = os.read(self._replies, 1 << 16)
            assert data, "Chromium ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def evaluate(self, script: str) -> Any:
        """The value of `script` in the page; of a promise, what it comes to."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, condition: str) -> Any:
        """Wait until `condition` is true in the page: it is asked again at each change of the document."""
        return self.evaluate(
            f"""new Promise((resolve, reject) => {{
                const look = () => {{ const value = {condition}; if (value) {{ watch.disconnect(); resolve(value); }} }};
                const watch = new MutationObserver(look);
                watch.observe(document, {{subtree: true, childList: true, characterData: true, attributes: true}});
                setTimeout(() => reject(new Error("never: " + {json.dumps(condition)})), {DEADLINE_S * 500});
                look();
            }})"""
        )

    def open(self, url: str) -> None:
        """Go to `url`; `until` then waits for what it shows."""
        self.call("Page.enable")
        self.call("Page.navigate", url=url)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, gone in the end with all its processes."""
    assert CHROMIUM is not None
    (command_read, command_write), (reply_read, reply_write) = os.pipe(), os.pipe()
    # Chromium reads commands from descriptor 3 and writes replies to 4
    arguments = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--window-size=1280,860",
        f"--user-data-dir={profile}", "--remote-debugging-pipe",
    ]  # fmt: skip
    shell = f'exec "$0" "$@" 3<&{command_read} 4>&{reply_write}'
    process = subprocess.Popen(
        ["bash", "-c", shell, CHROMIUM, *arguments],
        pass_fds=(command_read, reply_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(command_read)
    os.close(reply_write)
    try:
        yield Browser(command_write, reply_read)
    finally:
        os.close(command_write)  # it ends when nobody can command it any more
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
        os.close(reply_read)
