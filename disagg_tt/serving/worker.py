"""A worker's process: opens its mesh and links, loads the model, joins the hub, and serves until the hub is gone.

in a job of MPI's   the ranks of a rank binding, each pair of a prefill and a decode rank joined before weights are loaded
by hand             one worker, over tcp or nixl; the hub brings it together with the others as they come and go
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from loguru import logger

from disagg_tt.blocks import BLOCK
from disagg_tt.cache import PagedCache
from disagg_tt.config import Options
from disagg_tt.core import DECODE, PREFILL, whole_tiles
from disagg_tt.device import ttnn
from disagg_tt.device.mesh import close_mesh, open_mesh
from disagg_tt.errors import PlanError
from disagg_tt.kv_stream.control import clock_offset, connect_ranks
from disagg_tt.kv_stream.mesh_socket import socket_config
from disagg_tt.link import Link, as_row
from disagg_tt.model import weights
from disagg_tt.plan import Setup, default_weight_dtype, serving_blocks
from disagg_tt.processes import signals_call, signals_raise
from disagg_tt.rank import Seat, be_rank, mesh_shape_of
from disagg_tt.report import configure_logging
from disagg_tt.run import Run, read_run
from disagg_tt.serving.connection import Connection
from disagg_tt.serving.decode_rank import DecodeRank
from disagg_tt.serving.meeting import Meeting
from disagg_tt.serving.prefill_rank import PrefillRank
from disagg_tt.serving.rank import CHUNK
from disagg_tt.watchdog import Watchdog

PREFILL_SEQUENCES = 8  # of full length, that a prefill rank's cache holds: for prefixes that return


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker is told. hub: its address. token: what both must know, "" on loopback. slots: requests at once.

    blocks: of cache, None for `slots` sequences of full length. listen: the address at which prefill workers that were
    started by hand find a decode worker.
    """

    options: Options
    hub: str
    token: str = ""
    slots: int = 32
    blocks: int | None = None
    prefix_caching: bool = True
    listen: str = "127.0.0.1"


def rank_main(w: WorkerOptions) -> int:
    """Serve as one rank of a job that MPI started; return its exit code."""
    return be_rank(lambda seat: _serve_in_job(w, seat), w.options.deadline_s, lambda event: None, pair=False)


def _serve_in_job(w: WorkerOptions, seat: Seat) -> None:
    o = w.options
    run = read_run(o, seat.emit, seat.watchdog)
    shape = mesh_shape_of(os.environ, o.rank_binding)
    run.config.check_mesh(shape[0] * shape[1])
    ttnn.init_distributed_context()
    me = int(ttnn.distributed_context_get_rank())
    roles = [(PREFILL, DECODE)[i] for i in ttnn.distributed_context_allgather_int(int(seat.role == DECODE))]
    with ExitStack() as closing:
        mesh = open_mesh(shape, queues=2 if o.overlap == "queue" else 1, trace=o.enable_trace)
        closing.callback(close_mesh, mesh)
        links = _join_ranks(run, mesh, shape, me, roles)
        hub = Connection(w.hub, w.token, o.deadline_s)
        closing.callback(hub.close)
        rank = _rank(w, run, mesh, seat.role, hub)
        closing.callback(rank.close)
        for peer, (link, offset) in links.items():
            name = f"{roles[peer]}-{peer}"
            closing.callback(link.close_stream)
            if isinstance(rank, PrefillRank):
                rank.add_link(name, link)
            else:
                rank.add_link(name, link, offset)
        _go(run, rank, f"{seat.role}-{me}", in_job=True)


