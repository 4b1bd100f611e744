"""Elementwise ops against written-out references in float64: every function, NaN, infinities and the smallest numbers too.

Floats are within one step of their dtype of the exact result, integers exact. Meshes are 1x2.
"""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from tensors import (
    ROW_MAJOR,
    TILE,
    OpenMesh,
    bfloat16,
    chips,
    generator,
    height_sharded,
    put,
    same_on_all,
    ulp_bfloat16,
)

from disagg_tt.device import emulator as ttnn
from disagg_tt.errors import DeviceError, NotEmulatedError

NAN, INF = float("nan"), float("inf")
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    NAN,
    INF,
    -INF,
    1e-40,
    -1e-40,
    2.0**-126,
    3e38,
    -3e38,
    88.0,
    -88.0,
    100.0,
    -100.0,
]
FLOATS = [ttnn.bfloat16, ttnn.float32, ttnn.bfloat8_b]


def names(dtype: Any) -> str:
    return str(dtype.value)


def numbers(seed: int, special: bool = True) -> torch.Tensor:
    """Return [4, 64] float32 numbers of many sizes that bfloat16 holds, `SPECIAL` first."""
    g = generator(seed)
    x = torch.randn(4, 64, generator=g) * torch.exp2(torch.randint(-6, 4, (4, 64), generator=g))
    if special:
        x[0, : len(SPECIAL)] = torch.tensor(SPECIAL)
    return bfloat16(x)


def step(exact: torch.Tensor, dtype: Any) -> torch.Tensor:
    """Return the distance between neighbouring numbers of `dtype` at each of `exact`, [rows, width]."""
    if dtype is ttnn.float32:
        return torch.exp2((torch.frexp(exact.abs().clamp(min=2.0**-125)).exponent - 24).double())
    if dtype is ttnn.bfloat16:
        return ulp_bfloat16(exact.float()).double().clamp(min=2.0**-133)
    largest = exact.unflatten(-1, (-1, 16)).abs().amax(-1, keepdim=True).expand(-1, -1, 16).flatten(-2)
    return torch.exp2((torch.frexp(largest.clamp(min=2.0**-110)).exponent - 7).double())


def assert_within_a_step(got: torch.Tensor, exact: torch.Tensor, dtype: Any) -> None:
    """Check `got` against the float64 result: NaN and infinities where it has them, else at most one step off."""
    assert got.shape == exact.shape
    limit = 3.4028234663852886e38 if dtype is ttnn.float32 else 3.3895313892515355e38
    assert torch.equal(got.isnan(), exact.isnan())
    huge = exact.abs() > limit
    known = ~(exact.isnan() | huge)
    assert (got[huge].sign() == exact[huge].sign()).all()
    assert (got[huge].abs() >= limit).all()
    off = ((got.double() - exact).abs() / step(exact.nan_to_num(0, 0, 0), dtype))[known]
    assert off.max().item() <= 1, f"{off.max().item()} steps at {exact[known][off.argmax()].item()}"


# ---------------------------------------------------------------- one tensor

UNARY = {
    "relu": lambda x: torch.where(x.isnan(), x, x.clamp(min=0)),
    "gelu": lambda x: torch.where(x == -INF, NAN, x * torch.exp(torch.special.log_ndtr(x))),
    "silu": lambda x: torch.where(x == -INF, NAN, x / (1 + torch.exp(-x))),
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "rsqrt": lambda x: 1 / torch.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "neg": torch.neg,
    "abs": torch.abs,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "tanh": torch.tanh,
    "log": torch.log,
    "square": lambda x: x * x,
    "identity": torch.clone,
}


@pytest.mark.parametrize("dtype", FLOATS, ids=names)
@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_tensor(mesh: Any, name: str, dtype: Any) -> None:
    x = put(mesh, numbers(1, special=dtype is not ttnn.bfloat8_b), dtype)
    held = same_on_all(x)
    result = getattr(ttnn, name)(x)
    assert (result.dtype, result.shape) == (dtype, x.shape)
    exact = UNARY[name](held.double())
    if dtype is ttnn.bfloat8_b:
        keep = exact.isfinite().unflatten(-1, (-1, 16)).all(-1, keepdim=True).expand(-1, -1, 16).flatten(-2)
        got, exact = same_on_all(result).where(keep, torch.zeros(())), exact.where(keep, 0.0)
        assert_within_a_step(got, exact, dtype)
    else:
        assert_within_a_step(same_on_all(result), exact, dtype)
    assert torch.equal(same_on_all(x).nan_to_num(7), held.nan_to_num(7)), "the input was modified"


