"""What can go wrong between two hosts: both ends say so in time, nothing counts as received, and the next stream works."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import wire_child
import wire_ends
from wire_ends import CASES, PLAN, begun, outcome, pair, receive, run_ends, send, values

from disagg_tt.errors import DisaggError, PeerError, StreamError
from disagg_tt.kv_stream.frame import DESCRIPTOR, Header, Kind
from disagg_tt.kv_stream.host_wire import Plan
from disagg_tt.kv_stream.tcp import MOST_UNPROVEN, TcpReceiver, TcpSender
from disagg_tt.mpirun import job_folder, mpi_environment, mpirun_command

SOON_S = 0.4  # the deadline where the test waits for it
LATE_S = 10.0  # a loaded machine's delay
KINDS = ("tcp", "nixl")
mpich = pytest.mark.skipif(not wire_ends.MPICH.exists(), reason=f"no MPICH in {wire_ends.MPICH}")
CHILD = Path(__file__).with_name("wire_child.py")


@pytest.fixture(autouse=True)
def _nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """No file or connection stays open when a test has ended."""
    if "nixl" in request.node.name or "gloo" in request.node.name:  # they keep some for the process
        yield
        return
    before = open_files()
    yield
    gc.collect()
    assert open_files() <= before


def open_files() -> set[str]:
    """The names that the kernel has for this process's open files and connections."""
    folder = Path("/proc/self/fd")
    return {str(f.readlink()) for f in folder.iterdir() if f.is_symlink()} - {f"/proc/{os.getpid()}/fd"}


def check_released(end: Any) -> None:
    """The end is closed with nothing registered, and a fresh pair can stream, on the same port if it had one."""
    end.close()
    if hasattr(end, "memory"):
        assert not end.memory.registered and end.memory.agent is None
    if hasattr(end, "port"):
        with socket.create_server(("127.0.0.1", end.port)):
            pass


def check_next(kind: str) -> None:
    case = CASES["contiguous to paged"]
    assert run_ends(*pair(kind), case.prefill, case.decode) == ("ok", "ok")


def begun_pair(kind: str, **own: Any) -> tuple[Any, Any, torch.Tensor]:
    """Two ends that have agreed on PLAN, and the receiver's memory, zeros."""
    prefill, decode = pair(kind, **own)
    memory = torch.zeros(PLAN.layers, PLAN.layer_bytes, dtype=torch.uint8)

    def receiving(end: Any) -> None:
        end.register([memory.view(-1)])
        end.begin(PLAN)

    def sending(end: Any) -> None:
        end.kept = begun(end)

    stay = [end.close for end in (prefill, decode)]
    prefill.close = decode.close = lambda: None
    assert run_ends(prefill, decode, sending, receiving) == ("ok", "ok")
    prefill.close, decode.close = stay
    return prefill, decode, memory


@pytest.mark.parametrize("kind", ["tcp", "nixl", "gloo"])
@pytest.mark.parametrize("side", [0, 1], ids=["decode absent", "prefill absent"])
def test_an_absent_peer_is_an_error_at_the_deadline(kind, side):
    ends = pair(kind, deadline_s=SOON_S)
    ends[1 - side].close()
    started = time.monotonic()
    with pytest.raises(PeerError, match=f"within {SOON_S:g} s"):
        ends[side].begin(PLAN)
    assert SOON_S / 2 < time.monotonic() - started < LATE_S
    check_released(ends[side])
    check_next(kind)


