"""A log of every device call: op, inputs, arguments and outputs, one JSON line each, alike for ttnn and the emulator.

    DISAGG_TT_LOG_CALLS=FILE        logs the whole process, in a job of several ranks to FILE.rank0, FILE.rank1, ...
    with log_calls(ttnn, file): ... logs the block

    {"op": "add", "inputs": ["[1, 1, 32, 256] BFLOAT16 TILE DRAM INTERLEAVED", ...], "arguments": {...}, "outputs": [...]}

Two runs of one program whose logs are equal made the same calls with the same tensors. The functions of `OPS` are replaced
in the module itself while it logs, so that nothing is paid when it does not.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

OPS = {
    "": [
        "abs",
        "add",
        "add_",
        "aggregate_tensor",
        "all_broadcast",
        "all_gather",
        "all_reduce",
        "allocate_tensor_on_device",
        "allocate_tensor_on_host",
        "arange",
        "argmax",
        "as_tensor",
        "broadcast",
        "chunk",
        "clamp",
        "clone",
        "combine_device_tensors",
        "concat",
        "copy",
        "copy_device_to_host_tensor",
        "copy_host_to_device_tensor",
        "deallocate",
        "distribute_tensor",
        "div",
        "div_",
        "divide",
        "divide_",
        "dump_tensor",
        "embedding",
        "empty",
        "empty_like",
        "eq",
        "eq_",
        "exp",
        "expand",
        "fill_cache",
        "from_device",
        "from_host_shards",
        "from_torch",
        "full",
        "full_like",
        "ge",
        "ge_",
        "gelu",
        "get_device_tensors",
        "gt",
        "gt_",
        "identity",
        "interleaved_to_sharded",
        "layer_norm",
        "le",
        "le_",
        "linear",
        "load_tensor",
        "log",
        "lt",
        "lt_",
        "matmul",
        "max",
        "maximum",
        "mean",
        "min",
        "minimum",
        "move",
        "mul",
        "mul_",
        "multiply",
        "multiply_",
        "ne",
        "ne_",
        "neg",
        "ones",
        "ones_like",
        "pad",
        "permute",
        "plus_one",
        "point_to_point",
        "reallocate",
        "reciprocal",
        "reduce_scatter",
        "relu",
        "repeat",
        "repeat_interleave",
        "reshape",
        "reshard",
        "rms_norm",
        "rsqrt",
        "rsub",
        "rsub_",
        "sharded_to_interleaved",
        "sigmoid",
        "silu",
        "slice",
        "softmax",
        "split",
        "sqrt",
        "square",
        "squeeze",
        "stack",
        "std",
        "sub",
        "sub_",
        "subtract",
        "subtract_",
        "sum",
        "tanh",
        "tilize",
        "tilize_with_val_padding",
        "tilize_with_zero_padding",
        "to_device",
        "to_dtype",
        "to_layout",
        "to_memory_config",
        "to_torch",
        "topk",
        "transpose",
        "typecast",
        "unsqueeze",
        "unsqueeze_to_4D",
        "untilize",
        "untilize_with_unpadding",
        "update_cache",
        "var",
        "view",
        "zeros",
        "zeros_like",
    ],
    "experimental": [
        "all_gather_async",
        "all_reduce_async",
        "minimal_matmul",
        "nlp_concat_heads",
        "nlp_concat_heads_decode",
        "nlp_create_qkv_heads",
        "nlp_create_qkv_heads_decode",
        "paged_fill_cache",
        "paged_update_cache",
        "recv_async",
        "recv_direct_async",
        "reduce_scatter_minimal_async",
        "rotary_embedding_hf",
        "rotary_embedding_llama",
        "send_async",
        "send_direct_async",
    ],
    "transformer": [
        "chunked_scaled_dot_product_attention",
        "paged_scaled_dot_product_attention_decode",
        "scaled_dot_product_attention",
        "scaled_dot_product_attention_decode",
    ],
    "kv_cache": ["fill_cache_for_user_", "update_cache_for_token_"],
}
"""Every function of the emulator's ttnn that takes or returns tensors, by namespace."""

# Of different types on the two; the outputs' shapes tell what they did.
_HIDDEN = {"mesh_mapper", "mesh_composer"}


@contextlib.contextmanager
def log_calls(ttnn: Any, path: Path) -> Iterator[None]:
    """Append the calls of `ttnn`'s OPS inside the block to the file `path`. Blocks do not nest."""
    with path.open("a", buffering=1) as file:
        originals = _install(ttnn, file)
        try:
            yield
        finally:
            for namespace, name, function in originals:
                setattr(namespace, name, function)


