"""Elementwise ops of two operands: two tensors, or a tensor and a number; of floats, or of integers that wrap.

    (dtypes, mixed or not) -> the dtypes computed in -> activations -> the function -> activations -> one rounding

A call is validated into a plan once for its specs and arguments; the plan holds the output's spec and the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from disagg_tt.device.emulator.launch import launch, launch_in_place
from disagg_tt.device.emulator.mesh import command_queue
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.convert import round_to_even
from disagg_tt.device.emulator.ops.pairs import NOTHING, Fusing, Number, Pair, arithmetic
from disagg_tt.device.emulator.ops.plan import adjusted, broadcast, emulated, need, same_place
from disagg_tt.device.emulator.spec import Spec, make_spec, tile_padded
from disagg_tt.device.emulator.tensor import Tensor
from disagg_tt.device.emulator.types import TILE_SIZE, DataType, Layout, MemoryConfig

FLOATS = frozenset({DataType.BFLOAT16, DataType.FLOAT32, DataType.BFLOAT8_B, DataType.BFLOAT4_B})
WORDS = frozenset({DataType.INT32, DataType.UINT32})
ARITHMETIC = FLOATS | WORDS | {DataType.UINT16}
_RANGE = {DataType.INT32: (-(2**31), 2**31), DataType.UINT32: (0, 2**32), DataType.UINT16: (0, 2**16),
          DataType.UINT8: (0, 2**8)}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Op:
    """What an op computes, on float32 or int64, and of which dtypes.

    Attributes:
        mixes: the two floats may be of different dtypes.
        promotes: an INT32 or UINT32 operand beside a float one becomes a float; else integers stay among their own.
        quotient: INT32 operands give FLOAT32.
        to_even: the result in bfloat16 of bfloat16 operands is rounded with ties to even, by the SFPU, unless the call
            asks for the fast mode; else the packer rounds ties away from zero.
        asks_even: a call may ask for ties to even with fast_and_approximate_mode=False.
        widens: UINT8 operands are UINT16 ones.
        numbers_first: the first operand may be a number.
        of_one: beside a number it is an op of one tensor for the device, which keeps its layout.
    """

    name: str
    compute: Pair
    dtypes: frozenset[DataType] = ARITHMETIC
    mixes: bool = True
    promotes: bool = False
    quotient: bool = False
    to_even: bool = False
    asks_even: bool = False
    widens: bool = False
    numbers_first: bool = True
    of_one: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """The output's spec, what computes it from the data of the tensors, and whether the number comes first."""

    spec: Spec
    compute: Callable[..., torch.Tensor]


def run(
    op: Op,
    a: Tensor | Number,
    b: Tensor | Number,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
    output_tensor: Tensor | None = None,
    activations: Sequence[object] = (),
    a_activations: Sequence[object] = (),
    b_activations: Sequence[object] = (),
    fast: bool | None = None,
    queue: int | None = None,
) -> Tensor:
    """Return op(a, b), written into `output_tensor` if there is one; raises DeviceError or TypeError."""
    if queue is not None:
        with command_queue(queue):
            return run(
                op, a, b, dtype, memory_config, output_tensor, activations, a_activations, b_activations, fast
            )
    left, right = getattr(a, "spec", a), getattr(b, "spec", b)
    out = None if output_tensor is None else output_tensor.spec
    if activations or a_activations or b_activations:
        fusing = (_listed(op, activations), _listed(op, a_activations), _listed(op, b_activations))
    else:
        fusing = NOTHING
    plan = _plan(op, left, right, dtype, memory_config, out, fusing, fast)
    tensors = [x for x in (a, b) if isinstance(x, Tensor)]
    if output_tensor is None:
        return launch(op.name, plan.spec, plan.compute, *tensors)
    launch_in_place(op.name, output_tensor, plan.compute, *tensors)
    return output_tensor


def _listed(op: Op, activations: object) -> tuple[object, ...]:
    if not isinstance(activations, (list, tuple)):
        raise TypeError(f"{op.name}: activations {activations!r}; they must be a list")
    return tuple(activations)


@lru_cache(maxsize=4096, typed=True)  # typed: 2 and 2.0 are different operands
def _plan(
    op: Op,
    a: Spec | Number,
    b: Spec | Number,
    dtype: DataType | None,
    memory_config: MemoryConfig | None,
    out: Spec | None,
    fusing: Fusing,
    fast: bool | None,
) -> Plan:
    """Validate a call."""
    for what, given, kind in (
        ("dtype", dtype, DataType),
        ("memory_config", memory_config, MemoryConfig),
        ("fast_and_approximate_mode", fast, bool),
    ):
        if given is not None and not isinstance(given, kind):
            raise TypeError(f"{op.name}: {what} {given!r}; it must be a {kind.__name__}")
    tensors = [x for x in (a, b) if isinstance(x, Spec)]
    known = all(isinstance(x, (Spec, int, float)) for x in (a, b))
    if not tensors or not known or (not isinstance(a, Spec) and not op.numbers_first):
        raise TypeError(f"{op.name} of {type(a)} and {type(b)}; it takes tensors, or a tensor and a number")
    first, second = _computed_in(op, a, b)
    integers = not first.is_float
    result = DataType.FLOAT32 if op.quotient and integers else first
    asked = dtype or (out.dtype if out else None)
    need(
        not (op.quotient and integers) or (asked in (None, DataType.FLOAT32) and not fast),
        op.name,
        f"integers to {asked and asked.value}, fast mode {fast}; their quotient is float32, and never fast",
    )
    need(
        dtype is None or out is None or dtype is out.dtype,
        op.name,
        f"dtype {dtype and dtype.value} and an output tensor of {out and out.dtype.value}; they must be the same",
    )
    goal = asked or result
    emulated(
        goal is result or (goal.is_float and result.is_float),
        op.name,
        f"convert its {result.value} result to {goal.value}; use typecast",
    )
    even = first is second is goal is DataType.BFLOAT16
    need(
        not op.asks_even or fast is not False or goal is DataType.BFLOAT16,
        op.name,
        f"fast_and_approximate_mode=False of a {goal.value} result; it is for bfloat16 results only",
    )
    rounding = (
        round_to_even
        if even and (op.to_even and not fast or op.asks_even and fast is False)
        else round_on_device
    )
    spec = _output(op, a, b, goal, memory_config, out)
    return Plan(spec, arithmetic(op.name, op.compute, a, b, first, second, spec, fusing, rounding))


