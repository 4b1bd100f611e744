"""What a rank does, from configuration to answers: the order of events of DESIGN, each line of which some bug taught.

    1. read the configuration, fail on anything wrong                     read_run
    2. open the mesh, make the socket, barrier: before weights            Link.between_ranks
    3. say hello: the same checkpoint and settings on both ranks?         _exchange_hellos
    4. load weights, warm up                                              _load_model
    5. prefill streams, decode answers                                    serve_prefill, DecodeServer
    6. synchronise, barrier, close                                        Link.close
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from loguru import logger

from disagg_tt.cache import BLOCK, PagedCache
from disagg_tt.config import LlamaConfig, Options
from disagg_tt.core import DECODE, PREFILL, Answer, Request, whole_tiles
from disagg_tt.decode import Decode, Token
from disagg_tt.device import features, ttnn
from disagg_tt.device.mesh import close_mesh, open_mesh, open_two
from disagg_tt.errors import CheckpointError, PromptError, StreamError
from disagg_tt.kv_stream.base import PrefillTimes
from disagg_tt.kv_stream.control import Control, LocalControl, Message, clock_offset, connect_ranks, expect
from disagg_tt.kv_stream.local import LocalSender
from disagg_tt.kv_stream.mesh_socket import MeshSocketReceiver, MeshSocketSender, socket_config
from disagg_tt.model import weights
from disagg_tt.model.checkpoint import Checkpoint, find_checkpoint
from disagg_tt.model.llama import Llama
from disagg_tt.perf import Timeline, decode_times, transfer_times
from disagg_tt.prefill import Prefill
from disagg_tt.prompt import Tokenizer, encode_prompts
from disagg_tt.tokens import Sampling, TextStream
from disagg_tt.watchdog import Watchdog

MAX_SLOTS = 32
BUSY_EVERY_S = 1.0

Emit = Callable[[dict[str, Any]], None]


@dataclass
class Run:
    """A run's configuration, checked: everything that needs no device."""

    options: Options
    checkpoint: Checkpoint
    config: LlamaConfig
    tokenizer: Tokenizer
    max_seq_len: int
    emit: Emit
    watchdog: Watchdog

    @property
    def sampling(self) -> Sampling:
        o = self.options
        return Sampling(temperature=o.temperature, top_p=o.top_p, top_k=o.top_k, seed=o.seed)

    def requests(self) -> list[Request]:
        """Return the prompts as requests; raises PromptError for one that is empty or too long."""
        encoded = encode_prompts(self.tokenizer, self.options.prompts, self.options.chat, self.max_seq_len)
        return [Request(i, tuple(tokens), self.options.max_new_tokens) for i, tokens in enumerate(encoded)]

    def text_stream(self, max_new_tokens: int) -> TextStream:
        o = self.options
        return TextStream(self.tokenizer, o.stop, self.config.eos_token_ids, max_new_tokens, o.ignore_eos)

    def tokens_a_slot(self, requests: list[Request]) -> int:
        """Return the tokens of the longest request with its answer, in whole tiles, at most the sequence limit."""
        longest = max(len(r.tokens) + r.max_new_tokens for r in requests)
        return whole_tiles(min(longest, self.max_seq_len))

    def slots(self, requests: int) -> int:
        return self.options.batch or min(requests, MAX_SLOTS)


def read_run(options: Options, emit: Emit, watchdog: Watchdog) -> Run:
    """Check the checkpoint and the limits; raises CheckpointError or PromptError before any device is touched."""
    checkpoint = Checkpoint.open(find_checkpoint(options.model))
    checkpoint.verify()
    config = checkpoint.config
    limit = options.max_seq_len or config.max_position_embeddings
    if limit > config.max_position_embeddings:
        raise PromptError(
            f"--max-seq-len is {limit}; this model's max_position_embeddings is {config.max_position_embeddings}, use at most that"
        )
    return Run(options, checkpoint, config, Tokenizer(checkpoint.path), limit, emit, watchdog)


