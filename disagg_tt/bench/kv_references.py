"""The reference rows of `bench kv`: what users have without a wire, and what a wire's own library does bare.

None of them checks anything: no plan, no deadline, no failure told.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import time
from typing import Any

from disagg_tt.bench.kv_ends import End, Exchange, Load
from disagg_tt.errors import InputError


class PickleEnd(End):
    """The whole cache pickled, a 4-byte length, and `data += chunk` at the other end, over TCP."""

    LIMIT = 1 << 28  # the receiver's way of joining chunks is quadratic; its length field ends at 4 GiB

    def __init__(self, exchange: Exchange, sends: bool, load: Load):
        if load.total_bytes > self.LIMIT:
            raise InputError(f"pickle: {load.total_bytes:,} bytes; measured up to {self.LIMIT:,} only")
        super().__init__(sends, load)
        self._layers = [m.clone() for m in self.memory]  # a view would be pickled with all of its storage
        listener = None if sends else socket.create_server(("127.0.0.1", 0))
        port = exchange(listener.getsockname()[1] if listener else 0)
        self._socket = (
            socket.create_connection(("127.0.0.1", port)) if listener is None else listener.accept()[0]
        )
        if listener is not None:
            listener.close()

    def stream(self, request: int) -> list[float]:
        started = time.perf_counter()
        if self.sends:
            data = pickle.dumps([self._layers[i % self.load.ring] for i in range(self.load.layers)])
            self._socket.sendall(struct.pack("I", len(data)))
            self._socket.sendall(data)
        else:
            (size,) = struct.unpack("I", self._exactly(4))
            # Our own rank's pickle, on loopback: the reference is about its cost. No other code here unpickles.
            layers = pickle.loads(self._exactly(size))
            for memory, layer in zip(self.memory, layers, strict=False):
                memory.copy_(layer)
        ended = time.perf_counter()
        return [started, *[ended] * self.load.layers, ended]

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self._socket.recv(size - len(data))
            if not chunk:
                raise ConnectionError("the other rank is gone")
            data += chunk
        return data

    def close(self) -> None:
        self._socket.close()


class BlockingMpiEnd(End):
    """mpi4py's blocking Send and Recv, a layer a message."""

    def __init__(self, comm: Any, peer: int, sends: bool, load: Load):
        super().__init__(sends, load)
        self._comm, self._peer = comm, peer

    def stream(self, request: int) -> list[float]:
        times = [time.perf_counter()]
        for layer in range(self.load.layers):
            buffer = self.memory[layer % self.load.ring].numpy()
            if self.sends:
                self._comm.Send(buffer, dest=self._peer, tag=99)
            else:
                self._comm.Recv(buffer, source=self._peer, tag=99)
            times.append(time.perf_counter())
        return [*times, time.perf_counter()]


class BareNixlEnd(End):
    """NIXL alone: the receiver READs one layer buffer after another, and the sender waits for the notifications."""

    def __init__(self, exchange: Exchange, sends: bool, load: Load):
        from disagg_tt.kv_stream.nixl import new_agent

        super().__init__(sends, load)
        self._agent = new_agent("prefill" if sends else "decode", one_host=True)
        regions = [(m.data_ptr(), m.numel(), 0, "") for m in self.memory]
        self._registered = self._agent.register_memory(regions, "DRAM")
        theirs = exchange([self._agent.get_agent_metadata().hex(), [r[:3] for r in regions]])
        self._handles = []
        if not sends:
            self._peer = self._agent.add_remote_agent(bytes.fromhex(theirs[0]))
            for ours, there in zip(regions, theirs[1], strict=True):
                local = self._agent.get_xfer_descs([ours[:3]], "DRAM")
                remote = self._agent.get_xfer_descs([tuple(there)], "DRAM")
                self._handles.append(self._agent.initialize_xfer("READ", local, remote, self._peer, b"read"))

    def stream(self, request: int) -> list[float]:
        times, layers = [time.perf_counter()], self.load.layers
        if self.sends:
            read = 0
            while read < layers:
                read += sum(len(notes) for notes in self._agent.get_new_notifs().values())
                os.sched_yield()  # else two ranks on one core wait for each other's time slices
            return [*times * (layers + 1), time.perf_counter()]
        for layer in range(layers):
            handle = self._handles[layer % self.load.ring]
            state = self._agent.transfer(handle, b"read")
            while state == "PROC":
                state = self._agent.check_xfer_state(handle)
                os.sched_yield()
            if state != "DONE":
                raise InputError(f"nixl_bare: layer {layer} was not read: {state}")
            times.append(time.perf_counter())
        return [*times, time.perf_counter()]

    def close(self) -> None:
        for handle in self._handles:
            self._agent.release_xfer_handle(handle)
        self._agent.deregister_memory(self._registered)


class BareGlooEnd(End):
    """torch.distributed's gloo alone: one send and one receive a layer."""

    def __init__(self, exchange: Exchange, sends: bool, load: Load):
        import torch.distributed as dist

        super().__init__(sends, load)
        store = None if sends else dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        port = exchange(store.port if store else 0)
        self._store: Any = store or dist.TCPStore("127.0.0.1", port, 2, is_master=False)
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        self._group: Any = gloo(self._store, 0 if sends else 1, 2, options)

    def stream(self, request: int) -> list[float]:
        times = [time.perf_counter()]
        for layer in range(self.load.layers):
            buffer = [self.memory[layer % self.load.ring]]
            (self._group.send(buffer, 1, 0) if self.sends else self._group.recv(buffer, 0, 0)).wait()
            times.append(time.perf_counter())
        return [*times, time.perf_counter()]

    def close(self) -> None:
        self._group = self._store = None
