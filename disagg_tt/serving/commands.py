"""The commands serve, proxy and worker.

disagg-tt serve                        HTTP server, router, and the ranks of a rank binding, in one command
disagg-tt proxy                        HTTP server and router alone, for workers that are started elsewhere
disagg-tt worker --rank-binding FILE   the ranks of a binding, for a proxy (under tt-run or mpirun: one of them)
disagg-tt worker --role prefill        one worker, over --transport tcp or nixl
"""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from disagg_tt.config import KV_DTYPES, OVERLAPS, WEIGHT_DTYPES, Options, check_number
from disagg_tt.errors import InputError
from disagg_tt.transfer_config import CONNECTORS, TOKEN_VARIABLE, TRANSPORTS

PORT, HUB_PORT = 8000, 8001
MODES = ("auto", "pd", "ppd")


@dataclass(frozen=True)
class ServerOptions:
    """What the HTTP server is told. host, port: where it listens. hub: where workers find it, zmq's form."""

    model: str | None = None
    host: str = "127.0.0.1"
    port: int = PORT
    mode: str = "auto"
    api_key: str | None = None
    max_seq_len: int | None = None
    served_model_name: str | None = None
    hub: str = "tcp://127.0.0.1:*"
    token: str = ""
    deadline_s: float = 60.0


def main(words: Sequence[str]) -> int:
    """Run serve, proxy or worker; raises InputError for what is wrong with the command line."""
    command, rest = words[0], list(words[1:])
    if command == "worker":
        return _worker(rest)
    to = argparse.ArgumentParser(prog=f"disagg-tt {command}", description="An OpenAI-compatible endpoint.")
    _add_server_flags(to)
    if command == "serve":
        _add_rank_flags(to)
    else:
        _add_model_flags(to)
        to.add_argument(
            "--hub",
            default=f"tcp://127.0.0.1:{HUB_PORT}",
            help="where workers find the proxy; another address than loopback needs DISAGG_TT_TOKEN (default: %(default)s)",
        )
    a = to.parse_args(rest)
    from disagg_tt.serving.cluster import run_proxy, run_serve

    server = ServerOptions(
        model=a.model,
        host=a.host,
        port=a.port,
        mode=a.mode,
        api_key=a.api_key,
        max_seq_len=a.max_seq_len,
        served_model_name=a.served_model_name,
        hub=a.hub if command == "proxy" else ServerOptions.hub,
        token=os.environ.get(TOKEN_VARIABLE, "") if command == "proxy" else secrets.token_hex(32),
        deadline_s=a.deadline_s,
    )
    if command == "proxy":
        return run_proxy(server)
    _options(a)  # what is wrong with the ranks' flags is said before anything starts
    return run_serve(server, a.rank_binding, _rank_words(a))


def _worker(words: list[str]) -> int:
    to = argparse.ArgumentParser(prog="disagg-tt worker", description="Ranks that serve under a proxy.")
    _add_rank_flags(to)
    to.add_argument(
        "--proxy", default=f"tcp://127.0.0.1:{HUB_PORT}", help="the proxy's --hub (default: %(default)s)"
    )
    to.add_argument(
        "--role", choices=("prefill", "decode"), help="be one worker of its own, over tcp or nixl"
    )
    to.add_argument("--name", help="its name (default: the role and a random number)")
    to.add_argument("--listen", default="127.0.0.1", help="where prefill workers reach this decode worker")
    a = to.parse_args(words)
    from disagg_tt.launch import in_job

    options = _options(a)
    if a.role is None and not in_job():
        return _run_ranks(a.rank_binding, ["worker", *words])
    from disagg_tt.serving.worker import WorkerOptions, hand_main, rank_main

    token = os.environ.get(TOKEN_VARIABLE, "")
    w = WorkerOptions(
        options,
        a.proxy,
        token,
        a.max_num_seqs,
        a.num_blocks,
        a.prefix_caching,
        listen=a.listen,
    )
    if a.role is None:
        return rank_main(w)
    if options.transport not in CONNECTORS:
        raise InputError(
            f"--transport is {options.transport}; workers that are started by hand need one of {', '.join(CONNECTORS)}"
        )
    return hand_main(w, a.role, a.name or f"{a.role}-{secrets.token_hex(3)}")


