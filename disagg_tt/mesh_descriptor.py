"""The mesh graph descriptor: the shapes of the meshes, from the protobuf text file that TT_MESH_GRAPH_DESC_PATH names.

A small reader of protobuf's text format is enough for it, so that the emulator needs neither ttnn nor protobuf.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from disagg_tt.errors import RankBindingError

Message = dict[str, list[Any]]  # every field may repeat; a value is a str, an int, a float or a Message

_TOKEN = re.compile(
    r"""\s+|\#[^\n]*|(?P<token>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|[-+.\w]+|[{}<>\[\]:,;])"""
)
_CLOSING = {"{": "}", "<": ">"}


def read_mesh_descriptor(path: Path) -> dict[int, tuple[int, int]]:
    """Return the (rows, columns), in chips, of each mesh id that the descriptor instantiates.

    Raises RankBindingError when the file is unreadable, malformed, or describes meshes that nothing connects.
    """
    try:
        document = parse_text_proto(path.read_text(encoding="utf-8"))
        declared = {_only(mesh, "name"): mesh for mesh in document.get("mesh_descriptors", [])}
        graphs = document.get("graph_descriptors", [])
        instances = [i for g in graphs for i in g.get("instances", [])] + document.get(
            "top_level_instance", []
        )
        shapes = {}
        for mesh in (mesh for instance in instances for mesh in instance.get("mesh", [])):
            name = _only(mesh, "mesh_descriptor")
            if name not in declared:
                raise ValueError(f"mesh_descriptor {name!r} is not declared; declared are {sorted(declared)}")
            shapes[int(_only(mesh, "mesh_id"))] = _shape(declared[name])
    except (OSError, UnicodeDecodeError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise RankBindingError(
            f"mesh graph descriptor {path}: {error}. Allowed: protobuf text with mesh_descriptors and instances, as in "
            "mesh_descriptors/n300x2.textproto. Correct the file."
        ) from error
    if not shapes:
        raise RankBindingError(
            f"mesh graph descriptor {path}: it has no mesh instance. Add top_level_instance and instances, as in "
            "mesh_descriptors/n300x2.textproto."
        )
    if len(shapes) > 1 and not any(
        graph.get("connections") or graph.get("graph_topology") for graph in graphs
    ):
        raise RankBindingError(
            f"mesh graph descriptor {path}: nothing connects its meshes {sorted(shapes)}; K and V could not travel. "
            "Add connections between them, as in mesh_descriptors/n300x2.textproto."
        )
    return shapes


def _only(message: Message, field: str) -> Any:
    values = message.get(field, [])
    if len(values) != 1:
        raise ValueError(f"field {field} is given {len(values)} times instead of once")
    return values[0]


def _shape(mesh: Message) -> tuple[int, int]:
    dims = _only(mesh, "device_topology").get("dims", [])
    if len(dims) != 2 or not all(isinstance(dim, int) and dim > 0 for dim in dims):
        raise ValueError(f"device_topology dims are {dims} instead of two positive numbers, rows and columns")
    return dims[0], dims[1]


def parse_text_proto(text: str) -> Message:
    """Parse protobuf text format: `name: value`, `name { ... }`, `name: [v, v]`, # comments. Raises ValueError."""
    tokens: list[str] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"line {text.count(chr(10), 0, at) + 1}: unexpected {text[at : at + 20]!r}")
        if match["token"]:
            tokens.append(match["token"])
        at = match.end()
    tokens.reverse()  # the next token is the last of the list
    return _message(tokens, "")


def _message(tokens: list[str], end: str) -> Message:
    message: Message = {}
    while (name := _next(tokens) if tokens else "") != end:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(
                f"{name or 'the end of the file'!r} where a field name or {end or 'the end'!r} belongs"
            )
        if tokens and tokens[-1] == ":":
            tokens.pop()
        token = _next(tokens)
        values = message.setdefault(name, [])
        if token == "[":
            while (token := _next(tokens)) != "]":
                if token != ",":
                    values.append(_value(token, tokens))
        else:
            values.append(_value(token, tokens))
        if tokens and tokens[-1] in ",;":
            tokens.pop()
    return message


def _value(token: str, tokens: list[str]) -> Any:
    if token in _CLOSING:
        return _message(tokens, _CLOSING[token])
    if token[0] in "\"'":
        return token[1:-1]
    if re.fullmatch(r"[-+]?\d+", token):
        return int(token)
    if re.fullmatch(r"[-+.\w]+", token):
        return token  # an enumeration value, a float or a boolean: nothing here needs those
    raise ValueError(f"{token!r} where a value belongs")


def _next(tokens: list[str]) -> str:
    if not tokens:
        raise ValueError("the file ends inside a message")
    return tokens.pop()
