"""A rank that dies, stops, hangs or never comes ends the other with that reason, soon; nothing is left behind."""

from __future__ import annotations

import re
import signal
import sys
import time
import uuid
from pathlib import Path

import pytest
from runs import MARKER, end_of, environment, marked, started

from disagg_tt.launch import RankBinding, default_binding, run_job

DEADLINE = 3.0  # seconds that the ranks may wait for each other
NOTICED = 60.0  # seconds until the job has ended: the deadline or zmq's heartbeats (8), or ttnn's handshake (10), and slack
LONG = ["--prompt", "Hello!", "--ignore-eos", "--max-new-tokens", "2000", "--json"]

# Who tells it first: the launcher, or the rank that waited for the other, in its own words or the emulator's.
KILLED = r"SIGKILL|has ended \(its process was killed"
FAULTS = {
    "decode:decode:dies": f"{KILLED}|decode rank (died|is gone)",
    "prefill:prefill:dies": f"{KILLED}|prefill rank (died|is gone)",
    "decode:stream:dies": f"{KILLED}|decode rank (died|is gone)",
    "decode:decode:stops": "decode rank (died or hangs|is gone)|from the decode rank within",
    "prefill:prefill:stops": "prefill rank (died or hangs|is gone)|from the prefill rank within",
    "decode:stream:stops": "waited 3 s for the (first token|K/V) of request 0",
    "decode:decode:hangs": "waited 3 s for a decode step|from the decode rank within 3 s",
    "decode:stream:hangs": "waited 3 s for the (first token|K/V) of request 0",
    "prefill:socket:hangs": "timed out trying to establish a socket connection",
    "decode:socket:hangs": "timed out trying to establish a socket connection",
    "decode:start:dies": "SIGKILL",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_one_rank_ends_the_job_with_its_reason(fault, monkeypatch):
    monkeypatch.setattr("disagg_tt.launch._FAILED_SECONDS", 2.0)  # a rank that stopped will not end by itself
    events: list[dict] = []
    mark = uuid.uuid4().hex
    began = time.monotonic()
    program = [sys.executable, str(Path(__file__).with_name("faulty.py"))]
    code = run_job(
        [fault, "generate", *LONG, "--deadline-s", str(DEADLINE)],
        RankBinding.load(default_binding()),
        "emulator",
        {**environment(), MARKER: mark},
        events.append,
        program=program,
        deadline=NOTICED,
    )
    reasons = [event["reason"] for event in events if event["event"] == "failed"]
    assert code not in (0, 2), reasons
    assert reasons
    assert re.search(FAULTS[fault], reasons[0]), reasons
    assert time.monotonic() - began < NOTICED
    assert [pid for pid, _ in marked(mark)] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_signal_during_a_run_leaves_nothing(number):
    command = [sys.executable, "-m", "disagg_tt", "generate", *LONG[:-1]]
    with started(command, environment()) as running:
        assert running.process.stdout is not None
        assert running.process.stdout.read(1)  # it answers
        assert len(running.left()) >= 3  # the launcher and two ranks
        running.process.send_signal(number)
        result = end_of(running)
    assert result.code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], result.err
    assert result.left == []
    assert "Traceback" not in result.err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_from_outside_ends_the_command(rank):
    command = [sys.executable, "-m", "disagg_tt", "generate", *LONG[:-1]]
    with started(command, environment()) as running:
        assert running.process.stdout is not None
        assert running.process.stdout.read(1)
        running.kill(rank)
        result = end_of(running)
    assert result.code == 1, result.err
    assert result.left == []
    assert "disagg-tt: " in result.err
    assert "Traceback" not in result.err
