"""Running the program in tests: as the command that a user types, or in this process where two ranks are not the point."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg_tt.config import Options
from disagg_tt.core import Answer
from disagg_tt.rank import answer_here

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "disagg_tt" / "checkpoint"

BOUND = 120.0  # seconds: far above what a run takes (2), below a hang
MARKER = "DISAGG_TT_TEST_RUN"  # its value names the run in the environment of each of its processes
_LAUNCHING = re.compile("OMPI_|PMIX_|PRTE_|TT_MESH_|TT_VISIBLE|HF_MODEL$|PROMPT$")


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what a job or a user's shell may have left there, for the emulator."""
    kept = {name: value for name, value in os.environ.items() if not _LAUNCHING.match(name)}
    paths = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH", "")]))
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    own = {"DISAGG_TT_DEVICE": "emulator", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return kept | root | own | changes


@dataclass
class Running:
    """A command that was started, and the mark by which its processes are known."""

    process: subprocess.Popen[str]
    mark: str

    def left(self) -> list[int]:
        """Living processes of this run, the command itself included."""
        return [pid for pid, _ in marked(self.mark)]

    def kill(self, rank: int) -> None:
        """Kill a rank's process."""
        wanted = f"OMPI_COMM_WORLD_RANK={rank}".encode()
        for pid, variables in marked(self.mark):
            if wanted in variables:
                os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str
    left: list[int]  # processes that outlived it

    def answers(self) -> list[dict[str, Any]]:
        """The answers of a run with --json."""
        assert self.code == 0, self.err
        return [json.loads(line) for line in self.out.splitlines()]

    def tokens(self) -> list[list[int]]:
        return [answer["tokens"] for answer in self.answers()]

    def refused(self, *parts: str) -> None:
        """Assert that it ended as wrong input must: exit code 2, a message with all `parts`, nothing else, nobody left."""
        assert self.code == 2, self.err
        assert self.left == []
        assert "Traceback" not in self.err
        messages = [line for line in self.err.splitlines() if line.startswith("disagg-tt: ")]
        assert len(messages) == 1, self.err
        for part in parts:
            assert re.search(part, self.err), (part, self.err)
        assert self.out == ""


def marked(mark: str) -> Iterator[tuple[int, list[bytes]]]:
    """The living processes whose environment has the mark, with their environments."""
    wanted = f"{MARKER}={mark}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue  # it ended meanwhile, or belongs to somebody else
            if wanted in variables and state not in "ZX":
                yield int(entry.name), variables


@contextmanager
def started(command: list[str], env: Mapping[str, str]) -> Iterator[Running]:
    """Start a command in a session of its own; whatever is left of it at the end is killed."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        command,
        env={**env, MARKER: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    running = Running(process, mark)
    with process:
        try:
            yield running
        finally:
            for pid in running.left():
                os.kill(pid, signal.SIGKILL)


def end_of(running: Running, bound: float = BOUND) -> Result:
    """Wait for the command to end and say how it did."""
    out, err = running.process.communicate(timeout=bound)
    return Result(running.process.returncode, out, err, running.left())


def run(command: list[str], **env: str) -> Result:
    """Run a command to its end."""
    with started(command, environment(**env)) as running:
        return end_of(running)


def cli(*words: str, **env: str) -> Result:
    """Run `disagg-tt` with these words, to its end."""
    return run([sys.executable, "-m", "disagg_tt", *words], **env)


def two_ranks(*flags: str, **env: str) -> Result:
    """Run `disagg-tt generate --json` over two ranks, to its end."""
    return cli("generate", "--json", *flags, **env)


def here(**options: Any) -> list[Answer]:
    """Answer in this process: over two submeshes, or with single_mesh=True on one mesh."""
    return answer_here(Options(**options), lambda event: None)


def tokens_here(**options: Any) -> list[list[int]]:
    """The tokens of each answer of `here`."""
    return [answer.tokens for answer in here(**options)]


def prompts_file(folder: Path, prompts: list[Any]) -> str:
    """Write prompts, texts or lists of messages, to a --prompts-file and return its path."""
    entries = [{"prompt": p} if isinstance(p, str) else {"messages": p} for p in prompts]
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    return str(path)


def seeded(seed: int) -> random.Random:
    """A random source whose seed is printed, to be seen when a test fails."""
    print(f"seed {seed}")
    return random.Random(seed)