process_log = contextlib.ExitStack()
"""Holds the log of the whole process open; closing it ends the log."""


def log_process(ttnn: Any, environ: Mapping[str, str]) -> None:
    """Log all calls of this process, into a new file, when DISAGG_TT_LOG_CALLS is set in `environ`."""
    path = environ.get("DISAGG_TT_LOG_CALLS")
    if path:
        rank = environ.get("OMPI_COMM_WORLD_RANK")
        file = Path(path if rank is None else f"{path}.rank{rank}")
        file.unlink(missing_ok=True)
        process_log.enter_context(log_calls(ttnn, file))


def _install(ttnn: Any, file: TextIO) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Replace each op by one that logs to `file`; return (namespace, name, the op that was there)."""
    log, originals = _Log(file), []
    for space, names in OPS.items():
        namespace = getattr(ttnn, space) if space else ttnn
        for name in names:
            function = getattr(namespace, name)
            originals.append((namespace, name, function))
            setattr(namespace, name, log.wrap(f"{space}.{name}".lstrip("."), function))
    return originals


class _Log:
    def __init__(self, file: TextIO):
        self.file = file
        self.inside = False  # an op that calls others is one call

    def wrap(self, op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` so that it writes a line for each call that returns."""

        def logged(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            # Described before the call: an op may change its input's memory, and a deallocated one cannot be described.
            inputs, arguments = _split(args, kwargs)
            self.inside = True
            try:
                result = function(*args, **kwargs)
            finally:
                self.inside = False
            results = result if isinstance(result, (list, tuple)) else [result]
            outputs = [describe(r) for r in results if r is not None]
            line = {"op": op, "inputs": inputs, "arguments": arguments, "outputs": outputs}
            self.file.write(json.dumps(line) + "\n")
            return result

        return logged


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the tensors among the arguments, in order, and the other arguments by name, or by place for unnamed ones."""
    named = [(str(i), a) for i, a in enumerate(args)] + [
        (k, a) for k, a in kwargs.items() if k not in _HIDDEN
    ]
    inputs = [describe(a) for _, a in named if _is_tensor(a)]
    return inputs, {name: describe(a) for name, a in named if not _is_tensor(a) and a is not None}


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "padded_shape") and hasattr(
        value, "storage_type"
    )  # torch tensors lack the first, specs the second


def describe(value: Any) -> Any:
    """Return a tensor's spec, or an argument, in words or JSON that do not depend on whose object it is."""
    if _is_tensor(value):
        return _tensor(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = type(value).__name__
    if kind == "Tensor":
        return f"torch {list(value.shape)} {value.dtype}"
    if "Config" in kind and hasattr(value, "memory_layout"):
        return _memory(value)
    if kind == "TensorSpec":
        return f"{list(value.shape)} {value.dtype.name} {value.layout.name} {_memory(value.memory_config)}"
    if "Mesh" in kind and hasattr(value, "get_num_devices"):
        return f"mesh of {'x'.join(map(str, value.shape))}"
    fields = _FIELDS.get(kind)
    if fields:
        return {field: describe(getattr(value, field)) for field in fields}
    if hasattr(value, "name"):
        return value.name  # dtypes, layouts, activations
    if hasattr(value, "__iter__"):
        return [describe(v) for v in value]
    return kind


_FIELDS = {
    "CoreCoord": ("x", "y"),
    "SDPAProgramConfig": (
        "compute_with_storage_grid_size",
        "q_chunk_size",
        "k_chunk_size",
        "exp_approx_mode",
    ),
    "WormholeComputeKernelConfig": ("math_fidelity", "math_approx_mode", "fp32_dest_acc_en", "packer_l1_acc"),
}


def _tensor(tensor: Any) -> str:
    padded = (
        "" if list(tensor.shape) == list(tensor.padded_shape) else f" padded to {list(tensor.padded_shape)}"
    )
    place = "host" if tensor.device() is None else _memory(tensor.memory_config())
    return f"{list(tensor.shape)}{padded} {tensor.dtype.name} {tensor.layout.name} {place}"


def _memory(config: Any) -> str:
    shard = config.shard_spec
    spread = f"{config.buffer_type.name} {config.memory_layout.name}"
    if shard is None:
        return spread
    ranges = [f"{r.start.x}-{r.start.y}..{r.end.x}-{r.end.y}" for r in shard.grid.ranges()]
    cores = f"{shard.grid.num_cores()} cores {' '.join(sorted(ranges))}"
    return f"{spread} shard {list(shard.shape)} {shard.orientation.name} on {cores}"
