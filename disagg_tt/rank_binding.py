"""The rank binding: which MPI rank drives which mesh, in the YAML file that tt-run takes.

    rank_bindings:                     # one entry a rank, ranks 0..n-1
      - rank: 0
        mesh_id: 0                     # a mesh of the descriptor
        mesh_host_rank: 0
        env_overrides: {DISAGG_TT_ROLE: prefill, TT_VISIBLE_DEVICES: "0"}
      - ...
    global_env: {}                     # for all ranks, env_overrides win
    mesh_graph_desc_path: mesh_descriptors/n300x2.textproto

Read here with tt-run's own rules (ttnn.distributed.ttrun), so that one file serves hardware, mock cluster and emulator,
and checked for what this program needs: one prefill mesh and at least one decode mesh, joined in the descriptor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
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
    role: str
    env: dict[str, str]


@dataclass(frozen=True)
class RankBinding:
    """A checked rank binding; `mesh_shapes` gives (rows, columns) in chips of each mesh id of the descriptor."""

    path: Path
    ranks: tuple[Rank, ...]
    mesh_graph_desc_path: Path
    mesh_shapes: dict[int, tuple[int, int]]
    global_env: dict[str, str]

    @classmethod
    def load(cls, path: str | Path, environ: Mapping[str, str] = os.environ) -> RankBinding:
        """Read and check the file; relative paths are sought as tt-run seeks them, then in this package's own folders.

        Raises RankBindingError, which names the value seen, the values allowed and the remedy.
        """
        path = _find(Path(path), [bundled_folder()], environ, "rank binding")
        document = _read(path)
        raise_ = _Complaint(f"rank binding {path}")
        global_env = _strings(document.get("global_env"), "global_env", raise_)
        descriptor = document.get("mesh_graph_desc_path")
        if not isinstance(descriptor, str) or not descriptor:
            raise_(
                f"mesh_graph_desc_path is {descriptor!r}", "the path of a mesh graph descriptor (.textproto)"
            )
        beside = [path.parent.parent, path.parent]
        descriptor_path = _find(Path(descriptor), beside, environ, "mesh graph descriptor")
        shapes = read_mesh_descriptor(descriptor_path)

        entries = _entries(document, raise_)
        environments = {}
        for rank, entry in entries.items():
            overrides = _strings(entry.get("env_overrides"), f"env_overrides of rank {rank}", raise_)
            merged = _expand(global_env, environ) | _expand(overrides, environ)
            environments[rank] = {
                "TT_MESH_ID": str(entry["mesh_id"]),
                **(
                    {}
                    if entry["mesh_host_rank"] is None
                    else {"TT_MESH_HOST_RANK": str(entry["mesh_host_rank"])}
                ),
                "TT_MESH_GRAPH_DESC_PATH": str(descriptor_path),
                "TT_RUN_RANK": str(rank),
            } | merged
        roles = _roles(environments, raise_)
        ranks = tuple(
            Rank(r, e["mesh_id"], e["mesh_host_rank"], roles[r], environments[r]) for r, e in entries.items()
        )
        _check_meshes(ranks, shapes, descriptor_path, raise_)
        return cls(path, ranks, descriptor_path, shapes, global_env)

    def pair(self) -> tuple[Rank, Rank]:
        """The prefill rank and the decode rank. Raises RankBindingError when there are more than two ranks."""
        if len(self.ranks) != 2:
            raise RankBindingError(
                f"rank binding {self.path}: it has {len(self.ranks)} ranks; this program runs one prefill and one "
                "decode rank. Use a rank binding with two ranks, such as rank_bindings/n300x2_1p1d.yaml."
            )
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
        if entry.get("mesh_graph_desc_path") not in (None, "", document.get("mesh_graph_desc_path")):
            raise_(
                f"entry {place} of rank_bindings has a mesh_graph_desc_path of its own, {entry['mesh_graph_desc_path']!r}",
                "one mesh graph descriptor for all ranks",
            )
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


def _roles(environments: dict[int, dict[str, str]], raise_: _Complaint) -> dict[int, str]:
    """The role of each rank: DISAGG_TT_ROLE, or without any, rank 0 prefills and the others decode."""
    named = {rank: env["DISAGG_TT_ROLE"] for rank, env in environments.items() if "DISAGG_TT_ROLE" in env}
    roles = named or {rank: ROLES[min(rank, 1)] for rank in environments}
    shown = ", ".join(f"rank {rank} {role!r}" for rank, role in roles.items())
    remedy = "Set DISAGG_TT_ROLE in the env_overrides of every rank or of none."
    if set(roles) != set(environments):
        raise_(f"only some ranks have a role ({shown})", "a role for every rank or for none", remedy)
    if not set(roles.values()) <= set(ROLES):
        raise_(f"DISAGG_TT_ROLE is {shown}", "prefill and decode", remedy)
    if list(roles.values()).count("prefill") != 1 or "decode" not in roles.values():
        raise_(f"the roles are {shown}", "one prefill rank and at least one decode rank", remedy)
    return roles


def _check_meshes(
    ranks: tuple[Rank, ...], shapes: dict[int, tuple[int, int]], descriptor: Path, raise_: _Complaint
) -> None:
    """Check the ranks against the descriptor's meshes and their visible devices against the chips needed."""
    owner: dict[int, Rank] = {}
    user: dict[str, Rank] = {}  # of each PCIe device
    for rank in ranks:
        if rank.mesh_id not in shapes:
            raise_(
                f"rank {rank.rank} has mesh_id {rank.mesh_id}",
                f"the mesh ids of {descriptor}: {sorted(shapes)}",
                "Correct mesh_id, or name another descriptor in mesh_graph_desc_path.",
            )
        other = owner.setdefault(rank.mesh_id, rank)
        if other is not rank:
            raise_(
                f"ranks {other.rank} ({other.role}) and {rank.rank} ({rank.role}) share mesh {rank.mesh_id}",
                "one rank a mesh",
                "Give each rank a mesh_id of its own.",
            )
        rows, columns = shapes[rank.mesh_id]
        if rank.env.get("TT_VISIBLE_DEVICES"):
            devices = {device.strip() for device in rank.env["TT_VISIBLE_DEVICES"].split(",")}
            chips, fewest = rows * columns, -(-rows * columns // CHIPS_PER_PCIE_DEVICE)
            if not fewest <= len(devices) <= chips:
                raise_(
                    f"rank {rank.rank} sees {len(devices)} PCIe device(s), TT_VISIBLE_DEVICES="
                    f"{rank.env['TT_VISIBLE_DEVICES']!r}, for a mesh of {rows}x{columns} = {chips} chips",
                    f"{fewest} devices of two chips (N300) to {chips} devices of one chip (N150)",
                    "Correct TT_VISIBLE_DEVICES, or name a descriptor of another shape.",
                )
            for device in sorted(devices):
                other = user.setdefault(device, rank)
                if other is not rank:
                    raise_(
                        f"ranks {other.rank} and {rank.rank} both see PCIe device {device}, TT_VISIBLE_DEVICES="
                        f"{other.env['TT_VISIBLE_DEVICES']!r} and {rank.env['TT_VISIBLE_DEVICES']!r}",
                        "devices that no other rank sees",
                        "Give each rank boards of its own in TT_VISIBLE_DEVICES.",
                    )
