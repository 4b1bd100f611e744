"""`disagg-tt emulate`: scripts run as python would run them, alone, as a binding's ranks, and in a job that MPI started."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from runs import ROOT, Result, cli, end_of, environment, run, started

PAIR = ROOT / "rank_bindings" / "n300x2_1p1d.yaml"
PIPELINE = ROOT / "examples" / "socket_pipeline.py"
N300X2 = (ROOT / "mesh_descriptors" / "n300x2.textproto").read_text()
SHORT = {"TT_METAL_OPERATION_TIMEOUT_SECONDS": "5"}


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def binding(folder: Path, ranks: int, columns: int, **first: object) -> str:
    """Write a rank binding of meshes of 1 x `columns` chips; `first` replaces what rank 0's entry says."""
    more = "".join(f'instances {{ mesh {{ mesh_descriptor: "M0" mesh_id: {i} }} }} ' for i in range(2, ranks))
    descriptor = folder / "meshes.textproto"
    descriptor.write_text(
        N300X2.replace("connections", more + "connections", 1).replace("[ 1, 2 ]", f"[ 1, {columns} ]")
    )
    entries: list[dict] = [
        {"rank": r, "mesh_id": r, "mesh_host_rank": 0, "env_overrides": {"STAGE": f"s{r}"}}
        for r in range(ranks)
    ]
    entries[0] |= first
    document = {
        "rank_bindings": entries,
        "mesh_graph_desc_path": str(descriptor),
        "global_env": {"EXPANDED": "$FROM_OUTSIDE/x"},
    }
    path = folder / "binding.yaml"
    path.write_text(yaml.safe_dump(document))
    return str(path)


def in_ranks(path: str, *words: str, **env: str) -> Result:
    return cli("emulate", "--rank-binding", str(PAIR), path, *words, **env)


# ---------------------------------------------------------------- as python


AS_PYTHON = """
import os, sys
import ttnn.experimental
from ttnn import bfloat16
from ttnn.distributed import open_mesh_device
print(sys.argv[1:], __name__, os.path.basename(__file__), sys.path[0] == os.path.dirname(os.path.realpath(__file__)))
import beside
print(beside.VALUE, sys.modules["__main__"].AT_THE_TOP if False else "", ttnn.bfloat16 is bfloat16)
"""


def test_a_script_runs_as_python_runs_it(tmp_path):
    (tmp_path / "beside.py").write_text("VALUE = 7")
    done = cli("emulate", script(tmp_path, AS_PYTHON), "--rank-binding", "its own", "-m")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines() == [
        "['--rank-binding', 'its own', '-m'] __main__ script.py True",
        "7  True",
    ]


