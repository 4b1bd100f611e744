"""The decode rank's answer to control messages: slots reserved, layers received, and, when all are here, decode steps."""

from __future__ import annotations

import time

from disagg_tt.core import Answer
from disagg_tt.decode import Decode, Token
from disagg_tt.errors import StreamError
from disagg_tt.kv_stream.base import KVReceiver, PrefillTimes
from disagg_tt.kv_stream.control import START_UP_S, Message
from disagg_tt.link import Link
from disagg_tt.perf import Timeline, transfer_times
from disagg_tt.run import Answers, Run

BUSY_EVERY_S = 1.0


class DecodeServer:
    """Turns control messages into reserved slots, received layers and, when all are here, decode steps."""

    def __init__(
        self,
        run: Run,
        link: Link,
        decode: Decode,
        receiver: KVReceiver,
        offset: float,
        timeline: Timeline,
    ):
        self.run, self.link, self.decode, self.receiver = run, link, decode, receiver
        self.offset, self.timeline = offset, timeline  # offset: the prefill rank's clock minus this one's, s
        self.ended = False
        self.answers = Answers(run.emit)
        self._slot = 0
        self._announced_at = 0.0
        self._layers_sent: list[float] = []
        self._last_beat = time.monotonic()

    def serve(self) -> list[Answer]:
        """Handle messages until the prefill side says bye, then decode what runs; return the answers."""
        limit = max(START_UP_S, self.run.options.deadline_s)  # the prefill rank may still be compiling
        while not self.ended:
            with self.run.watchdog.guard("an announced layer to arrive"):
                while self.receiver.wait_for_layer():
                    pass
            self.handle(self.link.control.receive(limit, "the next request"))
            if self.decode.slots:
                limit = self.run.options.deadline_s
        return self.finish()

    def finish(self) -> list[Answer]:
        """Decode until no slot is running and return all answers, by request."""
        while self.decode.running:
            self._step()
        self.decode.close()
        return self.answers.in_order()

    def handle(self, message: Message) -> None:
        """Act on one control message."""
        kind, streaming = message["kind"], self.receiver.stream.request
        if kind in ("layer", "sent") and message["request"] != streaming:
            raise StreamError(
                f"a {kind!r} message of request {message['request']} while {streaming} is streaming"
            )
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
        self.answers.open(message["request"], message["tokens"], self.decode.slots[self._slot].steps)
        self.receiver.accept(message["request"], message["tokens"], self.decode.table_row(self._slot))

    def _start(self, message: Message) -> None:
        with self.run.watchdog.guard(f"the K/V of request {message['request']} to arrive"):
            metadata = self.receiver.finish()
        times = PrefillTimes(*(message[f] - self.offset for f in ("called_at", "started_at", "computed_at")))
        arrived, sent = self.receiver.arrived_at, self._layers_sent
        for layer, at in enumerate(arrived):
            self.timeline.add("arrive", sent[layer], at, layer=layer, request=metadata.request)
        perf = self.answers.by_request[metadata.request].perf
        perf |= {
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
            perf["layers"] = [
                ((s - start) * 1e3, (a - start) * 1e3) for s, a in zip(sent, arrived, strict=True)
            ]
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
        answer = self.answers.take(token, first)
        if answer is not None:
            self.link.control.send("done", request=token.request, answer=vars(answer))
