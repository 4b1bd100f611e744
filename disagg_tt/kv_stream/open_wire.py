"""Joining the wire that `--transport` names: the decode end listens, and says over the control channel where."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path
from typing import Any

from disagg_tt.config import Options
from disagg_tt.errors import InputError
from disagg_tt.kv_stream.control import Control, expect, own_host
from disagg_tt.kv_stream.host_wire import WireReceiver, WireSender

Wire = WireSender | WireReceiver


def open_receiver(o: Options, control: Control, peer: int) -> WireReceiver:
    """Return the decode end, and tell the prefill end where it is. Raises InputError where it cannot listen."""
    if o.transport == "mpi" and o.kv_transfer is None:
        from disagg_tt.kv_stream.mpi import MpiReceiver

        return MpiReceiver(_communicator(), peer, deadline_s=o.deadline_s)
    if o.transport == "torch":
        from disagg_tt.kv_stream.torch_distributed import TorchReceiver

        host = own_host()
        port = _free_port(host)
        control.send("wire", host=host, port=port, token="")
        return TorchReceiver(host, port, deadline_s=o.deadline_s)
    kind = _ends(o.transport)[1]
    ours, token = o.kv_transfer, ""
    if ours is not None:
        wire = kind(
            ours.kv_ip, ours.kv_port, token=ours.kv_token, deadline_s=o.deadline_s, verify=ours.verify
        )
    else:
        token = secrets.token_hex(16)
        wire = kind(own_host(), token=token, deadline_s=o.deadline_s)
    # Programs have their token already: it does not travel.
    control.send("wire", host="" if ours else own_host(), port=wire.port, token=token)
    return wire


def open_sender(o: Options, control: Control, peer: int) -> WireSender:
    """Return the prefill end. Raises PeerError when the decode end does not listen."""
    if o.transport == "mpi" and o.kv_transfer is None:
        from disagg_tt.kv_stream.mpi import MpiSender

        return MpiSender(_communicator(), peer, deadline_s=o.deadline_s)
    told = expect(control, "wire", o.deadline_s, "where the decode end listens")
    settings: dict[str, Any] = {"deadline_s": o.deadline_s}
    if o.transport == "torch":
        from disagg_tt.kv_stream.torch_distributed import TorchSender

        return TorchSender(told["host"], told["port"], **settings)
    ours = o.kv_transfer
    host = ours.kv_ip if ours else told["host"]
    settings["token"] = ours.kv_token if ours else told["token"]
    if ours is not None:
        settings["verify"] = ours.verify
    if o.transport == "nixl":
        settings["lease_s"] = o.deadline_s
    return _ends(o.transport)[0](host, told["port"], **settings)


def _ends(transport: str) -> tuple[type[Any], type[Any]]:
    """Return the sender and the receiver of a wire that listens at a host and a port, with a token."""
    if transport == "nixl":
        from disagg_tt.kv_stream.nixl import NixlReceiver, NixlSender

        return NixlSender, NixlReceiver
    if transport == "mpi":
        from disagg_tt.kv_stream.mpi_programs import MpiProgramReceiver, MpiProgramSender

        return MpiProgramSender, MpiProgramReceiver
    from disagg_tt.kv_stream.tcp import TcpReceiver, TcpSender

    return TcpSender, TcpReceiver


def _communicator() -> Any:
    """Return the ranks' communicator for the wire alone: its messages cannot be taken for others'.

    Raises InputError under a ttnn wheel, whose MPI library, which has joined the job, mpi4py cannot use.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/libmpi-" in line:  # as wheels rename what they bring
            raise InputError(
                f"--transport mpi: this ttnn has an MPI library of its own ({line.split()[-1]}) that mpi4py cannot share; use "
                "tcp, nixl or torch, or a ttnn built against the system's Open MPI"
            )
    from mpi4py import MPI

    return MPI.COMM_WORLD.Dup()


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
