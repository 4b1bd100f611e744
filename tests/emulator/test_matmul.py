"""Products against torch: operands, transposes, bias, activation, and what is rejected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensors import TILE, assert_rounded, bfloat16, chips, generator, put, same_on_all

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.device.emulator.types import DataType
from disagg_tt.errors import DeviceError, NotEmulatedError


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return bfloat16(torch.randn(shape, generator=generator(seed)))


@pytest.mark.parametrize(
    "op", [ttnn.linear, ttnn.experimental.minimal_matmul], ids=["linear", "minimal_matmul"]
)
@pytest.mark.parametrize("weight", [ttnn.bfloat16, ttnn.bfloat8_b, ttnn.bfloat4_b], ids=lambda d: d.value)
@pytest.mark.parametrize("rows", [1, 32, 50])
def test_matmul_with_weights_cut_by_columns(mesh: Any, op: Any, weight: Any, rows: int) -> None:
    a, b = values(1, 1, rows, 64), values(1, 1, 64, 192, seed=1)
    device = put(mesh, b, weight, cut=3)
    result = op(put(mesh, a), device, dtype=ttnn.bfloat16)
    for got, held in zip(chips(result), chips(device), strict=True):
        assert_rounded(got, a @ held)


def test_matmul_with_rows_cut_and_reduced_is_the_whole_product(mesh: Any) -> None:
    a, b = values(1, 1, 40, 128), values(1, 1, 128, 64, seed=1)
    partial = ttnn.linear(put(mesh, a, cut=3), put(mesh, b, cut=2), dtype=ttnn.float32)
    torch.testing.assert_close(
        same_on_all(ttnn.all_reduce(partial, cluster_axis=1)), a @ b, rtol=1e-5, atol=1e-4
    )


def test_matmul_rounds_once_to_the_dtype_asked_for(mesh: Any) -> None:
    a, b = values(1, 1, 32, 64), values(1, 1, 64, 64, seed=1)
    result = ttnn.linear(put(mesh, a), put(mesh, b), dtype=ttnn.bfloat8_b)
    assert result.dtype is ttnn.bfloat8_b
    torch.testing.assert_close(
        same_on_all(result), round_on_device(a @ b, DataType.BFLOAT8_B), rtol=0.02, atol=0.1
    )
    assert torch.equal(same_on_all(result), round_on_device(same_on_all(result), DataType.BFLOAT8_B))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((40, 64), (64, 50)),
        ((3, 40, 64), (64, 50)),
        ((40, 64), (1, 1, 64, 50)),
        ((2, 3, 40, 64), (2, 3, 64, 50)),
        ((1, 1, 40, 64), (2, 3, 64, 50)),
        ((2, 1, 2, 33, 32), (1, 1, 1, 32, 7)),
        ((64,), (64, 50)),
        ((64,), (64,)),
        ((3, 40, 64), (64,)),
        ((2, 0), (0, 5)),
    ],
)
def test_matmul_of_every_form_is_torchs(mesh: Any, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    x, y = values(*a), values(*b, seed=1)
    expected = x @ y if len(a) != 1 or len(b) == 1 else (x[None] @ y).squeeze(-2)
    result = ttnn.matmul(put(mesh, x), put(mesh, y))
    if len(b) > len(a) > 1 and expected.dim() < len(b):
        expected = expected.reshape(result.shape)
    assert list(result.shape) == list(expected.reshape(result.shape).shape)
    assert_rounded(same_on_all(result), expected.reshape(result.shape))


@pytest.mark.parametrize("turns", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)])
def test_matmul_of_transposed_operands(mesh: Any, turns: tuple[bool, bool], lead: tuple[int, ...]) -> None:
    x, y = values(*lead, 40, 64), values(*lead, 64, 50, seed=1)
    given = [v.transpose(-1, -2).contiguous() if turn else v for v, turn in zip((x, y), turns, strict=True)]
    result = ttnn.matmul(*(put(mesh, v) for v in given), transpose_a=turns[0], transpose_b=turns[1])
    assert_rounded(same_on_all(result), x @ y)


@pytest.mark.parametrize("bias", [(50,), (1, 50), (1, 1, 1, 50), (40, 50), (1, 1)])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_linear_adds_the_bias_before_the_activation(
    mesh: Any, bias: tuple[int, ...], activation: str | None
) -> None:
    a, b, c = values(2, 1, 40, 64), values(64, 50, seed=1), values(*bias, seed=2)
    result = ttnn.linear(*(put(mesh, v) for v in (a, b)), bias=put(mesh, c), activation=activation)
    function = {None: lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}[activation]
    assert_rounded(same_on_all(result), function(a.double() @ b.double() + c.double()).float())


def test_activation_may_be_a_string_a_type_or_a_type_with_parameters(mesh: Any) -> None:
    a, b = put(mesh, values(32, 64)), put(mesh, values(64, 32, seed=1))
    relu = ttnn.UnaryOpType.RELU
    for given in ("relu", relu, ttnn.UnaryWithParam(relu)):
        assert same_on_all(ttnn.matmul(a, b, activation=given)).min() == 0
    with pytest.raises(DeviceError, match="activation 'swish'; allowed: relu, gelu"):
        ttnn.matmul(a, b, activation="swish")


def test_each_chip_multiplies_its_own_operands(mesh: Any) -> None:
    a, b, c = values(2, 40, 64), values(2, 64, 50, seed=1), values(2, 50, seed=2)
    left, right, bias = (put(mesh, v, cut=0) for v in (a, b, c))
    result = chips(ttnn.linear(left, right, bias=bias, activation="relu"))
    shared = chips(ttnn.matmul(left, put(mesh, b[:1])))
    for chip in range(2):
        assert_rounded(result[chip], F.relu(a[chip : chip + 1] @ b[chip] + c[chip]))
        assert_rounded(shared[chip], a[chip : chip + 1] @ b[0])


def test_minimal_matmul_with_bias_and_activation(mesh: Any) -> None:
    a, b, c = values(1, 1, 50, 64), values(1, 1, 64, 96, seed=1), values(1, 96, seed=2)
    operands = (put(mesh, v) for v in (a, b))
    result = ttnn.experimental.minimal_matmul(
        *operands, bias_tensor=put(mesh, c), fused_activation=ttnn.UnaryOpType.SILU
    )
    assert_rounded(same_on_all(result), F.silu(a @ b + c))


def test_a_sharded_product_has_the_shards_that_ttnn_chooses(mesh: Any) -> None:
    a, b = values(1, 1, 33, 64), values(1, 1, 64, 256, seed=1)
    for place, shard, cores in (
        (ttnn.L1_WIDTH_SHARDED_MEMORY_CONFIG, (64, 32), 8),
        (ttnn.L1_HEIGHT_SHARDED_MEMORY_CONFIG, (32, 256), 2),
    ):
        result = ttnn.matmul(put(mesh, a), put(mesh, b), memory_config=place)
        spec = result.memory_config().shard_spec
        assert (tuple(spec.shape), spec.grid.num_cores()) == (shard, cores)
        assert_rounded(same_on_all(result), a @ b)


def config(**changes: Any) -> Any:
    sizes = {"in0_block_w": 2, "out_subblock_h": 1, "out_subblock_w": 1, "per_core_M": 1, "per_core_N": 2}
    given = {
        "compute_with_storage_grid_size": ttnn.CoreCoord(8, 7),
        "transpose_mcast": False,
        **sizes,
        **changes,
    }
    return ttnn.MatmulMultiCoreReuseMultiCastProgramConfig(**given)


def test_a_program_config_that_fits_changes_nothing(mesh: Any) -> None:
    a, b = values(1, 1, 64, 128), values(1, 1, 128, 256, seed=1)
    result = ttnn.linear(put(mesh, a), put(mesh, b), program_config=config())
    assert torch.equal(same_on_all(result), same_on_all(ttnn.linear(put(mesh, a), put(mesh, b))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in0_block_w": 3}, "4 inner tiles, in0_block_w 3"),
        ({"per_core_N": 0}, "per_core_N 0; it must be 1 or more"),
        ({"out_subblock_w": 4}, "out_block_w, out_subblock_w 4"),
        ({"compute_with_storage_grid_size": (9, 7)}, "a grid of 9x7; there are"),
        ({"compute_with_storage_grid_size": (1, 1)}, "2x4 blocks for 1x1; give a core more tiles"),
        ({"per_core_M": 4}, "4x2 tiles a core of 2x8"),
    ],
)
def test_a_program_config_that_does_not_fit_is_rejected(mesh: Any, changes: Any, message: str) -> None:
    a, b = put(mesh, values(1, 1, 64, 128)), put(mesh, values(1, 1, 128, 256))
    if "compute_with_storage_grid_size" in changes:
        changes = {
            "compute_with_storage_grid_size": ttnn.CoreCoord(*changes["compute_with_storage_grid_size"])
        }
    with pytest.raises(DeviceError, match=message):
        ttnn.linear(a, b, program_config=config(**changes))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((40, 64), (32, 50), "inner sizes differ"),
        ((2, 3, 32, 64), (2, 1, 64, 32), "batches of"),
        ((2, 32, 64), (1, 2, 64, 32), "batches of"),
        ((), (64,), "both need an axis"),
    ],
)
def test_shapes_that_ttnn_does_not_multiply_are_rejected(mesh: Any, a: Any, b: Any, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        ttnn.matmul(put(mesh, values(*a)), put(mesh, values(*b)))


def test_what_is_not_emulated_says_so(mesh: Any) -> None:
    a, b = put(mesh, values(64, 64)), put(mesh, values(64, 64))
    place = ttnn.create_sharded_memory_config(
        (32, 64),
        core_grid=ttnn.num_cores_to_corerangeset(2, ttnn.CoreCoord(8, 7), True),
        strategy=ttnn.ShardStrategy.HEIGHT,
        use_height_and_width_as_shard_shape=True,
    )
    with pytest.raises(NotEmulatedError, match="the emulator does not multiply shards"):
        ttnn.matmul(ttnn.to_memory_config(a, place), b)
    with pytest.raises(NotEmulatedError, match="the emulator does not take optional_output_tensor"):
        ttnn.matmul(a, b, optional_output_tensor=a)
    with pytest.raises(DeviceError, match="dtype uint32 of a product of floats"):
        ttnn.matmul(a, b, dtype=ttnn.uint32)
    assert a.layout is TILE