# ---------------------------------------------------------------- the link between the two meshes


@dataclass
class Link:
    """One rank's mesh, its socket and its control channel."""

    mesh: Any
    socket: Any
    control: Control
    opened: Any  # what close_mesh must close; None when the other link closes it
    ranks: bool

    @classmethod
    def between_ranks(cls, role: str, shape: tuple[int, int], peer: int, queues: int) -> Link:
        """Open this rank's mesh and make its end of the socket; both ranks must do so within ttnn's 10 s."""
        ttnn.init_distributed_context()
        me = int(ttnn.distributed_context_get_rank())
        mesh = open_mesh(shape, queues=queues)
        sender, receiver = (me, peer) if role == PREFILL else (peer, me)
        socket = ttnn.MeshSocket(mesh, socket_config(*_as_row(shape), sender=sender, receiver=receiver))
        ttnn.distributed_context_barrier()
        other = DECODE if role == PREFILL else PREFILL
        control = connect_ranks(ttnn, me=me, peer=peer, peer_role=other, bind=role == PREFILL)
        return cls(mesh, socket, control, mesh, ranks=True)

    @classmethod
    def within_process(cls, shape: tuple[int, int], queues: int) -> tuple[Link, Link]:
        """Open one mesh that holds both and join its two submeshes."""
        parent, prefill, decode = open_two(shape, queues=queues)
        sender, receiver = ttnn.create_socket_pair(prefill, decode, socket_config(*shape))
        ours, theirs = LocalControl.pair()
        return cls(prefill, sender, ours, parent, ranks=False), cls(decode, receiver, theirs, None, ranks=False)

    def close(self) -> None:
        """Wait for the other rank to be done too, then close the control channel, the socket and the mesh."""
        if self.ranks:
            ttnn.synchronize_device(self.mesh)
            ttnn.distributed_context_barrier()
        self.control.close()
        self.socket = None
        if self.opened is not None:
            close_mesh(self.opened)


def _as_row(shape: tuple[int, int]) -> tuple[int, int]:
    return (1, shape[0] * shape[1]) if min(shape) > 1 else shape


def _exchange_hellos(run: Run, control: Control, requests: list[Request] | None) -> Message:
    """Compare what the two ranks run; return the other's hello. Raises CheckpointError or StreamError if they differ."""
    o = run.options
    settings = {
        "kv_dtype": o.kv_dtype,
        "weight_dtype": str(weights.weight_dtype(run.config, o.weight_dtype)),
        "direct": o.direct,
        "sampling": [o.temperature, o.top_p, o.top_k, o.seed],
    }
    count, tokens = (len(requests), run.tokens_a_slot(requests)) if requests else (0, 0)
    control.send("hello", digest=run.checkpoint.digest(), settings=settings, requests=count, tokens=tokens)
    theirs = expect(control, "hello", o.deadline_s, "comparing checkpoints")
    if theirs["digest"] != run.checkpoint.digest():
        raise CheckpointError(
            f"the two ranks load different checkpoints or tokenizers: this rank's digest is {run.checkpoint.digest()[:16]}, the "
            f"other's {theirs['digest'][:16]}; give both the same --model"
        )
    if theirs["settings"] != settings:
        raise StreamError(f"the two ranks run with different settings: {settings} here, {theirs['settings']} there")
    return theirs


def _load_model(run: Run, mesh: Any, role: str, tokens: int, beat: Callable[[], None]) -> Llama:
    """Load the weights and build the model for sequences of up to `tokens`; `beat` is called now and then."""

    def progress(layers: range) -> Iterator[int]:
        for layer in layers:
            run.emit({"event": "progress", "what": f"{role}: layers loaded", "done": layer, "total": len(layers)})
            beat()
            yield layer
        run.emit({"event": "progress", "what": f"{role}: layers loaded", "done": len(layers), "total": len(layers)})

    dtype = weights.weight_dtype(run.config, run.options.weight_dtype)
    loaded = weights.load(run.checkpoint, mesh, dtype, progress)
    return Llama(mesh, run.config, loaded, whole_tiles(tokens), getattr(ttnn, run.options.kv_dtype))


