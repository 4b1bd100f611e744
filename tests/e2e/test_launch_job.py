"""Jobs of two trivial ranks under mpirun: events arrive, exit codes are right, and no process outlives a job."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from disagg_tt import launch
from disagg_tt.errors import RankBindingError
from disagg_tt.launch import RankBinding, default_binding, run_job
from disagg_tt.report import MAX_EVENT_BYTES

BOUND = 60.0  # seconds: far above what is measured (under 1)

RANK = """
import os, signal, sys
from disagg_tt.report import Reporter
rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
report = Reporter.from_env(os.environ, os.environ["DISAGG_TT_ROLE"], rank)
def end(code):
    report.close()
    sys.stdout.flush()
    os._exit(code)
def wait():
    while True:
        signal.pause()
"""


@pytest.fixture(scope="module")
def binding() -> RankBinding:
    return RankBinding.load(default_binding(), {})


def run(binding, body, on_event=lambda event: None, device="emulator", **options):
    """Run the ranks; return (exit code, events). A job that overruns BOUND is ended and fails the test."""
    events = []

    def collect(event):
        events.append(event)
        on_event(event)

    program = [sys.executable, "-c", RANK + body]
    code = run_job(
        options.pop("argv", []), binding, device, on_event=collect, program=program, deadline=BOUND, **options
    )
    assert not any("did not end within" in event.get("reason", "") for event in events), events
    return code, events


def named(events, name):
    return [event for event in events if event["event"] == name]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_each_rank_has_its_environment_and_all_events_arrive(binding, monkeypatch, capfd):
    monkeypatch.setenv("TT_VISIBLE_DEVICES", "of the parent")
    body = """
names = ("TT_MESH_ID", "TT_VISIBLE_DEVICES", "TT_MESH_GRAPH_DESC_PATH", "DISAGG_TT_DEVICE", "FOR_ALL")
report.emit({"event": "env", "argv": sys.argv[1:], **{name: os.environ[name] for name in names}})
for number in range(2000):
    report.emit({"event": "token", "number": number, "text": "\\u00e9\\n"})
print("printed by", rank)
end(0)
"""
    code, events = run(binding, body, argv=["--help", "a b"], env={"FOR_ALL": "1; $x"})
    assert code == 0
    for rank, role in enumerate(("prefill", "decode")):
        own = [event for event in events if event["rank"] == rank]
        assert own[1] == {
            "event": "env",
            "argv": ["--help", "a b"],
            "TT_MESH_ID": str(rank),
            "TT_VISIBLE_DEVICES": str(rank),
            "TT_MESH_GRAPH_DESC_PATH": str(binding.mesh_graph_desc_path),
            "DISAGG_TT_DEVICE": "emulator",
            "FOR_ALL": "1; $x",
            "rank": rank,
            "role": role,
        }
        assert [event["number"] for event in named(own, "token")] == list(range(2000))
        assert own[-1]["event"] == "closed"
    out, err = capfd.readouterr()
    assert out == ""
    assert {"printed by 0", "printed by 1"} <= set(err.splitlines())


def test_ranks_speak_mpi(binding):
    body = """
from mpi4py import MPI
report.emit({"event": "sum", "value": MPI.COMM_WORLD.allreduce(rank + 1)})
MPI.Finalize()
end(0)
"""
    code, events = run(binding, body)
    assert code == 0
    assert [event["value"] for event in named(events, "sum")] == [3, 3]


def test_the_failing_ranks_own_code_and_reason(binding):
    body = """
class Bad(Exception):
    exit_code = 2
if rank == 1:
    report.failed(Bad("value 3; allowed: 4"))
    end(2)