HEADER = Header(Kind.LAYER, PLAN.request, 0, PLAN.layer_bytes).encode()
SAID = {
    "half a header": (HEADER[:20], r"PeerError: .*closed the connection"),
    "half a layer": (HEADER + b"x" * 1000, r"PeerError: .*closed the connection while receiving layer 0"),
    "wrong magic": (b"HTTP" + HEADER[4:], r"StreamError: .*begins with b'HTTP'"),
    "wrong version": (HEADER[:4] + b"\0\x09" + HEADER[6:], r"StreamError: .*protocol version 9"),
    "unknown kind": (HEADER[:6] + b"\xff\xff" + HEADER[8:], r"StreamError: .*kind 65535"),
    "another size": (
        Header(Kind.LAYER, PLAN.request, 0, PLAN.layer_bytes + 1).encode(), r"StreamError: .*24,025 bytes came.*24,024 bytes is due"
    ),
    "an absurd layer": (Header(Kind.LAYER, PLAN.request, 0, 2**63).encode(), r"StreamError: .*9,223,372,036,854,775,808 bytes came"),
    "an absurd reason": (Header(Kind.FAILED, length=2**62).encode(), r"StreamError: .*allowed: at most 1,024"),
    "another request": (Header(Kind.LAYER, 8, 0, PLAN.layer_bytes).encode(), r"StreamError: .*of request 8"),
    "another frame": (Header(Kind.TAKEN).encode(), r"StreamError: .*sent a TAKEN frame; LAYER is due"),
    "a reason": (Header(Kind.FAILED, length=4).encode() + b"fire", r"PeerError: .*prefill end failed: fire"),
}  # fmt: skip


@pytest.mark.parametrize("what", SAID)
def test_what_a_sender_may_not_say(what):
    said, expected = SAID[what]
    prefill, decode, memory = begun_pair("tcp")
    prefill._channel._socket.sendall(said)
    if "half" in what:
        prefill._channel._socket.shutdown(socket.SHUT_WR)
    tracemalloc.start()
    assert_raises(lambda: decode.receive(0, [memory[0]]), expected)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20, "memory for an announced length"
    tracemalloc.stop()
    with pytest.raises(StreamError, match="this end has failed"):
        decode.finish()
    decode.close()
    assert outcome(send_rest, prefill).startswith("PeerError")  # told, or at least left
    check_released(prefill)
    check_released(decode)
    check_next("tcp")


def send_rest(end: Any) -> None:
    for number, layer in enumerate(end.kept):
        end.send(number, [layer])
    end.finish()


def assert_raises(call: Any, expected: str) -> None:
    with pytest.raises(DisaggError, match=expected.partition(": ")[2]) as raised:
        call()
    assert type(raised.value).__name__ == expected.partition(": ")[0]


def readable(*extents: tuple[int, int]) -> bytes:
    where = b"".join(DESCRIPTOR.pack(*extent) for extent in extents)
    return Header(Kind.READABLE, PLAN.request, 0, len(where)).encode() + where


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (readable((1 << 20, PLAN.layer_bytes - 1)), r"StreamError: .*the plan says 24,024"),
        (readable((0, PLAN.layer_bytes)), r"StreamError: .*no address 0"),
        (readable((4096, PLAN.layer_bytes)), r"(StreamError|PeerError): .*nixl"),
        (Header(Kind.READABLE, PLAN.request, 0, 15).encode() + bytes(15), r"StreamError: .*15 bytes of descriptors"),
        (Header(Kind.READABLE, PLAN.request, 0, 1 << 30).encode(), r"StreamError: .*allowed: at most 1,048,576"),
    ],
    ids=["nixl sum", "nixl null", "nixl not registered", "nixl half", "nixl absurd"],
)  # fmt: skip
def test_where_a_sender_may_not_say_a_layer_lies(said, expected):
    prefill, decode, memory = begun_pair("nixl")
    prefill._channel._socket.sendall(said)
    with pytest.raises((StreamError, PeerError), match=expected.partition(": ")[2]):
        decode.receive(0, [memory[0]])
    assert not memory.any()
    assert outcome(send_rest, prefill).startswith("PeerError")
    check_released(prefill)
    check_released(decode)


def test_nixl_metadata_that_is_none_is_refused():
    prefill, decode = pair("nixl")
    agent = prefill.memory.agent
    prefill.memory.agent = type("Agent", (), {"get_agent_metadata": lambda self: b"\xff" * 100})()
    ended = run_ends(prefill, decode, lambda end: end.begin(PLAN), receive)
    assert ended[0].startswith("PeerError") and ended[1].startswith("StreamError: nixl: the metadata"), ended
    del agent


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_token_is_refused_on_both_sides(kind):
    prefill, decode = pair(kind, token="right", deadline_s=2.0)
    prefill._token = "wrong"
    ended = run_ends(prefill, decode, lambda end: end.begin(PLAN), lambda end: end.begin(PLAN))
    assert ended[0].startswith("PeerError") and "does not know the token" in ended[0]
    assert ended[1].startswith("StreamError") and "does not know the token" in ended[1]
    check_released(decode)


