"""`disagg-tt serve`, `proxy` and `worker` as the processes that a user starts, and what must be true when they end."""

from __future__ import annotations

import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
from runs import Running, environment, marked, started

MODEL = "disagg-tt-tiny"
BOUND = 240.0  # seconds: far above what anything here takes on a loaded machine, below a hang


class Log:
    """The lines that a process writes to stderr, read by a thread so that it never waits for us."""

    def __init__(self, running: Running):
        self.lines: list[str] = []
        self._came = threading.Condition()
        self._ended = False
        self._process = running.process
        self._threads = [
            threading.Thread(target=self._read, args=(pipe,), daemon=True)
            for pipe in (running.process.stdout, running.process.stderr)
        ]
        for thread in self._threads:
            thread.start()

    def _read(self, pipe: Any) -> None:
        for line in pipe:
            with self._came:
                self.lines.append(line.rstrip())
                self._came.notify_all()
        with self._came:
            self._ended = True
            self._came.notify_all()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, after: int = 0) -> re.Match[str]:
        """Return the first match in a line from number `after` on, waiting for it."""

        def found() -> re.Match[str] | None:
            return next(filter(None, (re.search(pattern, line) for line in self.lines[after:])), None)

        with self._came:
            self._came.wait_for(lambda: found() or self._ended, BOUND)
            match = found()
        assert match, f"no line has {pattern!r}:\n{self.text}"
        return match

    def join(self) -> None:
        for thread in self._threads:
            thread.join(BOUND)


def until(condition: Callable[[], Any], what: str, bound: float = BOUND) -> Any:
    """Return what `condition` gives once it is true; look often."""
    end = time.monotonic() + bound
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {bound:g} s"
        time.sleep(0.02)
    return value


class Deployed:
    """A command of disagg-tt that runs: its processes and its log."""

    def __init__(self, running: Running, folder: Path):
        self.running, self.folder = running, folder
        self.log = Log(running)
        self._mpi_folders: set[str] = set()

    def note_folders(self) -> None:
        """Remember where the ranks' MPI keeps its files, to see that they go."""
        for _, variables in marked(self.running.mark):
            for variable in variables:
                if variable.startswith(b"OMPI_MCA_btl_sm_backing_directory="):
                    self._mpi_folders.add(variable.partition(b"=")[2].decode())

    def rank_pid(self, rank: int) -> int:
        """The process of a rank of its job."""

        def pid() -> int | None:
            wanted = f"OMPI_COMM_WORLD_RANK={rank}".encode()
            return next((pid for pid, env in marked(self.running.mark) if wanted in env), None)

        return until(pid, f"rank {rank}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it, and check that nothing of it is left; return its exit code."""
        self.note_folders()
        self.running.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        code = self.running.process.wait(BOUND)
        left = self.running.left()
        self.log.join()
        assert left == [], self.log.text
        assert [folder for folder in self._mpi_folders if Path(folder).exists()] == []
        assert [path.name for path in self.folder.iterdir()] == []
        return code


class Server(Deployed):
    """One that serves HTTP."""

    def __init__(self, running: Running, folder: Path):
        super().__init__(running, folder)
        match = self.log.wait_for(r"HTTP at http://127\.0\.0\.1:(\d+) .* workers at (\S+)")
        self.port, self.hub = int(match[1]), match[2]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=BOUND)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=BOUND)

    def get(self, path: str) -> Any:
        return self.http.get(path).json()

    def health(self) -> dict[str, Any]:
        return self.get("/health")

    def ready(self, prefill: int, decode: int) -> Server:
        """Wait until it has these workers."""
        wanted = {"prefill": prefill, "decode": decode}
        until(lambda: self.health()["workers"] == wanted, f"workers {wanted}")
        self.note_folders()
        return self

    def mode(self, mode: str) -> None:
        assert self.http.post(f"/mode/{mode}").status_code == 200

    def busy(self) -> list[str]:
        """What is not idle: requests, and workers that hold a slot or a block or have somebody waiting."""
        state = self.get("/state")
        busy = [f"request {request}" for request in state["requests"]]
        for worker in state["workers"]:
            if any(worker[name] for name in ("running", "waiting", "slots_used", "blocks_used")):
                busy.append(f"worker {worker}")
        return busy

    def at_rest(self) -> None:
        """Wait until nothing is in flight, and no slot or block in use on any worker."""
        end = time.monotonic() + BOUND
        while busy := self.busy():
            assert time.monotonic() < end, busy
            time.sleep(0.05)

    def close(self) -> None:
        self.http.close()
        self.openai.close()

    def wait(self) -> int:
        self.close()
        code = super().wait()
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", self.port)) != 0
        return code


@contextmanager
def command(kind: type[Deployed], *words: str, **env: str) -> Iterator[Any]:
    """Run `disagg-tt` with these words as a `kind`; whatever is left at the end is killed."""
    with ExitStack() as closing:
        folder = closing.enter_context(tempfile.TemporaryDirectory(prefix="served-"))
        surroundings = environment(TMPDIR=folder, **env)
        words = (sys.executable, "-m", "disagg_tt", *words)
        yield kind(closing.enter_context(started([*words], surroundings)), Path(folder))


@contextmanager
def served(
    *flags: str, prefill: int = 1, decode: int = 1, number: int = signal.SIGTERM, **env: str
) -> Iterator[Server]:
    """Run `disagg-tt serve` with its ranks; end it with the signal `number` and check that it went well."""
    with command(Server, "serve", "--port", "0", "--threads", "1", *flags, **env) as server:
        yield server.ready(prefill, decode)
        assert server.stop(number) == 0, server.log.text
        assert "Traceback" not in server.log.text
