"""A process of test_wire_faults that is killed: `wire_child.py prefill|decode KIND PORT LAYER`, or `rank` of an MPI job.

It streams up to LAYER, says so, and waits for what comes.
"""

from __future__ import annotations

import os
import signal
import sys

import torch
from wire_ends import ENDS, PLAN, values


def stream(role: str, kind: str, port: int, until: int) -> None:
    sender, receiver = ENDS[kind]
    end = sender("127.0.0.1", port) if role == "prefill" else receiver(port=port)
    memory = values() if role == "prefill" else torch.zeros(PLAN.layers, PLAN.layer_bytes, dtype=torch.uint8)
    end.register([memory.view(-1)])
    end.begin(PLAN)
    for number in range(until):
        (end.send if role == "prefill" else end.receive)(number, [memory[number]])
        if role == "prefill":
            end.sent(number)
    print("here", flush=True)
    sys.stdin.read()


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
    else:
        stream(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
