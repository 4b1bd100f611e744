"""The memory map of a chip, by arithmetic alone: what a model and its cache take before any device is opened.

An interleaved tensor's pages are dealt round the DRAM banks, so every bank gives as many whole pages as the fullest one:
all figures here are what the allocator takes, in bytes over all banks of one chip. Weights, rope tables, cache and
arriving prompt equal the allocator's figures to the byte (tests/ttnn_mock/test_memory.py); activations and programs are
reserves, of which the largest prefill uses at least three quarters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from disagg_tt.config import KV_DTYPES, MAX_BATCH, TILE, WEIGHT_DTYPES, LlamaConfig, check_number
from disagg_tt.core import DECODE, PREFILL, whole_tiles
from disagg_tt.errors import InputError, PlanError

DRAM_BANKS = 12
DRAM_BANK_BYTES = 1_072_693_184  # what ttnn 0.81 leaves of each bank of a Wormhole chip
DRAM_BYTES = DRAM_BANKS * DRAM_BANK_BYTES
DRAM_ALIGNMENT = 32
TILE_BYTES = {
    "bfloat16": 2048,
    "bfloat8_b": 1088,
    "bfloat4_b": 576,
}  # a packed tile, with its shared exponents
SMALL_MODEL = 1_000_000_000  # parameters below which the weights are bfloat16 unless said otherwise

SOCKET_FIFO_BYTES = 8192  # of L1, on every core of a receiving chip
SOCKET_CONFIG_BYTES = 64  # of L1, on every core of either end
# Kernel binaries live in DRAM too, one set a program; the mock cluster's are placeholders, so this is a guess on the safe
# side: a hundred prompt lengths' programs of some 0.5 MB.
PROGRAMS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Setup:
    """What is planned: a model on meshes of `chips` chips, and `slots` decode slots of `tokens` tokens each.

    tokens: prompt and answer of one slot, a multiple of 32; also the longest prompt. overlap: as in Options; "inline"
    frees a layer's K and V when they are sent, the others keep those of a whole prompt. Raises InputError or PlanError
    for values that no plan can have.
    """

    config: LlamaConfig
    chips: int
    weight_dtype: str
    kv_dtype: str
    slots: int
    tokens: int
    overlap: str = "inline"

    def __post_init__(self) -> None:
        self.config.check_mesh(self.chips)
        check_number("--batch", self.slots, 1, MAX_BATCH)
        for name, value, allowed in (
            ("--weight-dtype", self.weight_dtype, WEIGHT_DTYPES),
            ("--kv-dtype", self.kv_dtype, KV_DTYPES),
        ):
            if value not in allowed:
                raise InputError(f"{name} is {value!r}, allowed are {', '.join(allowed)}")
        if self.tokens < TILE or self.tokens % TILE:
            raise InputError(f"a slot of {self.tokens} tokens; allowed are multiples of {TILE}")


def default_weight_dtype(config: LlamaConfig) -> str:
    """Return the dtype of the matrices when the user names none."""
    return "bfloat16" if config.parameters < SMALL_MODEL else "bfloat8_b"


@dataclass(frozen=True)
class MemoryMap:
    """What one chip of a role's mesh holds. `dram`: item -> bytes. `l1_socket`: bytes of L1 on each core."""

    role: str
    dram: dict[str, int]
    l1_socket: int

    @property
    def used(self) -> int:
        return sum(self.dram.values())

    @property
    def left(self) -> int:
        """Bytes of DRAM that stay free; negative when the plan does not fit."""
        return DRAM_BYTES - self.used


def prefill_map(setup: Setup) -> MemoryMap:
    """Return the map of a prefill chip, whether it fits or not."""
    dram = _model(setup)
    if setup.overlap != "inline":
        dram["K/V kept until sent"] = 2 * setup.config.num_hidden_layers * _keys(setup, setup.tokens)
    dram["activations"] = _prefill_activations(setup) + _logits(setup)
    dram["programs"] = PROGRAMS_BYTES
    return MemoryMap(PREFILL, dram, SOCKET_CONFIG_BYTES)


def decode_map(setup: Setup) -> MemoryMap:
    """Return the map of a decode chip, whether it fits or not."""
    blocks = setup.tokens // TILE
    dram = _model(setup)
    dram["K/V cache"] = cache_bytes(setup, setup.slots * blocks)
    dram["page table"] = rows_bytes(setup.slots, blocks * 4)
    dram["arriving prompt"] = 2 * _keys(setup, setup.tokens)
    dram["activations"] = _logits(setup)
    dram["programs"] = PROGRAMS_BYTES
    return MemoryMap(DECODE, dram, SOCKET_CONFIG_BYTES + SOCKET_FIFO_BYTES)


