"""The processes of a deployment: the server's own, and beside it the job of ranks, which it outlives.

    serve ──┬── HTTP server, frontend, router, hub      in this process
            └── worker --rank-binding ... ── mpirun or tt-run ── rank 0, rank 1, ...

When the job ends, the server stays, says so in /health, and starts the job again; generations in flight go on when the
ranks are back. On Ctrl-C or SIGTERM everything is ended, the ranks first told to stop.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from loguru import logger

from disagg_tt.errors import PeerError
from disagg_tt.model.checkpoint import Checkpoint, find_checkpoint
from disagg_tt.processes import tied
from disagg_tt.prompt import Tokenizer
from disagg_tt.report import configure_logging
from disagg_tt.serving.commands import ServerOptions
from disagg_tt.serving.frontend import Frontend
from disagg_tt.serving.hub import Hub
from disagg_tt.serving.router import Router
from disagg_tt.serving.server import Served, create_app
from disagg_tt.serving.web import listen, serving
from disagg_tt.transfer_config import TOKEN_VARIABLE

MOST_FAILED_STARTS = 3  # in a row, without a rank that serves
STOP_S = 15.0  # for the ranks to end when told to
BROKEN_S = 5.0  # for a job that has lost a rank to end by itself, and say why


def run_proxy(server: ServerOptions) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code."""
    configure_logging("proxy")
    return asyncio.run(_proxy(server))


def run_serve(server: ServerOptions, rank_binding: str | None, rank_words: list[str]) -> int:
    """Serve, with the ranks of `rank_binding`, until SIGINT or SIGTERM; return the exit code."""
    from disagg_tt.rank_binding import RankBinding, default_binding

    configure_logging("server")
    RankBinding.load(rank_binding or default_binding()).check()
    return asyncio.run(_serve(server, rank_words))


async def _proxy(server: ServerOptions) -> int:
    stop = _stop_event()
    async with serving_over_hub(server) as frontend:
        await stop.wait()
        frontend.stop()
    return 0


async def _serve(server: ServerOptions, rank_words: list[str]) -> int:
    stop = _stop_event()
    async with serving_over_hub(server) as frontend:
        job = asyncio.create_task(_keep_running(frontend, server, rank_words))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((job, stopped), return_when=asyncio.FIRST_COMPLETED)
        failed = job.done()
        stopped.cancel()
        frontend.stop()
        frontend.hub.stop_workers()
        job.cancel()
        await asyncio.gather(job, stopped, return_exceptions=True)
    if failed and (error := job.exception()) is not None:
        raise error
    return 0


def _stop_event() -> asyncio.Event:
    """Return an event that SIGINT and SIGTERM set."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop


@asynccontextmanager
async def serving_over_hub(server: ServerOptions) -> AsyncIterator[Frontend]:
    """Serve HTTP over a hub while the context lasts. Raises InputError for a model, an address or a port that will not do."""
    path = find_checkpoint(server.model)
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    limit = min(server.max_seq_len or config.max_position_embeddings, config.max_position_embeddings)
    served = Served(
        server.served_model_name or (Path(server.model).name if server.model else "disagg-tt-tiny"),
        limit,
        config.vocab_size,
        frozenset(config.eos_token_ids),
        server.api_key,
    )
    listener = listen(server.host, server.port)
    hub = Hub(server.hub, server.token, digest=checkpoint.digest(), max_seq_len=limit)
    frontend = Frontend(hub, Router(server.mode), deadline_s=server.deadline_s)
    hub.start()
    try:
        async with serving(create_app(frontend, Tokenizer(path), served), listener):
            host, port = listener.getsockname()[:2]
            logger.info(
                "HTTP at http://{}:{} (model {}), workers at {}", host, port, served.model, hub.address
            )
            yield frontend
    finally:
        await hub.close()


async def _keep_running(frontend: Frontend, server: ServerOptions, rank_words: list[str]) -> None:
    """Run the job of ranks, again when it ends; raises PeerError when it does not come up."""
    hub, failed_starts = frontend.hub, 0
    command = [sys.executable, "-m", "disagg_tt", "worker", *rank_words, "--proxy", hub.address]
    while True:
        joined = frontend.joined
        hub.job_lost.clear()
        process = await asyncio.create_subprocess_exec(
            *tied(command, signal.SIGTERM),
            stdin=asyncio.subprocess.DEVNULL,
            env={**os.environ, TOKEN_VARIABLE: server.token},
            start_new_session=True,
        )
        ended, lost = asyncio.create_task(process.wait()), asyncio.create_task(hub.job_lost.wait())
        try:
            await asyncio.wait((ended, lost), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((ended,), timeout=BROKEN_S)  # a job whose rank hangs does not end
        finally:
            lost.cancel()
            if not ended.done():
                await _end(process, STOP_S if hub.told else 0.0)
        code = await ended
        for name in list(hub.workers):
            hub.lose(name, f"the job of ranks ended with exit code {code}")
        failed_starts = 0 if joined.is_set() else failed_starts + 1
        if failed_starts == MOST_FAILED_STARTS or (code == 2 and failed_starts):
            raise PeerError(
                f"the ranks did not start (exit code {code}, {failed_starts} times in a row); what they said is above"
            )
        logger.warning("the ranks ended with exit code {}; they are started again", code)


async def _end(process: asyncio.subprocess.Process, patience_s: float) -> None:
    """End the job, in order and then not; first let it end by itself for `patience_s`, where it was told to."""
    for number, limit_s in ((None, patience_s), (signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        if number is not None:
            with suppress(ProcessLookupError):  # it ended this moment
                process.send_signal(number)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), limit_s)
            return
        if limit_s:
            logger.warning("the ranks still run {:g} s after they were told to stop", limit_s)