@pytest.mark.parametrize("variant", ["Accurate", "FastLut", "Tanh"])
def test_gelu_variants(mesh: Any, variant: str) -> None:
    x = numbers(2, special=False).clamp(-6, 6)
    got = same_on_all(ttnn.gelu(put(mesh, x, ttnn.float32), variant=getattr(ttnn.GeluVariant, variant)))
    d = x.double()
    curve = torch.tanh((2 / torch.pi) ** 0.5 * (d + 0.044715 * d**3))
    exact = 0.5 * d * (1 + curve) if variant == "Tanh" else d * torch.special.ndtr(d)
    assert (got - exact).abs().max() < 1e-6
    assert torch.equal(
        same_on_all(ttnn.gelu(put(mesh, x), fast_and_approximate_mode=True)),
        same_on_all(ttnn.gelu(put(mesh, x))),
    )


@pytest.mark.parametrize(("low", "high"), [(-1, 2), (-0.5, None), (None, 0.25)])
def test_clamp(mesh: Any, low: float | None, high: float | None) -> None:
    x = numbers(3)
    got = same_on_all(ttnn.clamp(put(mesh, x), low, high))
    torch.testing.assert_close(got, x.clamp(low, high), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "dtype", "before", "after"),
    [
        ("relu", ttnn.int32, [-5, 0, 2**31 - 1, -(2**31)], [0, 0, 2**31 - 1, 0]),
        ("relu", ttnn.uint32, [5, 2**32 - 1], [5, 2**32 - 1]),
        ("abs", ttnn.int32, [-5, 7, -(2**31)], [5, 7, -(2**31)]),
        ("neg", ttnn.int32, [-5, 7, -(2**31)], [5, -7, -(2**31)]),
        ("square", ttnn.int32, [-5, 65536, 46341], [25, 0, 46341**2 - 2**32]),
        ("square", ttnn.uint32, [65537, 2**32 - 1], [131073, 1]),
        ("square", ttnn.uint16, [255, 256], [65025, 0]),
        ("identity", ttnn.uint8, [255, 3], [255, 3]),
    ],
)  # fmt: skip
def test_integers_of_one_tensor_wrap(
    mesh: Any, name: str, dtype: Any, before: list[int], after: list[int]
) -> None:
    result = getattr(ttnn, name)(put(mesh, torch.tensor([before]), dtype))
    assert same_on_all(result).tolist() == [after]
    assert same_on_all(ttnn.typecast(result, ttnn.float32)).tolist() == torch.tensor([after]).float().tolist()


@pytest.mark.parametrize("name", ["exp", "silu", "gelu", "sqrt", "reciprocal", "sigmoid"])
def test_functions_of_floats_reject_integers(mesh: Any, name: str) -> None:
    with pytest.raises(DeviceError, match=f"{name}: input is int32; allowed: floats; use typecast"):
        getattr(ttnn, name)(put(mesh, torch.ones(1, 32), ttnn.int32))


# ---------------------------------------------------------------- two operands

BINARY = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "rsub": lambda a, b: b - a,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}
COMPARISONS = {n: getattr(operator, n) for n in ("eq", "ne", "lt", "gt", "le", "ge")}


@pytest.mark.parametrize("dtype", [ttnn.bfloat16, ttnn.float32], ids=names)
@pytest.mark.parametrize("name", [*BINARY, *COMPARISONS])
def test_functions_of_two_tensors(mesh: Any, name: str, dtype: Any) -> None:
    a, b = numbers(4), numbers(5)
    b[0, : len(SPECIAL)] = torch.tensor(SPECIAL[1:] + SPECIAL[:1])
    a, b = bfloat16(a), bfloat16(b)
    left, right = put(mesh, a, dtype), put(mesh, b, dtype)
    result = getattr(ttnn, name)(left, right)
    exact = {**BINARY, **COMPARISONS}[name](a.double(), b.double()).double()
    assert result.dtype is dtype
    assert_within_a_step(same_on_all(result), exact, dtype)
    assert torch.equal(same_on_all(left).nan_to_num(7), a.nan_to_num(7)), "an input was modified"


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_block_floats_of_two_tensors(mesh: Any, name: str) -> None:
    left, right = (put(mesh, numbers(s, special=False).abs() + 1, ttnn.bfloat8_b) for s in (6, 7))
    a, b = same_on_all(left).double(), same_on_all(right).double()
    result = getattr(ttnn, name)(left, right)
    assert result.dtype is ttnn.bfloat8_b
    assert_within_a_step(same_on_all(result), BINARY[name](a, b), ttnn.bfloat8_b)
    into = getattr(ttnn, name)(left, right, dtype=ttnn.float32)
    assert_within_a_step(same_on_all(into), BINARY[name](a, b), ttnn.float32)