def hand_main(w: WorkerOptions, role: str, name: str) -> int:
    """Serve as a worker of its own that was started by hand; return its exit code."""
    configure_logging(role)
    o = w.options
    watchdog = Watchdog(o.deadline_s, _give_up)
    run = read_run(o, lambda event: None, watchdog)
    shape = mesh_shape_of(os.environ, o.rank_binding)
    run.config.check_mesh(shape[0] * shape[1])
    with ExitStack() as closing, signals_raise():
        closing.callback(watchdog.close)
        hub = Connection(w.hub, w.token, o.deadline_s)
        closing.callback(hub.close)
        mesh = open_mesh(shape, trace=o.enable_trace)
        closing.callback(close_mesh, mesh)
        rank = _rank(w, run, mesh, role, hub)
        closing.callback(rank.close)
        rank.meet = Meeting(run, mesh, role, w.token, w.listen)
        closing.callback(rank.meet.close)
        closing.enter_context(signals_call(rank.stop))
        _go(run, rank, name, in_job=False)
        logger.info("{} leaves", name)
    return 0


def _give_up(what: str) -> None:
    logger.error("{} did not happen in time; the device hangs (--deadline-s sets the limit)", what)
    os._exit(1)


def _join_ranks(
    run: Run, mesh: Any, shape: tuple[int, int], me: int, roles: list[str]
) -> dict[int, tuple[Link, float]]:
    """Join this rank with all of the other role; return its links, and each peer's clock minus this one's, by rank.

    All ranks go through the pairs in the same order, so that nobody waits for one that waits for another.
    """
    o = run.options
    pairs = [(p, d) for p, its in enumerate(roles) for d, theirs in enumerate(roles) if (its, theirs) == (PREFILL, DECODE)]  # fmt: skip
    sockets: dict[int, Any] = {}
    mine = [pair for pair in pairs if me in pair]
    if o.transport == "mesh_socket":
        if len(mine) > 1:
            logger.warning(
                "this rank has {} MeshSockets; several corrupted data on hardware (tt-metal#48757): check the answers, or use "
                "--transport tcp",
                len(mine),
            )
        for p, d in mine:
            config = socket_config(*as_row(shape), sender=p, receiver=d)
            sockets[d if me == p else p] = ttnn.MeshSocket(mesh, config)
    ttnn.distributed_context_barrier()
    links = {}
    for p, d in mine:
        peer = d if me == p else p
        control = connect_ranks(ttnn, me=me, peer=peer, peer_role=roles[peer], bind=me == p)
        link = Link(mesh, control, None, ranks=True, socket=sockets.get(peer))
        offset = clock_offset(control, o.deadline_s, asks=me == d)
        link.open_wire(o, roles[me], peer)
        links[peer] = (link, offset)
    return links


def _rank(w: WorkerOptions, run: Run, mesh: Any, role: str, hub: Connection) -> PrefillRank | DecodeRank:
    """Load the model and make the rank, its cache of the size that its role needs and its chips have room for."""
    o, tokens = run.options, whole_tiles(run.max_seq_len)
    slots, each = 1 if role == PREFILL else w.slots, tokens // BLOCK
    weight_dtype = o.weight_dtype or default_weight_dtype(run.config)
    setup = Setup(run.config, mesh.get_num_devices(), weight_dtype, o.kv_dtype, slots, tokens)
    most = serving_blocks(setup, CHUNK)
    blocks = w.blocks or min(most, each * (PREFILL_SEQUENCES if role == PREFILL else slots))
    if not each <= blocks <= most:
        raise PlanError(
            f"--num-blocks is {blocks:,}; allowed are {each:,} (one sequence of {tokens:,} tokens) to {most:,} (what a chip has "
            "room for)"
        )
    model = run.load_model(mesh, role, tokens)
    cache = PagedCache(mesh, run.config, slots, each, blocks, getattr(ttnn, o.kv_dtype))
    if role == PREFILL:
        return PrefillRank(model, cache, run, hub, prefix_caching=w.prefix_caching)
    return DecodeRank(model, cache, run, hub, prefix_caching=w.prefix_caching)


def _go(run: Run, rank: PrefillRank | DecodeRank, name: str, *, in_job: bool) -> None:
    """Warm up, register and serve."""
    rank.warm_up()
    o = run.options
    dtype = str(weights.weight_dtype(run.config, o.weight_dtype))
    rank.register(
        name, {"kv_dtype": o.kv_dtype, "weight_dtype": dtype, "transport": o.transport}, in_job=in_job
    )
    logger.info("{} serves", name)
    rank.serve()
