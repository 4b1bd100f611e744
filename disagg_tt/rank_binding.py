"""The rank binding: which MPI rank drives which mesh, in the YAML file that tt-run takes.

    rank_bindings:                     # one entry a rank, ranks 0..n-1
      - rank: 0
        mesh_id: 0                     # a mesh of the descriptor
        mesh_host_rank: 0
        env_overrides: {DISAGG_TT_ROLE: prefill, TT_VISIBLE_DEVICES: "0"}
      - ...
    global_env: {}                     # for all ranks, env_overrides win
    mesh_graph_desc_path: mesh_descriptors/n300x2.textproto

`RankBinding.load` reads it with tt-run's own rules (ttnn.distributed.ttrun), so that one file serves hardware, mock cluster
and emulator. `check` checks it for what this program needs, ranks that each have a mesh of their own and a decode rank among
them; `pair` for one prefill and one decode rank.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NoReturn

import yaml

from disagg_tt.errors import RankBindingError
from disagg_tt.mesh_descriptor import read_mesh_descriptor

ROLES = ("prefill", "decode")
CHIPS_PER_PCIE_DEVICE = 2  # at most: an N300 has two chips behind one PCIe device, an N150 one


@dataclass(frozen=True)
class Rank:
    """One MPI rank. `env` is all that tt-run would set for it: TT_MESH_*, global_env, then env_overrides."""

    rank: int
    mesh_id: int
    mesh_host_rank: int | None
    env: dict[str, str]

    @property
    def role(self) -> str:
        """What it does in this program: DISAGG_TT_ROLE, or without it, rank 0 prefills and the others decode."""
        return self.env.get("DISAGG_TT_ROLE", ROLES[min(self.rank, 1)])


@dataclass(frozen=True)
class RankBinding:
    """A rank binding; `mesh_shapes` gives (rows, columns) in chips of each mesh id of its descriptor."""

    path: Path
    ranks: tuple[Rank, ...]
    mesh_graph_desc_path: Path
    mesh_shapes: dict[int, tuple[int, int]]
    global_env: dict[str, str]

    @classmethod
    def load(cls, path: str | Path, environ: Mapping[str, str] = os.environ) -> RankBinding:
        """Read the file; relative paths are sought as tt-run seeks them, then in this package's own folders.

        Raises RankBindingError, which names the value seen, the values allowed and the remedy.
        """
        path = _find(Path(path), [bundled_folder()], environ, "rank binding")
        document = _read(path)
        raise_ = _Complaint(f"rank binding {path}")
        global_env = _strings(document.get("global_env"), "global_env", raise_)
        beside = [path.parent.parent, path.parent]

        def descriptor(named: Any) -> Path:
            if not isinstance(named, str) or not named:
                raise_(
                    f"mesh_graph_desc_path is {named!r}", "the path of a mesh graph descriptor (.textproto)"
                )
            return _find(Path(named), beside, environ, "mesh graph descriptor")

        common = descriptor(document.get("mesh_graph_desc_path"))
        shapes = {common: read_mesh_descriptor(common)}
        ranks = []
        for rank, entry in _entries(document, raise_).items():
            of_rank = descriptor(entry.get("mesh_graph_desc_path") or str(common))
            if of_rank not in shapes:
                shapes[of_rank] = read_mesh_descriptor(of_rank)
            mesh_id, host_rank = entry["mesh_id"], entry["mesh_host_rank"]
            if mesh_id not in shapes[of_rank]:
                raise_(
                    f"rank {rank} has mesh_id {mesh_id}",
                    f"the mesh ids of {of_rank}: {sorted(shapes[of_rank])}",
                    "Correct mesh_id, or name another descriptor in mesh_graph_desc_path.",
                )
            env = {
                "TT_MESH_ID": str(mesh_id),
                "TT_MESH_GRAPH_DESC_PATH": str(of_rank),
                "TT_RUN_RANK": str(rank),
            }
            if host_rank is not None:
                env["TT_MESH_HOST_RANK"] = str(host_rank)
            overrides = _strings(entry.get("env_overrides"), f"env_overrides of rank {rank}", raise_)
            env |= _expand(global_env, environ) | _expand(overrides, environ)
            ranks.append(Rank(rank, mesh_id, host_rank, env))
        return cls(path, tuple(ranks), common, shapes[common], global_env)

    def check(self) -> None:
        """Raise RankBindingError unless there is a decode rank, and each rank has a role and a mesh of its own."""
        raise_ = _Complaint(f"rank binding {self.path}")
        _check_roles(self.ranks, raise_)
        for first, second in combinations(self.ranks, 2):
            _check_meshes(first, second, self.mesh_shapes, raise_)

    def pair(self) -> tuple[Rank, Rank]:
        """The prefill rank and the decode rank. Raises RankBindingError when the binding does not make such a pair."""
        raise_ = _Complaint(f"rank binding {self.path}")
        _check_roles(self.ranks, raise_, one_prefill=True)
        if len(self.ranks) != 2:
            raise_(
                f"it has {len(self.ranks)} ranks",
                "this program runs one prefill and one decode rank",
                "Use a rank binding with two ranks, such as rank_bindings/n300x2_1p1d.yaml.",
            )
        self.check()
        prefill, decode = sorted(self.ranks, key=lambda rank: ROLES.index(rank.role))
        return prefill, decode


def bundled_folder() -> Path:
    """The folder that holds rank_bindings/ and mesh_descriptors/: the package when installed, else the checkout."""
    package = Path(__file__).resolve().parent
    return package if (package / "rank_bindings").is_dir() else package.parent


def default_binding() -> Path:
    """The rank binding used when none is named: two N300 boards."""
    return bundled_folder() / "rank_bindings" / "n300x2_1p1d.yaml"


class _Complaint:
    """Raises RankBindingError about one file: the value seen, the values allowed, the remedy."""

    def __init__(self, subject: str) -> None:
        self.subject = subject

    def __call__(self, seen: str, allowed: str, remedy: str = "Correct the file.") -> NoReturn:
        raise RankBindingError(f"{self.subject}: {seen}; allowed: {allowed}. {remedy}")


def _find(path: Path, also: list[Path], environ: Mapping[str, str], what: str) -> Path:
    """Find a file as tt-run does (TT_METAL_HOME, then the working directory), then in the folders `also`."""
    path = path.expanduser()
    home = [Path(environ["TT_METAL_HOME"]).expanduser()] if environ.get("TT_METAL_HOME") else []
    bases = [Path()] if path.is_absolute() else [*home, Path.cwd(), *also]
    for base in bases:
        if (base / path).is_file():
            return (base / path).resolve()
    searched = "" if path.is_absolute() else f" (searched in {', '.join(map(str, bases))})"
    raise RankBindingError(
        f"{what} {path}: there is no such file{searched}. Give the path of an existing file."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RankBindingError(
            f"rank binding {path}: it cannot be read as YAML: {error}. Correct the file."
        ) from error
    if not isinstance(document, dict):
        raise RankBindingError(
            f"rank binding {path}: it holds a {type(document).__name__}; allowed: a mapping with rank_bindings and "
            "mesh_graph_desc_path. See rank_bindings/n300x2_1p1d.yaml."
        )
    return document


def _entries(document: dict[str, Any], raise_: _Complaint) -> dict[int, dict[str, Any]]:
    """The entries of rank_bindings by rank, in order, their numbers checked."""
    listed = document.get("rank_bindings")
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise_(f"rank_bindings is {listed!r}", "a list with a mapping (rank, mesh_id, ...) for each rank")
    entries: dict[int, dict[str, Any]] = {}
    for place, entry in enumerate(listed):
        numbers = {
            key: _number(
                entry.get(key), f"{key} of entry {place} of rank_bindings", raise_, key == "mesh_host_rank"
            )
            for key in ("rank", "mesh_id", "mesh_host_rank")
        }
        rank = numbers["rank"]
        assert rank is not None
        if rank in entries:
            raise_(
                f"rank {rank} appears twice", "each rank once", f"Number the ranks 0 to {len(listed) - 1}."
            )
        entries[rank] = entry | numbers
    if sorted(entries) != list(range(len(entries))):
        raise_(
            f"the ranks are {sorted(entries)}",
            f"{list(range(len(entries)))}",
            "Number the ranks from 0 without a gap, or add the missing rank.",
        )
    return dict(sorted(entries.items()))


def _number(value: Any, what: str, raise_: _Complaint, optional: bool) -> int | None:
    """An integer of 0 or more, also written as a string or a whole float, which tt-run accepts."""
    if value is None and optional:
        return None
    try:
        number = int(value) if not isinstance(value, bool) and float(value).is_integer() else -1
    except (TypeError, ValueError, OverflowError):
        number = -1
    if number < 0:
        raise_(f"{what} is {value!r}", "an integer of 0 or more")
    return number


def _strings(value: Any, what: str, raise_: _Complaint) -> dict[str, str]:
    """A mapping of strings to strings, such as env_overrides; none is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise_(f"{what} is {value!r}", "a mapping from variable names to strings")
    for name, text in value.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise_(
                f"{what} sets {name!r} to {text!r}, of type {type(text).__name__}",
                "strings (tt-run takes nothing else)",
                f'Quote it: {name}: "{text}".',
            )
    return dict(value)


