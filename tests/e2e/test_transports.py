"""Every transport gives the same tokens; two programs find, check and miss each other as two ranks do."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from runs import Result, Running, cli, end_of, environment, run, started, tokens_here, two_ranks

PROMPTS = ("What is the capital of France?", "Hello there! " * 12)
FLAGS = ["--max-new-tokens", "12", *(word for prompt in PROMPTS for word in ("--prompt", prompt))]


@cache
def expected(kv_dtype: str) -> list[list[int]]:
    return tokens_here(prompts=PROMPTS, max_new_tokens=12, kv_dtype=kv_dtype, single_mesh=True)


@pytest.mark.parametrize(
    ("transport", "kv_dtype", "overlap"),
    [
        ("mpi", "bfloat8_b", "inline"),
        ("tcp", "bfloat16", "after"),
        ("nixl", "bfloat8_b", "inline"),
        ("torch", "bfloat16", "inline"),
    ],
)
def test_two_ranks_give_the_tokens_of_one_mesh(transport, kv_dtype, overlap):
    if transport == "nixl":
        pytest.importorskip("nixl")
    done = two_ranks("--transport", transport, "--kv-dtype", kv_dtype, "--overlap", overlap, *FLAGS)
    answers = done.answers()
    assert [answer["tokens"] for answer in answers] == expected(kv_dtype)
    assert done.left == []
    for answer in answers:
        perf = answer["perf"]
        assert perf["kv_bytes"] == perf["kv_bytes_sent"] > 0
        assert perf["hidden_ms"] + perf["exposed_ms"] == pytest.approx(perf["transfer_ms"])


def test_local_is_one_mesh():
    assert tokens_here(prompts=PROMPTS, max_new_tokens=12, transport="local") == expected("bfloat8_b")


def free_port() -> int:
    """A port that is free, and the next one too."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return int(port)


def config(role: str, port: int, connector: str = "tcp", **extra: Any) -> list[str]:
    values = {"kv_connector": connector, "kv_role": f"kv_{role}", "kv_ip": "127.0.0.1", "kv_port": port}
    if extra:
        values["kv_connector_extra_config"] = extra
    return ["--kv-transfer-config", json.dumps(values)]


MPICH = Path(sys.prefix) / "mpich"  # as make test installs it


@contextmanager
def program(*words: str, connector: str = "tcp", **env: str) -> Iterator[Running]:
    command = [sys.executable, "-m", "disagg_tt", "generate", *words]
    if connector == "mpi":
        command = [str(MPICH / "bin/mpiexec"), "-n", "1", *command]
        env["MPI4PY_LIBMPI"] = str(MPICH / "lib/libmpi.so.12")
    with started(command, environment(**env)) as running:
        yield running


def two_programs(
    consumer: list[str], producer: list[str], connector: str = "tcp", tokens: tuple[str, str] = ("", "")
) -> tuple[Result, Result]:
    """Run both programs to their ends: (decode, prefill)."""
    port = free_port()
    ours, theirs = ({"DISAGG_TT_TOKEN": token, "connector": connector} for token in tokens)
    with (
        program(*consumer, *config("consumer", port, connector), **ours) as decode,
        program(*producer, *config("producer", port, connector), **theirs) as prefill,
    ):
        return end_of(decode), end_of(prefill)


@pytest.mark.parametrize(
    ("connector", "kv_dtype"), [("tcp", "bfloat8_b"), ("nixl", "bfloat16"), ("mpi", "bfloat8_b")]
)
def test_two_programs_give_the_tokens_of_one_mesh_and_the_prefill_program_prints(connector, kv_dtype):
    if connector == "nixl":
        pytest.importorskip("nixl")
    if connector == "mpi" and not MPICH.exists():
        pytest.skip(f"no MPICH in {MPICH}")
    settings = ["--kv-dtype", kv_dtype]
    decode, prefill = two_programs(
        settings, ["--json", *settings, *FLAGS], connector, tokens=("secret", "secret")
    )
    assert prefill.tokens() == expected(kv_dtype)
    assert (decode.code, decode.out, decode.left, prefill.left) == (0, "", [], [])


@pytest.mark.parametrize(
    ("settings", "tokens", "reason"),
    [
        ([], ("a", "b"), "token"),
        (["--kv-dtype", "bfloat16"], ("", ""), "different settings"),
    ],
    ids=["token", "settings"],
)
def test_programs_that_differ_both_end_with_the_reason(settings, tokens, reason):
    for result in two_programs(settings, FLAGS, tokens=tokens):
        assert (result.code, result.left) == (1, []), result.err
        assert re.search(reason, result.err), result.err
        assert "Traceback" not in result.err
        assert result.out == ""


@pytest.mark.parametrize(
    ("role", "reason"),
    [
        ("consumer", "the prefill rank did not connect its control channel within 1 s"),
        ("producer", "nothing came from the decode rank within 1 s"),
    ],
)
def test_a_program_whose_peer_never_comes_says_so(role, reason):
    result = cli("generate", "--deadline-s", "1", *config(role, free_port()))
    assert (result.code, result.left) == (1, [])
    assert reason in result.err


FAKE_SSH = """#!/bin/sh
host=$1; shift
exec /bin/sh -c "$*"
"""


def test_ranks_on_the_hosts_of_a_hostfile_give_the_tokens_of_one_mesh(tmp_path):
    """The second host is this machine too, reached by a program in ssh's place: mpirun starts a daemon of its own there."""
    file, ssh = tmp_path / "hosts", tmp_path / "ssh"
    file.write_text("localhost slots=1\nother slots=1\n")
    ssh.write_text(FAKE_SSH)
    ssh.chmod(0o700)
    own: list[str] = []
    for name, value in (
        ("plm_ssh_agent", ssh),
        *((f"prte_{n}_tmpdir_base", tmp_path / n) for n in ("local", "remote")),
    ):
        own += ["--prtemca", name, str(value)]
    mpirun = [
        str(Path(sys.executable).parent / "mpirun"),
        "--hostfile",
        str(file),
        *own,
        "-x",
        "DISAGG_TT_DEVICE",
    ]
    generate = [sys.executable, "-m", "disagg_tt", "generate", "--transport", "mpi", "--json", *FLAGS]
    done = run([*mpirun, "-x", "PYTHONPATH", "-n", "2", *generate])
    assert done.tokens() == expected("bfloat8_b")
    assert done.left == []


@pytest.mark.parametrize("killed", ["consumer", "producer"])
def test_a_killed_program_ends_the_other_with_a_reason(killed):
    port = free_port()
    endless = ["--ignore-eos", "--max-new-tokens", "1900"]
    with (
        program(*endless, *config("consumer", port)) as decode,
        program(*endless, *config("producer", port)) as prefill,
    ):
        assert prefill.process.stderr is not None
        for line in prefill.process.stderr:  # it says its first token when K and V are on their way
            if "first token" in line:
                break
        victim, other = (decode, prefill) if killed == "consumer" else (prefill, decode)
        os.kill(victim.process.pid, signal.SIGKILL)
        result = end_of(other, 30)
    assert (result.code, result.left) == (1, []), result.err
    assert re.search("is gone|died or hangs", result.err), result.err
    assert "Traceback" not in result.err