wait()
"""
    code, events = run(binding, body)
    assert code == 2
    (failed,) = named(events, "failed")
    assert (failed["rank"], failed["role"], failed["reason"]) == (1, "decode", "value 3; allowed: 4")


@pytest.mark.parametrize(
    ("end", "code", "reason"),
    [
        ("os._exit(7)", 7, "rank 1 ended with exit code 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "rank 1 died of SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 1, "rank 1 died of SIGSEGV"),
        ("raise SystemExit(3)", 3, "rank 1 ended with exit code 3"),
    ],
)
@pytest.mark.parametrize("mpi", [False, True], ids=["no_mpi", "mpi"])
def test_a_rank_that_just_ends_takes_the_other_with_it(binding, monkeypatch, end, code, reason, mpi):
    folders = []

    class Recorded(tempfile.TemporaryDirectory):
        def __enter__(self):
            folders.append(super().__enter__())
            return folders[-1]

    monkeypatch.setattr(tempfile, "TemporaryDirectory", Recorded)
    # without finalize=False, a rank that leaves by an exception waits in MPI_Finalize for the other rank
    begin = (
        "import mpi4py\nmpi4py.rc.finalize = False\nfrom mpi4py import MPI\nMPI.COMM_WORLD.barrier()\n"
        if mpi
        else ""
    )
    other = "MPI.COMM_WORLD.recv(source=1)" if mpi else "wait()"
    start = time.monotonic()
    got, events = run(binding, f"{begin}if rank == 1:\n    {end}\n{other}\n")
    assert time.monotonic() - start < BOUND
    assert (got, [event["reason"] for event in named(events, "failed")]) == (code, [reason])
    assert [Path(folder).exists() for folder in folders] == [False], "MPI's shared memory outlives the job"
    assert not any(alive(event["pid"]) for event in named(events, "started"))


def test_a_stopped_rank_is_ended_once_the_other_gives_up(binding):
    def stop(event):
        if event["event"] == "ready":
            os.kill(event["pid"], signal.SIGSTOP if event["rank"] == 1 else signal.SIGCONT)
        ready.add(event["rank"] if event["event"] == "ready" else None)
        if {0, 1} <= ready and "told" not in ready:
            ready.add("told")
            os.kill(pids[0], signal.SIGUSR1)

    ready, pids = set(), {}

    def remember(event):
        if event["event"] == "started":
            pids[event["rank"]] = event["pid"]
        stop(event)

    body = """
from disagg_tt.errors import PeerError
def give_up(*_):
    report.failed(PeerError("rank 1 hangs"))
    end(1)
signal.signal(signal.SIGUSR1, give_up)
report.emit({"event": "ready", "pid": os.getpid()})
wait()
"""
    code, events = run(binding, body, on_event=remember)
    assert (code, named(events, "failed")[0]["reason"]) == (1, "rank 1 hangs")
    assert not any(alive(pid) for pid in pids.values())


def test_ranks_that_ignore_sigterm_are_killed(binding):
    """Also through an exception in on_event, which is raised on."""

    class Enough(Exception):
        pass

    pids = []

    def enough(event):
        if event["event"] == "ready":
            pids.append(event["pid"])
        if len(pids) == 2:
            raise Enough

    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
report.emit({"event": "ready", "pid": os.getpid()})
wait()
"""
    with pytest.raises(Enough):
        run(binding, body, on_event=enough)
    assert len(pids) == 2
    assert not any(alive(pid) for pid in pids)


def test_limits(binding):
    program = [sys.executable, "-c", "import signal\nwhile True: signal.pause()"]
    events = []
    code = run_job([], binding, "emulator", on_event=events.append, program=program, start_deadline=0.2)
    assert (code, [event["reason"] for event in events]) == (1, ["no rank reported anything within 0.2 s"])
    events.clear()
    code = run_job([], binding, "emulator", on_event=events.append, program=program, deadline=0.2)
    assert (code, [event["reason"] for event in events]) == (1, ["the job did not end within 0.2 s"])


def test_a_rank_that_never_comes_is_named(binding, monkeypatch):
    monkeypatch.setattr("disagg_tt.launch.TOGETHER_SECONDS", 1.0)
    late = "import os, signal\nif os.environ['OMPI_COMM_WORLD_RANK'] == '1': signal.pause()\n"
    events = []
    code = run_job(
        [],
        binding,
        "emulator",
        on_event=events.append,
        program=[sys.executable, "-c", late + RANK + "wait()"],
        deadline=BOUND,
    )
    assert code == 1
    assert "rank 1 never came" in named(events, "failed")[0]["reason"]
    assert [event["rank"] for event in named(events, "started")] == [0]


def test_what_is_no_event_does_not_reach_the_handler(binding):
    body = f"""
import zmq
push = zmq.Context.instance().socket(zmq.PUSH)
push.connect(os.environ["DISAGG_TT_EVENTS"])
for message in (b"no json", b"[]", b'{{"event": "x", "rank": 0, "text": "' + b"a" * {MAX_EVENT_BYTES} + b'"}}'):
    push.send(message)
push.send(b'{{"event": "raw", "rank": 9}}')
report.emit({{"event": "big", "text": "a" * {MAX_EVENT_BYTES}}})
push.close(linger=5000)
zmq.Context.instance().term()
end(0)
"""
    code, events = run(binding, body)
    assert code == 0
    assert {event["event"] for event in events} == {"started", "raw", "closed"}
    assert len(named(events, "raw")) == 2


