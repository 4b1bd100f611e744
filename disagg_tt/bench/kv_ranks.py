"""One rank of `bench kv`: runs every transport and load in turn with the other rank, and reports a row for each."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch

from disagg_tt.bench.kv_ends import End, Load, MeshSocketEnd, WireEnd
from disagg_tt.bench.kv_references import BareGlooEnd, BareNixlEnd, BlockingMpiEnd, PickleEnd
from disagg_tt.core import PREFILL
from disagg_tt.errors import InputError, StreamError
from disagg_tt.geometry import Geometry
from disagg_tt.rank import Seat, be_rank, mesh_shape_of

PATIENCE_S = 120.0
WIRES = ("mpi", "tcp", "nixl", "torch")


class Pair:
    """This rank and the other, over MPI."""

    def __init__(self, peer: int):
        from mpi4py import MPI

        self.comm, self.peer = MPI.COMM_WORLD.Dup(), peer

    def exchange(self, value: Any) -> Any:
        """Give the other rank a JSON value and return the other's."""
        text = self.comm.sendrecv(json.dumps(value), dest=self.peer, source=self.peer)
        return json.loads(text)

    def barrier(self) -> None:
        self.comm.Barrier()


def make_end(transport: str, pair: Pair, sends: bool, load: Load, geometry: Geometry, mesh: Any) -> End:
    """Return this rank's end of a transport; raises InputError where the load or the machine does not allow it."""
    if load.order != "contiguous" and transport not in WIRES:
        raise InputError(f"{transport} sends whole tensors; block orders are for wires")
    if transport == "mesh_socket":
        device, mesh_socket = mesh()
        return MeshSocketEnd(device, mesh_socket, geometry.dtype, sends, load)
    if transport == "mpi4py":
        return BlockingMpiEnd(pair.comm, pair.peer, sends, load)
    references: dict[str, Any] = {"pickle": PickleEnd, "nixl_bare": BareNixlEnd, "gloo_bare": BareGlooEnd}
    if transport in references:
        end: End = references[transport](pair.exchange, sends, load)
        return end
    return WireEnd(make_wire(transport, pair, sends), sends, load)


def make_wire(transport: str, pair: Pair, sends: bool) -> Any:
    """Return this rank's end of a wire, without digests: they are compared outside the timed part."""
    module = import_module(
        f"disagg_tt.kv_stream.{'torch_distributed' if transport == 'torch' else transport}"
    )
    end = getattr(module, f"{transport.title()}{'Sender' if sends else 'Receiver'}")
    own: dict[str, Any] = {"deadline_s": PATIENCE_S, "verify": False}
    if transport == "mpi":
        return end(pair.comm, pair.peer, **own)
    if sends:
        return end("127.0.0.1", pair.exchange(0), **own)
    receiver = end(**own)
    pair.exchange(receiver.port)
    return receiver


class Meshes:
    """This rank's mesh and one MeshSocket to the other rank's, made when first asked for."""

    def __init__(self, sends: bool, peer: int):
        self._sends, self._peer = sends, peer
        self._made: tuple[Any, Any] | None = None

    def __call__(self) -> tuple[Any, Any]:
        if self._made is None:
            from disagg_tt.device import ttnn
            from disagg_tt.device.mesh import open_mesh
            from disagg_tt.kv_stream.mesh_socket import socket_config

            ttnn.init_distributed_context()
            shape = mesh_shape_of(os.environ, None)
            mesh = open_mesh(shape)
            me = int(ttnn.distributed_context_get_rank())
            ends = (me, self._peer) if self._sends else (self._peer, me)
            chips = mesh.get_num_devices()
            made = ttnn.MeshSocket(mesh, socket_config(1, chips, sender=ends[0], receiver=ends[1]))
            self._made = mesh, made
        return self._made


def copy_rate(load: Load) -> float:
    """Return bytes/s of a plain copy of the load's stream, one ring of layer buffers to another, by one thread."""
    source, target = (torch.zeros(load.ring, load.layer_bytes, dtype=torch.uint8) for _ in range(2))
    started = time.perf_counter()
    for layer in range(load.layers):
        target[layer % load.ring].copy_(source[layer % load.ring])
    return load.total_bytes / (time.perf_counter() - started)


def measure(name: str, pair: Pair, end: End, warmup: int, iterations: int) -> list[dict[str, Any]]:
    """Run the streams; return each timed one's figures (ms), with the rate of a plain copy right after it.

    Raises StreamError when what arrived differs from what was sent.
    """
    figures = []
    for number in range(warmup + iterations):
        end.blank()
        pair.barrier()
        called = time.perf_counter()
        times = end.stream(number)
        layers = [b - a for a, b in pairwise(times[:-1])]
        found = {
            "total_ms": (times[-2] - times[0]) * 1e3,
            "end_to_end_ms": (times[-1] - called) * 1e3,
            "layer_ms": statistics.mean(layers) * 1e3,
        }
        ours = end.digests()
        theirs = pair.exchange(ours)
        if ours != theirs:
            raise StreamError(f"{name}: what arrived differs from what was sent: digests {theirs} and {ours}")
        if number >= warmup:
            if not end.sends:
                found["copy_rate"] = copy_rate(end.load)
            figures.append(found)
    return figures


def main(text: str) -> int:
    """Be one rank of the job that `settings`, in JSON, describe."""
    settings = json.loads(text)
    torch.set_num_threads(1)

    def work(seat: Seat) -> None:
        sends, pair = seat.role == PREFILL, Pair(seat.peer)
        geometry, meshes = Geometry(**settings["geometry"]), Meshes(sends, seat.peer)
        for tokens in settings["seq_lengths"]:
            for order in settings["orders"]:
                for transport in settings["transports"]:
                    load = Load.of(geometry, tokens, order, settings["mode"] == "bulk")
                    about = {
                        "transport": transport,
                        "tokens": tokens,
                        "order": order,
                        "bytes": load.total_bytes,
                    }
                    try:
                        end = make_end(transport, pair, sends, load, geometry, meshes)
                    except InputError as error:
                        if not sends:
                            seat.emit({"event": "skipped", **about, "reason": str(error)})
                        continue
                    try:
                        figures = measure(transport, pair, end, settings["warmup"], settings["iterations"])
                    finally:
                        end.close()
                    if not sends:
                        seat.emit({"event": "row", **about, "layers": load.layers, "figures": figures})

    return be_rank(work, PATIENCE_S, lambda event: print(json.dumps(event), flush=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