# ---------------------------------------------------------------- prefill


def serve_prefill(run: Run, link: Link, requests: list[Request], timeline: Timeline) -> Callable[[], list[Answer]]:
    """Prefill and stream all `requests`; return a function that waits for their answers."""
    control, o = link.control, run.options
    model = _load_model(run, link.mesh, PREFILL, run.tokens_a_slot(requests), lambda: control.send("busy"))
    layers = run.config.num_hidden_layers
    sender = MeshSocketSender(
        link.mesh, link.socket, control, layers, overlap=o.overlap, direct=o.direct, deadline_s=o.deadline_s
    )
    prefill = Prefill(model, sender, run.sampling, timeline)
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
        sender.close()
        found = {m["request"]: Answer(**m["answer"]) for m in messages}
        for number, count in sent.items():
            found[number].perf["kv_bytes_sent"] = count
        return [found[r.id] for r in requests]

    return answers


def _warm_up_prefill(run: Run, prefill: Prefill, requests: list[Request], beat: Callable[[], None]) -> None:
    lengths = sorted({whole_tiles(len(r.tokens)) for r in requests})
    if not features.compiles:
        lengths = lengths[:1]  # nothing to compile, only torch to wake
    for done, length in enumerate(lengths):
        run.emit({"event": "progress", "what": "prefill: programs compiled", "done": done, "total": len(lengths)})
        prefill.warm_up([length])
        beat()
    run.emit({"event": "progress", "what": "prefill: programs compiled", "done": len(lengths), "total": len(lengths)})


def _first_token_shower(run: Run, request: Request) -> Callable[[int], None]:
    def show(token: int) -> None:
        text = run.text_stream(request.max_new_tokens).push(token)
        run.emit({"event": "first_token", "request": request.id, "token": token, "text": text})

    return show


# ---------------------------------------------------------------- decode


