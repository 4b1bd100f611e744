"""What the two ends of a wire do in each case of its suite, in two threads of one process or as two ranks of an MPI job.

run(kind, name)         the case's outcomes in threads: (prefill's, decode's), "ok" or "StreamError: what it says"
run_job()               all cases' outcomes over mpi, by name, from one job of two ranks
run_programs()          the same from two programs that were started separately, each by MPICH's mpiexec
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from disagg_tt.errors import DisaggError, StreamError
from disagg_tt.kv_stream.host_wire import Plan, WireReceiver, WireSender
from disagg_tt.kv_stream.nixl import NixlReceiver, NixlSender
from disagg_tt.kv_stream.tcp import TcpReceiver, TcpSender
from disagg_tt.kv_stream.torch_distributed import TorchReceiver, TorchSender
from disagg_tt.mpirun import job_folder, mpi_environment, mpirun_command

DEADLINE_S = 30.0
LAYERS, BLOCK, BLOCKS = 4, 1001, 24
PLAN = Plan(7, LAYERS, BLOCK * BLOCKS)
ORDERS = ("contiguous", "paged", "fragmented")
ENDS: dict[str, Any] = {
    "tcp": (TcpSender, TcpReceiver),
    "nixl": (NixlSender, NixlReceiver),
    "gloo": (TorchSender, TorchReceiver),
    "nccl": (TorchSender, TorchReceiver),
}
Part = Callable[[Any], None]


@dataclass(frozen=True)
class Case:
    """What each end does, and how it ends: regular expressions of outcomes."""

    prefill: Part
    decode: Part
    prefill_ends: str = "ok"
    decode_ends: str = "ok"


def values(plan: Plan = PLAN) -> torch.Tensor:
    """The memory that a stream is sent from: uint8 of [layers, bytes a layer]."""
    return torch.randint(
        0, 256, (plan.layers, plan.layer_bytes), dtype=torch.uint8,
        generator=torch.Generator().manual_seed(plan.request),
    )  # fmt: skip


def cut(layer: torch.Tensor, order: str, seed: int) -> list[torch.Tensor]:
    """A layer's extents: one; shuffled runs of 4 blocks; or shuffled pieces of any size."""
    if order == "contiguous":
        return [layer]
    chance = random.Random(seed)
    if order == "paged":
        runs = layer.split(4 * BLOCK)
        pieces = [list(run.split(BLOCK)) for run in runs]
    else:
        bounds = sorted({0, layer.numel(), *(chance.randrange(layer.numel()) for _ in range(40))})
        pieces = [[layer[a:b]] for a, b in zip(bounds, bounds[1:], strict=False)]
    chance.shuffle(pieces)
    return [piece for run in pieces for piece in run]


def send(end: WireSender, plan: Plan = PLAN, order: str = "contiguous") -> None:
    memory = values(plan)
    end.register([memory.view(-1)])
    send_from(end, memory, plan, order)


def send_from(end: WireSender, memory: torch.Tensor, plan: Plan, order: str) -> None:
    end.begin(plan)
    for number, layer in enumerate(memory):
        end.send(number, cut(layer, order, number))
        end.sent(number - 1)
    end.sent(plan.layers - 1)
    memory.zero_()  # it may be reused now
    end.finish()


def receive(
    end: WireReceiver, plan: Plan = PLAN, order: str = "contiguous", sent_as: str = "contiguous"
) -> None:
    memory = torch.zeros(plan.layers, plan.layer_bytes, dtype=torch.uint8)
    end.register([memory.view(-1)])
    receive_into(end, memory, plan, order, sent_as)


def receive_into(end: WireReceiver, memory: torch.Tensor, plan: Plan, order: str, sent_as: str) -> None:
    end.begin(plan)
    expected = values(plan)
    for number, layer in enumerate(memory):
        extents = cut(layer, order, number + 99)
        end.receive(number, extents)
        assert torch.equal(torch.cat(extents), torch.cat(cut(expected[number], sent_as, number))), number
    end.finish()


def usable(end: WireReceiver) -> None:
    """Receive; whatever goes wrong, finishing afterwards is refused, so nothing takes the destination for filled."""
    try:
        receive(end)
    except DisaggError:
        try:
            end.finish()
        except StreamError:
            raise
        raise AssertionError("a failed stream was finished") from None


def several_prefill(end: WireSender) -> None:
    memory = torch.empty(1 << 17, dtype=torch.uint8)
    end.register([memory])
    for plan, order in SEVERAL:
        here = memory[: plan.total_bytes].view(plan.layers, -1)
        here.copy_(values(plan))
        send_from(end, here, plan, order)


def several_decode(end: WireReceiver) -> None:
    memory = torch.zeros(1 << 17, dtype=torch.uint8)
    end.register([memory])
    for plan, order in SEVERAL:
        receive_into(end, memory[: plan.total_bytes].view(plan.layers, -1), plan, "paged", order)