def plan(setup: Setup) -> tuple[MemoryMap, MemoryMap]:
    """Return the maps of a prefill and a decode chip.

    Raises PlanError, with the bytes needed and available and with what would fit, when one of them does not fit.
    """
    maps = prefill_map(setup), decode_map(setup)
    for chip in maps:
        if chip.left < 0:
            raise PlanError(
                f"{setup.slots} slots of {setup.tokens} tokens, weights {setup.weight_dtype}, cache {setup.kv_dtype}: a "
                f"{chip.role} chip needs {chip.used:,} B of DRAM and has {DRAM_BYTES:,} B, {-chip.left:,} B too few; "
                f"{_remedies(setup)}"
            )
    return maps


def fits(setup: Setup) -> bool:
    """Whether both chips have room for `setup`."""
    return prefill_map(setup).left >= 0 and decode_map(setup).left >= 0


def most_slots(setup: Setup) -> int:
    """Return how many slots of `setup.tokens` tokens fit, as if there were no limit of slots; 0 when none does."""
    if prefill_map(setup).left < 0:
        return 0
    chip, blocks = decode_map(setup), setup.tokens // TILE
    room = chip.left + chip.dram["K/V cache"] + chip.dram["page table"]
    return _most(lambda n: cache_bytes(setup, n * blocks) + rows_bytes(n, blocks * 4) <= room, 1 << 20)


def most_tokens(setup: Setup) -> int:
    """Return the most tokens a slot, whole tiles, with which `setup.slots` slots fit; 0 when not even a tile does."""
    limit = whole_tiles(setup.config.max_position_embeddings) // TILE
    return TILE * _most(lambda tiles: fits(replace(setup, tokens=tiles * TILE)), limit)


def cache_tokens(setup: Setup) -> int:
    """Return the tokens that the cache can hold in all when it takes what the rest of `setup` leaves of a decode chip."""
    chip = decode_map(setup)
    room = chip.left + chip.dram["K/V cache"]
    return TILE * _most(lambda blocks: cache_bytes(setup, blocks) <= room, 1 << 32)


