"""Rank bindings and mesh descriptors: the good ones are read as tt-run reads them, each bad one names its mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from disagg_tt.errors import RankBindingError
from disagg_tt.job_output import JobOutput
from disagg_tt.launch import RankBinding, check_launch, default_binding, in_job, job_rank, job_size
from disagg_tt.mesh_descriptor import parse_text_proto, read_mesh_descriptor
from disagg_tt.rank_binding import bundled_folder

BINDINGS = sorted((bundled_folder() / "rank_bindings").glob("*.yaml"))
PAIRS = [path for path in BINDINGS if path.stem.endswith("_1p1d")]
SHAPES = {"1x1x2": (1, 1), "1x4x2": (1, 4), "2x2x2": (2, 2)} | {f"n300x{n}": (1, 2) for n in (1, 2, 3, 4)}
N300X2 = str(bundled_folder() / "mesh_descriptors/n300x2.textproto")


def entry(rank: object, mesh_id: object | None = None, **env: object) -> dict:
    return {"rank": rank, "mesh_id": rank if mesh_id is None else mesh_id, "env_overrides": env}


def write(folder: Path, *entries: dict, **top: object) -> Path:
    path = folder / "binding.yaml"
    path.write_text(yaml.safe_dump({"rank_bindings": list(entries), "mesh_graph_desc_path": N300X2, **top}))
    return path


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_shipped_bindings_make_a_pair(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the descriptor is found from anywhere
    binding = RankBinding.load(path, {})
    prefill, decode = binding.pair()
    assert (prefill.rank, prefill.role, decode.rank, decode.role) == (0, "prefill", 1, "decode")
    assert binding.mesh_shapes == dict.fromkeys((0, 1), SHAPES[path.stem.split("_")[0]])
    assert decode.env["TT_MESH_ID"] == "1"
    assert decode.env["TT_MESH_HOST_RANK"] == "0"
    assert Path(decode.env["TT_MESH_GRAPH_DESC_PATH"]) == binding.mesh_graph_desc_path


@pytest.mark.parametrize("path", BINDINGS, ids=lambda path: path.stem)
def test_in_shipped_bindings_every_prefill_mesh_reaches_every_decode_mesh(path):
    binding = RankBinding.load(path, {})
    binding.check()
    roles = [rank.role for rank in binding.ranks]
    named = {"p": roles.count("prefill"), "d": roles.count("decode")}
    assert "".join(f"{count}{role}" for role, count in named.items() if count) == path.stem.split("_")[1]
    assert set(binding.mesh_shapes.values()) == {SHAPES[path.stem.split("_")[0]]}
    graphs = parse_text_proto(binding.mesh_graph_desc_path.read_text()).get("graph_descriptors", [])
    joined = {
        frozenset(node["mesh"][0]["mesh_id"][0] for node in connection["nodes"])
        for graph in graphs
        for connection in graph["connections"]
    }
    meshes = {role: [rank.mesh_id for rank in binding.ranks if rank.role == role] for role in set(roles)}
    assert {frozenset((p, d)) for p in meshes.get("prefill", []) for d in meshes["decode"]} <= joined


def test_shipped_bindings_are_all_known():
    assert {path.stem.split("_")[0] for path in BINDINGS} == set(SHAPES)
    assert default_binding() in BINDINGS


@pytest.mark.mock
@pytest.mark.parametrize("path", BINDINGS, ids=lambda path: path.stem)
def test_tt_run_agrees(path, monkeypatch):
    """The environment that tt-run would give each rank is ours, from the repository root as the README has it."""
    monkeypatch.setenv("TT_METAL_HOME", str(bundled_folder()))
    from ttnn.distributed import ttrun

    config = ttrun.parse_binding_config(path.relative_to(bundled_folder()))
    ours = RankBinding.load(path)
    for theirs, rank in zip(config.rank_bindings, ours.ranks, strict=True):
        environment = ttrun.get_rank_environment(theirs, config, parent_env_prefix={})
        assert rank.env.items() <= environment.items()
        named = ("TT_MESH", "TT_VISIBLE", "TT_RUN_RANK", "DISAGG_TT")
        assert {name for name in environment if name.startswith(named)} == set(rank.env)


def test_relative_paths_are_sought_in_tt_metal_home_first(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, columns in ((home, 2), (here, 4)):
        folder.mkdir()
        text = Path(N300X2).read_text().replace("[ 1, 2 ]", f"[ 1, {columns} ]")
        (folder / "mesh.textproto").write_text(text)
    path = write(tmp_path, entry(0), entry(1), mesh_graph_desc_path="mesh.textproto")
    monkeypatch.chdir(here)
    assert RankBinding.load(path, {}).mesh_shapes[0] == (1, 4)
    assert RankBinding.load(path, {"TT_METAL_HOME": str(home)}).mesh_shapes[0] == (1, 2)


def test_variables_expand_and_overrides_win_over_global_env(tmp_path):
    path = write(
        tmp_path,
        entry(0, A="$X/${X}/$UNKNOWN", B="rank"),
        entry(1),
        global_env={"B": "all", "C": "${X}"},
    )
    zero, one = RankBinding.load(path, {"X": "x"}).ranks
    assert (zero.env["A"], zero.env["B"], one.env["B"], one.env["C"]) == ("x/x/$UNKNOWN", "rank", "all", "x")


def test_roles(tmp_path):
    swapped = write(tmp_path, entry(0, DISAGG_TT_ROLE="decode"), entry(1, DISAGG_TT_ROLE="prefill"))
    assert [rank.rank for rank in RankBinding.load(swapped).pair()] == [1, 0]
    unnamed = write(tmp_path, entry(1), entry(0))
    assert [rank.role for rank in RankBinding.load(unnamed).ranks] == ["prefill", "decode"]


THREE = (
    Path(N300X2)
    .read_text()
    .replace("connections", 'instances { mesh { mesh_descriptor: "M0" mesh_id: 2 } }\n  connections', 1)
)


def test_any_number_of_ranks_is_a_binding_but_only_two_are_a_pair(tmp_path):
    (tmp_path / "three.textproto").write_text(THREE)
    path = write(
        tmp_path, entry(0), entry(1), entry(2), mesh_graph_desc_path=str(tmp_path / "three.textproto")
    )
    binding = RankBinding.load(path)
    with pytest.raises(
        RankBindingError, match="it has 3 ranks; allowed: this program runs one prefill and one decode rank"
    ):
        binding.pair()
    alone = RankBinding.load(write(tmp_path, entry(0, 1)))
    assert [rank.env["TT_MESH_ID"] for rank in alone.ranks] == ["1"]
    with pytest.raises(RankBindingError, match="the roles are rank 0 'prefill'"):
        alone.pair()


def test_roles_and_shared_meshes_are_this_programs_matter_not_tt_runs(tmp_path):
    path = write(tmp_path, entry(0, 0, DISAGG_TT_ROLE="head"), entry(1, 0, TT_VISIBLE_DEVICES="0,1,2,3"))
    assert [rank.mesh_id for rank in RankBinding.load(path).ranks] == [0, 0]


def test_a_rank_may_name_a_descriptor_of_its_own(tmp_path):
    other = str(bundled_folder() / "mesh_descriptors/1x4x2.textproto")
    path = write(tmp_path, entry(0), {**entry(1), "mesh_graph_desc_path": other})
    binding = RankBinding.load(path)
    assert [rank.env["TT_MESH_GRAPH_DESC_PATH"] for rank in binding.ranks] == [N300X2, other]
    with pytest.raises(RankBindingError, match="descriptors of their own, .*n300x2.*1x4x2"):
        binding.pair()


PREFILL, DECODE = {"DISAGG_TT_ROLE": "prefill"}, {"DISAGG_TT_ROLE": "decode"}
BAD_BINDINGS = {
    "no ranks": ((), r"rank_bindings is \[\]"),
    "one rank": (
        (entry(0),),
        "the roles are rank 0 'prefill'; allowed: one prefill rank and at least one decode",
    ),
    "double": ((entry(0), entry(0, 1)), "rank 0 appears twice"),
    "missing": ((entry(0), entry(2, 1)), r"the ranks are \[0, 2\]; allowed: \[0, 1\]"),
    "negative": (
        (entry(0), entry(-1, 1)),
        "rank of entry 1 of rank_bindings is -1; allowed: an integer of 0",
    ),
    "no number": ((entry(0), entry("one", 1)), "rank of entry 1 of rank_bindings is 'one'"),
    "truth": ((entry(0), entry(True, 1)), "rank of entry 1 of rank_bindings is True"),
    "infinite": ((entry(0), entry(float("inf"), 1)), "rank of entry 1 of rank_bindings is inf"),
    "no mesh": ((entry(0), {"rank": 1}), "mesh_id of entry 1 of rank_bindings is None"),
    "two prefill": (
        (entry(0, **PREFILL), entry(1, **PREFILL)),
        "the roles are rank 0 'prefill', rank 1 'prefill'",
    ),
    "no prefill": (
        (entry(0, **DECODE), entry(1, **DECODE)),
        "the roles are rank 0 'decode', rank 1 'decode'",
    ),
    "one role": ((entry(0, **PREFILL), entry(1)), "only some ranks have a role"),
    "odd role": (
        (entry(0, **PREFILL), entry(1, DISAGG_TT_ROLE="draft")),
        "'draft'; allowed: prefill and decode",
    ),
    "odd mesh": ((entry(0), entry(1, 7)), r"rank 1 has mesh_id 7; allowed: the mesh ids of .*: \[0, 1\]"),
    "same mesh": ((entry(0, 0), entry(1, 0)), r"ranks 0 \(prefill\) and 1 \(decode\) share mesh 0"),
    "unquoted": ((entry(0, TT_VISIBLE_DEVICES=0), entry(1)), 'Quote it: TT_VISIBLE_DEVICES: "0"'),
    "too many chips": (
        (entry(0, TT_VISIBLE_DEVICES="0,1,2"), entry(1)),
        "rank 0 sees 3 PCIe .*for a mesh of 1x2 = 2 chips; allowed: 1 devices of two chips",
    ),
    "shared board": (
        (entry(0, TT_VISIBLE_DEVICES="0"), entry(1, TT_VISIBLE_DEVICES="0")),
        "ranks 0 and 1 both see PCIe device 0",
    ),
}


@pytest.mark.parametrize("name", BAD_BINDINGS)
def test_bad_binding(name, tmp_path):
    entries, message = BAD_BINDINGS[name]
    path = write(tmp_path, *entries)
    with pytest.raises(RankBindingError, match=message) as caught:
        RankBinding.load(path).pair()
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_too_few_chips(tmp_path):
    descriptor = str(bundled_folder() / "mesh_descriptors/1x4x2.textproto")
    path = write(tmp_path, entry(0, TT_VISIBLE_DEVICES="0"), entry(1), mesh_graph_desc_path=descriptor)
    with pytest.raises(
        RankBindingError, match="1x4 = 4 chips; allowed: 2 devices of two chips .* to 4 devices"
    ):
        RankBinding.load(path).pair()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"rank_bindings: [", "cannot be read as YAML"),
        (b"\xff\xfe\xfa", "cannot be read as YAML"),
        (b"- rank: 0", "it holds a list; allowed: a mapping"),
        (b"", "it holds a NoneType"),
        (b"rank_bindings: [1]\nmesh_graph_desc_path: " + N300X2.encode(), r"rank_bindings is \[1\]"),
        (b"rank_bindings: []", "mesh_graph_desc_path is None"),
        (
            b"mesh_graph_desc_path: nowhere.textproto",
            "mesh graph descriptor nowhere.textproto: there is no such file",
        ),
        (b"global_env: [A]\nmesh_graph_desc_path: " + N300X2.encode(), r"global_env is \['A'\]"),
    ],
)
def test_malformed_file(content, message, tmp_path):
    path = tmp_path / "binding.yaml"
    path.write_bytes(content)
    with pytest.raises(RankBindingError, match=message):
        RankBinding.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(RankBindingError, match=r"rank binding .*none\.yaml: there is no such file"):
        RankBinding.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[ 1, 2 ]", "[ 1, 2", "where a value belongs"),
        ("[ 1, 2 ]", "[ 8 ]", r"dims are \[8\] instead of two positive numbers"),
        ("[ 1, 2 ]", "[ 0, 2 ]", r"dims are \[0, 2\]"),
        ('name: "M0"', 'name: "M9"', r"mesh_descriptor 'M0' is not declared; declared are \['M9'\]"),
        ('name: "M0"', 'name: "M0', "line 3: unexpected"),
        ("top_level_instance {", "top_level_instance {{", "where a field name"),
        ("connections {", "remarks {", r"nothing connects its meshes \[0, 1\]"),
        ("mesh_id: 1", "mesh_id: one", "invalid literal for int"),
        ("device_topology {", "device_topology: 3 x {", "'int' object"),
    ],
)
def test_bad_descriptor(before, after, message, tmp_path):
    path = tmp_path / "mesh.textproto"
    text = Path(N300X2).read_text()
    assert before in text
    path.write_text(text.replace(before, after))
    with pytest.raises(RankBindingError, match=message) as caught:
        read_mesh_descriptor(path)
    assert str(path) in str(caught.value)


def test_empty_descriptor(tmp_path):
    (tmp_path / "mesh.textproto").write_text("# nothing\n")
    with pytest.raises(RankBindingError, match="no mesh instance"):
        read_mesh_descriptor(tmp_path / "mesh.textproto")


def test_text_proto():
    parsed = parse_text_proto('a: 1, b: [2, x]; # comment\n c { d: "q{" } c < d: -4 > e: []')
    assert parsed == {"a": [1], "b": [2, "x"], "c": [{"d": ["q{"]}, {"d": [-4]}], "e": []}


def test_launch_check(tmp_path):
    binding = RankBinding.load(default_binding())
    job = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    check_launch(binding, job)
    assert (in_job(job), job_rank(job), job_size(job)) == (True, 1, 2)
    assert (in_job({}), job_rank({}), job_size({})) == (False, 0, 1)
    command = rf"tt-run --rank-binding {binding.path} python 'my script.py' --x"
    with pytest.raises(RankBindingError, match="one process without MPI; .* needs 2 ranks") as caught:
        check_launch(binding, {}, ["my script.py", "--x"])
    assert command in str(caught.value)
    with pytest.raises(RankBindingError, match="3 ranks; .* needs 2 ranks"):
        check_launch(binding, {"OMPI_COMM_WORLD_SIZE": "3"}, ["x.py"])


class Text:
    """A stream that keeps what is written."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_output_keeps_ranks_lines_and_takes_the_launchers_notices():
    rule = b"-" * 74
    stream = Text()
    output = JobOutput(stream)
    table = b"a table\n" + rule + b"\nrow\n" + rule + b"\n"
    notice = (
        rule
        + b"\nprterun noticed that process rank 1 with PID 7 on node n exited on\nsignal 9 (Killed).\n"
        + rule
    )
    data = b"[1,0]<stdout>: tagged\n" + table + notice + b"\nno newline"
    for at in range(len(data)):  # as a pipe may cut it
        output.feed(data[at : at + 1])
    output.close()
    assert stream.text == "tagged\n" + table.decode() + "no newline\n"
    assert output.first_failure() == (1, 1, "rank 1 died of SIGKILL")


def test_output_knows_an_exit_code():
    output = JobOutput(Text())
    text = "prterun detected that\n   Process name: [prterun-x-7@1,0]\n   Exit code:    3\n"
    output.feed(("-" * 74 + "\n" + text + "-" * 74 + "\n").encode())
    assert output.first_failure() == (0, 3, "rank 0 ended with exit code 3")