SEVERAL = [(Plan(0, 1, BLOCK), "contiguous"), (PLAN, "fragmented"), (Plan(2**32 - 1, 5, 3 * BLOCK), "paged"), (PLAN, "paged")]  # fmt: skip


class Allocations(TorchDispatchMode):
    """The bytes of the largest tensor made while this is on, in this thread."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in {
            a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)
        }:
            self.largest = max(self.largest, made.untyped_storage().nbytes())
        return made


BIG = Plan(3, 2, 1 << 22)


def no_copies(move: Callable[[], None]) -> None:
    """Run `move` twice; neither torch nor Python may take memory of a layer's size meanwhile."""
    with Allocations() as made:
        move()
    tracemalloc.start()
    move()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.largest < BIG.layer_bytes // 8 and peak < BIG.layer_bytes // 2, (made.largest, peak)


def zero_copy_prefill(end: WireSender) -> None:
    memory = values(BIG)
    extents = [cut(layer, "paged", 0) for layer in memory]
    end.register([memory.view(-1)])

    def move() -> None:
        end.begin(BIG)
        for number, layer in enumerate(extents):
            end.send(number, layer)
        end.finish()

    no_copies(move)


def zero_copy_decode(end: WireReceiver) -> None:
    memory = torch.zeros(BIG.layers, BIG.layer_bytes, dtype=torch.uint8)
    extents = [cut(layer, "paged", 1) for layer in memory]
    end.register([memory.view(-1)])

    def move() -> None:
        end.begin(BIG)
        for number, layer in enumerate(extents):
            end.receive(number, layer)
        end.finish()

    no_copies(move)


def begun(end: Any) -> torch.Tensor:
    memory = values()
    end.register([memory.view(-1)])
    end.begin(PLAN)
    return memory


def send_out_of_order(end: WireSender) -> None:
    memory = begun(end)
    end.send(0, [memory[0]])
    end.sent(0)
    end.send(2, [memory[2]])


def send_short(end: WireSender) -> None:
    end.send(0, [begun(end)[0, 1:]])


def finish_early(end: WireSender) -> None:
    memory = begun(end)
    end.send(0, [memory[0]])
    end.sent(0)
    end.finish()


def send_damaged(end: WireSender) -> None:
    as_it_is = end._send
    end._send = lambda header, pieces: as_it_is(replace(header, value=header.value ^ 1), pieces)  # type: ignore[method-assign]
    send(end)


def send_other_layer(end: WireSender) -> None:
    as_it_is = end._send
    end._send = lambda header, pieces: as_it_is(replace(header, layer=header.layer + 1), pieces)  # type: ignore[method-assign]
    memory = begun(end)
    end.send(0, [memory[0]])
    end.finish()


