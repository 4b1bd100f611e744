"""What `bench stages` measures, one function a stage, each of which returns its rows.

Both sides of a comparison are measured in turn, again and again, and their medians compared: a machine's speed drifts.

Threads: transformers computes with `Plan.threads`. Of our two ranks one prefills while the other waits, then the
reverse, and each row says how many threads each rank has: half of those (as many in all, of which half ever compute),
or as many each (of which as many ever compute). On one mesh there is one process, so neither question arises.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from disagg_tt.bench.deep import LAYERS_VARIABLE, write_wide
from disagg_tt.bench.jobs import Job, Place, binding, prompts_of
from disagg_tt.bench.reference import Reference
from disagg_tt.bench.table import Row
from disagg_tt.config import KV_DTYPES, LlamaConfig
from disagg_tt.core import whole_tiles
from disagg_tt.model.checkpoint import load_config
from disagg_tt.prompt import Tokenizer

TILE_BYTES = {
    "bfloat8_b": 1088,
    "bfloat16": 2048,
}  # of 32 x 32 values, packed (TTNN's BFP8 tile: 64 exponents more)
METADATA_BYTES = 4096  # a chip's tile of 32 x 32 uint32
OVERLAPS = ("inline", "queue")  # each compared with "after"

Measure = Callable[[], Sequence[float]]


@dataclass(frozen=True)
class Plan:
    """How much is measured. Lengths are tokens; `new_tokens` includes the prefill's one; `flags` are generate's."""

    model: Path
    threads: int
    repeats: int
    batch: int = 32
    prompt: int = 128
    new_tokens: int = 129
    prefill: int = 1024
    wire: tuple[int, ...] = (2, 32, 33, 128, 1000, 1500)
    overlap: tuple[int, ...] = (128, 512, 1500)
    wide_layers: int = 2
    deep_layers: int = 8
    flags: tuple[str, ...] = ()

    def place(self, threads: int) -> Place:
        """Return two ranks of so many threads each, started with the plan's flags."""
        return Place(self.model, threads, flags=self.flags)

    def wide(self, model: Path) -> Plan:
        """Return the plan for a model of 8B width, of which a step takes as long as a hundred of the packaged one's."""
        return replace(self, model=model, prompt=32, new_tokens=min(self.new_tokens, 9))


def in_turn(repeats: int, sides: Mapping[str, Measure]) -> dict[str, float]:
    """Measure every side `repeats` times, one after the other in turn; return the median of each one's figures."""
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, measure in sides.items():
            figures[name] += measure()
    return {name: statistics.median(values) for name, values in figures.items()}


# ---------------------------------------------------------------- bytes on the wire


def expected_bytes(config: LlamaConfig, kv_dtype: str, tokens: int, chips: int) -> int:
    """Return the bytes of K, V and metadata that `tokens` prompt tokens should take on the wire."""
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * whole_tiles(tokens)
    return values * TILE_BYTES[kv_dtype] // 1024 + chips * METADATA_BYTES


def wire(plan: Plan) -> list[Row]:
    """Bytes counted where the emulator's transport writes them (on hardware: the pages sent), against the formula."""
    config, tokenizer = load_config(plan.model), Tokenizer(plan.model)
    rows, columns = next(iter(binding().mesh_shapes.values()))
    lengths = [n for n in plan.wire if n <= config.max_position_embeddings]
    prompts = [prompts_of(tokenizer, n)[0] for n in lengths]
    found = []
    for kv_dtype in KV_DTYPES:
        job = plan.place(plan.threads).run(prompts, "--max-new-tokens", "1", "--kv-dtype", kv_dtype)
        for length, sent in zip(lengths, job.perf("kv_bytes_sent"), strict=True):
            expected = expected_bytes(config, kv_dtype, length, rows * columns)
            found.append(
                Row("wire", f"{length} tokens, {kv_dtype}", sent, expected, "bytes", "== 1", required=True)
            )
    return found


