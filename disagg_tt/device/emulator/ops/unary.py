"""Elementwise ops of one tensor: relu, gelu, silu, exp and the like."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch

from disagg_tt.device.emulator.launch import launch, launch_in_place
from disagg_tt.device.emulator.mesh import command_queue
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.convert import wrap
from disagg_tt.device.emulator.ops.functions import (
    FUNCTIONS,
    Function,
    GeluVariant,
    SigmoidMode,
    exact_gelu,
    gelu_tanh,
)
from disagg_tt.device.emulator.ops.plan import emulated, leave_out, need, same_place
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor
from disagg_tt.device.emulator.types import DataType, MemoryConfig

Call = Callable[..., Tensor]

_WORDS = (DataType.INT32, DataType.UINT32)
_INTEGERS = {
    "relu": (*_WORDS, DataType.UINT16, DataType.UINT8),
    "abs": (*_WORDS, DataType.UINT16, DataType.UINT8),
    "identity": (*_WORDS, DataType.UINT16, DataType.UINT8),
    "square": (*_WORDS, DataType.UINT16),
    "neg": (DataType.INT32,),
    "clamp": (DataType.INT32,),
}
_WRITTEN_AS = (
    DataType.BFLOAT16,
    DataType.FLOAT32,
    DataType.BFLOAT8_B,
)  # among which input and output may differ


@lru_cache(maxsize=4096)
def _plan(op: str, a: Spec, memory_config: MemoryConfig | None, out: Spec | None) -> Spec:
    if not isinstance(a, Spec) or not isinstance(memory_config, (MemoryConfig, type(None))):
        raise TypeError(
            f"{op}: input {a!r}, memory_config {memory_config!r}; they must be a tensor and a MemoryConfig"
        )
    integers = _INTEGERS.get(op, ())
    allowed = ", ".join(["floats", *(d.value for d in integers)])
    need(
        a.dtype.is_float or a.dtype in integers,
        op,
        f"input is {a.dtype.value}; allowed: {allowed}; use typecast",
    )
    if out is not None:
        same = (out.shape, out.layout) == (a.shape, a.layout)
        need(same, op, f"output tensor {out!r} for {a!r}; shape and layout must be the same")
        need(
            out.dtype is a.dtype or (out.dtype in _WRITTEN_AS and a.dtype in _WRITTEN_AS),
            op,
            f"output tensor of {out.dtype.value} for {a.dtype.value}; it must be the same, or both "
            "bfloat16, float32 or bfloat8_b",
        )
        return out
    return make_spec(a.shape, a.dtype, a.layout, same_place(op, a, memory_config), a.padded_shape)


def run(
    op: str,
    function: Function,
    input_tensor: Tensor,
    memory_config: MemoryConfig | None,
    output_tensor: Tensor | None,
    sub_core_grids: object,
    queue: int | None,
) -> Tensor:
    """Return function(input), written into `output_tensor` if there is one; raises DeviceError or TypeError."""
    if queue is not None:
        with command_queue(queue):
            return run(op, function, input_tensor, memory_config, output_tensor, sub_core_grids, None)
    leave_out(op, sub_core_grids=sub_core_grids)
    out = None if output_tensor is None else output_tensor.spec
    spec = _plan(op, getattr(input_tensor, "spec", input_tensor), memory_config, out)
    dtype = spec.dtype

    def compute(x: torch.Tensor) -> torch.Tensor:
        if not dtype.is_float:
            return wrap(function(x), dtype)
        if dtype is DataType.FLOAT32:  # in which a float32 function would miss the last digit
            return function(x.to(torch.float64)).to(torch.float32)
        return round_on_device(function(x), dtype)

    if output_tensor is None:
        return launch(op, spec, compute, input_tensor)
    launch_in_place(op, output_tensor, compute, input_tensor)
    return output_tensor


def _named(call: Call, name: str) -> Call:
    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"Return {name} of each element, in the input's dtype; see unary.run."
    return call


def _plain(name: str) -> Call:
    """Return the op of a function that has no modes."""
    function = FUNCTIONS[name]

    def call(
        input_tensor: Tensor,
        *,
        memory_config: MemoryConfig | None = None,
        output_tensor: Tensor | None = None,
        sub_core_grids: None = None,
        queue_id: int | None = None,
        cq_id: int | None = None,
    ) -> Tensor:
        queue = cq_id if queue_id is None else queue_id
        return run(name, function, input_tensor, memory_config, output_tensor, sub_core_grids, queue)

    return _named(call, name)


def _with_modes(name: str) -> Call:
    """Return the op of a function that ttnn can also approximate."""
    function = FUNCTIONS[name]

    def call(
        input_tensor: Tensor,
        *,
        fast_and_approximate_mode: bool = False,
        memory_config: MemoryConfig | None = None,
        output_tensor: Tensor | None = None,
        sub_core_grids: None = None,
        queue_id: int | None = None,
        cq_id: int | None = None,
    ) -> Tensor:
        if not isinstance(fast_and_approximate_mode, bool):
            raise TypeError(
                f"{name}: fast_and_approximate_mode {fast_and_approximate_mode!r}; it must be a bool"
            )
        queue = cq_id if queue_id is None else queue_id
        return run(name, function, input_tensor, memory_config, output_tensor, sub_core_grids, queue)

    return _named(call, name)


relu, silu, reciprocal, neg, abs, square, identity = map(
    _plain, ("relu", "silu", "reciprocal", "neg", "abs", "square", "identity")
)
exp, sqrt, rsqrt, tanh, log = map(_with_modes, ("exp", "sqrt", "rsqrt", "tanh", "log"))


def gelu(
    input_tensor: Tensor,
    *,
    variant: GeluVariant | None = None,
    fast_and_approximate_mode: bool | None = None,
    memory_config: MemoryConfig | None = None,
    output_tensor: Tensor | None = None,
    sub_core_grids: None = None,
    queue_id: int | None = None,
    cq_id: int | None = None,
) -> Tensor:
    """Return gelu of each element, in the input's dtype: exact, also in the fast mode, or of the variant Tanh."""
    if not isinstance(variant, (GeluVariant, type(None))) or not isinstance(
        fast_and_approximate_mode, (bool, type(None))
    ):
        raise TypeError(f"gelu: variant {variant!r}, fast_and_approximate_mode {fast_and_approximate_mode!r}")
    if variant is not None and fast_and_approximate_mode is not None:
        raise TypeError("gelu takes variant or fast_and_approximate_mode, not both")
    function = gelu_tanh if variant is GeluVariant.Tanh else exact_gelu
    queue = cq_id if queue_id is None else queue_id
    return run("gelu", function, input_tensor, memory_config, output_tensor, sub_core_grids, queue)