class DecodeServer:
    """Turns control messages into reserved slots, received layers and, when all are here, decode steps."""

    def __init__(self, run: Run, link: Link, decode: Decode, receiver: MeshSocketReceiver, offset: float, timeline: Timeline):
        self.run, self.link, self.decode, self.receiver = run, link, decode, receiver
        self.offset, self.timeline = offset, timeline  # offset: the prefill rank's clock minus this one's, s
        self.ended = False
        self.answers: dict[int, Answer] = {}
        self._slot = 0
        self._announced_at = 0.0
        self._layers_sent: list[float] = []
        self._steps: dict[int, list[float]] = {}
        self._last_beat = time.monotonic()

    def serve(self) -> list[Answer]:
        """Handle messages until the prefill side says bye, then decode what runs; return the answers."""
        while not self.ended:
            while self.receiver.wait_for_layer():
                pass
            self.handle(self.link.control.receive(self.run.options.deadline_s, "the next request"))
        return self.finish()

    def finish(self) -> list[Answer]:
        """Decode until no slot is running and return all answers, by request."""
        while self.decode.running:
            self._step()
        return [self.answers[i] for i in sorted(self.answers)]

    def handle(self, message: Message) -> None:
        """Act on one control message."""
        kind = message["kind"]
        if kind == "announce":
            self._accept(message)
        elif kind == "layer":
            self._layers_sent.append(message["at"] - self.offset)
            self.receiver.receive_layer(message["layer"])
        elif kind == "sent":
            self._start(message)
        elif kind == "bye":
            self.ended = True
        elif kind != "busy":
            raise StreamError(f"the decode rank got a {kind!r} message, which only it sends")

    def _accept(self, message: Message) -> None:
        while len(self.decode.slots) == self.decode.cache.slots:
            self._step()
        self._announced_at = time.monotonic()
        self._layers_sent = []
        text = self.run.text_stream(message["max_new_tokens"])
        self._slot = self.decode.reserve(message["request"], message["tokens"], text)
        self.answers[message["request"]] = Answer(message["request"], message["tokens"])
        self._steps[message["request"]] = self.decode.slots[self._slot].steps
        self.receiver.accept(message["request"], message["tokens"], self._slot)

    def _start(self, message: Message) -> None:
        with self.run.watchdog.guard(f"the K/V of request {message['request']} to arrive"):
            metadata = self.receiver.finish()
        times = PrefillTimes(*(message[f] - self.offset for f in ("called_at", "started_at", "computed_at")))
        arrived, sent = self.receiver.arrived_at, self._layers_sent
        for layer, at in enumerate(arrived):
            self.timeline.add("arrive", sent[layer], at, layer=layer, request=metadata.request)
        perf = self.answers[metadata.request].perf
        perf |= {
            "request": metadata.request,
            "prompt_tokens": metadata.sequence_length,
            "prefill_ms": (times.computed_at - times.started_at) * 1e3,
            "ttft_ms": (times.computed_at - times.called_at) * 1e3,
            "kv_bytes": self.receiver.bytes_received,
            "receive_wait_ms": (sent[0] - self._announced_at) * 1e3,
            "receive_ms": (arrived[-1] - sent[0]) * 1e3,
            "end_to_end_ms": (max(arrived[-1], times.computed_at) - times.started_at) * 1e3,
            **transfer_times(sent[0], arrived[-1], times.computed_at),
        }
        if self.run.options.per_layer:
            start = times.started_at
            perf["layers"] = [((s - start) * 1e3, (a - start) * 1e3) for s, a in zip(sent, arrived, strict=True)]
        self._take(self.decode.start(self._slot, metadata.next_token), first=True)

    def _step(self) -> None:
        with self.run.watchdog.guard("a decode step"):
            tokens = self.decode.step()
        for token in tokens:
            self._take(token)
        if time.monotonic() - self._last_beat > BUSY_EVERY_S:
            self._last_beat = time.monotonic()
            self.link.control.send("busy")

    def _take(self, token: Token, first: bool = False) -> None:
        answer = self.answers[token.request]
        answer.tokens.append(token.token)
        answer.text += token.text
        self.run.emit({"event": "token", "request": token.request, "text": token.text, "first": first})
        if token.finish_reason is None:
            return
        answer.finish_reason = token.finish_reason
        answer.perf |= {"new_tokens": len(answer.tokens), **decode_times(self._steps[token.request], 1)}
        self.link.control.send("done", request=token.request, answer=vars(answer))


def build_decode_server(run: Run, link: Link, hello: Message, offset: float, timeline: Timeline) -> DecodeServer:
    """Load the decode mesh's model and cache for what the prefill side's `hello` announces."""
    slots = run.slots(hello["requests"])
    model = _load_model(run, link.mesh, DECODE, hello["tokens"], lambda: link.control.send("busy"))
    decode = Decode(model, _cache(run, link.mesh, slots, hello["tokens"]), run.sampling, timeline)
    decode.warm_up()
    link.control.send("busy")
    receiver = MeshSocketReceiver(link.mesh, link.socket, link.control, run.config, decode.cache, direct=run.options.direct)
    return DecodeServer(run, link, decode, receiver, offset, timeline)


def _cache(run: Run, mesh: Any, slots: int, tokens: int) -> PagedCache:
    pages = tokens // BLOCK
    return PagedCache(mesh, run.config, slots, pages, slots * pages, getattr(ttnn, run.options.kv_dtype))


# ---------------------------------------------------------------- the three ways to run


