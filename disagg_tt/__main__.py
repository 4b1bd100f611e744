"""The command line of disagg-tt. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from disagg_tt import __version__
from disagg_tt.config import KV_DTYPES, OVERLAPS, WEIGHT_DTYPES, Options, resolve_prompts
from disagg_tt.errors import DisaggError, InputError
from disagg_tt.transfer_config import TRANSPORTS, KVTransferConfig

EXTRAS = {  # modules that a command needs and the plain installation lacks
    "fastapi": "serve",
    "httpx": "serve",
    "huggingface_hub": "hub",
    "matplotlib": "plot",
    "prometheus_client": "serve",
    "pydantic": "serve",
    "transformers": "test",
    "uvicorn": "serve",
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; defaults are those of config.Options."""
    top = argparse.ArgumentParser(
        prog="disagg-tt", description="Llama inference disaggregated over two Tenstorrent meshes."
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="answer prompts: one mesh prefills, another decodes")
    add_generate_flags(generate)
    check = commands.add_parser(
        "check", help="dry run of a model on a rank binding, with the memory map of a chip"
    )
    add_check_flags(check)
    commands.add_parser(
        "emulate", help="run an unmodified ttnn script on the emulator", add_help=False
    )  # has a parser of its own, see main
    commands.add_parser("bench", help="measure", add_help=False)  # has a parser of its own, see main
    commands.add_parser(
        "conformance",
        help="random calls on the emulator and on the real ttnn: do they agree?",
        add_help=False,
    )  # has a parser of its own, see main
    for name, does in (
        ("serve", "an OpenAI-compatible endpoint over the meshes of a rank binding"),
        ("proxy", "the endpoint alone, for workers that are started elsewhere"),
        ("worker", "ranks that serve under a proxy"),
    ):
        commands.add_parser(name, help=does, add_help=False)  # have parsers of their own, see main
    return top


def add_model_flags(to: argparse.ArgumentParser) -> None:
    """Flags that say what runs where."""
    to.add_argument(
        "--model",
        default=os.environ.get("HF_MODEL"),
        help="checkpoint folder or hub name (HF_MODEL; default: the one in the package); check knows llama-3.1-8b",
    )
    to.add_argument("--kv-dtype", default=Options.kv_dtype, help=f"cache dtype: {', '.join(KV_DTYPES)}")
    to.add_argument(
        "--weight-dtype", help=f"{', '.join(WEIGHT_DTYPES)} (default: bfloat16 below 1 B parameters)"
    )
    to.add_argument("--max-seq-len", type=int, help="tokens of prompt and answer (default: the model's)")
    to.add_argument("--rank-binding", help="tt-run's YAML file (default: two N300 boards)")


def add_generate_flags(to: argparse.ArgumentParser) -> None:
    """Flags of `generate`, one for each field of Options."""
    add_model_flags(to)
    to.add_argument("--prompt", action="append", help="a prompt; repeatable (default: PROMPT, or a question)")
    to.add_argument("--prompts-file", help="a prompt a line, or .jsonl with prompt or messages")
    style = to.add_mutually_exclusive_group()
    style.add_argument(
        "--chat", dest="chat", action="store_true", default=True, help="use the chat template (default)"
    )
    style.add_argument("--raw", dest="chat", action="store_false", help="continue the text as it is")
    to.add_argument("--max-new-tokens", type=int, default=Options.max_new_tokens)
    to.add_argument("--temperature", type=float, default=Options.temperature, help="0: greedy (default)")
    to.add_argument("--top-p", type=float, default=Options.top_p)
    to.add_argument("--top-k", type=int, default=Options.top_k)
    to.add_argument("--seed", type=int, default=Options.seed)
    to.add_argument("--stop", action="append", default=[], help="text that ends the answer; repeatable")
    to.add_argument("--ignore-eos", action="store_true", help="go on after the end of the text")
    to.add_argument(
        "--weight-cache", help="folder where weights are kept in the device's format, for the next start"
    )
    to.add_argument("--batch", type=int, help="decode slots (default: one a prompt, at most 32)")
    to.add_argument("--transport", help=f"{', '.join(TRANSPORTS)} (default: {Options.transport})")
    to.add_argument(
        "--kv-transfer-config",
        help="JSON, with vLLM's names: be one of two programs that were started separately",
    )
    to.add_argument("--overlap", default=Options.overlap, help=f"how K/V leaves: {', '.join(OVERLAPS)}")
    to.add_argument(
        "--fifo", dest="direct", action="store_false", help="send through the socket's FIFO, not directly"
    )
    to.add_argument("--enable-trace", action="store_true", help="replay the decode step as a ttnn trace")
    to.add_argument("--single-mesh", action="store_true", help="prefill and decode on one mesh: the baseline")
    to.add_argument("--one-process", action="store_true", help="two submeshes in one process, no MPI")
    to.add_argument("--json", action="store_true", help="one JSON line an answer")
    to.add_argument("--per-layer", action="store_true", help="each layer's times in the perf log")
    to.add_argument("--trace", help="write a trace for Perfetto to this file")
    to.add_argument("--threads", type=int, help="torch threads a rank on the emulator")
    to.add_argument(
        "--deadline-s",
        type=float,
        default=Options.deadline_s,
        help="limit of a wait for the other rank, once it has started, for which it has 600 s",
    )