def receive_floats(end: WireReceiver) -> None:
    begun(end)
    end.receive(0, [torch.zeros(PLAN.layer_bytes // 4)])


def without_begin(end: Any) -> None:
    (end.send if isinstance(end, WireSender) else end.receive)(0, [values()[0]])


def after_close(end: Any) -> None:
    end.close()
    end.close()
    end.begin(PLAN)


def senseless_plan(end: Any) -> None:
    end.begin(Plan(1, 1 << 20, 1 << 50))


CASES = {
    **{
        f"{sent} to {taken}": Case(
            lambda end, sent=sent: send(end, order=sent),
            lambda end, sent=sent, taken=taken: receive(end, order=taken, sent_as=sent),
        )
        for sent in ORDERS
        for taken in ORDERS
    },
    "several streams": Case(several_prefill, several_decode),
    "zero copy": Case(zero_copy_prefill, zero_copy_decode),
    "other layers": Case(
        send, lambda end: receive(end, replace(PLAN, layers=3)),
        r"StreamError: .*layers=3.*expects .*layers=4", r"StreamError: .*layers=4.*expects .*layers=3",
    ),
    "other size": Case(
        send, lambda end: receive(end, replace(PLAN, layer_bytes=1)),
        r"StreamError: .*announces .*layer_bytes=1\b", r"StreamError: .*announces .*layer_bytes=24024",
    ),
    "other request": Case(
        send, lambda end: receive(end, replace(PLAN, request=8)),
        r"StreamError: .*announces .*request=8", r"StreamError: .*announces .*request=7",
    ),
    "out of order": Case(
        send_out_of_order, usable, r"StreamError: .*layer 2 of 4; layer 1 is next",
        r"StreamError: .*this end has failed .*prefill end.*failed: .*layer 1 is next",
    ),
    "short layer": Case(
        send_short, usable, r"StreamError: .*24,023 bytes.*24,024", r"StreamError: .*failed: .*24,023 bytes"
    ),
    "finished early": Case(
        finish_early, usable, r"StreamError: .*finished after 1 of 4", r"StreamError: .*failed: .*after 1 of 4"
    ),
    "damaged": Case(
        send_damaged, usable, r"PeerError: .*decode end.*(failed: .*damaged|gone|closed)",
        r"StreamError: .*this end has failed .*layer 0 of request 7 arrived damaged: its digest differs",
    ),
    "another layer comes": Case(
        send_other_layer, usable, r"(PeerError|StreamError): .*", r"StreamError: .*layer 1 of request 7 .*layer 0 of request 7"
    ),
    "not bytes": Case(
        send, receive_floats, r"PeerError: .*decode end.*(failed: .*float32|gone|closed)", r"StreamError: .*torch.float32"
    ),
    "not begun": Case(without_begin, without_begin, *[r"StreamError: .*no stream has begun"] * 2),
    "closed": Case(after_close, after_close, *[r"StreamError: .*has failed \(it is closed\)"] * 2),
    "senseless plan": Case(senseless_plan, senseless_plan, *[r"StreamError: .*layers 1,048,576; allowed: 1 to 4,096"] * 2),
}  # fmt: skip


def outcome(part: Part, end: Any) -> str:
    """Do an end's part, close it, and return how it ended."""
    try:
        part(end)
    except (DisaggError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        end.close()
    return "ok"


def pair(kind: str, **own: Any) -> tuple[Any, Any]:
    """A sender and a receiver that will find each other, with a deadline that no passing test meets."""
    own = {"deadline_s": DEADLINE_S} | ({"backend": kind} if kind in ("gloo", "nccl") else {}) | own
    sender, receiver = ENDS[kind]
    decode = receiver(**own)
    return sender("127.0.0.1", decode.port, **own), decode


def run_ends(prefill: Any, decode: Any, sends: Part, receives: Part) -> tuple[str, str]:
    with ThreadPoolExecutor(2) as threads:
        parts = [threads.submit(outcome, sends, prefill), threads.submit(outcome, receives, decode)]
        return parts[0].result(), parts[1].result()


def run(kind: str, name: str) -> tuple[str, str]:
    return run_ends(*pair(kind), CASES[name].prefill, CASES[name].decode)


def run_job() -> dict[str, tuple[str, str]]:
    command = mpirun_command([sys.executable, __file__, "rank"], [{}, {}])
    with job_folder() as folder:
        env = mpi_environment(folder) | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    found: dict[str, dict[int, str]] = {}
    for line in done.stdout.splitlines():
        rank, name, ended = json.loads(line)
        found.setdefault(name, {})[rank] = ended
    assert set(found) == set(CASES), done.stdout + done.stderr
    return {name: (both[0], both[1]) for name, both in found.items()}


MPICH = Path(sys.prefix) / "mpich"  # as make test installs it


def mpich(*words: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of a Python program that MPICH starts."""
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_", "PRTE_"))
    }
    env |= {"MPI4PY_LIBMPI": str(MPICH / "lib/libmpi.so.12"), "PYTHONPATH": os.pathsep.join(sys.path)}
    return [str(MPICH / "bin/mpiexec"), "-n", "1", sys.executable, *words], env


def run_programs() -> dict[str, tuple[str, str]]:
    command, env = mpich(__file__, "prefill")
    decode = subprocess.Popen([*command[:-1], "decode"], env=env, stdout=subprocess.PIPE, text=True)
    with decode:
        prefill = subprocess.run(
            command, env=env, stdin=decode.stdout, stdout=subprocess.PIPE, text=True, timeout=120
        )
    found = {name: (one, other) for name, one, other in map(json.loads, prefill.stdout.splitlines())}
    assert set(found) == set(CASES), prefill.stdout
    return found


def decode_program() -> None:
    """Print the port where each case's end listens, then how it ended."""
    from disagg_tt.kv_stream.mpi_programs import MpiProgramReceiver

    for case in CASES.values():
        end = MpiProgramReceiver(token="secret", deadline_s=DEADLINE_S)
        print(end.port, flush=True)
        print(json.dumps(outcome(case.decode, end)), flush=True)


def prefill_program() -> None:
    """Print the outcomes of each case, the decode program's read from the input."""
    from disagg_tt.kv_stream.mpi_programs import MpiProgramSender

    for name, case in CASES.items():
        end = MpiProgramSender("127.0.0.1", int(input()), token="secret", deadline_s=DEADLINE_S)
        ours = outcome(case.prefill, end)
        print(json.dumps([name, ours, json.loads(input())]), flush=True)


def rank() -> None:
    """Be one rank of the job: rank 0 is prefill."""
    from mpi4py import MPI

    from disagg_tt.kv_stream.mpi import MpiReceiver, MpiSender

    me = MPI.COMM_WORLD.rank
    for name, case in CASES.items():
        comm = MPI.COMM_WORLD.Dup()  # what a failed case leaves behind stays in its own
        end = (MpiReceiver if me else MpiSender)(comm, 1 - me, deadline_s=DEADLINE_S)
        print(json.dumps([me, name, outcome(case.decode if me else case.prefill, end)]), flush=True)
    MPI.COMM_WORLD.Barrier()
    sys.stdout.flush()
    os._exit(0)  # MPI would wait for the messages of failed cases


if __name__ == "__main__":
    {"decode": decode_program, "prefill": prefill_program, "rank": rank}[sys.argv[1]]()
