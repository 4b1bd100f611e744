"""Cases of embedding: ids and tables of several ranks, dtypes and layouts."""

from __future__ import annotations

from random import Random

from disagg_tt.conformance.case import DRAM, L1, Case, Value, attribute, tensor
from disagg_tt.conformance.known import ARGUMENT, SHARDED, stricter
from disagg_tt.conformance.ops.norm import random_place

IDS = ([1, 32], [1, 5], [2, 32], [2, 40], [1, 1, 1, 33], [4, 1, 1, 32], [1, 128], [32, 1], [1, 1], [3, 7])
ODD_IDS = ([32], [2, 3, 32], [1, 1, 32], [1, 2, 1, 32], [1, 1, 1, 1, 32], [2, 1, 64])
TABLES = (
    [64, 64],
    [50, 128],
    [100, 32],
    [1, 1, 64, 96],
    [1, 64, 64],
    [64, 48],
    [33, 1],
    [64, 40],
    [128, 1024],
)


def _embedding(rng: Random) -> Case:
    ids = rng.choice(IDS if rng.random() < 0.85 else ODD_IDS)
    table = rng.choice(TABLES) if rng.random() < 0.95 else rng.choice(([64], [1, 2, 64, 64], [2, 1, 64, 64]))
    order = "ROW_MAJOR" if rng.random() < 0.85 else "TILE"
    args: list[Value] = [
        tensor(
            ids,
            rng.choice(("uint32",) * 8 + ("int32", "bfloat16", "uint16")),
            order,
            rng.choice((DRAM, DRAM, L1, random_place(rng, ids) if order == "TILE" else DRAM)),
            rng.choice(("device",) * 30 + ("host", "freed")),
        ),
        tensor(
            table,
            rng.choice(("bfloat16",) * 8 + ("float32", "bfloat8_b", "uint32")),
            "ROW_MAJOR" if rng.random() < 0.9 else "TILE",
            rng.choice((DRAM, DRAM, L1)),
        ),
    ]
    kwargs: dict[str, Value] = {}
    if rng.random() < 0.6:
        kwargs["layout"] = attribute(rng.choice(("TILE_LAYOUT", "TILE_LAYOUT", "ROW_MAJOR_LAYOUT")))
    if rng.random() < 0.15:
        kwargs["dtype"] = attribute(rng.choice(("bfloat16", "bfloat16", "float32", "bfloat8_b", "uint32")))
    if rng.random() < 0.3:
        out = [ids[0], ids[-1], table[-1]]
        kwargs["memory_config"] = rng.choice((DRAM, L1, random_place(rng, out)))
    if rng.random() < 0.05:
        kwargs["padding_idx"] = rng.choice((0, 3))
    if rng.random() < 0.05:
        kwargs["embeddings_type"] = attribute("EmbeddingsType." + rng.choice(("GENERIC", "PADDED", "BINARY")))
    if rng.random() < 0.05:
        kwargs["output_tensor"] = tensor(
            [ids[0], ids[-1], table[-1]], "bfloat16", rng.choice(("TILE", "ROW_MAJOR"))
        )
    if rng.random() < 0.02:
        kwargs[rng.choice(("layout", "dtype", "memory_config"))] = rng.choice(("bfloat16", 1, [1]))
    return Case("embedding", args, kwargs)


GENERATORS = {"embedding": _embedding}
KNOWN = [
    stricter(
        "embedding",
        "must be .batch, 1, 1, length",
        "ttnn takes ids with more axes and drops all but the first of each",
    ),
    stricter(
        "embedding",
        "of a table of floats",
        "ttnn makes integers of a table of floats, which no embedding means",
    ),
    stricter(
        "embedding",
        "does not (take output_tensor|have EmbeddingsType.BINARY)",
        ARGUMENT,
    ),
    stricter("embedding", "take or make shards", SHARDED),
]