def add_check_flags(to: argparse.ArgumentParser) -> None:
    """Flags of `check`."""
    add_model_flags(to)
    to.add_argument("--batch", type=int, help="decode slots (default: as many as fit, at most 32)")
    to.add_argument("--map-only", action="store_true", help="print the memory map, run nothing")


def options_of(arguments: argparse.Namespace) -> Options:
    """Return the Options that parsed `generate` flags stand for; raises InputError."""
    values = {f.name: getattr(arguments, f.name) for f in fields(Options) if hasattr(arguments, f.name)}
    prompts = resolve_prompts(arguments.prompt, arguments.prompts_file, os.environ)
    text = arguments.kv_transfer_config
    transfer = KVTransferConfig.parse(text, os.environ) if text is not None else None
    values["transport"] = arguments.transport or (transfer.kv_connector if transfer else Options.transport)
    return Options(**{**values, "prompts": prompts, "stop": tuple(arguments.stop), "kv_transfer": transfer})


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; a DisaggError becomes one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["bench"]:
            from disagg_tt.bench import main as bench

            return bench(words[1:])
        if words[:1] == ["conformance"]:
            from disagg_tt.conformance.run import main as conformance

            return conformance(words[1:])
        if words[:1] == ["emulate"]:
            from disagg_tt.emulate import main as emulate

            return emulate(words[1:])
        if words[:1] in (["serve"], ["proxy"], ["worker"]):
            from disagg_tt.serving.commands import main as serving

            return serving(words)
        arguments = parser().parse_args(words)
        if arguments.command == "generate":
            return generate(options_of(arguments), words)
        from disagg_tt.check import main as check

        return check(arguments, words)
    except DisaggError as error:
        print(f"disagg-tt: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        extra = EXTRAS[error.name]
        print(f"disagg-tt: {error.name} is not installed; pip install 'disagg_tt[{extra}]'", file=sys.stderr)
        return InputError.exit_code
    except KeyboardInterrupt:
        return 130


def generate(options: Options, words: list[str]) -> int:
    """Answer the prompts: as a rank when started by MPI, else as one of two programs, here, or as two ranks' launcher."""
    from disagg_tt.launch import in_job

    if options.kv_transfer is not None:
        from disagg_tt.rank import program_main

        return program_main(options, options.kv_transfer)
    if in_job():
        from disagg_tt.rank import main as rank_main

        return rank_main(options)
    if options.in_one_process:
        from disagg_tt.rank import run_here

        return run_here(options)
    return launch(options, words)


def launch(options: Options, words: list[str]) -> int:
    """Start the two ranks with the same command line and show what they report."""
    from disagg_tt.device import choose
    from disagg_tt.launch import RankBinding, default_binding, run_job
    from disagg_tt.report import configure_logging
    from disagg_tt.terminal import Terminal

    configure_logging("launcher")
    binding = RankBinding.load(options.rank_binding or default_binding())
    binding.pair()
    kind, _ = choose(os.environ)
    if kind == "mock" and options.overlap == "queue":
        raise InputError(
            "--overlap queue needs a second command queue, which a mock cluster lacks; use inline or after"
        )
    terminal = Terminal(len(options.prompts), as_json=options.json, trace=options.trace)
    try:
        code = run_job(words, binding, kind, {}, terminal.handle)
    finally:
        terminal.close()
    if terminal.failure is not None:
        raise Failed(terminal.failure)
    return code


class Failed(DisaggError):
    """A rank failed; the message is the rank's."""

    def __init__(self, event: dict[str, Any]):
        super().__init__(f"{event.get('role', 'rank')} rank {event['rank']}: {event['reason']}")
        self.exit_code = int(event.get("exit_code", 1))


if __name__ == "__main__":
    sys.exit(main())