def test_add_rounds_ties_away_from_zero_and_to_even_in_the_accurate_mode(mesh: Any) -> None:
    ulp = 2.0**-7
    a = put(mesh, torch.tensor([[1.0, 1.0, -1.0, -1.0]]))
    b = put(mesh, torch.tensor([[ulp / 2, 3 * ulp / 2, -ulp / 2, -3 * ulp / 2]]))
    assert same_on_all(ttnn.add(a, b)).tolist() == [[1 + ulp, 1 + 2 * ulp, -1 - ulp, -1 - 2 * ulp]]
    accurate = same_on_all(ttnn.add(a, b, fast_and_approximate_mode=False))
    assert accurate.tolist() == [[1, 1 + 2 * ulp, -1, -1 - 2 * ulp]]
    with pytest.raises(DeviceError, match="bfloat16 results only"):
        ttnn.add(a, b, fast_and_approximate_mode=False, dtype=ttnn.float32)


def test_mul_rounds_ties_to_even_and_away_from_zero_in_the_fast_mode(mesh: Any) -> None:
    a, b = (
        put(mesh, torch.tensor([[1 + 2.0**-7]])),
        put(mesh, torch.tensor([[1.5]])),
    )  # 1.5 + 1.5 * 2^-7: a tie
    assert same_on_all(ttnn.mul(a, b)).item() == 1.5 + 2.0**-6
    c = put(mesh, torch.tensor([[1 + 3 * 2.0**-7]]))  # 1.5 + 4.5 * 2^-7
    assert same_on_all(ttnn.mul(c, b)).item() == 1.5 + 4 * 2.0**-7
    assert same_on_all(ttnn.mul(c, b, fast_and_approximate_mode=True)).item() == 1.5 + 5 * 2.0**-7


WRAPPING = {
    ttnn.uint32: ([0, 2**32 - 1, 2**31, 65537, 35308], [1, 2**32 - 1, 2**31, 65537, 2**32 - 2]),
    ttnn.int32: ([0, 2**31 - 1, -(2**31), 65537, -7], [1, 1, -1, 65537, -(2**31)]),
    ttnn.uint16: ([0, 65535, 300, 256, 1], [1, 65535, 300, 256, 2]),
}


@pytest.mark.parametrize("dtype", WRAPPING, ids=names)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "rsub"])
def test_integers_wrap_to_the_last_bit(mesh: Any, name: str, dtype: Any) -> None:
    a, b = WRAPPING[dtype]
    bits = 16 if dtype is ttnn.uint16 else 32
    exact = [BINARY[name](x, y) % 2**bits for x, y in zip(a, b, strict=True)]
    expected = [x - 2**bits if dtype is ttnn.int32 and x >= 2 ** (bits - 1) else x for x in exact]
    left, right = (put(mesh, torch.tensor([v]), dtype) for v in (a, b))
    for layout in (TILE, ROW_MAJOR):
        result = getattr(ttnn, name)(
            put(mesh, torch.tensor([a]), dtype, layout), put(mesh, torch.tensor([b]), dtype, layout)
        )
        assert same_on_all(result).tolist() == [expected]
        assert (result.dtype, result.layout) == (dtype, layout)
    assert getattr(ttnn, f"{name}_")(left, right) is left
    assert same_on_all(left).tolist() == [expected]


def test_integers_compare_exactly_and_choose_the_larger(mesh: Any) -> None:
    a, b = torch.tensor([[2**32 - 1, 2**24, 5]]), torch.tensor([[2**32 - 2, 2**24 + 1, 5]])
    left, right = put(mesh, a, ttnn.uint32), put(mesh, b, ttnn.uint32)
    for name, compare in COMPARISONS.items():
        assert torch.equal(same_on_all(getattr(ttnn, name)(left, right)), compare(a, b).long())
    assert torch.equal(same_on_all(ttnn.maximum(left, right)), torch.maximum(a, b))
    most = put(mesh, torch.tensor([[2**31 - 1]]), ttnn.int32)
    assert same_on_all(ttnn.lt(ttnn.add(most, 1), 0)).item() == 1, (
        "what has wrapped is negative for the next op"
    )
    small = put(mesh, torch.tensor([[1, 2]]), ttnn.uint8)
    assert ttnn.eq(small, small).dtype is ttnn.uint16
    assert ttnn.eq_(small, small).dtype is ttnn.uint8


