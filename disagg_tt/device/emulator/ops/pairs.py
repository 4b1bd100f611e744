"""The arithmetic of elementwise ops of two operands: loaded in the dtypes computed in, computed, fused, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from disagg_tt.device.emulator.ops.convert import convert, wrap
from disagg_tt.device.emulator.ops.functions import Function, fused
from disagg_tt.device.emulator.ops.plan import emulated
from disagg_tt.device.emulator.spec import Spec
from disagg_tt.device.emulator.tensor import whole
from disagg_tt.device.emulator.types import DataType

Number = int | float
Pair = Callable[[Any, Any], torch.Tensor]
Fusing = tuple[
    tuple[object, ...], tuple[object, ...], tuple[object, ...]
]  # after the op; before it, on a; on b
NOTHING: Fusing = ((), (), ())


def arithmetic(
    name: str,
    function: Pair,
    a: Spec | Number,
    b: Spec | Number,
    first: DataType,
    second: DataType,
    spec: Spec,
    fusing: Fusing,
    rounding: Callable[[torch.Tensor, DataType], torch.Tensor],
) -> Callable[..., torch.Tensor]:
    """Return what computes the result from the tensors' data, in memory of its own."""
    after, before_a, before_b = (fused(name, activations) for activations in fusing)
    integers, goal = not first.is_float, spec.dtype
    emulated(
        not integers or fusing == NOTHING, name, "fuse activations with integers; call them on their own"
    )

    goal_storage = goal.storage
    last = rounding if goal.is_float else wrap

    def finish(result: torch.Tensor) -> torch.Tensor:
        if result.dtype is not goal_storage:  # of comparisons and quotients of integers
            result = result.to(goal_storage)
        for activation in after:
            result = activation(result)
        return last(result, goal)

    if isinstance(a, Spec) and isinstance(b, Spec):
        load_a, load_b = _load(a, first, before_a), _load(b, second, before_b)
        same, specs = a.shape == b.shape, (a, b)

        def of_two(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            if not same:
                x, y = _aligned(x, y, specs)
            elif x.dim() > 2 and x.shape[-2] != y.shape[-2]:  # the rows that are defined in both
                rows = min(x.shape[-2], y.shape[-2])
                x, y = x[..., :rows, :], y[..., :rows, :]
            if load_a is not None:
                x = load_a(x)
            if load_b is not None:
                y = load_b(y)
            return finish(function(x, y))

        return of_two

    held = _held(b if isinstance(a, Spec) else a, first)
    tensor = a if isinstance(a, Spec) else b
    assert isinstance(tensor, Spec)
    load = _load(tensor, first, before_a if isinstance(a, Spec) else before_b)
    for activation in before_b if isinstance(a, Spec) else before_a:
        held = activation(held)
    number_last = isinstance(a, Spec)

    def of_one(x: torch.Tensor) -> torch.Tensor:
        if load is not None:
            x = load(x)
        return finish(function(x, held) if number_last else function(held, x))

    return of_one


def _load(spec: Spec, dtype: DataType, functions: tuple[Function, ...]) -> Function | None:
    """Return what makes the values to compute with of a tensor's data; None if those are its data."""
    if spec.dtype is dtype and not functions:
        return None

    def load(x: torch.Tensor) -> torch.Tensor:
        if spec.dtype is not dtype:
            x = convert(x, spec.dtype, dtype)
        for function in functions:
            x = function(x)
        return x

    return load


def _held(number: Any, dtype: DataType) -> torch.Tensor:
    """Return a number as it is held beside a tensor: beside bfloat16 and block floats in bfloat16, cut towards zero."""
    if not dtype.is_float:
        return wrap(torch.tensor(int(number)), dtype)
    value = torch.tensor([float(number)], dtype=torch.float64).to(torch.float32)
    if dtype is not DataType.FLOAT32:
        value = (value.view(torch.int32) & -0x10000).view(torch.float32)
    return value


def _aligned(x: torch.Tensor, y: torch.Tensor, specs: tuple[Spec, Spec]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both with as many axes, so that they broadcast axis by axis."""
    x, y = whole(x, specs[0]), whole(y, specs[1])
    if x.dim() < y.dim():
        return x.reshape(x.shape[0], *(1,) * (y.dim() - x.dim()), *x.shape[1:]), y
    return x, y.reshape(y.shape[0], *(1,) * (x.dim() - y.dim()), *y.shape[1:])
