"""Our side of a comparison: whole jobs of `disagg-tt generate`, started as a user starts them.

What is measured comes from the program itself: the perf log of each answer, and the trace's spans.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disagg_tt.device import kind
from disagg_tt.errors import DisaggError, InputError
from disagg_tt.launch import RankBinding, default_binding, run_job
from disagg_tt.prompt import Tokenizer

PATIENCE_S = 600  # a layer of a wide model takes its time; a benchmark is watched by whoever started it
WORDS = ("the", "and", "of", "to", "in", "is", "it", "on", "was", "for", "a", "not", "he", "she", "we")


class JobError(DisaggError):
    """A job of a benchmark failed; the message is the job's."""


@dataclass
class Job:
    """What came out of one job: its answers, each with its perf log, and its trace events."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    spans: list[dict[str, Any]] = field(default_factory=list)

    def perf(self, key: str) -> list[float]:
        """Return one figure of every answer's perf log, in the order of the prompts."""
        return [answer["perf"][key] for answer in self.answers]

    def decode_rates(self, batch: int) -> list[float]:
        """Return tokens/s of each whole batch decoded: wall time from its first step's start to its last one's end.

        That includes what comes between the steps: sampling, text and events of `batch` slots.
        """
        steps = [s for s in self.spans if s["name"] == "decode step" and s["args"]["slots"] == batch]
        each = len(self.answers[0]["tokens"]) - 1  # the first token is the prefill's
        rates = []
        for first in range(0, len(steps) - each + 1, each):
            group = steps[first : first + each]
            wall_us = group[-1]["ts"] + group[-1]["dur"] - group[0]["ts"]
            rates.append(batch * each / wall_us * 1e6)
        return rates


@dataclass(frozen=True)
class Place:
    """Where our side runs: two ranks or one mesh, with `threads` torch threads in each process.

    `program` is the module that the ranks run, with `env` set (see deep.py), and `flags` are those of every job.
    """

    model: Path
    threads: int
    single_mesh: bool = False
    program: str = "disagg_tt"
    env: tuple[tuple[str, str], ...] = ()
    flags: tuple[str, ...] = ()

    def run(self, prompts: Sequence[str], *flags: str) -> Job:
        """Answer `prompts`, raw and past any end of text, with `generate`'s `flags`; raises JobError when it fails."""
        with tempfile.TemporaryDirectory(prefix="disagg-tt-bench-") as folder:
            file = Path(folder) / "prompts.jsonl"
            file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
            words = [
                "generate",
                "--model",
                str(self.model),
                "--prompts-file",
                str(file),
                "--raw",
                "--ignore-eos",
            ]
            words += ["--threads", str(self.threads), "--deadline-s", str(PATIENCE_S), *self.flags, *flags]
            env = {"TT_METAL_OPERATION_TIMEOUT_SECONDS": str(PATIENCE_S), **dict(self.env)}
            trace = Path(folder) / "trace.json"
            return (_one_mesh if self.single_mesh else _two_ranks)(self.program, words, env, trace)


def _two_ranks(program: str, words: list[str], env: dict[str, str], trace: Path) -> Job:
    job, failures, said = Job(), [], io.StringIO()

    def take(event: dict[str, Any]) -> None:
        if event["event"] == "answers":
            job.answers += event["answers"]
        elif event["event"] == "trace":
            job.spans += event["events"]
        elif event["event"] == "failed":
            failures.append(event["reason"])

    ranks = (sys.executable, "-m", program)
    with redirect_stderr(said):
        code = run_job([*words, "--trace", str(trace)], binding(), kind, env, take, program=ranks)
    if code or not job.answers:
        raise JobError(f"a job of two ranks failed: {'; '.join(failures)}\n{said.getvalue()[-2000:]}")
    job.spans = [s for s in job.spans if s["ph"] == "X"]
    return job


def _one_mesh(program: str, words: list[str], env: dict[str, str], trace: Path) -> Job:
    command = [sys.executable, "-m", program, *words, "--single-mesh", "--json", "--trace", str(trace)]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    if done.returncode:
        raise JobError(f"a job on one mesh failed: {done.stderr[-2000:]}")
    spans = json.loads(trace.read_text())["traceEvents"]
    return Job([json.loads(x) for x in done.stdout.splitlines()], [s for s in spans if s["ph"] == "X"])


def binding() -> RankBinding:
    """Return the rank binding that all jobs use: two N300."""
    return RankBinding.load(default_binding())


def prompts_of(tokenizer: Tokenizer, tokens: int, count: int = 1) -> list[str]:
    """Return `count` different texts of exactly `tokens` tokens each, what the tokenizer puts in front included."""
    words = [f" {w}" for w in WORDS if _grow_by_one(tokenizer, f" {w}")]
    empty = len(tokenizer.encode(""))
    texts = []
    for number in range(count):
        chosen = [words[(number + place * (1 + number // 5)) % len(words)] for place in range(tokens - empty)]
        text = "".join(chosen) if words else ""
        if len(tokenizer.encode(text)) != tokens:
            raise InputError(
                f"no prompt of {tokens} tokens can be made of this tokenizer's words; use another --model"
            )
        texts.append(text)
    return texts


def _grow_by_one(tokenizer: Tokenizer, word: str) -> bool:
    return [len(tokenizer.encode(word * n)) - len(tokenizer.encode("")) for n in (1, 2, 3)] == [1, 2, 3]
