"""`disagg-tt bench stages`: what it prints and when it fails. Never how fast anything is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from disagg_tt.__main__ import main, options_of, parser
from disagg_tt.bench import jobs, measure, request_times
from disagg_tt.bench.deep import wide_config
from disagg_tt.bench.stages import STAGES, chosen
from disagg_tt.bench.table import Row, table
from disagg_tt.config import LLAMA_3_1_8B
from disagg_tt.device import kind
from disagg_tt.errors import InputError
from disagg_tt.model.checkpoint import find_checkpoint
from disagg_tt.prompt import Tokenizer
from disagg_tt.rank import answer_here

pytestmark = pytest.mark.skipif(
    kind == "mock", reason="a mock cluster computes nothing that could be measured"
)


def here(words: list[str], way: str) -> jobs.Job:
    """A job of bench, run in this process."""
    events: list[dict[str, Any]] = []
    options = options_of(parser().parse_args([*words, way, "--trace", "not written here"]))
    answers = [vars(answer) for answer in answer_here(options, events.append)]
    found = (span for event in events if event["event"] == "trace" for span in event["events"])
    return jobs.Job(answers, [span for span in found if span["ph"] == "X"])


def test_quick_stages_print_tables_and_one_json_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    two_ranks = jobs._two_ranks  # the bytes are counted between ranks; times may be of one process

    def mostly_here(program: str, words: list[str], *more: Any) -> jobs.Job:
        return here(words, "--one-process") if "--overlap" in words else two_ranks(program, words, *more)

    monkeypatch.setattr(jobs, "_two_ranks", mostly_here)
    file = tmp_path / "stages.json"
    flags = ["--quick", "--threads", "2", "--rows", "overlap,wire", "--json", str(file)]
    assert main(["bench", "stages", *flags]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert json.loads(file.read_text()) == result
    assert (result["bench"], result["threads"], result["quick"]) == ("stages", 2, True)
    rows = result["rows"]
    assert list(dict.fromkeys(row["stage"] for row in rows)) == ["wire", "overlap"]
    headings = ["ours", "reference", "unit", "ratio", "goal", "met"]
    assert [line.split() for line in lines if line.endswith("met")] == [
        ["wire", *headings],
        ["overlap", *headings],
    ]
    assert len([line for line in lines if line]) == 2 + len(rows)
    for row in rows:
        assert any(line.startswith(f"{row['name']} ") for line in lines)
        assert math.isfinite(row["ours"])
        assert row["reference"] > 0
        assert row["ratio"] == pytest.approx(row["ours"] / row["reference"])
    assert all(row["met"] and row["required"] and row["ours"] == row["reference"] for row in rows[:4])


def test_requests_by_transport_against_one_mesh_measured_or_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, done = jobs.Place.run, []

    def recorded(place: jobs.Place, *words: Any) -> jobs.Job:
        done.append(run(place, *words))
        return done[-1]

    def again(place: jobs.Place, *words: Any) -> jobs.Job:
        assert not place.single_mesh, "one mesh is read, not measured"
        return done[-1]

    monkeypatch.setattr(jobs.Place, "run", recorded)
    file = tmp_path / "requests.json"
    words = ["bench", "stages", "--quick", "--transport", "tcp"]
    assert main([*words, "--json", str(file)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    first = json.loads(last)["requests"]
    assert json.loads(file.read_text())["requests"] == first
    assert [(r["transport"], r["tokens"], r["new_tokens"]) for r in first] == [
        (name, tokens, 9) for tokens in (32, 128) for name in ("single mesh", "tcp")
    ]
    table = [line.split() for line in lines if line]
    assert len(table) == 1 + len(first) and table[0][0] == "transport"
    for row in first:
        assert row["prefill_ms"] > 0 and row["decode_ms"] > 0
        assert row["hidden_ms"] + row["exposed_ms"] == pytest.approx(row["transfer_ms"])
        assert row["total_ms"] == pytest.approx(row["prefill_ms"] + row["exposed_ms"] + row["decode_ms"])
        one = next(r for r in first if r["transport"] == "single mesh" and r["tokens"] == row["tokens"])
        assert row["baseline_ms"] == one["total_ms"]
        more = (row["total_ms"] - one["total_ms"]) / row["total_ms"]
        assert row["overhead_percent"] == pytest.approx(100 * more)
        assert (row["transfer_ms"] > 0) == (row["transport"] == "tcp")
    monkeypatch.setattr(jobs.Place, "run", again)
    assert main([*words, "--baseline", str(file)]) == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])["requests"]
    assert sorted(second, key=first.index) == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--transport", "tcp", "--rows", "wire"], "--rows and --transport are two reports"),
        (["--baseline", "x.json"], "give both"),
        (["--transport", "tcp", "--baseline", "nowhere.json"], "--baseline nowhere.json cannot be used"),
        (["--json", "/nowhere/at/all.json"], "the folder /nowhere/at does not exist"),
    ],
)
def test_bad_flags_of_stages_start_nothing(words, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr(jobs.Place, "run", lambda *_: pytest.fail("a job was started"))
    assert main(["bench", "stages", "--quick", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_baseline_of_other_requests_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    plan = measure.Plan(tmp_path, 1, 1, new_tokens=9, overlap=(32,))
    row = dict.fromkeys(request_times.Times.__dataclass_fields__, 1.0) | {
        "transport": "single mesh",
        "tokens": 32,
    }
    for new_tokens, refused in ((9, False), (10, True)):
        file.write_text(json.dumps({"requests": [row | {"new_tokens": new_tokens}]}))
        if refused:
            with pytest.raises(InputError, match=r"no single mesh for \[32\] prompt tokens and 9 new"):
                request_times.read_baseline(file, plan)
        else:
            assert [t.tokens for t in request_times.read_baseline(file, plan)] == [32]


def test_stages_against_transformers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(jobs, "_two_ranks", lambda program, words, *_: here(words, "--one-process"))
    monkeypatch.setattr(jobs, "_one_mesh", lambda program, words, *_: here(words, "--single-mesh"))
    assert main(["bench", "stages", "--quick", "--threads", "1", "--rows", "prefill,decode"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    sides = ["two ranks, 1 thread each", "one mesh, 1 thread"]
    names = [f"{batch}, {side}" for batch in ("batch 1", "batch 32", "batch 32 to batch 1") for side in sides]
    assert [row["name"] for row in rows if row["stage"] == "decode"] == names
    assert [row["name"] for row in rows if row["stage"] == "prefill"] == [f"128 tokens, {s}" for s in sides]
    assert all(row["ours"] > 0 and row["reference"] > 0 and not row["required"] for row in rows)


def test_a_byte_too_many_on_the_wire_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_more(place: jobs.Place, prompts: list[str], *flags: str) -> jobs.Job:
        tokens = [len(Tokenizer(place.model).encode(p)) for p in prompts]
        config, kv_dtype = measure.load_config(place.model), flags[flags.index("--kv-dtype") + 1]
        counts = [measure.expected_bytes(config, kv_dtype, n, 2) for n in tokens]
        counts[-1] += 1
        return jobs.Job([{"perf": {"kv_bytes_sent": n}} for n in counts])

    monkeypatch.setattr(jobs.Place, "run", one_more)
    assert main(["bench", "stages", "--quick", "--rows", "wire"]) == 1
    output = capsys.readouterr()
    rows = json.loads(output.out.splitlines()[-1])["rows"]
    assert [row["met"] for row in rows] == [True, False, True, False]
    assert "failed: 33 tokens, bfloat8_b; 33 tokens, bfloat16" in output.err


def test_expected_bytes_of_llama_3_1_8b() -> None:
    # 32 layers x 8 heads x 128, K and V: 65,536 values a token; a bfloat8_b tile of 1,024 values is 1,088 bytes
    assert measure.expected_bytes(LLAMA_3_1_8B, "bfloat8_b", 33, 2) == 64 * 65536 * 1088 // 1024 + 8192
    assert measure.expected_bytes(LLAMA_3_1_8B, "bfloat16", 1, 4) == 32 * 65536 * 2 + 4 * 4096


def test_prompts_have_exactly_the_tokens_asked_for() -> None:
    tokenizer = Tokenizer(find_checkpoint(None))
    for length in (2, 31, 32, 33, 1500):
        prompts = jobs.prompts_of(tokenizer, length, 32 if length > 2 else 1)
        assert {len(tokenizer.encode(p)) for p in prompts} == {length}
        assert len(set(prompts)) == len(prompts)


def test_decode_rates_count_the_time_between_steps() -> None:
    def step(at_us: float, slots: int) -> dict[str, object]:
        return {"name": "decode step", "ts": at_us, "dur": 1e6, "args": {"slots": slots}}

    answers = [{"tokens": [1, 2, 3]}] * 2
    spans = [step(0, 2), step(3e6, 2), step(9e6, 1), step(20e6, 2), step(21e6, 2)]
    assert jobs.Job(answers, spans).decode_rates(2) == [4 / 4, 4 / 2]


def test_a_goal_is_met_or_not_and_only_a_required_one_fails() -> None:
    assert Row("decode", "fast", 3, 2, "tokens/s", ">= 1.5").met
    slow = Row("decode", "slow", 2, 2, "tokens/s", ">= 1.5")
    assert (slow.met, slow.failed) == (False, False)
    assert Row("overlap", "nothing sent", 0, 0, "ms", "<= 1.5").met is False
    assert "slow" in table([slow])


def test_stages_are_chosen_by_name() -> None:
    assert chosen(None, quick=False) == list(STAGES)
    assert not any("wide" in stage for stage in chosen(None, quick=True))
    assert chosen("wide, wire", quick=True) == ["wire", "wide"]
    with pytest.raises(InputError, match="'speed'.*allowed are wire"):
        chosen("speed", quick=False)


def test_the_wide_model_is_llama_3_1_8b_but_shallow() -> None:
    wide = wide_config(layers=2, vocab_size=2048)
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    assert all(getattr(wide, name) == getattr(LLAMA_3_1_8B, name) for name in same)
    assert (wide.num_hidden_layers, wide.vocab_size) == (2, 2048)