def test_a_module_runs_as_python_m_runs_it(tmp_path):
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__main__.py").write_text(
        "import sys, os, ttnn\nfrom . import part\nprint(__name__, sys.argv[1:], os.path.basename(sys.argv[0]), part.N)"
    )
    (package / "part.py").write_text("N = 3")
    done = cli("emulate", "-m", "mine", "-m", "x", PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert (done.code, done.out) == (0, "__main__ ['-m', 'x'] __main__.py 3\n"), done.err


@pytest.mark.parametrize(
    ("text", "code", "error"),
    [
        ("import sys\nsys.exit('a reason')", 1, "a reason\n"),
        ("import atexit\natexit.register(print, 'cleaned up')\nraise SystemExit(4)", 4, ""),
        (
            "def f():\n    1 / 0\nf()",
            1,
            r"in <module>\n    f\(\)\n(.*\n)*ZeroDivisionError: division by zero\n$",
        ),
        ("x = (", 1, 'script.py", line 1\n.*\n.*\nSyntaxError: '),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
    ],
)
def test_exit_codes_and_tracebacks_are_pythons(tmp_path, text, code, error):
    done = cli("emulate", script(tmp_path, text))
    assert done.code == code, done.err
    assert re.search(error, done.err), done.err
    assert "emulate.py" not in done.err, "the traceback shows more than the script's own frames"
    assert done.out == ("cleaned up\n" if "atexit" in text else "")


CATCHES = """
import ttnn
try:
    ttnn.open_mesh_device(ttnn.MeshShape(99, 99))
except RuntimeError as error:
    print("caught", type(error).__name__)
for name in ("ttnn.nosuch", "ttnn.experimental.nosuch", "ttnn.transformer.nosuch", "ttnn.distributed.nosuch"):
    try:
        eval(name)
    except AttributeError as error:
        print(error)
for statement in ("import ttnn.nosuch", "from ttnn import nosuch", "from ttnn.experimental import nosuch",
                  "from ttnn._ttnn.multi_device import nosuch", "import ttnn.socket", "from ttnn.operations.conv import nosuch"):
    try:
        exec(statement)
    except ImportError as error:
        print(error)
assert not hasattr(ttnn, "nosuch")
"""


def test_what_is_not_there_is_said_by_name_with_what_is(tmp_path):
    done = cli("emulate", script(tmp_path, CATCHES))
    assert done.code == 0, done.err
    caught, *said = done.out.splitlines()
    assert caught == "caught DeviceError"
    for line, (name, has) in zip(
        said,
        [
            ("ttnn.nosuch", "MeshSocket"),
            ("ttnn.experimental.nosuch", "send_async"),
            ("ttnn.transformer.nosuch", "scaled_dot_product_attention"),
            ("ttnn.distributed.nosuch", "open_mesh_device"),
            ("ttnn.nosuch", "MeshSocket"),
            ("ttnn.nosuch", "MeshSocket"),
            ("ttnn.experimental.nosuch", "send_async"),
            ("ttnn._ttnn.multi_device.nosuch", "send_bytes"),
            ("ttnn.socket", "MeshSocket"),
            ("ttnn.operations", "MeshSocket"),
        ],
        strict=True,
    ):
        assert line.startswith(f"the emulator does not have {name}; it has "), line
        assert has in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.py"], "script nowhere.py: there is no such file"),
        ([str(ROOT)], "it is not a file"),
        (
            ["--rank-binding", "nowhere.yaml", str(PIPELINE)],
            "rank binding nowhere.yaml: there is no such file",
        ),
    ],
)
def test_what_is_no_script_or_binding_is_refused(words, message):
    cli("emulate", *words).refused(message)


def test_a_binding_inside_a_job_is_refused():
    cli("emulate", "--rank-binding", str(PAIR), str(PIPELINE), OMPI_COMM_WORLD_SIZE="2").refused(
        "inside an MPI job, whose ranks run already; leave it out"
    )


# ---------------------------------------------------------------- ranks


def test_the_pipeline_of_three_ranks_agrees_with_torch(tmp_path):
    done = cli("emulate", "--rank-binding", binding(tmp_path, 3, 2), str(PIPELINE))
    assert (done.code, done.left) == (0, []), done.err
    assert len(re.findall(r"^batch \d: 3 stages, largest error 0\.0[01]", done.out, re.M)) == 4, done.out


