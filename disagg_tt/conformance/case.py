"""A call as JSON, so that two processes can make the same one, and how its result is described.

A value of a case is a JSON value, or a mapping with one key that starts with `$`:

    {"$": "bfloat16"}                              an attribute of ttnn, dotted
    {"$call": "MeshShape", "args": [1, 2]}         what an attribute of ttnn returns when called (args, kwargs)
    {"$mesh": true}                                the mesh that the worker opened
    {"$tensor": {"shape": [...], "dtype": "bfloat16", "layout": "TILE", "memory": VALUE, "on": "device"}}
                                                   a tensor of undefined values; on: device, host, freed (deallocated)
    {"$values": [[...]], "dtype": "int32"}         a ROW_MAJOR tensor of integers in DRAM, the same on every chip
    {"$torch": [2, 3], "dtype": "float32"}         a torch tensor of zeros of that shape

The functions below make them; generators use nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from disagg_tt.device.calls import describe

Value = Any  # JSON
DRAM: Value = {"$": "DRAM_MEMORY_CONFIG"}
L1: Value = {"$": "L1_MEMORY_CONFIG"}
MESH: Value = {"$mesh": True}
GRID = (8, 7)  # cores of a chip with WORKER dispatch, which a mock cluster needs
MESHES = ((1, 2), (2, 2))  # the shapes that a case may ask for


@dataclass(frozen=True)
class Case:
    """One call. `op` is dotted below ttnn ("experimental.nlp_concat_heads"); a case is known by (op, seed, number)."""

    op: str
    args: list[Value] = field(default_factory=list)
    kwargs: dict[str, Value] = field(default_factory=dict)
    mesh: tuple[int, int] = (1, 2)
    seed: str = ""
    number: int = 0

    @property
    def name(self) -> str:
        return f"{self.op}:{self.number}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def attribute(name: str) -> Value:
    """Return the value that stands for ttnn.<name>."""
    return {"$": name}


def made(name: str, *args: Value, **kwargs: Value) -> Value:
    """Return the value that stands for ttnn.<name>(*args, **kwargs)."""
    return {"$call": name, "args": list(args), "kwargs": kwargs}


def tensor(
    shape: Sequence[int],
    dtype: str = "bfloat16",
    layout: str = "TILE",
    memory: Value = DRAM,
    on: str = "device",
) -> Value:
    return {"$tensor": {"shape": list(shape), "dtype": dtype, "layout": layout, "memory": memory, "on": on}}


def integers(values: Any, dtype: str = "int32") -> Value:
    """Return a ROW_MAJOR tensor of these (nested) integers."""
    return {"$values": values, "dtype": dtype}


def torch_zeros(shape: Sequence[int], dtype: str = "float32") -> Value:
    return {"$torch": list(shape), "dtype": dtype}


def cores(count: int, row_wise: bool = True) -> Value:
    """Return the CoreRangeSet of the first `count` cores of the grid."""
    return made("num_cores_to_corerangeset", count, made("CoreCoord", *GRID), row_wise)


def rectangle(columns: int, rows: int) -> Value:
    """Return the CoreRangeSet of a rectangle of cores from (0, 0)."""
    box = made("CoreRange", made("CoreCoord", 0, 0), made("CoreCoord", columns - 1, rows - 1))
    return made("CoreRangeSet", [box])


def sharded(
    kind: str, shard: Sequence[int], grid: Value, orientation: str = "ROW_MAJOR", buffer: str = "L1"
) -> Value:
    """Return a memory config: `kind` is HEIGHT, WIDTH or BLOCK, `shard` (height, width) in elements."""
    spec = made("ShardSpec", grid, list(shard), attribute(f"ShardOrientation.{orientation}"))
    return made(
        "MemoryConfig",
        attribute(f"TensorMemoryLayout.{kind}_SHARDED"),
        attribute(f"BufferType.{buffer}"),
        spec,
    )


class Calls:
    """Makes cases on one ttnn (real or emulated) and one mesh."""

    def __init__(self, ttnn: Any, mesh: Any):
        self.ttnn, self.mesh = ttnn, mesh

    def value(self, value: Value) -> Any:
        """Return what `value` stands for."""
        if isinstance(value, list):
            return [self.value(v) for v in value]
        if not isinstance(value, dict):
            return value
        if "$" in value:
            return self._attribute(value["$"])
        if "$call" in value:
            args = [self.value(v) for v in value["args"]]
            return self._attribute(value["$call"])(*args, **self._named(value["kwargs"]))
        if "$mesh" in value:
            return self.mesh
        if "$tensor" in value:
            return self._tensor(**value["$tensor"])
        if "$values" in value:
            return self._values(value["$values"], value["dtype"])
        if "$torch" in value:
            import torch

            return torch.zeros(value["$torch"], dtype=getattr(torch, value["dtype"]))
        return self._named(value)

    def make(self, case: Case) -> Any:
        """Make the call of a case and return its result; raises what the call raises."""
        args = [self.value(v) for v in case.args]
        return self._attribute(case.op)(*args, **self._named(case.kwargs))

    def _named(self, values: dict[str, Value]) -> dict[str, Any]:
        return {name: self.value(v) for name, v in values.items()}

    def _attribute(self, dotted: str) -> Any:
        found = self.ttnn
        for name in dotted.split("."):
            found = getattr(found, name)
        return found

    def _tensor(self, shape: list[int], dtype: str, layout: str, memory: Value, on: str) -> Any:
        import torch

        ttnn = self.ttnn
        kind, order = getattr(ttnn, dtype), getattr(ttnn, f"{layout}_LAYOUT")
        if on == "host":
            return ttnn.from_torch(torch.zeros(shape), dtype=kind, layout=order)
        made = ttnn.allocate_tensor_on_device(ttnn.Shape(shape), kind, order, self.mesh, self.value(memory))
        if on == "freed":
            ttnn.deallocate(made)
        return made

    def _values(self, values: Any, dtype: str) -> Any:
        import torch

        ttnn = self.ttnn
        return ttnn.from_torch(
            torch.tensor(values, dtype=torch.int32),
            dtype=getattr(ttnn, dtype),
            layout=ttnn.ROW_MAJOR_LAYOUT,
            device=self.mesh,
            mesh_mapper=ttnn.ReplicateTensorToMesh(self.mesh),
        )


def described(ttnn: Any, result: Any) -> list[Any]:
    """Return what a call gave: for each tensor its spec and each chip's shard, else the value in JSON."""
    results = (
        list(result) if isinstance(result, (list, tuple)) and type(result) in (list, tuple) else [result]
    )
    return [_one(ttnn, r) for r in results]


def _one(ttnn: Any, value: Any) -> Any:
    words = describe(value)
    if not hasattr(value, "memory_config") or value.device() is None:
        return words
    shards = [[int(d) for d in shard.shape] for shard in ttnn.get_device_tensors(value)]
    return {"spec": words, "shards": shards}
