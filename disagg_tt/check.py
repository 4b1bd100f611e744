"""disagg-tt check: the memory map of a chip, then a dry run of the whole program with weights that nobody loaded.

The dry run is two ranks as in `generate`: mesh, socket, barrier, weights (allocated), prefill and stream of several
lengths, decode of several batches. On ttnn without a card it runs on a mock cluster, so that the real runtime checks
every shape, layout and allocation of a model before somebody has the hardware or the checkpoint.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from disagg_tt.config import LLAMA_3_1_8B, MAX_BATCH, LlamaConfig, check_number
from disagg_tt.core import whole_tiles
from disagg_tt.device import choose
from disagg_tt.errors import DisaggError, RankBindingError
from disagg_tt.launch import RankBinding, default_binding, in_job, run_job
from disagg_tt.plan import (
    DRAM_BANKS,
    DRAM_BYTES,
    MemoryMap,
    Setup,
    cache_tokens,
    default_weight_dtype,
    fits,
    most_slots,
    most_tokens,
    plan,
)
from disagg_tt.report import configure_logging

BUILTIN = {"llama-3.1-8b": LLAMA_3_1_8B}
LENGTHS = (1, 31, 128, 1000, 2048, 8192)
DEFAULT_SEQ_LEN = 8192
REPEATS = 5  # of what is timed, after one that is not
# The emulator computes every value: larger models and longer prompts would take minutes there.
EMULATED_PARAMETERS, EMULATED_TOKENS = 200_000_000, 2048


def main(arguments: argparse.Namespace, words: list[str]) -> int:
    """Print the map and run; return the exit code. Raises PlanError when the plan does not fit, other InputErrors."""
    if in_job():
        from disagg_tt.dry_run import check_rank

        return check_rank(arguments)
    configure_logging("launcher")
    binding = RankBinding.load(arguments.rank_binding or default_binding())
    setup = setup_of(arguments, chips_of(binding))
    maps = plan(setup)
    kind, remark = _device()
    print(f"{_title(arguments, setup)}\n\n{map_text(setup, maps)}\n")
    if arguments.map_only:
        return 0
    if kind == "emulator" and setup.config.parameters > EMULATED_PARAMETERS:
        print(
            f"no dry run: the emulator computes every value, and {setup.config.parameters / 1e9:.1f} B parameters are too many "
            f"for it (at most {EMULATED_PARAMETERS / 1e9:.1f} B); install ttnn for one: pip install 'disagg_tt[ttnn]'"
        )
        return 0
    print(f"dry run on {remark}", flush=True)
    show = Rows()
    code = run_job(words, binding, kind, {}, show)
    if show.failure is not None:
        raise Rejected(show.failure)
    if code == 0:
        print("accepted")
    return code


class Rejected(DisaggError):
    """A rank's dry run failed; the message says at what."""

    def __init__(self, event: dict[str, Any]):
        super().__init__(f"not accepted, {event.get('role', '')} rank {event['rank']}: {event['reason']}")
        self.exit_code = int(event.get("exit_code", 1))


class Rows:
    """Prints the rows that the ranks report, and keeps the first failure."""

    def __init__(self) -> None:
        self.failure: dict[str, Any] | None = None
        self._section = ""

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "failed" and self.failure is None:
            self.failure = event
        if event["event"] != "row":
            return
        if event["section"] != self._section:
            self._section = event["section"]
            print(f"\n{self._section:40s} {'host ms':>10s}  {event['unit']:>20s}")
        print(f"  {event['what']:38s} {event['ms']:10.1f}  {event['amount']:20,}", flush=True)


def lengths_of(max_seq_len: int, kind: str) -> list[int]:
    """Return the prompt lengths that a dry run tries: LENGTHS as far as they go, and the longest prompt allowed."""
    most = min(max_seq_len, EMULATED_TOKENS) if kind == "emulator" else max_seq_len
    return [*(n for n in LENGTHS if n < most), most]


def batches_of(setup: Setup, batch: int | None) -> list[Setup]:
    """Return the decode batches that a dry run tries: 1, 3 and `setup`'s.

    Where the user gave no `batch`, also the largest, with as many tokens a slot as then fit.
    """
    tried = [replace(setup, slots=n) for n in sorted({1, 3, setup.slots}) if n <= setup.slots]
    widest = replace(setup, slots=MAX_BATCH)
    if batch is None and setup.slots < MAX_BATCH and (tokens := min(most_tokens(widest), setup.tokens)):
        tried.append(replace(widest, tokens=tokens))
    return tried


