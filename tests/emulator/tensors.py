"""What the emulator's tests share: seeded values, and the way to the device and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from disagg_tt.device import emulator as ttnn

OpenMesh = Callable[..., Any]
TILE, ROW_MAJOR = ttnn.TILE_LAYOUT, ttnn.ROW_MAJOR_LAYOUT


def generator(seed: int) -> torch.Generator:
    """Return a generator and print its seed, which pytest shows when the test fails."""
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def put(mesh: Any, values: torch.Tensor, dtype: Any = ttnn.bfloat16, layout: Any = TILE, *, cut: int | None = None,
        memory: Any = None) -> Any:  # fmt: skip
    """Return `values` on `mesh`, the same on every chip, or cut along axis `cut` into one part a chip."""
    mapper = ttnn.ReplicateTensorToMesh(mesh) if cut is None else ttnn.ShardTensorToMesh(mesh, dim=cut)
    return ttnn.from_torch(
        values, dtype=dtype, layout=layout, device=mesh, mesh_mapper=mapper, memory_config=memory
    )


def chips(tensor: Any) -> list[torch.Tensor]:
    """Return each chip's values as float32 or int64."""
    read = [ttnn.to_torch(shard) for shard in ttnn.get_device_tensors(tensor)]
    return [values.to(torch.float32 if values.is_floating_point() else torch.int64) for values in read]


def same_on_all(tensor: Any) -> torch.Tensor:
    """Return the values of a tensor that must be the same on every chip."""
    first, *others = chips(tensor)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0, equal_nan=True)
    return first


def height_sharded(mesh: Any, cores: int, height: int, width: int) -> Any:
    """Return an L1 memory config of one [height, width] shard on each of `cores` cores."""
    return ttnn.create_sharded_memory_config(
        (height, width),
        core_grid=ttnn.num_cores_to_corerangeset(cores, mesh.compute_with_storage_grid_size(), True),
        strategy=ttnn.ShardStrategy.HEIGHT,
        orientation=ttnn.ShardOrientation.ROW_MAJOR,
        use_height_and_width_as_shard_shape=True,
    )


def bfloat16(values: torch.Tensor) -> torch.Tensor:
    """Return float32 values rounded to bfloat16, ties to even."""
    return values.to(torch.bfloat16).to(torch.float32)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return normally distributed values that bfloat16 holds, as float32."""
    return bfloat16(torch.randn(shape, generator=generator(seed)))


def put_halves(mesh: Any, x: torch.Tensor, layout: Any = TILE, dtype: Any = ttnn.bfloat16) -> Any:
    """Return `x` with the first half of axis 0 on chip 0 and the second half on chip 1."""
    return put(mesh, x, dtype, layout, cut=0)


def check_halves(result: Any, expected: torch.Tensor) -> None:
    """Check that chip 0 holds the first half of axis 0 of `expected`, and chip 1 the second half."""
    for got, part in zip(chips(result), expected.chunk(2), strict=True):
        assert torch.equal(got, part)
        assert list(result.shape) == list(part.shape)


def ulp_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """Return the distance between neighbouring bfloat16 numbers at each value."""
    exponent = torch.frexp(values.abs().clamp(min=2.0**-100)).exponent
    return torch.exp2((exponent - 8).float())


def assert_rounded(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Check that `got` is `exact` rounded once to bfloat16: half of the last place, and 1e-6 for sums in another order."""
    assert got.shape == exact.shape
    assert torch.equal(got, bfloat16(got)), "values that bfloat16 cannot hold"
    if got.numel() == 0:
        return
    worst = (((got - exact).abs() - 1e-6) / ulp_bfloat16(exact)).max().item()
    assert worst <= 0.55, f"{worst} units in the last place"


_MAGNITUDE_BITS = {ttnn.float32: 24, ttnn.bfloat16: 8, ttnn.bfloat8_b: 7, ttnn.bfloat4_b: 3}


def assert_one_step(got: torch.Tensor, exact: torch.Tensor, dtype: Any) -> None:
    """Check that `got` is float64 `exact` to one rounding step of `dtype`, NaN and infinities in the same places."""
    assert got.shape == exact.shape
    for what in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(what(got), what(exact)), what.__name__
    finite, size = exact.isfinite(), exact.abs()
    if dtype.is_block_float:  # one exponent for 16 values of a row
        blocks = torch.nn.functional.pad(size, (0, -size.shape[-1] % 16)).unflatten(-1, (-1, 16))
        size = blocks.amax(-1, keepdim=True).expand_as(blocks).flatten(-2)[..., : size.shape[-1]]
    exponent = torch.frexp(size.clamp(min=2.0**-100)).exponent
    steps = (got.double() - exact).abs() / torch.exp2((exponent - _MAGNITUDE_BITS[dtype]).double())
    worst = steps[finite].max().item() if finite.any() else 0.0
    assert worst <= 1, f"{worst} rounding steps of {dtype.value}"