def test_integers_divide_into_floats(mesh: Any) -> None:
    a, b = torch.tensor([[7, -7, 2**31 - 1, 1]]), torch.tensor([[2, 3, 3, 0]])
    result = ttnn.div(put(mesh, a, ttnn.int32), put(mesh, b, ttnn.int32))
    assert result.dtype is ttnn.float32
    assert_within_a_step(same_on_all(result), a.double() / b.double(), ttnn.float32)
    with pytest.raises(DeviceError, match="their quotient is float32"):
        ttnn.div(put(mesh, a, ttnn.int32), put(mesh, b, ttnn.int32), dtype=ttnn.int32)


def test_numbers_beside_tensors(mesh: Any) -> None:
    x, whole = numbers(8), torch.tensor([[3, 2**31 - 1, -5]])
    floats, integers = put(mesh, x), put(mesh, whole, ttnn.int32)
    assert_within_a_step(same_on_all(ttnn.add(floats, 0.5)), x.double() + 0.5, ttnn.bfloat16)
    assert_within_a_step(same_on_all(ttnn.sub(2, floats)), 2 - x.double(), ttnn.bfloat16)
    assert_within_a_step(same_on_all(ttnn.div(1.0, floats)), 1 / x.double(), ttnn.bfloat16)
    assert same_on_all(ttnn.add(integers, 1)).tolist() == [[4, -(2**31), -4]]
    assert same_on_all(ttnn.add(integers, 2.0)).tolist() == [[5, -(2**31) + 1, -3]]
    assert same_on_all(ttnn.mul(integers, 2**32 - 1)).tolist() == [[-3, -(2**31) + 1, 5]]
    assert ttnn.mul(integers, 2.0).dtype is ttnn.float32
    held = 1.0078125 - 2.0**-7  # 1.01 beside bfloat16 is cut to what it holds
    one = put(mesh, torch.ones(1, 1))
    assert same_on_all(ttnn.mul(one, 1.007)).item() == held
    assert same_on_all(ttnn.mul(put(mesh, torch.ones(1, 1), ttnn.float32), 1.007)).item() == pytest.approx(
        1.007, rel=1e-7
    )
    for wrong in (2.5, NAN, 2**33):
        with pytest.raises(DeviceError, match="cannot represent"):
            ttnn.add(integers, wrong)


@pytest.mark.parametrize(
    ("left", "right"),
    [((2, 3, 5, 40), (40,)), ((5, 40), (2, 3, 1, 40)), ((2, 1, 1, 40), (1, 3, 5, 1)), ((1,), (3, 5)), ((2, 3, 5, 40), (1, 3, 1, 1))],
)  # fmt: skip
@pytest.mark.parametrize("layout", [TILE, ROW_MAJOR], ids=["tile", "rows"])
def test_axes_of_one_and_missing_axes_are_repeated(
    mesh: Any, left: tuple[int, ...], right: tuple[int, ...], layout: Any
) -> None:
    g = generator(9)
    a, b = torch.randn(left, generator=g), torch.randn(right, generator=g)
    result = ttnn.sub(put(mesh, a, ttnn.float32, layout), put(mesh, b, ttnn.float32, layout))
    assert torch.equal(same_on_all(result), a - b)


@pytest.mark.parametrize("cuts", [(None, None), (None, 1), (1, None), (1, 1)])
def test_replicated_tensors_beside_ones_cut_over_chips(
    mesh: Any, cuts: tuple[int | None, int | None]
) -> None:
    a, b = (torch.randn(1, 2, 40, 64, generator=generator(s)) for s in (10, 11))
    x, y = ((v[:, :1] if cut is None else v) for v, cut in zip((a, b), cuts, strict=True))
    left, right = put(mesh, x, ttnn.float32, cut=cuts[0]), put(mesh, y, ttnn.float32, cut=cuts[1])
    silu = [ttnn.UnaryOpType.SILU]
    for chip in range(2):
        i, j = (v[:, chip % v.shape[1]][:, None] for v in (x, y))
        assert torch.equal(chips(ttnn.add(left, right))[chip], i + j)
        fused = chips(ttnn.mul(left, right, input_tensor_a_activations=silu))[chip]
        torch.testing.assert_close(fused, i / (1 + torch.exp(-i)) * j, rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.cat(chips(left), dim=1)[:, : x.shape[1]], x), "an input was modified"


def test_a_tensor_of_fewer_axes_beside_one_of_more_keeps_each_chips_values_apart(mesh: Any) -> None:
    a, b = torch.randn(1, 3, 2, 40, generator=generator(16)), torch.randn(2, 40, generator=generator(17))
    got = chips(ttnn.add(put(mesh, a, ttnn.float32), put(mesh, b, ttnn.float32, cut=0)))
    for chip in range(2):
        assert torch.equal(got[chip], a + b[chip])


