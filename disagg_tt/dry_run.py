"""A rank of `disagg-tt check`: what `generate` does, with weights of undefined content and prompts of given lengths."""

from __future__ import annotations

import argparse
import os
import statistics
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from disagg_tt.cache import BLOCK
from disagg_tt.check import REPEATS, Rows, batches_of, lengths_of, setup_of
from disagg_tt.config import LlamaConfig, Options
from disagg_tt.core import PREFILL, Answer, Request
from disagg_tt.decode import Decode
from disagg_tt.device import kind, ttnn
from disagg_tt.errors import DeviceError
from disagg_tt.generate import decode_server, serve_prefill, tell_peer
from disagg_tt.kv_stream.control import START_UP_S, expect
from disagg_tt.link import Link
from disagg_tt.model import weights
from disagg_tt.model.llama import Llama
from disagg_tt.perf import Timeline
from disagg_tt.plan import Setup
from disagg_tt.rank import Seat, be_rank, mesh_shape_of
from disagg_tt.run import Emit, Run
from disagg_tt.tokens import TextStream
from disagg_tt.watchdog import Watchdog


class _NoText:
    """A tokenizer to which no token is text."""

    def decode(self, ids: Sequence[int]) -> str:
        return ""


class DryRun(Run):
    """A run that needs no checkpoint and no tokenizer; `stage` says, for an error, how far it is."""

    def __init__(self, setup: Setup, lengths: list[int], options: Options, emit: Emit, watchdog: Watchdog):
        self.setup, self.lengths, self.options, self.emit, self.watchdog = (
            setup,
            lengths,
            options,
            emit,
            watchdog,
        )
        self.config: LlamaConfig = setup.config
        self.max_seq_len = setup.tokens
        self.stage = "opening the mesh"

    def requests(self) -> list[Request]:
        """One prompt of each length; the longest of up to 2,048 tokens is repeated, to be timed."""
        timed = max(n for n in self.lengths if n <= 2048)
        lengths = sorted([*self.lengths, *[timed] * REPEATS])
        return [Request(i, (1,) * n, 2) for i, n in enumerate(lengths)]

    def load_model(self, mesh: Any, role: str, tokens: int, beat: Callable[[], None] = lambda: None) -> Llama:
        """Allocate the weights on `mesh`, load nothing."""
        self.stage = f"{role}: allocating weights"
        empty = weights.allocate(self.config, mesh, getattr(ttnn, self.setup.weight_dtype))
        return Llama(mesh, self.config, empty, tokens, getattr(ttnn, self.setup.kv_dtype))

    def text_stream(self, max_new_tokens: int) -> TextStream:
        return TextStream(_NoText(), (), (), max_new_tokens, ignore_eos=True)

    def progress(self, what: str, done: int, total: int) -> None:
        self.stage = f"{what}, {done} of {total}"
        super().progress(what, done, total)

    def row(self, section: str, what: str, times_ms: list[float], unit: str, amount: int) -> None:
        """Report that something was accepted, with the median of its times."""
        ms = statistics.median(times_ms)
        self.emit(
            {"event": "row", "section": section, "what": what, "ms": ms, "unit": unit, "amount": amount}
        )


def check_rank(arguments: argparse.Namespace) -> int:
    """Be one rank of the dry run; return its exit code."""

    def work(seat: Seat) -> None:
        shape = mesh_shape_of(os.environ, arguments.rank_binding)
        setup = setup_of(arguments, shape[0] * shape[1])
        lengths = lengths_of(setup.tokens if arguments.max_seq_len is None else arguments.max_seq_len, kind)
        options = Options(kv_dtype=setup.kv_dtype, weight_dtype=setup.weight_dtype, batch=setup.slots)
        run = DryRun(setup, lengths, options, seat.emit, seat.watchdog)
        try:
            dry_run(run, seat, shape, batches_of(setup, arguments.batch))
        except (RuntimeError, DeviceError) as error:  # ttnn and the emulator refuse a call
            raise DeviceError(f"{run.stage}, in {_caller(error)}: {_message(error)}") from error

    return be_rank(work, Options.deadline_s, Rows())


def _message(error: Exception) -> str:
    """Return what ttnn says before its backtrace, in one line."""
    return " ".join(str(error).split("backtrace:")[0].split())


def _caller(error: Exception) -> str:
    """Return the last line of the program, not of the device, that `error` came through, as file:line."""
    here = Path(__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        f
        for f in frames
        if here in (path := Path(f.filename)).parents and here / "device" not in path.parents
    ]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"


def dry_run(run: DryRun, seat: Seat, shape: tuple[int, int], batches: list[Setup]) -> None:
    """Open, prefill and stream or receive, decode `batches`, close."""
    link = Link.between_ranks(seat.role, shape, seat.peer, queues=1)
    timeline, requests = Timeline(seat.role), run.requests()
    try:
        if seat.role == PREFILL:
            _report_prefill(run, requests, serve_prefill(run, link, requests, timeline)())
            # Not in the barrier of close, which spins: what the other rank measures would suffer.
            expect(link.control, "bye", START_UP_S, "decoding the batches")
        else:
            hello = {"requests": len(requests), "tokens": run.setup.tokens}
            model = _receive(run, link, hello, timeline)
            for batch in batches:
                _decode(run, model, batch, timeline)
                link.control.send("busy")
            link.control.send("bye")
    except Exception as error:
        tell_peer(link.control, error)
        raise
    link.close()


def _report_prefill(run: DryRun, requests: list[Request], answers: list[Answer]) -> None:
    sends = 2 * run.config.num_hidden_layers
    for length in run.lengths:
        perfs = [a.perf for r, a in zip(requests, answers, strict=True) if len(r.tokens) == length]
        run.row(
            f"prefill and {sends} sends",
            f"{length:6,} tokens" + (f", median of {len(perfs)}" if len(perfs) > 1 else ""),
            [perf["prefill_ms"] for perf in perfs],
            "bytes on the wire",
            perfs[0]["kv_bytes_sent"],
        )


def _receive(run: DryRun, link: Link, hello: dict[str, int], timeline: Timeline) -> Llama:
    """Take all prompts and decode a step of each; return the model, whose cache is free again."""
    server = decode_server(run, link, hello, 0.0, timeline)
    server.serve()
    link.stream = None  # else its cache stays, and the batches need the room
    return server.decode.batch.model


def _decode(run: DryRun, model: Llama, batch: Setup, timeline: Timeline) -> None:
    """Decode the last steps of `batch.slots` full slots and report their median."""
    run.stage = f"decode step, batch {batch.slots} of {batch.tokens} tokens"
    steps = REPEATS + 1
    decode = Decode(model, run.cache(model.mesh, batch.slots, batch.tokens), run.sampling, timeline)
    decode.warm_up()
    prompt = batch.tokens - steps - 1
    for slot in range(batch.slots):
        decode.reserve(slot, prompt, run.text_stream(batch.tokens))
        decode.start(slot, 1)
    times = decode.slots[0].steps
    for _ in range(steps):
        decode.step()
    name = f"batch {batch.slots:2d} of {batch.tokens:6,} tokens"
    run.row(
        "decode step",
        f"{name}, median of {REPEATS}",
        [t * 1e3 for t in times[1:]],
        "blocks of cache",
        batch.slots * batch.tokens // BLOCK,
    )
