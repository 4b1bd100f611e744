"""Processes of test_wire_faults.

wire_child.py prefill|decode KIND PORT LAYER     streams up to LAYER, says so, and waits for what comes: it is killed
wire_child.py rank                               a rank of an MPI job, of which one is killed
wire_child.py survivor prefill|decode            an MPI program that streams with two others: the first of them is killed
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
from wire_ends import ENDS, PLAN, outcome, receive, send, values

START_S = 120.0  # of waiting for another process, which a loaded machine starts slowly


def made(role: str, kind: str, port: int) -> Any:
    if kind == "mpi":
        from disagg_tt.kv_stream.mpi_programs import MpiProgramReceiver as receiver
        from disagg_tt.kv_stream.mpi_programs import MpiProgramSender as sender
    else:
        sender, receiver = ENDS[kind]
    own = {"port": port, "deadline_s": START_S}
    return sender("127.0.0.1", **own) if role == "prefill" else receiver(**own)


def stream(role: str, kind: str, port: int, until: int) -> None:
    end = made(role, kind, port)
    memory = values() if role == "prefill" else torch.zeros(PLAN.layers, PLAN.layer_bytes, dtype=torch.uint8)
    end.register([memory.view(-1)])
    end.begin(PLAN)
    for number in range(until):
        (end.send if role == "prefill" else end.receive)(number, [memory[number]])
        if role == "prefill":
            end.sent(number)
    if until == PLAN.layers:
        end.finish()
    print("here", end.port if role == "decode" else 0, os.getpid(), flush=True)
    sys.stdin.read()


def survivor(role: str) -> None:
    """Stream with who listens at the port of each input line, or connects; say how each stream ended."""
    for line in sys.stdin:
        end = made(role, "mpi", int(line))
        print(outcome(send if role == "prefill" else receive, end).partition("\n")[0], flush=True)


def rank() -> None:
    from mpi4py import MPI

    from disagg_tt.kv_stream.mpi import MpiReceiver, MpiSender

    here, memory = MPI.COMM_WORLD.rank, values()
    if here:
        end = MpiReceiver(MPI.COMM_WORLD, 0)
        end.begin(PLAN)
        for number in range(PLAN.layers):
            end.receive(number, [memory[number]])
        end.finish()
        print("finished")
    else:
        sender = MpiSender(MPI.COMM_WORLD, 1)
        sender.begin(PLAN)
        sender.send(0, [memory[0]])
        sender.sent(0)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank()
    elif sys.argv[1] == "survivor":
        survivor(sys.argv[2])
    else:
        stream(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
