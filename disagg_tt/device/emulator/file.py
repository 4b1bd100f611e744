"""Tensors in files: dump_tensor, load_tensor, and the cache of as_tensor.

The files are the emulator's own: a line that names the format, a line of JSON that says what follows, the packed values.
The real ttnn writes flatbuffers, which are refused here, as it refuses these; as_tensor's caches have names of their own.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from disagg_tt.device.emulator.distributed import distributed_context_is_initialized, size
from disagg_tt.device.emulator.mappers import TensorToMesh
from disagg_tt.device.emulator.mesh import MeshDevice
from disagg_tt.device.emulator.numeric import BLOCK, pack, unpack
from disagg_tt.device.emulator.spec import make_spec
from disagg_tt.device.emulator.tensor import Tensor, Values
from disagg_tt.device.emulator.transfer import from_device, from_torch, to_device
from disagg_tt.device.emulator.types import (
    BufferType,
    CoreRange,
    CoreRangeSet,
    DataType,
    DumpTensorMode,
    Layout,
    MemoryConfig,
    ShardOrientation,
    ShardSpec,
    TensorMemoryLayout,
)
from disagg_tt.errors import DeviceError, NotEmulatedError

MAGIC = b"disagg_tt emulator tensor 1\n"
EXTENSION = ".tensorbin"


def dump_tensor(
    file_name: str | Path, tensor: Tensor, *, mode: DumpTensorMode = DumpTensorMode.DISTRIBUTED_GATHER
) -> None:
    """Write a tensor with all its parts to FILE.tensorbin, at once or not at all.

    LOCAL writes this rank's. DISTRIBUTED_GATHER, ttnn's default, gathers the tensor from all ranks, and rank 0 alone writes
    a file; raises NotEmulatedError for it where there are several.
    """
    if not isinstance(mode, DumpTensorMode):
        raise DeviceError(f"dump_tensor: mode is {mode!r}; give a ttnn.DumpTensorMode")
    ranks = size() if distributed_context_is_initialized() else 1
    if mode is DumpTensorMode.DISTRIBUTED_GATHER and ranks > 1:
        raise NotEmulatedError(
            f"dump_tensor: mode DISTRIBUTED_GATHER, ttnn's default, is a collective of all {ranks} ranks after which "
            "rank 0 alone writes the file; give mode=ttnn.DumpTensorMode.LOCAL and each rank a file of its own"
        )
    path = _tensor_path(file_name)
    place, spec = tensor.memory_config(), tensor.spec
    parts = from_device(tensor)._values.data
    assert parts is not None
    kept = parts[:1] if parts.stride(0) == 0 else parts
    values = _whole_blocks(kept) if spec.dtype.is_block_float else kept
    data = pack(values, spec.dtype) if values.numel() else torch.empty(0, dtype=torch.uint8)
    head = {
        "shape": list(spec.shape),
        "dtype": spec.dtype.name,
        "layout": spec.layout.name,
        "memory": _described(place),
        "parts": parts.shape[0],
        "stored": kept.shape[0],
        "bytes": data.numel(),
    }
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(MAGIC + json.dumps(head).encode() + b"\n")
            data.numpy().tofile(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_tensor(file_name: str | Path, *, device: MeshDevice | None = None) -> Tensor:
    """Return the tensor that dump_tensor wrote, on the host, or on `device` with the memory config that it had.

    Raises DeviceError for a file that is not there, not of this format, or damaged.
    """
    path = _tensor_path(file_name)
    if not path.is_file():
        raise DeviceError(f"load_tensor: {path} is not a file; write it with dump_tensor")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise DeviceError(
                f"load_tensor: {path} is not a tensor of the emulator (a file of the real ttnn is a flatbuffer, which it "
                "cannot read); write it with the emulator's dump_tensor"
            )
        line, raw = file.readline(), file.read()
    try:
        head = json.loads(line)
        dtype, layout = DataType[head["dtype"]], Layout[head["layout"]]
        spec = make_spec(head["shape"], dtype, layout, _place(head["memory"]))
        shape = (head["stored"], *spec.shape)
        padded = _padded(shape, dtype)
        count = dtype.bytes_of(torch.Size(padded).numel())
        if len(raw) != head["bytes"] or count != head["bytes"] or head["stored"] not in (1, head["parts"]):
            raise ValueError(f"{len(raw)} B of values, {count} B belong to {shape} {dtype.value}")
    except (ValueError, KeyError, TypeError) as error:
        raise DeviceError(f"load_tensor: {path} is damaged ({error}); write it again") from error
    values = (
        unpack(torch.frombuffer(bytearray(raw), dtype=torch.uint8), padded, dtype)
        if count
        else torch.zeros(shape)
    )
    values = values.reshape(padded)[..., : shape[-1]].to(dtype.storage)
    host = Tensor(spec, None, Values(values.reshape(shape).expand(head["parts"], *spec.shape)))
    return host if device is None else to_device(host, device, spec.memory_config)


def as_tensor(
    tensor: Any,
    dtype: DataType | None = None,
    *,
    layout: Layout | None = Layout.ROW_MAJOR,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
    cache_file_name: str | Path | None = None,
    preprocess: Callable[[Any], Any] | None = None,
    mesh_mapper: TensorToMesh | None = None,
    cache_dump_mode: DumpTensorMode = DumpTensorMode.DISTRIBUTED_GATHER,
) -> Tensor:
    """Return from_torch(preprocess(tensor), ...), from or into a cache file if one is named.

    The file's name is ttnn's with .emulator before the extension. Raises DeviceError for a device without memory_config.
    """
    if device is not None and memory_config is None:
        raise DeviceError(
            "as_tensor: memory_config must be given with device, DRAM_MEMORY_CONFIG for example"
        )

    def converted(target: MeshDevice | None) -> Tensor:
        values = preprocess(tensor) if preprocess else tensor
        made: Tensor = from_torch(
            values, dtype, layout=layout, device=target, memory_config=memory_config, mesh_mapper=mesh_mapper
        )
        return made

    if cache_file_name is None:
        return converted(device)
    names = [x.name if x is not None else "None" for x in (dtype, layout)]
    path = Path(f"{cache_file_name}_dtype_{names[0]}_layout_{names[1]}.emulator{EXTENSION}")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        dump_tensor(path, converted(None), mode=cache_dump_mode)
    try:
        return load_tensor(path, device=device)
    except DeviceError as error:
        logger.warning("{}; made anew", error)
        dump_tensor(path, converted(None), mode=cache_dump_mode)
        return load_tensor(path, device=device)


def _tensor_path(file_name: str | Path) -> Path:
    if not str(file_name).endswith(EXTENSION):
        raise DeviceError(f"file {file_name} of a tensor; its name must end in {EXTENSION}")
    return Path(file_name)


def _padded(shape: tuple[int, ...], dtype: DataType) -> tuple[int, ...]:
    """Return `shape` with its last axis in whole blocks for block floats, which are packed by blocks."""
    return (*shape[:-1], -(-shape[-1] // BLOCK) * BLOCK) if dtype.is_block_float else shape


def _whole_blocks(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, -values.shape[-1] % BLOCK))


def _described(place: MemoryConfig) -> dict[str, Any]:
    shard = place.shard_spec
    cores = None if shard is None else [[r.start.x, r.start.y, r.end.x, r.end.y] for r in shard.grid.ranges()]
    return {
        "layout": place.memory_layout.name,
        "buffer": place.buffer_type.name,
        "shard": None if shard is None else [cores, list(shard.shape), shard.orientation.name],
    }


def _place(described: dict[str, Any]) -> MemoryConfig:
    shard = None
    if described["shard"] is not None:
        cores, shape, order = described["shard"]
        grid = CoreRangeSet([CoreRange((a, b), (c, d)) for a, b, c, d in cores])
        shard = ShardSpec(grid, shape, ShardOrientation[order])
    return MemoryConfig(TensorMemoryLayout[described["layout"]], BufferType[described["buffer"]], shard)
