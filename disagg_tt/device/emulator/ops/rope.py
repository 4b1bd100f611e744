"""Rotary position embedding, in both conventions: rotate-half (_hf) and interleaved pairs (_llama)."""

from __future__ import annotations

from functools import lru_cache

import torch

from disagg_tt.device.emulator.launch import launch
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.ops.plan import emulated, need, need_dtype, need_tile, placed
from disagg_tt.device.emulator.spec import Spec, make_spec
from disagg_tt.device.emulator.tensor import Tensor, on_device
from disagg_tt.device.emulator.types import (
    TILE_SIZE,
    DataType,
    Layout,
    MemoryConfig,
    TensorMemoryLayout,
    WormholeComputeKernelConfig,
)

BF16 = DataType.BFLOAT16


def _need_height_sharded(op: str, name: str, spec: Spec) -> None:
    need(
        spec.memory_config.memory_layout is TensorMemoryLayout.HEIGHT_SHARDED,
        op,
        f"decode's {name} {spec!r} must be height sharded",
    )


def _need_shards_given(op: str, a: Spec, place: MemoryConfig) -> None:
    emulated(
        not place.is_sharded() or place == a.memory_config,
        op,
        f"choose the shards of an output {place!r} for an input {a!r}; place it as the input is",
    )


@lru_cache(maxsize=1024)
def _hf_plan(a: Spec, cos: Spec, sin: Spec, decode: bool, memory_config: MemoryConfig | None) -> Spec:
    op = "rotary_embedding_hf"
    need_tile(op, input=a, cos=cos, sin=sin)
    need_dtype(op, "input", a, BF16, DataType.BFLOAT8_B, DataType.FLOAT32, DataType.BFLOAT4_B)
    need_dtype(op, "cos", cos, BF16, DataType.BFLOAT8_B, DataType.FLOAT32, DataType.BFLOAT4_B)
    need(cos.dtype is sin.dtype, op, f"cos is {cos.dtype.value}, sin {sin.dtype.value}; they must be alike")
    need(
        len(a.shape) == len(cos.shape) == 4 and cos.shape == sin.shape,
        op,
        f"input {list(a.shape)}, cos {list(cos.shape)} and sin {list(sin.shape)} must have 4 axes, cos as sin",
    )
    width = a.shape[-1]
    need(cos.shape[-1] == width, op, f"cos width {cos.shape[-1]} for head_dim {width}")
    need(width == TILE_SIZE or width % 64 == 0, op, f"head_dim {width}; it must be 32 or a multiple of 64")
    need(cos.shape[0] == 1, op, f"cos {list(cos.shape)} must be [1, 1, positions, head_dim]")
    place = placed(memory_config, a.memory_config)
    if decode:
        for name, spec in (("input", a), ("cos", cos), ("sin", sin)):
            _need_height_sharded(op, name, spec)
        need(cos.shape[1] == a.shape[1], op, f"cos for {cos.shape[1]} users, input for {a.shape[1]}")
        need(a.shape[0] == 1, op, f"decode's input {list(a.shape)} must be [1, users, heads, head_dim]")
        need(cos.shape[2] == 1, op, f"decode's cos {list(cos.shape)} must be [1, users, 1, head_dim]")
        need(place.is_sharded(), op, f"decode's output {place!r} must be sharded as its input is")
    else:
        need(cos.shape[1] == 1, op, f"cos {list(cos.shape)} must be [1, 1, positions, head_dim] in prefill")
        need(
            cos.shape[2] >= a.shape[2], op, f"cos has {cos.shape[2]} positions, the input {a.shape[2]} tokens"
        )
    _need_shards_given(op, a, place)
    return make_spec(a.shape, a.dtype, Layout.TILE, place)


