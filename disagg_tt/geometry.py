"""How much K and V a model makes: layers, heads, dimensions, dtype and block, without the model itself.

    Geometry.named("llama-3.1-8b").layer_bytes(1024)       4,194,304: K and V of 8 heads x 128, 2 bytes an element
    Geometry.named("deepseek-v3").layer_bytes(1024)        626,688: one latent of 576 in bfloat8_b tiles of 1,088 bytes

Two counts exist and are never mixed: `counted_bytes`, which multiplies elements by the bytes of one element, as papers
and tables do (bfloat8_b: 1), and `layer_bytes`, what travels: whole blocks of tokens, in tiles of 32 x 32 elements with
their exponents.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from disagg_tt.errors import InputError

TILE = 32
MIB = 1 << 20
TILE_BYTES = {
    "bfloat8_b": 1088,
    "bfloat16": 2048,
    "float32": 4096,
}  # of 32 x 32 elements, packed as ttnn packs
ELEMENT_BYTES = {"bfloat8_b": 1, "bfloat16": 2, "float32": 4}
MOST = 1 << 20  # of any number of a geometry or of tokens: 1 Mi


@dataclass(frozen=True)
class Geometry:
    """One model's cache.

    Attributes:
        tensors: a layer has so many: 2 for K and V, 1 for a latent.
        heads, head_dim: of each tensor; a latent is one head.
        block: tokens of a cache block, whole tiles.
    """

    name: str
    layers: int
    tensors: int
    heads: int
    head_dim: int
    dtype: str
    block: int = TILE

    def __post_init__(self) -> None:
        for field in ("layers", "tensors", "heads", "head_dim", "block"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
                raise InputError(f"geometry {self.name}: {field} is {value!r}; allowed: 1 to {MOST:,}")
        if self.dtype not in TILE_BYTES:
            raise InputError(
                f"geometry {self.name}: dtype is {self.dtype!r}; allowed: {', '.join(TILE_BYTES)}"
            )
        for field in ("head_dim", "block"):
            if getattr(self, field) % TILE:
                raise InputError(
                    f"geometry {self.name}: {field} is {getattr(self, field)}; it must be a multiple of {TILE}, a tile's edge"
                )

    @classmethod
    def named(cls, name: str) -> Geometry:
        """Return a known geometry, or the one in the JSON file or JSON text `name`; raises InputError."""
        if name in GEOMETRIES:
            return GEOMETRIES[name]
        known = f"{', '.join(GEOMETRIES)}, a JSON file, or JSON text with {', '.join(f.name for f in fields(cls))}"
        text = name
        if not name.lstrip().startswith("{"):
            path = Path(name)
            if not path.is_file():
                raise InputError(f"geometry {name!r} is unknown; allowed: {known}")
            text = path.read_text(encoding="utf-8", errors="replace")
        try:
            values = json.loads(text)
            return cls(**{"name": "custom", **values})
        except (ValueError, TypeError) as error:
            raise InputError(f"geometry {name[:80]!r} cannot be used: {error}; allowed: {known}") from None

    def blocks(self, tokens: int) -> int:
        """Return how many blocks hold `tokens` tokens; raises InputError for a number that no sequence has."""
        if not 1 <= tokens <= MOST:
            raise InputError(f"{tokens:,} tokens; allowed: 1 to {MOST:,}")
        return -(-tokens // self.block)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one tensor of a layer, all heads: what a paged cache keeps together."""
        return self.heads * (self.head_dim // TILE) * (self.block // TILE) * TILE_BYTES[self.dtype]

    def layer_bytes(self, tokens: int) -> int:
        """Return what a layer of `tokens` tokens takes on the wire: whole blocks, packed tiles."""
        return self.tensors * self.blocks(tokens) * self.block_bytes

    def counted_bytes(self, tokens: int) -> int:
        """Return elements times bytes an element, over all layers, for exactly `tokens` tokens."""
        self.blocks(tokens)
        return self.layers * self.tensors * self.heads * self.head_dim * tokens * ELEMENT_BYTES[self.dtype]

    def total_bytes(self, tokens: int) -> int:
        """Return what a whole stream of `tokens` tokens takes on the wire."""
        return self.layers * self.layer_bytes(tokens)

    def as_json(self) -> str:
        return json.dumps(asdict(self))


GEOMETRIES = {
    g.name: g
    for g in (
        Geometry("llama-3.1-8b", layers=32, tensors=2, heads=8, head_dim=128, dtype="bfloat16"),
        Geometry("deepseek-v3", layers=61, tensors=1, heads=1, head_dim=576, dtype="bfloat8_b"),
    )
}