def test_fused_functions_come_before_and_after_the_op(mesh: Any) -> None:
    a, b = (numbers(s, special=False).clamp(-8, 8) for s in (12, 13))
    x, y = put(mesh, a, ttnn.float32), put(mesh, b, ttnn.float32)
    kind = ttnn.UnaryOpType
    got = ttnn.add(
        x, y,
        input_tensor_a_activations=[kind.RELU, ttnn.UnaryWithParam(kind.SQUARE)],
        input_tensor_b_activations=[kind.ABS],
        activations=[kind.NEG],
    )  # fmt: skip
    torch.testing.assert_close(same_on_all(got), -(a.clamp(min=0).square() + b.abs()))
    with pytest.raises(TypeError, match="activation 'relu'"):
        ttnn.add(x, y, activations=["relu"])
    i = put(mesh, torch.ones(1, 32), ttnn.int32)
    with pytest.raises(NotEmulatedError, match="fuse activations with integers"):
        ttnn.add(i, i, activations=[kind.RELU])


def test_results_go_where_they_are_asked_to(mesh: Any) -> None:
    x, place = put(mesh, numbers(14)), height_sharded(mesh, 1, 32, 64)
    assert ttnn.add(x, x).memory_config() == ttnn.DRAM_MEMORY_CONFIG
    assert ttnn.add(x, x, memory_config=ttnn.L1_MEMORY_CONFIG).memory_config() == ttnn.L1_MEMORY_CONFIG
    assert ttnn.add(x, ttnn.to_memory_config(x, place)).memory_config() == place
    tall = ttnn.add(
        ttnn.to_memory_config(put(mesh, numbers(14)[None]), place),
        put(mesh, numbers(14)[None].expand(2, 4, 64)),
    )
    assert tall.memory_config() == height_sharded(mesh, 1, 64, 64), (
        "one core keeps all rows, of which there are more"
    )
    out = ttnn.zeros_like(x)
    for result in (
        ttnn.mul(x, 2.0, output_tensor=out),
        ttnn.relu(x, output_tensor=out),
        ttnn.typecast(x, ttnn.bfloat16, output_tensor=out),
    ):
        assert result is out
    assert torch.equal(same_on_all(out).nan_to_num(7), same_on_all(x).nan_to_num(7))
    rows = put(mesh, numbers(14), layout=ROW_MAJOR)
    with pytest.raises(DeviceError, match="ROW_MAJOR layout; leave it out"):
        ttnn.add(rows, rows, output_tensor=rows)


def test_an_op_runs_on_the_queue_that_it_is_given(open_mesh: OpenMesh) -> None:
    mesh = open_mesh(1, 2, num_command_queues=2)
    x = put(mesh, torch.ones(1, 32))
    before = [mesh.queue(i).enqueued for i in range(2)]
    ttnn.wait_for_event(1, ttnn.record_event(mesh, 0))
    ttnn.add(x, x, queue_id=1)
    ttnn.relu(x, queue_id=1)
    assert mesh.queue(1).enqueued > before[1] + 1
    with pytest.raises(DeviceError, match="command queue 5"):
        ttnn.add(x, x, queue_id=5)


# ---------------------------------------------------------------- what is left out


@pytest.mark.parametrize("options", [{"sub_core_grids": 1}, {"sub_device_id": 1}])
def test_what_the_emulator_does_not_have_is_refused_by_name(mesh: Any, options: dict[str, Any]) -> None:
    x = put(mesh, torch.ones(1, 32))
    with pytest.raises(NotEmulatedError, match=f"add: the emulator does not take {next(iter(options))}"):
        ttnn.add(x, x, **options)
    with pytest.raises(
        NotEmulatedError, match="does not convert its float32 result to int32|bfloat16 result to int32"
    ):
        ttnn.add(x, x, dtype=ttnn.int32)
    with pytest.raises(NotEmulatedError, match="does not round quotients"):
        ttnn.div(x, x, rounding_mode="floor")


@pytest.mark.parametrize("wrong", [None, "2", torch.ones(1, 32)], ids=["None", "str", "torch"])
def test_wrong_types_are_type_errors(mesh: Any, wrong: Any) -> None:
    x = put(mesh, torch.ones(1, 32))
    with pytest.raises(TypeError, match="it takes tensors, or a tensor and a number"):
        ttnn.add(x, wrong)
    with pytest.raises(TypeError, match="dtype 'float32'; it must be a DataType"):
        ttnn.add(x, x, dtype="float32")
