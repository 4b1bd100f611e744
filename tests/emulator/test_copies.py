"""typecast, clone, copy and plus_one: rounding, the ends of integer ranges, memory of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensors import ROW_MAJOR, bfloat16, generator, height_sharded, put, same_on_all

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.errors import DeviceError

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [ttnn.bfloat8_b, ttnn.bfloat4_b, ttnn.bfloat16, ttnn.float32], ids=str)
def test_typecast_of_bfloat16_packs_as_the_device_does_and_leaves_its_input(mesh: Any, dtype: Any) -> None:
    exact = bfloat16(torch.randn(4, 64, generator=generator(15)) * 8)
    x = put(mesh, exact)
    result = ttnn.typecast(x, dtype)
    assert result.dtype is dtype
    assert torch.equal(same_on_all(result), round_on_device(exact.clone(), dtype))
    assert torch.equal(same_on_all(x), exact)


def test_typecast_of_float32_to_bfloat16_rounds_ties_to_even(mesh: Any) -> None:
    ulp = 2.0**-7
    x = put(mesh, torch.tensor([[1 + ulp / 2, 1 + 3 * ulp / 2, 1 + ulp / 2 + 1e-6]]), ttnn.float32)
    assert same_on_all(ttnn.typecast(x, ttnn.bfloat16)).tolist() == [[1, 1 + 2 * ulp, 1 + ulp]]


@pytest.mark.parametrize(
    ("source", "before", "dtype", "after"),
    [
        (ttnn.float32, [2.9, -2.9, 3e9, -3e9, NAN, INF, -INF, -0.0], ttnn.int32, [2, -2, 2**31 - 1, -(2**31), 2**31 - 1, 2**31 - 1, -(2**31), 0]),
        (ttnn.float32, [2.9, -2.9, 3e9, 5e9, INF, -INF], ttnn.uint32, [2, 0, 3000000000, 2**32 - 1, 2**32 - 1, 0]),
        (ttnn.float32, [2.4, 2.5, -3.0, 70000.0, 65535.4], ttnn.uint16, [2, 3, 0, 65535, 65535]),
        (ttnn.bfloat16, [2.5, -1.0, 260.0], ttnn.uint8, [2, 255, 4]),
        (ttnn.int32, [-1, 5, 2**31 - 1], ttnn.uint32, [2**32 - 1, 5, 2**31 - 1]),
        (ttnn.uint32, [2**32 - 1, 5], ttnn.int32, [-1, 5]),
        (ttnn.uint32, [2**32 - 1, 65536, 7], ttnn.uint16, [65535, 65535, 7]),
        (ttnn.int32, [-1, 70000, 7], ttnn.uint16, [0, 65535, 7]),
        (ttnn.uint16, [65535, 7], ttnn.int32, [65535, 7]),
        (ttnn.int32, [-1, 257], ttnn.uint8, [255, 1]),
        (ttnn.uint32, [2**32 - 1, 2**24 + 1, 3], ttnn.float32, [2.0**32, 2.0**24, 3]),
        (ttnn.int32, [-(2**31), 257, 259], ttnn.bfloat16, [-(2.0**31), 258, 260]),
    ],
)  # fmt: skip
def test_typecast_of_integers(
    mesh: Any, source: Any, before: list[float], dtype: Any, after: list[float]
) -> None:
    result = ttnn.typecast(put(mesh, torch.tensor([before]), source), dtype)
    assert result.dtype is dtype
    assert same_on_all(result).tolist() == [after]
    cloned = ttnn.clone(put(mesh, torch.tensor([before]), source), dtype=dtype)
    assert same_on_all(cloned).tolist() == [after]


def test_clone_and_copy_are_tensors_of_their_own(mesh: Any) -> None:
    x = put(mesh, torch.ones(1, 32), ttnn.float32)
    cloned, target = ttnn.clone(x), ttnn.zeros_like(x)
    assert ttnn.copy(x, target) is target
    ttnn.add_(x, 1.0)
    assert same_on_all(x).unique().tolist() == [2]
    assert same_on_all(cloned).unique().tolist() == same_on_all(target).unique().tolist() == [1]
    narrow = put(mesh, torch.zeros(1, 32))
    assert same_on_all(
        ttnn.copy(put(mesh, torch.full((1, 32), 1.01), ttnn.float32), narrow)
    ).unique().item() == bfloat16(torch.tensor(1.01))
    with pytest.raises(DeviceError, match="both must be interleaved or have the same shards"):
        ttnn.clone(x, memory_config=height_sharded(mesh, 1, 32, 32))


def test_plus_one_is_in_place_and_may_skip_negative_entries(mesh: Any) -> None:
    start = torch.tensor([3, -1, 7, 2**31 - 1], dtype=torch.int32)
    host = ttnn.from_torch(start, dtype=ttnn.int32)
    x = put(mesh, torch.zeros(4, dtype=torch.int32), ttnn.int32, ROW_MAJOR)
    ttnn.copy_host_to_device_tensor(host, x)
    assert ttnn.plus_one(x, skip_negative_entries=True) is x
    assert same_on_all(x).tolist() == [4, -1, 8, 2**31 - 1]
    ttnn.plus_one(x)
    assert same_on_all(x).tolist() == [5, 0, 9, -(2**31)]
    assert ttnn.to_torch(host).tolist() == start.tolist(), "the host's values changed"
    most = put(mesh, torch.tensor([2**32 - 1]), ttnn.uint32, ROW_MAJOR)
    assert same_on_all(ttnn.plus_one(most)).tolist() == [0]
    with pytest.raises(DeviceError, match="1 to 4 axes"):
        ttnn.plus_one(put(mesh, torch.zeros(1, 1, 1, 1, 4), ttnn.int32, ROW_MAJOR))