def test_a_receiver_that_does_not_know_the_token_gets_nothing():
    prefill, decode = pair("tcp", token="right", deadline_s=LATE_S)
    decode._check = lambda channel, nonce: channel.put(Header(Kind.PROOF, length=32), bytes(32))
    ended = run_ends(prefill, decode, send, receive)
    assert ended[0].startswith("StreamError: tcp: the decode end does not know the token")
    assert not ended[1].startswith("ok")


def strangers(port: int) -> list[socket.socket]:
    """All kinds of visitors, some of whom stay."""
    found = []
    for said in (
        b"",
        b"GET / HTTP/1.1\r\nHost: a-host-with-a-name\r\n\r\n",
        bytes(1000),
        b"DTKV",
        b"\x16\x03\x01",
    ):
        visitor = socket.create_connection(("127.0.0.1", port))
        visitor.sendall(said)
        found.append(visitor)
    scanner = socket.create_connection(("127.0.0.1", port))
    scanner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    scanner.close()  # with RST
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_strangers_do_not_take_the_senders_place(kind):
    prefill, decode = pair(kind, token="secret")
    visitors = strangers(decode.port)
    impostor = TcpSender("127.0.0.1", decode.port, token="guess", deadline_s=LATE_S)

    def send_after_them(end: Any) -> None:
        with pytest.raises(PeerError, match="does not know the token"):
            impostor.begin(PLAN)
        send(end)

    assert run_ends(prefill, decode, send_after_them, receive) == ("ok", "ok")
    impostor.close()
    for visitor in visitors:
        visitor.close()


def test_silent_strangers_are_dropped_when_they_are_too_many():
    prefill, decode = pair("tcp")
    with socket.create_connection(("127.0.0.1", decode.port)) as first:
        others = []

        def send_after_them(end: Any) -> None:
            for _ in range(MOST_UNPROVEN + 1):
                others.append(socket.create_connection(("127.0.0.1", decode.port)))
            send(end)

        assert run_ends(prefill, decode, send_after_them, receive) == ("ok", "ok")
        first.settimeout(LATE_S)
        while first.recv(4096):  # its challenge, then the end
            pass
    for other in others:
        other.close()


