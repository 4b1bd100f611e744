"""The functions of one number that ops and fused activations compute, on float32.

The approximate modes compute the same as the accurate ones: the emulator does not know the last digits of the SFPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import torch
import torch.nn.functional as F

from disagg_tt.device.emulator.ops.plan import emulated

Function = Callable[[torch.Tensor], torch.Tensor]


class UnaryOpType(Enum):
    """The functions that can be fused into another op."""

    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"
    EXP = "exp"
    SQRT = "sqrt"
    RSQRT = "rsqrt"
    RECIP = "reciprocal"
    NEG = "neg"
    ABS = "abs"
    SIGMOID = "sigmoid"
    TANH = "tanh"
    LOG = "log"
    SQUARE = "square"
    IDENTITY = "identity"

    __hash__ = object.__hash__  # by identity, which is faster


class GeluVariant(Enum):
    """Accurate and FastLut are the exact gelu here, Tanh the one with tanh in place of the normal distribution."""

    Accurate = 0
    FastLut = 1
    Tanh = 2


class SigmoidMode(Enum):
    Accurate = 0
    FastApproximate = 1


class UnaryWithParam:
    """A fused function with its parameters; of these only the flag for an approximate mode exists here."""

    __slots__ = ("op_type", "params")

    def __init__(self, op_type: UnaryOpType, *params: float):
        if not isinstance(op_type, UnaryOpType) or len(params) > 2:
            raise TypeError(
                f"UnaryWithParam({op_type!r}, ...): it takes a UnaryOpType and at most two numbers"
            )
        emulated(
            not params or op_type in _APPROXIMATED,
            "UnaryWithParam",
            f"take parameters of {op_type.name}; it takes the approximate flag of "
            + ", ".join(sorted(t.name for t in _APPROXIMATED)),
        )
        self.op_type, self.params = op_type, params

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UnaryWithParam):
            return NotImplemented
        return (self.op_type, self.params) == (other.op_type, other.params)

    def __hash__(self) -> int:
        return hash((self.op_type, self.params))

    def __repr__(self) -> str:
        return f"UnaryWithParam({self.op_type.name})"


_APPROXIMATED = {UnaryOpType[n] for n in ("GELU", "EXP", "SQRT", "RSQRT", "SIGMOID", "TANH", "LOG")}


def exact_gelu(x: torch.Tensor) -> torch.Tensor:
    """Return x times the normal distribution's integral up to x, by erfc, which is exact far below zero as well."""
    return (x * 0.5 * torch.special.erfc(x.to(torch.float64) * -(0.5**0.5))).to(x.dtype)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


FUNCTIONS: dict[str, Function] = {
    "relu": F.relu,
    "gelu": exact_gelu,
    "silu": F.silu,
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "neg": torch.neg,
    "abs": torch.abs,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "log": torch.log,
    "square": torch.square,
    "identity": torch.clone,
}


def fused(op: str, activations: Sequence[object]) -> tuple[Function, ...]:
    """Return the functions of a list of activations: UnaryOpType, UnaryWithParam or (UnaryOpType, parameter)."""
    return tuple(_function(op, activation) for activation in activations)


def _function(op: str, activation: object) -> Function:
    if isinstance(activation, tuple):
        activation = UnaryWithParam(*activation)
    if isinstance(activation, UnaryWithParam):
        activation = activation.op_type
    if not isinstance(activation, UnaryOpType):
        raise TypeError(f"{op}: activation {activation!r}; it must be a UnaryOpType or UnaryWithParam")
    return FUNCTIONS[activation.value]