def _computed_in(op: Op, a: Spec | Number, b: Spec | Number) -> tuple[DataType, DataType]:
    """Return the dtypes in which the operands are computed with; both floats, or both the same integers."""
    first = a.dtype if isinstance(a, Spec) else b.dtype  # type: ignore[union-attr]
    second = b.dtype if isinstance(b, Spec) else first
    if op.widens:
        first, second = (DataType.UINT16 if d is DataType.UINT8 else d for d in (first, second))
    if isinstance(a, Spec) and isinstance(b, Spec):
        pair = {first, second}
        if op.promotes and pair & WORDS and pair & FLOATS:
            floats = second if first in WORDS else first
            whole_floats = DataType.BFLOAT16 if floats.is_block_float else floats
            return (whole_floats, second) if first in WORDS else (first, whole_floats)
    else:
        number = b if isinstance(a, Spec) else a
        if first in WORDS and op.promotes and not _is_integer(number):
            return DataType.FLOAT32, DataType.FLOAT32
        if not first.is_float and first in op.dtypes:
            need(
                _fits(number, first),
                op.name,
                f"{number} with a {first.value} tensor, which cannot represent it; it must be a whole number in range",
            )
    for dtype in (first, second):
        names = ", ".join(sorted(d.value for d in op.dtypes))
        need(dtype in op.dtypes, op.name, f"an operand is {dtype.value}; allowed: {names}; use typecast")
    need(
        first is second or (op.mixes and first.is_float and second.is_float),
        op.name,
        f"operands of {first.value} and {second.value}; use typecast",
    )
    return first, second


def _is_integer(number: object) -> bool:
    """Whether ttnn takes a number as an integer; a larger one is a float."""
    return isinstance(number, int) and -(2**31) <= number < 2**32


def _fits(number: Any, dtype: DataType) -> bool:
    """Whether a number can stand beside integers; of an int beside 32 bits the last 32 count."""
    low, high = _RANGE[dtype]
    if isinstance(number, int) and dtype in WORDS:
        return _is_integer(number)
    return low <= number < high and number == int(number)


def _output(
    op: Op, a: Spec | Number, b: Spec | Number, dtype: DataType, place: MemoryConfig | None, out: Spec | None
) -> Spec:
    """Return the spec of the result, which is `out` where the result is written into a tensor."""
    tensors = [x for x in (a, b) if isinstance(x, Spec)]
    for t in tensors:
        need(
            t.layout is Layout.TILE or t.dtype is not DataType.UINT8 or op.widens,
            op.name,
            f"{t!r} is tilized first, which uint8 cannot be; use to_layout after typecast",
        )
        shard = t.memory_config.shard_spec
        need(
            t.layout is Layout.TILE
            or shard is None
            or not any(d % TILE_SIZE for d in shard.shape)
            or (op.of_one and len(tensors) == 1),
            op.name,
            f"{t!r} is tilized first, so its shards must be whole tiles of {TILE_SIZE}x{TILE_SIZE}",
        )
    shape = tensors[0].shape if len(tensors) == 1 else broadcast(op.name, tensors[0].shape, tensors[1].shape)
    rows = all(t.layout is Layout.ROW_MAJOR for t in tensors)
    if out is not None:
        alone = op.of_one and len(tensors) == 1
        need(alone or not rows, op.name, "an output tensor with inputs in ROW_MAJOR layout; leave it out")
        longest = max(len(out.shape), len(shape))
        same = (1,) * (longest - len(out.shape)) + tuple(out.shape) == (1,) * (longest - len(shape)) + tuple(
            shape
        )
        same = same and (not alone or out.layout is tensors[0].layout)
        need(same, op.name, f"a result of shape {list(shape)} into an output tensor of {list(out.shape)}")
        return out
    layout = Layout.ROW_MAJOR if rows else Layout.TILE
    return make_spec(shape, dtype, layout, _place(op, tensors, shape, place))


def _place(op: Op, tensors: list[Spec], shape: tuple[int, ...], asked: MemoryConfig | None) -> MemoryConfig:
    """Return where the result lies: as asked, else where the sharded operand is (on more cores), else the first."""
    if asked is not None and (not asked.is_sharded() or asked.shard_spec is not None):
        return asked
    if len(tensors) == 1:
        return same_place(op.name, tensors[0], asked)
    sharded = [t for t in tensors if t.memory_config.is_sharded()]
    source = tensors[0]
    if asked is not None:
        emulated(bool(sharded), op.name, f"choose shards for {asked!r}; give it a shard spec")
        source = sharded[0]
    elif sharded:
        first, second = (t.memory_config.shard_spec for t in tensors)
        if first is None:
            on_second = source.memory_config == MemoryConfig()
        else:
            on_second = second is not None and second.grid.num_cores() > first.grid.num_cores()
        source = tensors[on_second]
    if source.memory_config.shard_spec is None:
        return source.memory_config
    padded = tile_padded(shape) if source.layout is Layout.TILE else shape
    return adjusted(source.memory_config, source.padded_shape, padded)