LAUNCHER = """
import signal, sys
from disagg_tt.launch import RankBinding, default_binding, run_job
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
def show(event):
    if event["event"] == "ready":
        print(event["pid"], event["folder"], flush=True)
run_job([], RankBinding.load(default_binding(), {}), "emulator", on_event=show, program=[sys.executable, "-c", sys.argv[1]])
"""
READY = """
report.emit({"event": "ready", "pid": os.getpid(), "folder": os.environ["OMPI_MCA_btl_sm_backing_directory"]})
wait()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_a_signal_to_the_launcher_leaves_no_process(number):
    command = [sys.executable, "-c", LAUNCHER, RANK + READY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            assert launcher.stdout is not None
            lines = [launcher.stdout.readline().split() for _ in range(2)]
            handles = [os.pidfd_open(int(pid)) for pid, _ in lines]
            launcher.send_signal(number)
            code = launcher.wait(BOUND)
        finally:
            launcher.kill()
    assert code == {signal.SIGTERM: 143, signal.SIGHUP: 129}.get(number, -number)
    for handle in handles:
        assert select.select([handle], [], [], BOUND)[0], "a rank outlives the launcher"
        os.close(handle)
    if number == signal.SIGKILL:  # nobody was left to remove it
        shutil.rmtree(lines[0][1])


FAKE_MPIRUN = """
import os, sys
from pathlib import Path
count = Path(os.environ["COUNT"])
count.write_text(count.read_text() + ".")
print("PMIx detected a call to mkdir was unable to create the desired directory")
sys.exit(213)
"""


@pytest.mark.parametrize("recovers", [True, False])
def test_an_mpirun_that_fails_before_any_rank_is_started_once_more(binding, monkeypatch, tmp_path, recovers):
    count, commands = tmp_path / "count", []
    count.write_text("")

    def command(program, *rest):
        commands.append(program)
        return [sys.executable, "-c", FAKE_MPIRUN]

    real, begin = launch._command, launch.start
    monkeypatch.setattr(launch, "_command", command)

    def start(words, env, **options):
        if recovers and count.read_text():
            words = real(commands[0], binding, "emulator", tmp_path)
        return begin(words, env, **options)

    monkeypatch.setattr(launch, "start", start)
    code, events = run(binding, "end(0)", env={"COUNT": str(count)})
    if recovers:
        assert (code, count.read_text(), len(named(events, "closed"))) == (0, ".", 2)
    else:
        assert (code, count.read_text()) == (1, "..")
        (failed,) = named(events, "failed")
        assert failed["reason"].startswith(
            "the launcher ended with exit code 213: PMIx detected a call to mkdir"
        )


def test_another_failure_of_the_launcher_is_final(binding, monkeypatch):
    monkeypatch.setattr(
        launch, "_command", lambda *_: [sys.executable, "-c", "print('no'); raise SystemExit(9)"]
    )
    code, events = run(binding, "end(0)")
    assert (code, [event["reason"] for event in events]) == (9, ["the launcher ended with exit code 9: no"])


def test_mpiruns_own_files_lie_in_the_jobs_folder(binding):
    body = """
folder = os.environ["OMPI_MCA_btl_sm_backing_directory"]
report.emit({"event": "files", "found": [n for n in os.listdir(folder) if n.startswith("ompi.")]})
end(0)
"""
    code, events = run(binding, body)
    assert code == 0 and [len(event["found"]) for event in named(events, "files")] == [1, 1]


def test_a_binding_whose_ranks_share_a_mesh_starts_nothing(binding):
    more = RankBinding(binding.path, (*binding.ranks, binding.ranks[1]), *list(vars(binding).values())[2:])
    with pytest.raises(RankBindingError, match="share mesh 1"):
        run(more, "end(0)")


@pytest.mark.mock
def test_tt_run_starts_the_same_ranks_on_the_mock_cluster(binding, capfd):
    body = """
report.emit({"event": "env", **{name: os.environ[name] for name in (
    "TT_MESH_ID", "TT_VISIBLE_DEVICES", "DISAGG_TT_ROLE", "DISAGG_TT_DEVICE", "TT_METAL_MOCK_CLUSTER_DESC_PATH")}})
if rank == 1:
    report.failed(ValueError("on purpose"))
    end(5)
print("printed")
wait()
"""
    code, events = run(binding, body, device="mock", argv=["--dry-run"])
    assert [event["reason"] for event in named(events, "failed")] == ["on purpose"]
    assert code == 1  # what the rank reported: a ValueError has no exit code of its own
    found = named(events, "env")
    assert len(found) == 2
    for event in found:
        assert event["TT_VISIBLE_DEVICES"] == event["TT_MESH_ID"] == str(event["rank"])
        assert (event["DISAGG_TT_ROLE"], event["DISAGG_TT_DEVICE"]) == (event["role"], "ttnn")
        assert Path(event["TT_METAL_MOCK_CLUSTER_DESC_PATH"]).is_file()
    assert "[tt-run]" not in capfd.readouterr().err