def serving_blocks(setup: Setup, chunk: int) -> int:
    """Return how many cache blocks fit on a chip of a rank that serves: it computes prompts in pieces of `chunk` tokens.

    `setup.slots` and `setup.tokens` are its slots and the longest sequence. Raises PlanError when not even one such sequence
    has room.
    """
    piece = replace(setup, tokens=chunk)
    dram = _model(setup) | {
        "page tables": rows_bytes(setup.slots + 2, setup.tokens // TILE * 4),
        "arriving": 2 * _keys(piece, chunk),
        "activations": _prefill_activations(piece) + _logits(setup),
        "programs": PROGRAMS_BYTES,
    }
    room = DRAM_BYTES - sum(dram.values())
    blocks = _most(lambda n: cache_bytes(setup, n) <= room, 1 << 32)
    if blocks < setup.tokens // TILE:
        raise PlanError(
            f"a chip has room for {blocks * TILE:,} tokens of {setup.kv_dtype} cache beside weights in {setup.weight_dtype}, and a "
            f"sequence may have {setup.tokens:,}; give --max-seq-len {blocks * TILE}"
            if blocks
            else f"the model in {setup.weight_dtype} leaves no room for a cache on a chip; use a mesh of more chips, or "
            "--weight-dtype bfloat8_b"
        )
    return blocks


def _most(holds: Callable[[int], bool], limit: int) -> int:
    """Return the largest number from 1 to `limit` that `holds`, where all smaller ones hold too; 0 when none does."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _remedies(setup: Setup) -> str:
    """Say which smaller batch, sequence or dtypes would fit; each way changes one setting alone."""
    ways = []
    if slots := min(most_slots(setup), MAX_BATCH):
        ways.append(f"--batch {slots}")
    if tokens := most_tokens(setup):
        ways.append(f"--max-seq-len {tokens}")
    kv = [d for d in _smaller(setup.kv_dtype, KV_DTYPES) if fits(replace(setup, kv_dtype=d))]
    weight = [d for d in _smaller(setup.weight_dtype, WEIGHT_DTYPES) if fits(replace(setup, weight_dtype=d))]
    ways += [f"--kv-dtype {kv[0]}"] if kv else []
    ways += [f"--weight-dtype {weight[0]}"] if weight else []
    return f"what fits: {', or '.join(ways)}" if ways else "use a mesh of more chips or a smaller model"


def _smaller(dtype: str, allowed: tuple[str, ...]) -> list[str]:
    """Return the dtypes that take less memory than `dtype`, the largest of them first."""
    smaller = [d for d in allowed if TILE_BYTES[d] < TILE_BYTES[dtype]]
    return sorted(smaller, key=TILE_BYTES.__getitem__, reverse=True)


# ---------------------------------------------------------------- tensors, as the allocator counts them


def _dealt(pages: int, page_bytes: int) -> int:
    aligned = -(-page_bytes // DRAM_ALIGNMENT) * DRAM_ALIGNMENT
    return DRAM_BANKS * -(-pages // DRAM_BANKS) * aligned


def tile_bytes(rows: int, columns: int, dtype: str, batch: int = 1) -> int:
    """Return the DRAM bytes, over all banks, of a TILE tensor [batch, rows, columns]."""
    return _dealt(batch * -(-rows // TILE) * -(-columns // TILE), TILE_BYTES[dtype])


def rows_bytes(rows: int, row_bytes: int) -> int:
    """Return the DRAM bytes, over all banks, of a ROW_MAJOR tensor: a page is a row."""
    return _dealt(rows, row_bytes)


def _model(setup: Setup) -> dict[str, int]:
    """Return what either role loads; shapes as in model/weights.py and model/llama.py."""
    c, chips, dtype = setup.config, setup.chips, setup.weight_dtype
    queries, keys, ffn = _widths(setup)
    norm = rows_bytes(c.hidden_size // TILE, TILE * 2)
    layer = (
        tile_bytes(c.hidden_size, queries + 2 * keys, dtype)
        + tile_bytes(queries, c.hidden_size, dtype)
        + 2 * tile_bytes(c.hidden_size, ffn, dtype)
        + tile_bytes(ffn, c.hidden_size, dtype)
    )
    tables = tile_bytes(setup.tokens, c.head_dim, "bfloat16") + rows_bytes(setup.tokens, c.head_dim * 2)
    return {
        "embedding": rows_bytes(c.vocab_size, c.hidden_size // chips * 2),
        "layers": c.num_hidden_layers * layer,
        "lm_head": tile_bytes(c.hidden_size, _padded_vocab(setup) // chips, dtype),
        "norms": (2 * c.num_hidden_layers + 1) * norm,
        "rope tables": 2 * tables,  # cos and sin
    }


def cache_bytes(setup: Setup, blocks: int) -> int:
    """Return the DRAM bytes, over all banks of a chip, of all layers' K and V pools of `blocks` blocks of 32 tokens."""
    heads = setup.config.num_key_value_heads // setup.chips
    pool = tile_bytes(TILE, setup.config.head_dim, setup.kv_dtype, batch=blocks * heads)
    return 2 * setup.config.num_hidden_layers * pool


def _keys(setup: Setup, tokens: int) -> int:
    """Return the bytes of one layer's K, or V, of a prompt."""
    heads = setup.config.num_key_value_heads // setup.chips
    return tile_bytes(tokens, setup.config.head_dim, setup.kv_dtype, batch=heads)


def _widths(setup: Setup) -> tuple[int, int, int]:
    """Return a chip's share of the query width, of the key width and of the MLP's inner width."""
    c = setup.config
    return (
        c.num_attention_heads * c.head_dim // setup.chips,
        c.num_key_value_heads * c.head_dim // setup.chips,
        c.intermediate_size // setup.chips,
    )


def _padded_vocab(setup: Setup) -> int:
    share = TILE * setup.chips
    return -(-setup.config.vocab_size // share) * share


# ---------------------------------------------------------------- reserves


def _prefill_activations(setup: Setup) -> int:
    """Return what a prompt of `setup.tokens` tokens has alive at its peak, the reduction behind a layer's MLP.

    The residual before and after the attention, qkv, q, the attention's output, K and V, gate, up and their product, the
    partial sum, and three times as much for all_reduce (2.5 seen on the mock cluster, the rest for gaps between tensors).
    """
    queries, keys, ffn = _widths(setup)
    hidden = setup.config.hidden_size
    reduced = 0 if setup.chips == 1 else 3 * hidden
    width = 2 * hidden + (queries + 2 * keys) + 2 * queries + 3 * ffn + hidden + reduced
    return tile_bytes(setup.tokens, width, "bfloat16") + 2 * _keys(setup, setup.tokens)


def _logits(setup: Setup) -> int:
    """Return what the head takes: 32 rows of a chip's share of the logits, all of them tiled, in rows, and cut to size."""
    share = tile_bytes(TILE, _padded_vocab(setup) // setup.chips, "bfloat16")
    return (1 + 3 * setup.chips) * share