def setup_of(arguments: argparse.Namespace, chips: int) -> Setup:
    """Return what the flags ask for; raises InputError for values not allowed. Needs config.json alone."""
    config = _config(arguments.model)
    limit = config.max_position_embeddings
    tokens = arguments.max_seq_len
    if tokens is None:
        tokens = min(limit, DEFAULT_SEQ_LEN)
    check_number("--max-seq-len", tokens, 1, limit)
    setup = Setup(
        config,
        chips,
        arguments.weight_dtype or default_weight_dtype(config),
        arguments.kv_dtype,
        slots=1 if arguments.batch is None else arguments.batch,
        tokens=whole_tiles(tokens),
    )
    if arguments.batch is None and fits(setup):
        setup = replace(setup, slots=min(most_slots(setup), MAX_BATCH))
    return setup


def chips_of(binding: RankBinding) -> int:
    """Return the chips of each of the binding's two meshes; raises RankBindingError where the meshes differ."""
    shapes = [binding.mesh_shapes[rank.mesh_id] for rank in binding.pair()]
    if shapes[0] != shapes[1]:
        raise RankBindingError(
            f"rank binding {binding.path}: the prefill mesh is {_by(shapes[0])} chips, the decode mesh {_by(shapes[1])}; allowed "
            "are equal meshes, since each chip sends to its twin. Name meshes of one shape"
        )
    return shapes[0][0] * shapes[0][1]


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _config(model: str | None) -> LlamaConfig:
    if model in BUILTIN:
        return BUILTIN[model]
    from disagg_tt.model.checkpoint import find_checkpoint, load_config

    return load_config(find_checkpoint(model, files=("config.json", "generation_config.json")))


def _device() -> tuple[str, str]:
    """Return (kind, remark): as everywhere, but a mock cluster where ttnn is installed and no card is present."""
    kind, reason = choose(os.environ)
    if os.environ.get("DISAGG_TT_DEVICE") == "emulator" or find_spec("ttnn") is None:
        return kind, f"the emulator: {reason}"
    if kind == "mock" or not (Path("/dev/tenstorrent").exists() or os.environ.get("TT_METAL_SIMULATOR")):
        return "mock", "the real ttnn runtime with a mock cluster: no card is present, times are the host's"
    return kind, f"ttnn: {reason}"


# ---------------------------------------------------------------- the memory map


def _title(arguments: argparse.Namespace, setup: Setup) -> str:
    return (
        f"{arguments.model or 'the checkpoint in the package'}: {setup.config.parameters / 1e6:,.0f} M parameters, weights "
        f"{setup.weight_dtype}, cache {setup.kv_dtype}, {setup.slots} slots of {setup.tokens:,} tokens, {setup.chips} chips a mesh"
    )


def map_text(setup: Setup, maps: tuple[MemoryMap, MemoryMap]) -> str:
    """Return the two chips' maps as one aligned table, and how many tokens and users the cache could hold."""
    items = list(dict.fromkeys(item for chip in maps for item in chip.dram))
    items.sort(key=lambda item: item in ("activations", "programs"))  # the reserves come last
    rows = [(item, [chip.dram.get(item, 0) for chip in maps]) for item in items]
    rows += [("left", [chip.left for chip in maps]), (f"total, {DRAM_BANKS} banks", [DRAM_BYTES] * 2)]
    lines = [f"{'DRAM of a chip, MB':34s}" + "".join(f"{chip.role:>12s}" for chip in maps)]
    for name, values in rows:
        cells = (f"{value / 1e6:12,.1f}" if value else f"{'-':>12s}" for value in values)
        lines.append(f"  {name:32s}" + "".join(cells))
    lines.append(f"{'socket, B of L1 on a core':34s}" + "".join(f"{chip.l1_socket:12,}" for chip in maps))
    lines.append(
        f"room for {cache_tokens(setup):,} cache tokens: {most_slots(setup)} users of {setup.tokens:,} tokens "
        f"(decode takes at most {MAX_BATCH} at once)"
    )
    return "\n".join(lines)
