"""embedding: rows of a table by index."""

from __future__ import annotations

import math
from enum import Enum
from functools import lru_cache

import torch

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.plan import emulated, leave_out, need, need_dtype
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor
from disagg_tt.device.emulator.types import TILE_SIZE, DataType, Layout, MemoryConfig
from disagg_tt.errors import DeviceError


class EmbeddingsType(Enum):
    """How ttnn's kernels fetch rows; the values are the same for GENERIC and PADDED."""

    GENERIC = 0
    PADDED = 1
    BINARY = 2


@lru_cache(maxsize=1024)
def _plan(
    ids: Spec, table: Spec, layout: Layout | None, dtype: DataType | None, memory_config: MemoryConfig | None
) -> Spec:
    op = "embedding"
    need_dtype(op, "ids", ids, DataType.UINT32, DataType.BFLOAT16)
    allowed = (DataType.BFLOAT16, *((DataType.BFLOAT8_B,) if table.layout is Layout.TILE else ()))
    need_dtype(op, "table", table, *allowed)
    batch = ids.shape[:1] if len(ids.shape) > 1 else ()
    need(
        len(ids.shape) >= 1 and math.prod(ids.shape[1:-1]) == 1,
        op,
        f"ids {list(ids.shape)} must be [batch, 1, 1, length], [batch, length] or [length]",
    )
    need(
        len(table.shape) >= 1 and math.prod(table.shape[:-2]) == 1,
        op,
        f"table {list(table.shape)} must be [rows, width], with leading axes of 1",
    )
    whole_tiles = ids.padded_shape[-1] % TILE_SIZE == 0 and table.shape[-1] % TILE_SIZE == 0
    need(
        layout is not None
        or table.layout is Layout.TILE
        or not whole_tiles
        or dtype in (None, DataType.BFLOAT16),
        op,
        f"dtype {dtype} without a layout; ask for layout=TILE_LAYOUT",
    )
    layout = layout or table.layout
    out = DataType.BFLOAT16
    if dtype is not None and layout is Layout.TILE:  # rows in ROW_MAJOR are bfloat16 whatever is asked
        need(dtype.is_float, op, f"dtype {dtype.value} of a table of floats; use a float dtype")
        out = dtype
    place = memory_config or ids.memory_config
    emulated(
        not place.is_sharded() and not ids.memory_config.is_sharded(),
        op,
        "take or make shards; use interleaved",
    )
    return make_spec((*batch, ids.shape[-1], table.shape[-1]), out, layout, place)


def embedding(
    input_tensor: Tensor,
    weight: Tensor,
    *,
    padding_idx: int | None = None,
    layout: Layout | None = None,
    embeddings_type: EmbeddingsType = EmbeddingsType.GENERIC,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
    output_tensor: Tensor | None = None,
) -> Tensor:
    """Return rows of the table `weight`, [batch, length, width]; ids of undefined rows give undefined rows.

    The layout is the table's unless given. `padding_idx` does not change values. Raises DeviceError when it runs for an
    id that is outside of the table.
    """
    leave_out("embedding", output_tensor=output_tensor)
    emulated(
        embeddings_type is not EmbeddingsType.BINARY, "embedding", "have EmbeddingsType.BINARY; use GENERIC"
    )
    padded = embeddings_type is EmbeddingsType.PADDED
    need(not padded or padding_idx is not None, "embedding", "EmbeddingsType.PADDED needs padding_idx")
    layout = None if layout is None else Layout(layout)  # ttnn takes its number too
    spec = _plan(input_tensor.spec, weight.spec, layout, dtype, memory_config)
    size = math.prod(weight.shape[:-1])

    def compute(ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        i = ids.reshape(ids.shape[0], -1)
        if i.is_floating_point():
            i = i.nan_to_num(nan=-1).long()
        low, high = (int(x) for x in i.aminmax()) if i.numel() else (0, 0)
        if low < -1 or high >= size:
            raise DeviceError(f"embedding: ids reach from {low} to {high}; the table has rows 0..{size - 1}")
        rows = rows.reshape(rows.shape[0], size, -1)
        if i.shape[0] == 1:
            gathered = rows[:, i[0].clamp(min=0)]
        else:
            gathered = torch.stack([rows[c % rows.shape[0], i[c].clamp(min=0)] for c in range(i.shape[0])])
        if low < 0:
            gathered.masked_fill_((i < 0)[..., None], float("nan"))
        if len(spec.shape) == 3:
            gathered = gathered.view(gathered.shape[0], spec.shape[0], -1, spec.shape[2])
        if spec.dtype is DataType.BFLOAT16:
            return gathered
        return round_on_device(gathered.to(torch.float32), spec.dtype)

    return launch("embedding", spec, compute, input_tensor, weight, as_held=True)