@pytest.mark.parametrize("starter", ["mpirun", "tt-run"])
def test_a_job_that_another_launcher_started_is_joined(starter, tmp_path):
    tool = Path(sys.executable).with_name(starter)
    if starter == "tt-run" and not tool.exists():
        pytest.skip("ttnn is not installed")
    options = {
        "mpirun": ["--oversubscribe", "-n", "2"],
        "tt-run": ["--rank-binding", binding(tmp_path, 2, 1), "--mpi-args", "--oversubscribe", "--"],
    }
    command = [str(tool), *options[starter], sys.executable, "-m", "disagg_tt", "emulate", str(PIPELINE)]
    done = run(command, PATH=f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    assert (done.code, done.left) == (0, []), done.err
    assert len(re.findall(r"batch \d: 2 stages, largest error 0\.0[01]", done.out)) == 4, done.out


ENVIRONMENT = """
import json, os, sys, ttnn
names = ("TT_MESH_ID", "TT_RUN_RANK", "TT_MESH_HOST_RANK", "STAGE", "EXPANDED", "OMPI_COMM_WORLD_RANK", "TT_RUN_ORIGINAL_CWD")
print(json.dumps({name: os.environ.get(name) for name in names} | {"chips": len(ttnn.get_device_ids())}))
assert os.path.isfile(os.environ["TT_MESH_GRAPH_DESC_PATH"])
print("to stderr", file=sys.stderr)
"""


def test_each_rank_has_tt_runs_environment_and_its_meshs_chips(tmp_path):
    path = binding(tmp_path, 2, 4, env_overrides={"STAGE": "first"})
    done = cli("emulate", "--rank-binding", path, script(tmp_path, ENVIRONMENT), FROM_OUTSIDE="out")
    assert (done.code, done.left, done.err) == (0, [], "to stderr\n" * 2)
    seen = sorted((yaml.safe_load(line) for line in done.out.splitlines()), key=lambda e: e["TT_RUN_RANK"])
    for rank, environ in enumerate(seen):
        assert environ == {
            "TT_MESH_ID": str(rank),
            "TT_RUN_RANK": str(rank),
            "TT_MESH_HOST_RANK": "0",
            "STAGE": f"s{rank}" if rank else "first",
            "EXPANDED": "out/x",
            "OMPI_COMM_WORLD_RANK": str(rank),
            "TT_RUN_ORIGINAL_CWD": os.getcwd(),
            "chips": 4,
        }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"mesh_id": 1},
            "ranks 0 and 1 share mesh 1: the emulator does not run a mesh that several ranks share",
        ),
        (
            {"mesh_host_rank": 1},
            "TT_MESH_HOST_RANK is 1: the emulator does not run a mesh that several ranks share",
        ),
        ({"mesh_id": 5}, r"rank 0 has mesh_id 5; allowed: the mesh ids of .*: \[0, 1\]"),
    ],
)
def test_a_binding_of_meshes_that_cannot_be_emulated_is_refused(tmp_path, entry, message):
    path = binding(tmp_path, 2, 2, **entry)
    cli("emulate", "--rank-binding", path, str(PIPELINE)).refused(message)


# What rank 1 does while rank 0 waits for it.
RANK = "import os, signal, sys, time, ttnn\nrank = int(os.environ['OMPI_COMM_WORLD_RANK'])\n"
WAITS = "if rank == 0:\n    time.sleep(100)\n"
ENDS = {
    "exit": ("sys.exit(3)", 3, "rank 1 ended with exit code 3"),
    "raise": (
        "raise ttnn.nosuch",
        1,
        "does not have ttnn.nosuch(.*\n)*disagg-tt: rank 1 ended with exit code 1",
    ),
    "kill": ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL, "rank 1 died of SIGKILL"),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_first_rank_that_fails_gives_the_exit_code_and_takes_the_others_with_it(tmp_path, end):
    statement, code, message = ENDS[end]
    begun = time.monotonic()
    done = in_ranks(script(tmp_path, f"{RANK}{WAITS}{statement}"))
    assert time.monotonic() - begun < 90, "the other rank was waited for"
    assert (done.code, done.left) == (code, []), done.err
    assert re.search(message, done.err), done.err


EARLY = """
ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
mesh = ttnn.open_mesh_device(ttnn.MeshShape(1, 2))
if rank == 0:
    ttnn.distributed_context_barrier()
print("not reached by rank 0" if rank == 0 else "rank 1 is done")
"""


def test_a_rank_that_ends_early_is_an_error_in_the_rank_that_waits_for_it(tmp_path):
    done = in_ranks(script(tmp_path, RANK + EARLY), **SHORT)
    assert (done.code, done.left) == (1, []), done.err
    assert done.out == "rank 1 is done\n"
    assert re.search("DeviceError: .*rank", done.err), done.err
    assert "disagg-tt: rank 0 ended with exit code 1" in done.err


def test_a_syntax_error_is_said_once_before_any_rank_starts(tmp_path):
    done = in_ranks(script(tmp_path, "x = ("))
    assert (done.code, done.left, done.err.count("SyntaxError")) == (1, [], 1), done.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_ranks(tmp_path, number):
    waiting = script(tmp_path, f"{RANK}open(f'{tmp_path}/up{{rank}}', 'w').close()\ntime.sleep(100)")
    command = [sys.executable, "-m", "disagg_tt", "emulate", "--rank-binding", str(PAIR), waiting]
    with started(command, environment()) as running:
        while running.process.poll() is None and not all((tmp_path / f"up{r}").exists() for r in (0, 1)):
            time.sleep(0.05)  # looks again, for as long as the test's own limit allows
        running.process.send_signal(number)
        done = end_of(running)
    assert (done.code, done.left) == (128 + number, []), done.err
