"""ttnn's elementwise ops of two operands under their names, with ttnn's arguments.

a op b      add, subtract (sub), multiply (mul), divide (div), rsub, maximum, minimum, eq, ne, lt, gt, le, ge
a op= b     the same with _ at the end (not of maximum and minimum): the result is written into a
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from disagg_tt.device.emulator.ops.binary import ARITHMETIC, FLOATS, WORDS, Op, run
from disagg_tt.device.emulator.ops.pairs import Number, Pair
from disagg_tt.device.emulator.ops.plan import emulated, leave_out
from disagg_tt.device.emulator.tensor import Tensor
from disagg_tt.device.emulator.types import DataType, MemoryConfig

Call = Callable[..., Tensor]


def _quotient(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a / b if a.is_floating_point() else a.to(torch.float64) / b


def _plain_nan(choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Pair:
    """Return `choose` with NaNs of the usual bits: torch's maximum gives others, which rounding makes numbers of."""

    def chosen(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        result = choose(a, b)
        return torch.where(result == result, result, float("nan")) if result.is_floating_point() else result

    return chosen


def _differ_from(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return b - a


_ADD = Op("add", torch.add, asks_even=True)
_SUB = Op("sub", torch.sub, asks_even=True)
_RSUB = Op("rsub", _differ_from, asks_even=True, numbers_first=False)
_MUL = Op("mul", torch.mul, promotes=True, to_even=True)
_DIV = Op("div", _quotient, FLOATS | {DataType.INT32}, promotes=True, quotient=True, to_even=True)
_MAXIMUM = Op(
    "maximum", _plain_nan(torch.maximum), FLOATS | WORDS, mixes=False, numbers_first=False, of_one=True
)
_MINIMUM = Op(
    "minimum", _plain_nan(torch.minimum), FLOATS | WORDS, mixes=False, numbers_first=False, of_one=True
)
_SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "gt": ">", "le": "<=", "ge": ">="}
_COMPARED = ARITHMETIC | {DataType.UINT8}
_COMPARE = [Op(n, getattr(torch, n), _COMPARED, widens=True, numbers_first=False) for n in _SIGNS]
_COMPARE_IN_PLACE = [Op(n, getattr(torch, n), _COMPARED, numbers_first=False) for n in _SIGNS]


def _named(call: Call, name: str, meaning: str) -> Call:
    call.__name__ = call.__qualname__ = name
    call.__doc__ = meaning
    return call


def _arithmetic(op: Op, sign: str, fast: bool) -> Call:
    """Return the function for `op`, whose fast mode is `fast` unless asked otherwise."""

    def call(
        input_tensor_a: Tensor | Number,
        input_tensor_b: Tensor | Number,
        *,
        fast_and_approximate_mode: bool = fast,
        dtype: DataType | None = None,
        memory_config: MemoryConfig | None = None,
        output_tensor: Tensor | None = None,
        activations: Sequence[object] = (),
        input_tensor_a_activations: Sequence[object] = (),
        input_tensor_b_activations: Sequence[object] = (),
        sub_core_grids: None = None,
        sub_device_id: None = None,
        queue_id: int | None = None,
        cq_id: int | None = None,
    ) -> Tensor:
        if sub_core_grids is not None or sub_device_id is not None:
            leave_out(op.name, sub_core_grids=sub_core_grids, sub_device_id=sub_device_id)
        return run(op, input_tensor_a, input_tensor_b, dtype, memory_config, output_tensor, activations,
                   input_tensor_a_activations, input_tensor_b_activations, fast_and_approximate_mode,
                   cq_id if queue_id is None else queue_id)  # fmt: skip

    return _named(call, op.name, f"Return a {sign} b, of tensors or a tensor and a number; see binary.run.")


def _comparison(op: Op, sign: str) -> Call:
    """Return the function for a comparison: 1 where it holds, else 0, in the dtype of a."""

    def call(
        input_tensor_a: Tensor,
        input_tensor_b: Tensor | Number,
        *,
        dtype: DataType | None = None,
        memory_config: MemoryConfig | None = None,
        output_tensor: Tensor | None = None,
        activations: Sequence[object] = (),
        input_tensor_a_activations: Sequence[object] = (),
        input_tensor_b_activations: Sequence[object] = (),
        sub_core_grids: None = None,
        sub_device_id: None = None,
        queue_id: int | None = None,
        cq_id: int | None = None,
    ) -> Tensor:
        leave_out(op.name, sub_core_grids=sub_core_grids, sub_device_id=sub_device_id)
        return run(op, input_tensor_a, input_tensor_b, dtype, memory_config, output_tensor, activations,
                   input_tensor_a_activations, input_tensor_b_activations, None,
                   cq_id if queue_id is None else queue_id)  # fmt: skip

    return _named(call, op.name, f"Return 1 where a {sign} b, else 0, in the dtype of a; see binary.run.")


def _choice(op: Op, meaning: str, *, has_fast_mode: bool = False) -> Call:
    """Return the function for an op that ttnn runs on all cores only."""

    def call(
        input_tensor_a: Tensor,
        input_tensor_b: Tensor | Number,
        /,
        *,
        dtype: DataType | None = None,
        memory_config: MemoryConfig | None = None,
        output_tensor: Tensor | None = None,
        activations: Sequence[object] = (),
        input_tensor_a_activations: Sequence[object] = (),
        input_tensor_b_activations: Sequence[object] = (),
        fast_and_approximate_mode: bool | None = None,
        queue_id: int | None = None,
        cq_id: int | None = None,
    ) -> Tensor:
        if fast_and_approximate_mode is not None and not has_fast_mode:
            raise TypeError(f"{op.name}() got an unexpected keyword argument 'fast_and_approximate_mode'")
        return run(op, input_tensor_a, input_tensor_b, dtype, memory_config, output_tensor, activations,
                   input_tensor_a_activations, input_tensor_b_activations, fast_and_approximate_mode,
                   cq_id if queue_id is None else queue_id)  # fmt: skip

    return _named(call, op.name, f"Return {meaning}; see binary.run.")


def _in_place(op: Op, sign: str, fast: bool | None) -> Call:
    """Return the function that writes its result into a."""

    def call(
        input_a: Tensor,
        input_b: Tensor | Number,
        /,
        *,
        activations: Sequence[object] = (),
        input_tensor_a_activations: Sequence[object] = (),
        input_tensor_b_activations: Sequence[object] = (),
        fast_and_approximate_mode: bool | None = fast,
        sub_core_grids: None = None,
        sub_device_id: None = None,
        queue_id: int | None = None,
        cq_id: int | None = None,
    ) -> Tensor:
        leave_out(op.name, sub_core_grids=sub_core_grids, sub_device_id=sub_device_id)
        if fast is None and fast_and_approximate_mode is not None:
            raise TypeError(f"{op.name}_() got an unexpected keyword argument 'fast_and_approximate_mode'")
        if not isinstance(input_a, Tensor):
            raise TypeError(f"{op.name}_ of a {type(input_a).__name__}; its first operand must be a tensor")
        return run(op, input_a, input_b, None, None, input_a, activations, input_tensor_a_activations,
                   input_tensor_b_activations, fast_and_approximate_mode,
                   cq_id if queue_id is None else queue_id)  # fmt: skip

    return _named(call, f"{op.name}_", f"Write a {sign} b into a and return it; see binary.run.")


add = _arithmetic(_ADD, "+", fast=True)
subtract = sub = _arithmetic(_SUB, "-", fast=True)
multiply = mul = _arithmetic(_MUL, "*", fast=False)
rsub = _choice(_RSUB, "b - a", has_fast_mode=True)
maximum = _choice(_MAXIMUM, "the larger of a and b")
minimum = _choice(_MINIMUM, "the smaller of a and b")
eq, ne, lt, gt, le, ge = (_comparison(op, sign) for op, sign in zip(_COMPARE, _SIGNS.values(), strict=True))
add_ = _in_place(_ADD, "+", fast=True)
subtract_ = sub_ = _in_place(_SUB, "-", fast=True)
multiply_ = mul_ = _in_place(_MUL, "*", fast=False)
divide_ = div_ = _in_place(_DIV, "/", fast=False)
rsub_ = _in_place(_RSUB, "subtracted from", fast=True)
eq_, ne_, lt_, gt_, le_, ge_ = (
    _in_place(op, sign, fast=None) for op, sign in zip(_COMPARE_IN_PLACE, _SIGNS.values(), strict=True)
)

_DIVIDE = _arithmetic(_DIV, "/", fast=False)


def div(
    input_tensor_a: Tensor | Number,
    input_tensor_b: Tensor | Number,
    *,
    rounding_mode: str | None = None,
    **options: object,
) -> Tensor:
    """Return a / b, of tensors or a tensor and a number, with the options of multiply; see binary.run."""
    emulated(rounding_mode is None, "div", f"round quotients (rounding_mode={rounding_mode!r})")
    return _DIVIDE(input_tensor_a, input_tensor_b, **options)


divide = div
