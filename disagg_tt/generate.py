"""What a rank does, from configuration to answers: the order of events of the design, each line of which some bug taught.

1. read the configuration, fail on anything wrong          run.read_run
2. open the mesh, make the socket, barrier                 Link.between_ranks, Link.between_programs
3. say hello: same checkpoint and settings on both?        exchange_hellos, then Link.open_wire if there is no socket
4. load weights, warm up                                   run.load_model
5. prefill streams, decode answers                         serve_prefill, DecodeServer
6. synchronise, barrier, close                             Link.close
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from loguru import logger

from disagg_tt.core import DECODE, PREFILL, Answer, Request, whole_tiles
from disagg_tt.decode import Decode
from disagg_tt.decode_server import DecodeServer
from disagg_tt.device import features
from disagg_tt.device.mesh import close_mesh, open_mesh
from disagg_tt.kv_stream.control import Control, Message, clock_offset, expect
from disagg_tt.kv_stream.local import LocalSender
from disagg_tt.link import Link, exchange_hellos
from disagg_tt.perf import Timeline
from disagg_tt.prefill import Prefill
from disagg_tt.report import in_pieces
from disagg_tt.run import Answers, Run


def run_rank(run: Run, role: str, shape: tuple[int, int], peer: int) -> list[Answer]:
    """Be one of two ranks, or of two programs; both return the answers, with the measurements of both."""
    o = run.options
    queues = 2 if o.overlap == "queue" and role == PREFILL else 1
    requests = run.requests() if role == PREFILL else None
    run.config.check_mesh(shape[0] * shape[1])
    if requests is not None:
        run.check_memory(shape[0] * shape[1], requests)
    trace = o.enable_trace and role == DECODE
    if o.kv_transfer is not None:
        link = Link.between_programs(o, shape, trace=trace)
    else:
        sockets = o.transport == "mesh_socket"
        link = Link.between_ranks(role, shape, peer, sockets=sockets, queues=queues, trace=trace)
    timeline = Timeline(role)
    try:
        hello = exchange_hellos(run, link.control, requests)
        offset = clock_offset(link.control, o.deadline_s, asks=role == DECODE)
        link.open_wire(o, role, peer)
        if requests is not None:
            answers = serve_prefill(run, link, requests, timeline)()
        else:
            answers = decode_server(run, link, hello, offset, timeline).serve()
    except Exception as error:
        tell_peer(link.control, error)
        link.close_stream()
        raise
    link.close()
    _emit_trace(run, timeline, offset)
    return answers


def tell_peer(control: Control, error: Exception) -> None:
    """Tell the other rank, if it is still there, why this one ends, and close the channel."""
    try:
        control.send("failed", reason=str(error)[:4000])
    except Exception as lost:
        logger.debug("the other rank could not be told: {}", lost)
    control.close()


def run_one_process(run: Run, shape: tuple[int, int]) -> list[Answer]:
    """Be both ranks: two submeshes of one mesh in one process, without MPI."""
    requests = run.requests()
    run.check_memory(shape[0] * shape[1], requests)
    o = run.options
    queues = 2 if o.overlap == "queue" else 1
    ours, theirs = Link.within_process(shape, queues=queues, trace=o.enable_trace)
    lines = Timeline(PREFILL), Timeline(DECODE)
    hello = {"requests": len(requests), "tokens": run.tokens_a_slot(requests)}
    try:
        server = decode_server(run, theirs, hello, 0.0, lines[1])
        theirs.control.handler = server.handle  # type: ignore[attr-defined]
        collect = serve_prefill(run, ours, requests, lines[0])
        server.finish()
        answers = collect()
    finally:
        theirs.close()
        ours.close()
    for line in lines:
        _emit_trace(run, line, 0.0)
    return answers


def serve_prefill(
    run: Run, link: Link, requests: list[Request], timeline: Timeline
) -> Callable[[], list[Answer]]:
    """Prefill and stream all `requests`; return a function that waits for their answers."""
    control, o = link.control, run.options
    model = run.load_model(link.mesh, PREFILL, run.tokens_a_slot(requests), lambda: control.send("busy"))
    sender = link.sender(run, run.tokens_a_slot(requests))
    prefill = Prefill(model, sender, run.sampling, timeline, run.watchdog.guard)
    _warm_up_prefill(run, prefill, requests, lambda: control.send("busy"))
    sent: dict[int, int] = {}
    for request in requests:
        show = _first_token_shower(run, request)
        sent[request.id] = prefill.run(request, show)
    control.send("bye")

    def answers() -> list[Answer]:
        messages = sender.done
        while len(messages) < len(requests):
            messages.append(expect(control, "done", o.deadline_s, "the answers of the decode rank"))
        found = {m["request"]: Answer(**m["answer"]) for m in messages}
        for number, count in sent.items():
            found[number].perf["kv_bytes_sent"] = count
        return [found[r.id] for r in requests]

    return answers


def _warm_up_prefill(
    run: Run, prefill: Prefill, requests: list[Request], beat: Callable[[], None] = lambda: None
) -> None:
    lengths = sorted({whole_tiles(len(r.tokens)) for r in requests})
    if not features.compiles:
        lengths = lengths[:1]  # nothing to compile, only torch to wake
    for done, length in enumerate(lengths):
        run.progress("prefill: programs compiled", done, len(lengths))
        prefill.warm_up(length)
        beat()
    run.progress("prefill: programs compiled", len(lengths), len(lengths))


def _first_token_shower(run: Run, request: Request) -> Callable[[int], None]:
    def show(token: int) -> None:
        text = run.text_stream(request.max_new_tokens).push(token)
        run.emit({"event": "first_token", "request": request.id, "token": token, "text": text})

    return show


def decode_server(run: Run, link: Link, hello: Message, offset: float, timeline: Timeline) -> DecodeServer:
    """Load the decode mesh's model and cache for what the prefill side's `hello` announces."""
    control, slots = link.control, run.slots(hello["requests"])
    model = run.load_model(link.mesh, DECODE, hello["tokens"], lambda: control.send("busy"))
    cache = run.cache(link.mesh, slots, hello["tokens"])
    decode = Decode(model, cache, run.sampling, timeline, run.options.enable_trace)
    decode.warm_up()
    control.send("busy")
    receiver = link.receiver(run, cache, hello["tokens"])
    return DecodeServer(run, link, decode, receiver, offset, timeline)


def run_single_mesh(run: Run, shape: tuple[int, int]) -> list[Answer]:
    """Prefill and decode on one mesh: the baseline. No stream; everything else alike."""
    requests = run.requests()
    run.config.check_mesh(shape[0] * shape[1])
    mesh = open_mesh(shape, trace=run.options.enable_trace)
    timeline = Timeline("single mesh")
    try:
        answers = _answer_on(mesh, run, requests, timeline)
    finally:
        close_mesh(mesh)
    _emit_trace(run, timeline, 0.0)
    return answers


def _answer_on(mesh: Any, run: Run, requests: list[Request], timeline: Timeline) -> list[Answer]:
    answers = Answers(run.emit)
    tokens, slots = run.tokens_a_slot(requests), run.slots(len(requests))
    model = run.load_model(mesh, "single mesh", tokens)
    cache = run.cache(mesh, slots, tokens)
    decode = Decode(model, cache, run.sampling, timeline, run.options.enable_trace)
    sender = LocalSender(run.config.num_hidden_layers, decode.cache)
    prefill = Prefill(model, sender, run.sampling, timeline)
    _warm_up_prefill(run, prefill, requests)
    decode.warm_up()

    def step() -> None:
        for token in decode.step():
            answers.take(token)

    for request in requests:
        while len(decode.slots) == slots:
            step()
        started = time.monotonic()
        text = run.text_stream(request.max_new_tokens)
        slot = decode.reserve(request.id, len(request.tokens), text)
        sender.row = decode.table_row(slot)
        answers.open(request.id, len(request.tokens), decode.slots[slot].steps)
        first: list[int] = []
        prefill.run(request, first.append)
        taken = (time.monotonic() - started) * 1e3
        answers.by_request[request.id].perf |= {"prefill_ms": taken, "ttft_ms": taken}
        answers.take(decode.start(slot, first[0]), first=True)
    while decode.running:
        step()
    decode.close()
    return answers.in_order()


def _emit_trace(run: Run, timeline: Timeline, offset: float) -> None:
    if run.options.trace:
        for events in in_pieces(timeline.trace_events(offset)):
            run.emit({"event": "trace", "events": events})