# ---------------------------------------------------------------- speed, against transformers


def places(plan: Plan) -> dict[str, Place]:
    """Return the ways to give our side its threads, by the words that the rows name them with."""
    half, all_ = max(plan.threads // 2, 1), plan.threads
    two = {f"two ranks, {_threads(n)} each": plan.place(n) for n in dict.fromkeys((half, all_))}
    return {**two, f"one mesh, {_threads(all_)}": replace(plan.place(all_), single_mesh=True)}


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def decode(plan: Plan, stage: str = "decode", reference: Reference | None = None) -> list[Row]:
    """Decode tokens/s at batch 1 and at a full batch against transformers' generate, and against each other."""
    reference = reference or Reference(plan.model, plan.threads)
    tokenizer, rates = Tokenizer(plan.model), {}
    for batch in (1, plan.batch):
        prompts = prompts_of(tokenizer, plan.prompt, batch)
        ids = [tokenizer.encode(p) for p in prompts]
        count = ("--max-new-tokens", str(plan.new_tokens), "--batch", str(batch))

        def ours(
            place: Place, batch: int = batch, prompts: list[str] = prompts, count: tuple[str, ...] = count
        ) -> Measure:
            return lambda: place.run(prompts, *count).decode_rates(batch)

        def theirs(ids: list[list[int]] = ids) -> list[float]:
            return [reference.decode_rate(ids, plan.new_tokens)]

        theirs()  # warm-up
        sides = {name: ours(place) for name, place in places(plan).items()}
        rates[batch] = in_turn(plan.repeats, {**sides, "": theirs})
    few, many = rates[1], rates[plan.batch]
    names = list(places(plan))
    return [
        *(Row(stage, f"batch 1, {n}", few[n], few[""], "tokens/s", ">= 1.5") for n in names),
        *(Row(stage, f"batch {plan.batch}, {n}", many[n], many[""], "tokens/s", ">= 1") for n in names),
        *(
            Row(stage, f"batch {plan.batch} to batch 1, {n}", many[n], few[n], "tokens/s", ">= 8")
            for n in names
        ),
    ]


def prefill(plan: Plan, stage: str = "prefill", reference: Reference | None = None) -> list[Row]:
    """Prompt tokens/s of one prefill, to the first token, against transformers."""
    reference = reference or Reference(plan.model, plan.threads)
    tokenizer = Tokenizer(plan.model)
    prompts = prompts_of(tokenizer, plan.prefill)
    ids = tokenizer.encode(prompts[0])

    def ours(place: Place) -> Measure:
        def measure() -> list[float]:
            job = place.run(prompts * 2, "--max-new-tokens", "1", "--batch", "1")
            return [plan.prefill / ms * 1e3 for ms in job.perf("prefill_ms")]

        return measure

    def theirs() -> list[float]:
        return [reference.prefill_rate(ids) for _ in range(2)]

    theirs()  # warm-up
    sides = {name: ours(place) for name, place in places(plan).items()}
    rates = in_turn(plan.repeats, {**sides, "": theirs})
    what = f"{plan.prefill} tokens"
    return [Row(stage, f"{what}, {n}", rates[n], rates[""], "tokens/s", ">= 1") for n in sides]


def wide(plan: Plan) -> list[Row]:
    """The same for random layers of Llama-3.1-8B's width, where arithmetic and not Python decides."""
    with tempfile.TemporaryDirectory(prefix="disagg-tt-bench-") as folder:
        model = write_wide(Path(folder), plan.wide_layers)
        inner, reference = plan.wide(model), Reference(model, plan.threads)
        return decode(inner, "wide decode", reference) + prefill(inner, "wide prefill", reference)


# ---------------------------------------------------------------- streaming against sending afterwards


def overlap(plan: Plan) -> list[Row]:
    """Transfer times of each --overlap against `after`."""
    return _overlap("overlap", plan, plan.place(plan.threads), plan.repeats)


def wide_overlap(plan: Plan) -> list[Row]:
    """The same for layers of 8B width that share one layer's weights; once only, since a prefill takes a minute."""
    with tempfile.TemporaryDirectory(prefix="disagg-tt-bench-") as folder:
        inner = replace(plan, model=write_wide(Path(folder), 1))
        layers = ((LAYERS_VARIABLE, str(plan.deep_layers)),)
        place = replace(inner.place(plan.threads), program="disagg_tt.bench.deep", env=layers)
        return _overlap("wide overlap", inner, place, 1, plan.deep_layers)


def _overlap(stage: str, plan: Plan, place: Place, repeats: int, layers: int | None = None) -> list[Row]:
    """Rows for each length and way: exposed time against a layer's share of the serial one, and the end-to-end time.

    The serial one is `after`'s transfer, all of which is exposed. End to end is from the prefill's start to the last
    layer's arrival.
    """
    layers = layers or load_config(plan.model).num_hidden_layers
    tokenizer = Tokenizer(plan.model)
    prompts = [
        prompts_of(tokenizer, n)[0] for n in (plan.overlap[0], *plan.overlap)
    ]  # the first one warms up
    jobs: dict[str, list[Job]] = {way: [] for way in (*OVERLAPS, "after")}
    for _ in range(repeats):
        for way, done in jobs.items():
            done.append(place.run(prompts, "--max-new-tokens", "1", "--batch", "1", "--overlap", way))

    def median(way: str, key: str, number: int) -> float:
        return statistics.median(job.perf(key)[number] for job in jobs[way])

    shared = f", {layers} layers of shared weights" if stage.startswith("wide") else ""
    rows = []
    for number, length in enumerate(plan.overlap, 1):
        serial = median("after", "transfer_ms", number)
        for way in OVERLAPS:
            what = f"{length} tokens{shared}, {way}"
            exposed, hidden = (median(way, f"{part}_ms", number) for part in ("exposed", "hidden"))
            rows += [
                Row(stage, f"{what}: exposed to a layer of the serial transfer", exposed, serial / layers, "ms", "<= 1.5"),
                Row(stage, f"{what}: hidden to its transfer", hidden, median(way, "transfer_ms", number), "ms"),
                Row(stage, f"{what}: end to end to that of after", median(way, "end_to_end_ms", number),
                    median("after", "end_to_end_ms", number), "ms"),
            ]  # fmt: skip
    return rows


# ---------------------------------------------------------------- two meshes against one


def perf(plan: Plan) -> list[Row]:
    """The perf log of requests over two meshes against that on one, as many threads a process.

    Two jobs each, since a request that follows another one into the only slot waits for it: one of first tokens
    alone, one of decoding.
    """
    keys = {
        "prefill_ms": ("prefill", 1),
        "ttft_ms": ("time to first token", 1),
        "ms_per_token_p50": ("a token, p50", plan.new_tokens),
        "ms_per_token_p99": ("a token, p99", plan.new_tokens),
    }
    prompts = prompts_of(Tokenizer(plan.model), plan.prompt, 3)
    two = plan.place(max(plan.threads // 2, 1))
    jobs: dict[tuple[Place, int], list[Job]] = {
        (replace(two, single_mesh=single), tokens): []
        for single in (False, True)
        for tokens in (1, plan.new_tokens)
    }
    for _ in range(plan.repeats):
        for (place, tokens), done in jobs.items():
            done.append(place.run(prompts, "--max-new-tokens", str(tokens), "--batch", "1"))

    def row(key: str, name: str, tokens: int) -> Row:
        ours, reference = (
            statistics.median(value for job in jobs[place, tokens] for value in job.perf(key))
            for place in (two, replace(two, single_mesh=True))
        )
        return Row("perf", f"{plan.prompt} tokens, two meshes to one: {name}", ours, reference, "ms")

    return [row(key, *how) for key, how in keys.items()]