def run_rank(run: Run, role: str, shape: tuple[int, int], peer: int) -> list[Answer]:
    """Be one of two ranks; both return the answers, with the measurements of both."""
    queues = 2 if run.options.overlap == "queue" and role == PREFILL else 1
    requests = run.requests() if role == PREFILL else None
    run.config.check_mesh(shape[0] * shape[1])
    link = Link.between_ranks(role, shape, peer, queues)
    timeline = Timeline(role)
    try:
        hello = _exchange_hellos(run, link.control, requests)
        offset = clock_offset(link.control, run.options.deadline_s, asks=role == DECODE)
        if requests is not None:
            answers = serve_prefill(run, link, requests, timeline)()
        else:
            answers = build_decode_server(run, link, hello, offset, timeline).serve()
    except Exception as error:
        _tell_peer(link.control, error)
        raise
    link.close()
    _emit_trace(run, timeline, offset)
    return answers


def _tell_peer(control: Control, error: Exception) -> None:
    try:
        control.send("failed", reason=str(error)[:4000])
    except Exception as lost:
        logger.debug("the other rank could not be told: {}", lost)
    control.close()


def run_one_process(run: Run, shape: tuple[int, int]) -> list[Answer]:
    """Be both ranks: two submeshes of one mesh in one process, without MPI."""
    requests = run.requests()
    run.config.check_mesh(shape[0] * shape[1])
    ours, theirs = Link.within_process(shape, 2 if run.options.overlap == "queue" else 1)
    lines = Timeline(PREFILL), Timeline(DECODE)
    hello = {"requests": len(requests), "tokens": run.tokens_a_slot(requests)}
    server = build_decode_server(run, theirs, hello, 0.0, lines[1])
    theirs.control.handler = server.handle  # type: ignore[attr-defined]
    collect = serve_prefill(run, ours, requests, lines[0])
    server.finish()
    answers = collect()
    theirs.close()
    ours.close()
    for line in lines:
        _emit_trace(run, line, 0.0)
    return answers


def run_single_mesh(run: Run, shape: tuple[int, int]) -> list[Answer]:
    """Prefill and decode on one mesh: the baseline. No stream; everything else alike."""
    requests = run.requests()
    run.config.check_mesh(shape[0] * shape[1])
    mesh = open_mesh(shape)
    timeline = Timeline("single mesh")
    tokens, slots = run.tokens_a_slot(requests), run.slots(len(requests))
    model = _load_model(run, mesh, "single mesh", tokens, lambda: None)
    cache = _cache(run, mesh, slots, tokens)
    decode = Decode(model, cache, run.sampling, timeline)
    sender = LocalSender(run.config.num_hidden_layers, cache)
    prefill = Prefill(model, sender, run.sampling, timeline)
    _warm_up_prefill(run, prefill, requests, lambda: None)
    decode.warm_up()
    answers = {r.id: Answer(r.id, len(r.tokens), perf={"request": r.id, "prompt_tokens": len(r.tokens)}) for r in requests}
    steps: dict[int, list[float]] = {}

    def take(token: Token, first: bool = False) -> None:
        answer = answers[token.request]
        answer.tokens.append(token.token)
        answer.text += token.text
        run.emit({"event": "token", "request": token.request, "text": token.text, "first": first})
        if token.finish_reason is not None:
            answer.finish_reason = token.finish_reason
            answer.perf |= {"new_tokens": len(answer.tokens), **decode_times(steps[token.request], 1)}

    for request in requests:
        while len(decode.slots) == slots:
            for token in decode.step():
                take(token)
        started = time.monotonic()
        sender.slot = decode.reserve(request.id, len(request.tokens), run.text_stream(request.max_new_tokens))
        steps[request.id] = decode.slots[sender.slot].steps
        first: list[int] = []
        prefill.run(request, first.append)
        taken = (time.monotonic() - started) * 1e3
        answers[request.id].perf |= {"prefill_ms": taken, "ttft_ms": taken}
        take(decode.start(sender.slot, first[0]), first=True)
    while decode.running:
        for token in decode.step():
            take(token)
    close_mesh(mesh)
    _emit_trace(run, timeline, 0.0)
    return [answers[r.id] for r in requests]


def _emit_trace(run: Run, timeline: Timeline, offset: float) -> None:
    if run.options.trace:
        run.emit({"event": "trace", "events": timeline.trace_events(offset)})