def _expand(variables: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Replace $NAME and ${NAME} from `environ` as os.path.expandvars does; unknown names stay as they are."""

    def replace(match: re.Match[str]) -> str:
        return environ.get(match[1] or match[2], match[0])

    return {
        name: re.sub(r"\$(?:(\w+)|\{([^}]*)\})", replace, text, flags=re.ASCII)
        for name, text in variables.items()
    }


def _check_roles(ranks: tuple[Rank, ...], raise_: _Complaint, *, one_prefill: bool = False) -> None:
    named = [rank.rank for rank in ranks if "DISAGG_TT_ROLE" in rank.env]
    roles = [rank.role for rank in ranks]
    shown = ", ".join(f"rank {rank.rank} {rank.role!r}" for rank in ranks if not named or rank.rank in named)
    remedy = "Set DISAGG_TT_ROLE in the env_overrides of every rank or of none."
    if named and len(named) < len(ranks):
        raise_(f"only some ranks have a role ({shown})", "a role for every rank or for none", remedy)
    if not set(roles) <= set(ROLES):
        raise_(f"DISAGG_TT_ROLE is {shown}", "prefill and decode", remedy)
    if "decode" not in roles or (one_prefill and roles.count("prefill") != 1):
        prefill = "one prefill rank and " if one_prefill else ""
        raise_(f"the roles are {shown}", f"{prefill}at least one decode rank", remedy)


def _check_meshes(first: Rank, second: Rank, shapes: dict[int, tuple[int, int]], raise_: _Complaint) -> None:
    """Check that each rank has a mesh of one descriptor for itself, and PCIe devices that can make that mesh."""
    variable = "TT_MESH_GRAPH_DESC_PATH"
    if first.env[variable] != second.env[variable]:
        raise_(
            f"the ranks have mesh graph descriptors of their own, {first.env[variable]} and {second.env[variable]}",
            "one mesh graph descriptor for all ranks",
        )
    if first.mesh_id == second.mesh_id:
        raise_(
            f"ranks {first.rank} ({first.role}) and {second.rank} ({second.role}) share mesh {first.mesh_id}",
            "one rank a mesh",
            "Give each rank a mesh_id of its own.",
        )
    seen: dict[int, set[str]] = {}
    for rank in (first, second):
        visible = rank.env.get("TT_VISIBLE_DEVICES", "")
        seen[rank.rank] = {device.strip() for device in visible.split(",")} - {""}
        rows, columns = shapes[rank.mesh_id]
        chips, fewest = rows * columns, -(-rows * columns // CHIPS_PER_PCIE_DEVICE)
        if visible and not fewest <= len(seen[rank.rank]) <= chips:
            raise_(
                f"rank {rank.rank} sees {len(seen[rank.rank])} PCIe device(s), TT_VISIBLE_DEVICES={visible!r}, for a mesh of "
                f"{rows}x{columns} = {chips} chips",
                f"{fewest} devices of two chips (N300) to {chips} devices of one chip (N150)",
                "Correct TT_VISIBLE_DEVICES, or name a descriptor of another shape.",
            )
    if shared := sorted(seen[first.rank] & seen[second.rank]):
        raise_(
            f"ranks {first.rank} and {second.rank} both see PCIe device {shared[0]}, TT_VISIBLE_DEVICES="
            f"{first.env['TT_VISIBLE_DEVICES']!r} and {second.env['TT_VISIBLE_DEVICES']!r}",
            "devices that no other rank sees",
            "Give each rank boards of its own in TT_VISIBLE_DEVICES.",
        )