def sigmoid(
    input_tensor: Tensor,
    *,
    vector_mode: int = 4,
    mode: SigmoidMode = SigmoidMode.Accurate,
    memory_config: MemoryConfig | None = None,
    output_tensor: Tensor | None = None,
    sub_core_grids: None = None,
    queue_id: int | None = None,
    cq_id: int | None = None,
) -> Tensor:
    """Return 1 / (1 + exp(-x)) of each element, in the input's dtype, in every mode."""
    if not isinstance(mode, SigmoidMode) or not isinstance(vector_mode, int):
        raise TypeError(f"sigmoid: mode {mode!r}, vector_mode {vector_mode!r}")
    emulated(vector_mode == 4, "sigmoid", f"compute only columns of tiles (vector_mode={vector_mode})")
    queue = cq_id if queue_id is None else queue_id
    return run("sigmoid", torch.sigmoid, input_tensor, memory_config, output_tensor, sub_core_grids, queue)


def clamp(
    input_tensor: Tensor,
    min: float | None = None,
    max: float | None = None,
    *,
    memory_config: MemoryConfig | None = None,
    output_tensor: Tensor | None = None,
    queue_id: int | None = None,
    cq_id: int | None = None,
) -> Tensor:
    """Return each element, but at least `min` and at most `max`, in the input's dtype; one of the two may be left out."""
    bounds = [bound for bound in (min, max) if bound is not None]
    for bound in bounds:
        emulated(not isinstance(bound, Tensor), "clamp", "take tensors as min and max; give numbers")
        if not isinstance(bound, (int, float)):
            raise TypeError(f"clamp: min {min!r}, max {max!r}; they must be numbers")
    need(bool(bounds), "clamp", "without min and max; give at least one")
    need(
        len({type(bound) for bound in bounds}) == 1,
        "clamp",
        f"min {min!r} and max {max!r}; they must both be ints or both floats",
    )
    need(
        input_tensor.dtype.is_float or isinstance(bounds[0], int),
        "clamp",
        f"min {min!r} and max {max!r} of integers, which cannot represent floats; give ints",
    )
    function = partial(torch.clamp, min=min, max=max)
    queue = cq_id if queue_id is None else queue_id
    return run("clamp", function, input_tensor, memory_config, output_tensor, None, queue)