def rotary_embedding_hf(
    input_tensor: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    *,
    is_decode_mode: bool = False,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Return x * cos + rotate_half(x) * sin; prefill uses rows 0..S-1 of cos and sin, decode row u for user u."""
    on_device("rotary_embedding_hf", input_tensor, cos_cache, sin_cache)
    spec = _hf_plan(input_tensor.spec, cos_cache.spec, sin_cache.spec, is_decode_mode, memory_config)
    half, tokens = spec.shape[-1] // 2, spec.shape[2]

    def compute(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        if not is_decode_mode:
            c, s = c[:, :, :, :tokens], s[:, :, :, :tokens]
        out = x * c
        out[..., :half].addcmul_(x[..., half:], s[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], s[..., half:])
        return round_on_device(out, spec.dtype)

    return launch("rotary_embedding_hf", spec, compute, input_tensor, cos_cache, sin_cache)


@lru_cache(maxsize=1024)
def _llama_plan(
    a: Spec, cos: Spec, sin: Spec, matrix: Spec, decode: bool, memory_config: MemoryConfig | None, fp32: bool
) -> Spec:
    op = "rotary_embedding_llama"
    inputs = {"input": a, "cos": cos, "sin": sin, "trans_mat": matrix}
    need_tile(op, **inputs)
    for name, spec in inputs.items():
        need_dtype(op, name, spec, BF16)
        need(len(spec.shape) == 4, op, f"{name} {list(spec.shape)} must have 4 axes")
    width, place = a.shape[-1], placed(memory_config, a.memory_config)
    need(cos.shape == sin.shape, op, f"cos {list(cos.shape)} and sin {list(sin.shape)} differ")
    need(
        cos.shape[0] == 1 and cos.shape[-1] == width,
        op,
        f"cos {list(cos.shape)} must be [1, .., .., {width}], as wide as head_dim",
    )
    need(width % TILE_SIZE == 0, op, f"head_dim {width}; it must be a multiple of {TILE_SIZE}")
    need(width <= 256, op, f"head_dim {width}; at most 256")
    need(width <= 128 or not fp32, op, f"head_dim {width} with fp32_dest_acc_en; at most 128 then")
    need(matrix.shape[-1] == TILE_SIZE, op, f"trans_mat {list(matrix.shape)} must be {TILE_SIZE} wide")
    need(
        place.memory_layout is a.memory_config.memory_layout,
        op,
        f"output {place!r} for an input {a!r}; both must be sharded alike",
    )
    if decode:
        for name, spec in inputs.items():
            _need_height_sharded(op, name, spec)
        users = a.shape[1]
        need(a.shape[0] == 1, op, f"decode's input {list(a.shape)} must be [1, users, heads, head_dim]")
        need(
            cos.shape[1:3] == (users, 1),
            op,
            f"decode's cos {list(cos.shape)} must be [1, {users}, 1, {width}]",
        )
    else:
        for name, spec in inputs.items():
            need(not spec.memory_config.is_sharded(), op, f"prefill's {name} {spec!r} must be interleaved")
        need(
            cos.shape[1] in (1, a.shape[1]),
            op,
            f"cos {list(cos.shape)} for {a.shape[1]} heads; its heads must be 1 or as many",
        )
        need(
            cos.shape[2] >= a.shape[2], op, f"cos has {cos.shape[2]} positions, the input {a.shape[2]} tokens"
        )
        need(
            matrix.shape == (1, 1, TILE_SIZE, TILE_SIZE),
            op,
            f"trans_mat {list(matrix.shape)} must be [1, 1, {TILE_SIZE}, {TILE_SIZE}]",
        )
    _need_shards_given(op, a, place)
    return make_spec(a.shape, a.dtype, Layout.TILE, place)


def rotary_embedding_llama(
    input_tensor: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    trans_mat: Tensor,
    *,
    is_decode_mode: bool = False,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Return x * cos + (x @ trans_mat) * sin, trans_mat [32, 32] applied to each 32 columns.

    Prefill uses rows 0..S-1 of cos and sin; decode row u, and rows 32u.. of trans_mat [1, 1, 32 * users, 32], for user u.
    """
    op = "rotary_embedding_llama"
    on_device(op, input_tensor, cos_cache, sin_cache, trans_mat)
    fp32 = compute_kernel_config is not None and compute_kernel_config.fp32_dest_acc_en
    spec = _llama_plan(
        input_tensor.spec, cos_cache.spec, sin_cache.spec, trans_mat.spec, is_decode_mode, memory_config, fp32
    )
    tokens = spec.shape[2]

    def compute(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        if is_decode_mode:
            matrix = matrix.view(matrix.shape[0], 1, -1, TILE_SIZE, TILE_SIZE)[:, :, : spec.shape[1]]
        else:
            c, s = c[:, :, :, :tokens], s[:, :, :, :tokens]
        turned = torch.matmul(x.unflatten(-1, (-1, TILE_SIZE)), matrix[:, :, :, None]).flatten(-2)
        return round_on_device(x * c + turned * s, spec.dtype)

    return launch(op, spec, compute, input_tensor, cos_cache, sin_cache, trans_mat)
