"""Ops that change shapes, cut and join: each bit-exact against torch, on chips with values of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensors import (
    ROW_MAJOR,
    TILE,
    check_halves,
    chips,
    height_sharded,
    put,
    put_halves,
    same_on_all,
    values,
)

from disagg_tt.device import emulator as ttnn
from disagg_tt.device.emulator.numeric import round_on_device
from disagg_tt.errors import DeviceError, NotEmulatedError

LAYOUTS = pytest.mark.parametrize("layout", [ROW_MAJOR, TILE], ids=["rows", "tile"])


# ---------------------------------------------------------------- shape


@LAYOUTS
@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 32, 64), (1, 1, 32, 64)), ((1, 1, 32, 64), (1, 32, 1, 64)), ((1, 2, 20, 64), (1, 1, 40, -1)),
     ((1, 1, 8, 96), (1, 3, 8, 32)), ((1, 3, 5, 7), (105,)), ((1, 64, 33), (-1,)), ((1, 6), (1, 1, 2, 1, 3))],
)  # fmt: skip
def test_reshape_keeps_the_values_in_order(mesh: Any, layout: Any, before: Any, after: Any) -> None:
    x = values(2, *before[1:])
    result = ttnn.reshape(put_halves(mesh, x, layout), after)
    for got, part in zip(chips(result), x, strict=True):
        assert torch.equal(got, part.reshape(after))
    assert -1 not in result.shape


def test_reshape_with_padding_moves_rows_out_of_and_into_the_logical_part(mesh: Any) -> None:
    x = values(1, 1, 32, 64)
    three = ttnn.reshape(put(mesh, x), ttnn.Shape([1, 1, 3, 64]), ttnn.Shape([1, 1, 32, 64]))
    assert (list(three.shape), list(three.padded_shape)) == ([1, 1, 3, 64], [1, 1, 32, 64])
    assert torch.equal(same_on_all(three), x[:, :, :3])
    back = same_on_all(ttnn.reshape(three, ttnn.Shape([1, 1, 32, 64]), ttnn.Shape([1, 1, 32, 64])))
    assert torch.equal(back[:, :, :3], x[:, :, :3])
    assert back[:, :, 3:].isnan().all(), "rows that the emulator does not keep must read as undefined"


def test_a_view_shares_memory_and_what_moves_values_does_not(mesh: Any) -> None:
    x = values(2, 2, 64, 64)
    views = [
        lambda t: ttnn.reshape(t, [2, 1, 64, 64]),
        lambda t: ttnn.view(t, [128, 64]),
        lambda t: ttnn.squeeze(t, 0),
        lambda t: ttnn.transpose(t, 1, 1),
        lambda t: ttnn.slice(t, [0] * 4, [1, 2, 64, 64]),
        lambda t: ttnn.pad(t, [(0, 0)], 0.0),
        lambda t: ttnn.concat([t]),
        lambda t: ttnn.to_layout(t, TILE),
        lambda t: ttnn.to_memory_config(t, ttnn.DRAM_MEMORY_CONFIG),
    ]
    copies = [
        lambda t: ttnn.reshape(t, [1, 2, 32, 128]),
        lambda t: ttnn.permute(t, [0, 2, 1, 3]),
        lambda t: ttnn.slice(t, [0] * 4, [1, 1, 64, 64]),
        lambda t: ttnn.to_memory_config(t, ttnn.L1_MEMORY_CONFIG),
    ]
    for make, shares in [(v, True) for v in views] + [(c, False) for c in copies]:
        tensor = put_halves(mesh, x)
        result = make(tensor)
        ttnn.deallocate(result)
        assert tensor.is_allocated() is not shares


def test_what_is_not_a_reshape_is_rejected(mesh: Any) -> None:
    x = put(mesh, values(1, 2, 20, 64))
    for shape in ([1, 2, 20, 63], [-1, -1, 20, 64], [7, -1], [-2, 1, 20, 64]):
        with pytest.raises(DeviceError, match="reshape: "):
            ttnn.reshape(x, shape)
    for wrong in ([1.0, 2, 20, 64], 5, "ab"):
        with pytest.raises(TypeError, match="list of integers"):
            ttnn.reshape(x, wrong)
    with pytest.raises(DeviceError, match="would move values"):
        ttnn.view(x, [40, 64])
    with pytest.raises(DeviceError, match="uint16 values"):
        ttnn.reshape(put(mesh, torch.ones(4, 8), ttnn.uint16), [8, 4])
    with pytest.raises(NotEmulatedError, match="does not write shards"):
        ttnn.reshape(ttnn.to_memory_config(x, height_sharded(mesh, 2, 32, 64)), [1, 1, 40, 64])


@LAYOUTS
def test_squeeze_and_unsqueeze(mesh: Any, layout: Any) -> None:
    x = values(2, 1, 33, 1)
    for dim in (None, 1, -1, (1, 3), 2, ()):
        expected = x.squeeze() if dim is None else x.squeeze(dim)
        got = ttnn.squeeze(put(mesh, x, layout=layout), *([] if dim is None else [dim]))
        assert torch.equal(same_on_all(got), expected)
    for dim in (0, 2, -1, -5):
        assert torch.equal(same_on_all(ttnn.unsqueeze(put(mesh, x, layout=layout), dim)), x.unsqueeze(dim))
    assert list(ttnn.unsqueeze_to_4D(put(mesh, values(5, 7), layout=layout)).shape) == [1, 1, 5, 7]
    for dim, op in ((4, ttnn.squeeze), (5, ttnn.unsqueeze)):
        with pytest.raises(DeviceError, match=f"axis {dim}"):
            op(put(mesh, x), dim)


@LAYOUTS
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 3, 2, 1), (-4, 1, -1, 2), (0, 1, 2, 3), (0, 2, 3, 1)])
def test_permute(mesh: Any, layout: Any, order: tuple[int, ...]) -> None:
    x = values(2, 3, 5, 40)
    check_halves(ttnn.permute(put_halves(mesh, x, layout), order), x.permute(order))


@LAYOUTS
@pytest.mark.parametrize("axes", [(1, 2), (2, 3), (-1, -2), (1, 1), (3, 1)])
def test_transpose(mesh: Any, layout: Any, axes: tuple[int, int]) -> None:
    x = values(2, 3, 5, 64)
    check_halves(ttnn.transpose(put_halves(mesh, x, layout), *axes), x.transpose(*axes))


@pytest.mark.parametrize("dtype", [ttnn.bfloat8_b, ttnn.bfloat4_b], ids=lambda d: d.value)
def test_block_floats_are_packed_anew_only_where_rows_change(mesh: Any, dtype: Any) -> None:
    x = put(mesh, values(1, 3, 32, 64) * torch.logspace(-3, 3, 64), dtype)
    held = same_on_all(x)
    for axes in ((0, 1), (1, 2)):
        assert torch.equal(same_on_all(ttnn.transpose(x, *axes)), held.transpose(*axes))
    turned = held.transpose(2, 3)
    expected = round_on_device(turned.contiguous(), dtype)
    assert torch.equal(same_on_all(ttnn.transpose(x, 2, 3)), expected)
    assert not torch.equal(expected, turned), "the test's values do not show the difference"
    folded = round_on_device(held.reshape(1, 3, 256, 8), dtype)
    assert torch.equal(same_on_all(ttnn.reshape(x, [1, 3, 256, 8])), folded)


# ---------------------------------------------------------------- parts and padding


@LAYOUTS
@pytest.mark.parametrize(
    ("start", "end", "step"),
    [((0, 0, 32, 64), (1, 2, 70, 128), None), ((0, 1, 3, 5), (1, 2, 66, 99), None), ((0, 0, -7, 0), (1, -1, 70, 128), None),
     ((0, 0, 0, 0), (1, 2, 70, 128), (1, 1, 3, 2)), ((0, 0, 0, 0), (1, 2, 70, 128), None)],
)  # fmt: skip
def test_slice(mesh: Any, layout: Any, start: Any, end: Any, step: Any) -> None:
    x = values(2, 2, 70, 128)
    by = step or (1, 1, 1, 1)
    part = tuple(slice(i, j, s) for i, j, s in zip(start[1:], end[1:], by[1:], strict=True))
    check_halves(ttnn.slice(put_halves(mesh, x, layout), start, end, step), x[(slice(None), *part)])


def test_a_slice_off_the_tiles_goes_by_rows(mesh: Any) -> None:
    x = values(1, 1, 64, 64)
    eight, four = put(mesh, x, ttnn.bfloat8_b), put(mesh, x, ttnn.bfloat4_b)
    off, on = ([0, 0, 1, 0], [1, 1, 64, 64]), ([0, 0, 32, 0], [1, 1, 50, 64])
    assert ttnn.slice(eight, *off).dtype is ttnn.bfloat16
    assert torch.equal(same_on_all(ttnn.slice(eight, *off)), same_on_all(eight)[:, :, 1:])
    assert ttnn.slice(eight, *on).dtype is ttnn.bfloat8_b
    assert torch.equal(same_on_all(ttnn.slice(four, *on)), same_on_all(four)[:, :, 32:50])
    with pytest.raises(DeviceError, match="bfloat4_b cannot be written as rows"):
        ttnn.slice(four, *off)
    with pytest.raises(DeviceError, match="only 1 is allowed"):
        ttnn.slice(eight, [0] * 4, [1, 1, 64, 64], [1, 1, 2, 1])
    for start, end in (([0] * 3, [1] * 3), ([0] * 4, [1, 1, 65, 64]), ([0, 0, 9, 0], [1, 1, 8, 64])):
        with pytest.raises(DeviceError, match="slice: "):
            ttnn.slice(eight, start, end)


KEYS = [0, (..., 1), (0, slice(1, 3)), (slice(None), -1, slice(8, 40)), (..., slice(0, 5)), (0, 0, 0), [0, 1]]
KEYS += [(slice(None), slice(0, 3, 2), slice(None), slice(-7, None))]


@LAYOUTS
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_indexing_follows_python(mesh: Any, layout: Any, key: Any) -> None:
    x = values(1, 3, 40, 64)
    expected = x[tuple(key) if isinstance(key, list) else key]
    assert torch.equal(same_on_all(put(mesh, x, layout=layout)[key]), expected)
    unit = isinstance(key, int) or all(
        not isinstance(k, slice) or (k.step is None and (k.start or 0) >= 0) for k in key
    )
    if unit and not (layout is TILE and key == (..., 1)):  # for which tiles would have to be rearranged
        host = ttnn.from_torch(x, dtype=ttnn.bfloat16, layout=layout)[key]
        assert torch.equal(ttnn.to_torch(host).float(), expected)


def test_bad_indices_are_pythons_errors(mesh: Any) -> None:
    x = put(mesh, values(1, 3, 40, 64))
    for key, error in (
        ((0,) * 5, IndexError),
        (1, IndexError),
        ((0, -4), IndexError),
        ("a", TypeError),
        (None, TypeError),
    ):
        with pytest.raises(error):
            x[key]
    with pytest.raises(ValueError, match="ellipsis"):
        x[..., ...]
    with pytest.raises(DeviceError, match="step"):
        x[:, ::-1]


@LAYOUTS
def test_split_and_chunk_give_torchs_parts(mesh: Any, layout: Any) -> None:
    x = values(1, 2, 70, 96)
    tensor = put(mesh, x, layout=layout)
    pairs = [
        (ttnn.split(tensor, s, dim=d), x.split(s, dim=d))
        for s, d in ((32, 2), (1, 1), ([30, 66], -1), (100, 3))
    ]
    pairs += [(ttnn.chunk(tensor, n, d), x.chunk(n, dim=d)) for n, d in ((2, 2), (3, -1), (4, 1))]
    for got, expected in pairs:
        for ours, theirs in zip(got, expected, strict=True):
            assert torch.equal(same_on_all(ours), theirs)
    for sizes in (0, [30, 60], [70, 0], []):
        with pytest.raises(DeviceError, match="split: "):
            ttnn.split(tensor, sizes, dim=2)


def test_pad(mesh: Any) -> None:
    x = values(2, 3, 20, 40)
    pad = torch.nn.functional.pad
    rows, tiles = put_halves(mesh, x, ROW_MAJOR), put_halves(mesh, x)
    check_halves(ttnn.pad(rows, [(1, 0), (2, 3), (5, 1)], 1.5), pad(x, (5, 1, 2, 3, 1, 0), value=1.5))
    check_halves(ttnn.pad(rows, [1, 4, 22, 45], [0, 1, 2, 5], 2.0), pad(x, (5, 0, 2, 0, 1, 0), value=2.0))
    check_halves(ttnn.pad(tiles, [(0, 12), (0, 33)], value=-1), pad(x, (0, 33, 0, 12), value=-1.0))
    integers = torch.tensor([[2**32 - 1, 7]])
    padded = ttnn.pad(put(mesh, integers, ttnn.uint32, ROW_MAJOR), [(0, 0), (1, 1)], 2**31)
    assert same_on_all(padded).tolist() == [[2**31, 2**32 - 1, 7, 2**31]]
    eight = put(mesh, x, ttnn.bfloat8_b)
    expected = round_on_device(pad(same_on_all(eight), (0, 24), value=100.0), ttnn.bfloat8_b)
    assert torch.equal(same_on_all(ttnn.pad(eight, [(0, 24)], 100.0)), expected)
    host = ttnn.pad(ttnn.from_torch(x, dtype=ttnn.bfloat16), [(0, 2)], 3.0)
    assert torch.equal(ttnn.to_torch(host).float(), pad(x, (0, 2), value=3.0))


def test_what_cannot_be_padded_is_rejected(mesh: Any) -> None:
    tiles, rows = put(mesh, values(1, 3, 20, 40)), put(mesh, torch.ones(4, 4), ttnn.uint16, ROW_MAJOR)
    for tensor, padding, value, message in (
        (tiles, [(1, 0)], 0.0, "at the end only"),
        (tiles, [(0, 0)] * 5, 0.0, "more pairs than axes"),
        (rows, [(0, 1)], 1.5, "one that the dtype can hold"),
        (rows, [(0, 1)], 70000, "one that the dtype can hold"),
        (rows, [(0, -1)], 0, "does not fit"),
        (put(mesh, values(4, 4), ttnn.bfloat4_b), [(0, 32)], 0.0, "within their tiles"),
    ):
        with pytest.raises(DeviceError, match=message):
            ttnn.pad(tensor, padding, value)
    with pytest.raises(TypeError):
        ttnn.pad(tiles, [(0, 1)])
    with pytest.raises(TypeError, match="4 axes"):
        ttnn.pad(rows, [5, 5], [0, 0], 0.0)


# ---------------------------------------------------------------- joining and repeating


@LAYOUTS
@pytest.mark.parametrize("dim", [1, 2, -1])
def test_concat_and_stack(mesh: Any, layout: Any, dim: int) -> None:
    sizes = [3, 32, 33]
    parts = []
    for seed, size in enumerate(sizes):
        shape = [2, 3, 20, 40]
        shape[dim] = size
        parts.append(values(*shape, seed=seed))
    shared, others = parts[0][:1], parts[1:]
    tensors = [put(mesh, shared, layout=layout), *(put_halves(mesh, p, layout) for p in others)]
    whole = torch.cat([shared.expand(2, -1, -1, -1), *others], dim=dim)
    check_halves(ttnn.concat(tensors, dim=dim), whole)
    x, y = values(2, 3, 20), values(2, 3, 20, seed=1)
    check_halves(
        ttnn.stack([put_halves(mesh, x, layout), put_halves(mesh, y, layout)], dim), torch.stack([x, y], dim)
    )


def test_concat_lies_in_dram_unless_told_and_joins_only_what_is_alike(mesh: Any) -> None:
    x = put(mesh, values(1, 1, 20, 64), memory=ttnn.L1_MEMORY_CONFIG)
    assert ttnn.concat([x, x]).memory_config() == ttnn.DRAM_MEMORY_CONFIG
    assert ttnn.concat([x, x], memory_config=ttnn.L1_MEMORY_CONFIG).memory_config() == ttnn.L1_MEMORY_CONFIG
    eight, four = (put(mesh, values(1, 1, 20, 64), dtype) for dtype in (ttnn.bfloat8_b, ttnn.bfloat4_b))
    assert ttnn.concat([eight, eight], -1).dtype is ttnn.bfloat8_b
    assert ttnn.concat([eight, eight], 2).dtype is ttnn.bfloat16, "padded rows are joined by rows"
    for tensors, dim, message in (
        ([x, put(mesh, values(1, 1, 20, 64), layout=ROW_MAJOR)], 3, "layouts must be the same"),
        ([x, eight], 3, "dtypes must be the same"),
        ([x, put(mesh, values(1, 1, 21, 64))], 3, "may differ on axis 3 only"),
        ([x, x], 4, "axis 4"),
        ([four, four], 2, "bfloat4_b cannot be written as rows"),
        ([], 0, "no tensors"),
    ):
        with pytest.raises(DeviceError, match=message):
            ttnn.concat(tensors, dim)


@LAYOUTS
def test_repeat_and_expand(mesh: Any, layout: Any) -> None:
    x = values(2, 1, 20, 40)
    tensor = put_halves(mesh, x, layout)
    for times in ((1, 3, 2, 1), (2, 2), (1,), (1, 1, 1, 3)):
        full = (1,) * (4 - len(times)) + times
        check_halves(ttnn.repeat(tensor, times), x.repeat(full))
    for got, part in zip(chips(ttnn.repeat(tensor, (2, 1, 1, 1, 1))), x, strict=True):
        assert torch.equal(got, part[None].repeat(2, 1, 1, 1, 1))
    for repeats, dim in ((2, 1), (3, 2), (2, -1)):
        check_halves(ttnn.repeat_interleave(tensor, repeats, dim), x.repeat_interleave(repeats, dim=dim))
    check_halves(ttnn.expand(tensor, [-1, 4, -1, 40]), x.expand(-1, 4, -1, -1))
    with pytest.raises(DeviceError, match="only axes of size 1"):
        ttnn.expand(tensor, [1, 1, 40, 40])
    eight = put(mesh, x, ttnn.bfloat8_b)
    expected = round_on_device(same_on_all(eight).repeat(1, 1, 1, 2), ttnn.bfloat8_b)
    assert torch.equal(same_on_all(ttnn.repeat(eight, (1, 1, 1, 2))), expected)