@pytest.mark.parametrize(("kind", "layer"), [("tcp", 0), ("tcp", 2), ("nixl", 2)])
@pytest.mark.parametrize("dies", ["prefill", "decode"])
def test_a_peer_killed_in_a_stream_is_noticed(kind, layer, dies):
    prefill, decode = pair(kind, deadline_s=wire_child.START_S)  # a loaded machine starts a process slowly
    stays = decode if dies == "prefill" else prefill
    port = str(decode.port)
    if dies == "decode":
        decode.close()
    command = [sys.executable, str(CHILD), dies, kind, port, str(layer)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin and child.stdout
    memory = values()
    stays.register([memory.view(-1)])

    def stream() -> None:
        stays.begin(PLAN)
        for number in range(PLAN.layers):
            if number == layer:
                assert child.stdout and child.stdout.readline().startswith("here ")
                child.send_signal(signal.SIGKILL)
                child.wait()
            if dies == "prefill":
                stays.receive(number, [memory[number]])
            else:
                stays.send(number, [memory[number]])
                stays.sent(number)
        stays.finish()

    with pytest.raises(PeerError, match=r"closed the connection|gone"):
        stream()
    child.stdin.close()
    child.stdout.close()
    check_released(stays)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@mpich
@pytest.mark.parametrize(("dies", "layer"), [("prefill", 0), ("prefill", 2), ("decode", 2)])
def test_an_mpi_program_whose_peer_is_killed_streams_with_the_next(dies, layer):
    stays = "decode" if dies == "prefill" else "prefill"
    command, env = wire_ends.mpich(str(CHILD))
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": env}
    with subprocess.Popen([*command, "survivor", stays], **pipes) as survivor:
        ended = []
        for until in (layer, PLAN.layers):
            port = free_port()
            print(port, file=survivor.stdin, flush=True)
            with subprocess.Popen([*command, dies, "mpi", str(port), str(until)], **pipes) as other:
                said, _, pid = other.stdout.readline().split()
                assert said == "here"
                if until == layer:
                    os.kill(int(pid), signal.SIGKILL)
                ended.append(survivor.stdout.readline().strip())
                other.stdin.close()
        survivor.stdin.close()
    assert re.match(r"PeerError: .*(closed the connection|gone)", ended[0]), ended
    assert ended[1] == "ok"
    assert survivor.returncode == 0


def test_mpi_between_programs_says_what_it_needs():
    """In a process of its own: MPI keeps files open."""
    program = "from disagg_tt.kv_stream.mpi_programs import MpiProgramReceiver as r; r()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "InputError: mpi between two programs needs MPICH and an mpiexec for each" in done.stderr
    assert "this program has Open MPI" in done.stderr and "PREFIX/bin/mpiexec -n 1" in done.stderr


def test_a_killed_rank_ends_the_mpi_job():
    command = mpirun_command([sys.executable, str(CHILD), "rank"], [{}, {}])
    with job_folder() as folder:
        env = mpi_environment(folder) | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode and "finished" not in done.stdout


def test_a_reader_that_does_not_read_ends_the_stream_at_the_deadline():
    prefill, decode = pair("tcp", deadline_s=SOON_S)
    plan = Plan(1, 64, 1 << 22)
    memory = torch.zeros(1 << 22, dtype=torch.uint8)

    def flood(end: Any) -> None:
        end.begin(plan)
        for number in range(plan.layers):
            end.send(number, [memory])

    def idle(end: Any) -> None:
        end.begin(plan)
        flooded.result(timeout=LATE_S)
        for number in range(plan.layers):
            end.receive(number, [memory])

    with ThreadPoolExecutor(2) as threads:
        flooded = threads.submit(outcome, flood, prefill)
        idles = threads.submit(outcome, idle, decode)
        assert f"did not move within {SOON_S} s" in flooded.result()
        assert idles.result().startswith("PeerError: tcp: the prefill end closed")  # in the middle of a layer


def test_nixl_takes_back_a_layer_that_nobody_reads():
    prefill, decode, memory = leased()
    started = time.monotonic()
    prefill.send(0, [prefill.kept[0]])
    with pytest.raises(PeerError, match="lease of 0.4 s .1 expired.; the memory is taken back"):
        prefill.sent(0)
    assert SOON_S / 2 < time.monotonic() - started < LATE_S
    assert prefill.expired_leases == 1 and not prefill.memory.registered
    prefill.close()
    with pytest.raises(PeerError, match="prefill end failed: .*taken back|disconnect|DISCONNECT"):
        decode.receive(0, [memory[0]])
    with pytest.raises(StreamError, match="has failed"):
        decode.finish()
    check_released(decode)
    check_next("nixl")


def leased() -> tuple[Any, Any, torch.Tensor]:
    prefill, decode, memory = begun_pair("nixl")
    prefill._lease_s = SOON_S
    return prefill, decode, memory


def test_a_sender_that_is_interrupted_in_a_layer_sends_nothing_more():
    """Else its reason would be taken for the layer's last bytes."""
    prefill, decode, memory = begun_pair("tcp")
    channel = prefill._channel
    as_it_is, sent = channel._socket, []

    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            return getattr(as_it_is, name)

        def sendmsg(self, views: list[memoryview]) -> int:
            if sent:
                raise KeyboardInterrupt
            sent.append(as_it_is.sendmsg([views[0], views[1][: PLAN.layer_bytes - 20]]))
            return sent[0]

    channel._socket = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        prefill.send(0, [prefill.kept[0]])
    prefill.close()
    with pytest.raises(PeerError, match="closed the connection while receiving layer 0"):
        decode.receive(0, [memory[0]])
    check_released(decode)


def test_a_receiver_listens_for_one_sender_only():
    prefill, decode, _ = begun_pair("tcp")
    with pytest.raises(PeerError, match="no receiver at"):
        TcpSender("127.0.0.1", decode.port, deadline_s=SOON_S).begin(PLAN)
    for end in (prefill, decode):
        check_released(end)
    assert isinstance(decode, TcpReceiver)