def _run_ranks(rank_binding: str | None, words: list[str]) -> int:
    """Start the ranks of a binding with this command line, and return their exit code."""
    from loguru import logger

    from disagg_tt.device import choose
    from disagg_tt.launch import run_job
    from disagg_tt.rank_binding import RankBinding, default_binding
    from disagg_tt.report import configure_logging

    configure_logging("launcher")
    binding = RankBinding.load(rank_binding or default_binding())
    reasons: list[str] = []

    def show(event: Mapping[str, object]) -> None:
        if event["event"] == "failed":
            reasons.append(str(event["reason"]))

    code = run_job(words, binding, choose(os.environ)[0], {}, show)
    for reason in reasons:
        logger.error("{}", reason)
    return code


def _add_server_flags(to: argparse.ArgumentParser) -> None:
    d = ServerOptions
    to.add_argument("--host", default=d.host, help="where HTTP is served (default: %(default)s)")
    to.add_argument("--port", type=int, default=d.port, help="0: any free one (default: %(default)s)")
    to.add_argument(
        "--mode", default=d.mode, choices=MODES, help="where prompts are computed (default: %(default)s)"
    )
    to.add_argument("--api-key", default=os.environ.get("DISAGG_TT_API_KEY"), help="what clients must give (DISAGG_TT_API_KEY)")  # fmt: skip
    to.add_argument("--served-model-name", help="the name that clients give (default: the folder's)")


def _add_model_flags(to: argparse.ArgumentParser) -> None:
    to.add_argument("--model", default=os.environ.get("HF_MODEL"), help="checkpoint folder or hub name (HF_MODEL; default: the one in the package)")  # fmt: skip
    to.add_argument("--max-seq-len", type=int, help="tokens of prompt and answer (default: the model's)")
    to.add_argument(
        "--deadline-s", type=float, default=Options.deadline_s, help="limit of any wait for a rank"
    )


def _add_rank_flags(to: argparse.ArgumentParser) -> None:
    _add_model_flags(to)
    to.add_argument("--kv-dtype", default=Options.kv_dtype, help=f"cache dtype: {', '.join(KV_DTYPES)}")
    to.add_argument("--weight-dtype", help=f"{', '.join(WEIGHT_DTYPES)} (default: bfloat16 below 1 B parameters)")  # fmt: skip
    to.add_argument("--weight-cache", help="folder where weights are kept in the device's format, for the next start")  # fmt: skip
    to.add_argument("--rank-binding", help="tt-run's YAML file (default: two N300 boards, one prefills)")
    to.add_argument("--max-num-seqs", type=int, default=32, help="requests that a decode rank runs at once, at most 32 (default)")  # fmt: skip
    to.add_argument("--num-blocks", type=int, help="cache blocks of 32 tokens a rank (default: full sequences in all slots)")  # fmt: skip
    to.add_argument("--no-prefix-caching", dest="prefix_caching", action="store_false", help="compute, and send, every prompt whole")  # fmt: skip
    to.add_argument("--transport", default=Options.transport, help=f"{', '.join(TRANSPORTS)} (default: %(default)s)")  # fmt: skip
    to.add_argument("--overlap", default=Options.overlap, help=f"how K/V leaves: {', '.join(OVERLAPS)}")
    to.add_argument("--enable-trace", action="store_true", help="replay the decode step as a ttnn trace")
    to.add_argument("--threads", type=int, help="torch threads a rank on the emulator")


def _options(a: argparse.Namespace) -> Options:
    """Return what the ranks run, checked."""
    check_number("--max-num-seqs", a.max_num_seqs, 1, 32)
    if a.num_blocks is not None:
        check_number("--num-blocks", a.num_blocks, 1, 2**24)
    if a.transport == "local":
        raise InputError(
            "--transport local: ranks are several meshes; for one mesh use a binding of one rank"
        )
    names = (
        "model", "max_seq_len", "kv_dtype", "weight_dtype", "weight_cache", "rank_binding", "transport", "overlap",
    )  # fmt: skip
    return Options(
        **{name: getattr(a, name) for name in names},
        enable_trace=a.enable_trace,
        threads=a.threads,
        deadline_s=a.deadline_s,
    )


def _rank_words(a: argparse.Namespace) -> list[str]:
    """Return the flags of `worker` that give the ranks what `serve` was given."""
    words: list[Any] = []
    for flag in ("model", "max_seq_len", "deadline_s", "kv_dtype", "weight_dtype", "weight_cache", "rank_binding",
                 "max_num_seqs", "num_blocks", "transport", "overlap", "threads"):  # fmt: skip
        if getattr(a, flag) is not None:
            words += ["--" + flag.replace("_", "-"), getattr(a, flag)]
    words += ["--enable-trace"] * a.enable_trace + ["--no-prefix-caching"] * (not a.prefix_caching)
    return [str(word) for word in words]
