"""`disagg-tt bench multi-turn` and `bench serving`: what they print, and that figures agree. Never how fast anything is."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from disagg_tt.__main__ import main
from disagg_tt.bench import multi_turn, serving, turns
from disagg_tt.bench.load import Prompts, Reply, arrivals
from disagg_tt.bench.load_report import summary
from disagg_tt.bench.measure import expected_bytes
from disagg_tt.bench.multi_turn import Turn
from disagg_tt.device import kind
from disagg_tt.model.checkpoint import find_checkpoint, load_config
from disagg_tt.prompt import Tokenizer

pytestmark = pytest.mark.skipif(kind == "mock", reason="a mock cluster computes nothing that could be served")


@pytest.mark.timeout(600)  # two servers; on a loaded machine each takes its time to come up
def test_multi_turn_moves_the_bytes_that_it_should(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file, picture = tmp_path / "turns.json", tmp_path / "turns.png"
    assert main(["bench", "multi-turn", "--quick", "--json", str(file), "--plot", str(picture)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert json.loads(file.read_text()) == result and picture.read_bytes()[:4] == b"\x89PNG"
    assert list(result["ways"]) == ["pd-full", "pd", "ppd", "auto"]
    for title in ("latency ms", "first token ms", "KB to the decode mesh", "cache hits", "way"):
        assert any(line.lstrip().startswith(title) for line in lines), title
    config = load_config(find_checkpoint(None))
    prompts = (40, 40 + 4 + 40)
    for way, repeats in result["ways"].items():
        for found in repeats:
            assert [turn["prompt_tokens"] for turn in found] == list(prompts)
            for turn in found:
                moved = turn["sources"]["external_kv_transfer"]
                assert sum(turn["sources"].values()) == turn["prompt_tokens"]
                assert turn["bytes"] == (expected_bytes(config, "bfloat8_b", moved, 2) if moved else 0)
                assert turn["latency_ms"] >= turn["ttft_ms"] > 0
            moved = [turn["sources"]["external_kv_transfer"] for turn in found]
            routes = [turn["routes"] for turn in found]
            if way == "pd-full":
                assert moved == [40, 84]
            elif way == "pd":
                assert moved == [40, 84 - 32] and routes == [["pd"], ["pd"]]
            elif way == "ppd":
                assert moved == [40, 0] and routes == [["pd"], ["ppd"]]
    rows = {(row["stage"], row["name"]): row for row in result["rows"]}
    required = [row for row in rows.values() if row["required"]]
    assert len(required) == 4 and all(row["met"] for row in required)
    (whole,) = (row for (_, name), row in rows.items() if name.startswith("pd-full: 600 tokens, 672"))
    assert whole["ours"] == sum(expected_bytes(config, "bfloat8_b", tokens, 2) for tokens in (100, 200, 300))


@pytest.mark.timeout(600)
def test_serving_measures_every_part(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, picture = tmp_path / "load.json", tmp_path / "load.png"
    words = ["--quick", "--single-mesh-baseline", "--request-rate", "20", "--goodput", "ttft:60000"]
    assert main(["bench", "serving", *words, "--json", str(file), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert json.loads(file.read_text()) == result and picture.read_bytes()[:4] == b"\x89PNG"
    assert list(result["load"]) == ["two meshes", "one mesh"]
    tokens = set()
    for side in result["load"].values():
        assert (side["completed"], side["failed"]) == (4, 0)
        assert 0 < sum(side["budget_ms"].values()) <= side["ttft"]["mean"]
        assert side["goodput"] == side["requests_per_s"] > 0
        for metric in serving.METRICS:
            assert 0 < side[metric]["median"] <= side[metric]["p99"]
        tokens.add(round(side["output_tokens_per_s"] / side["requests_per_s"], 6))
    assert len(tokens) == 1  # both sides had the same load
    assert {row["stage"] for row in result["rows"]} == set(serving.PARTS) - {"load"}
    assert all(row["ours"] > 0 and row["reference"] > 0 for row in result["rows"])
    assert "p99 inter-token latency, ms" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["multi-turn", "--turns", "0"], "--turns is 0"),
        (["multi-turn", "--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json"),
        (["multi-turn", "--modes", "fast"], "invalid choice: 'fast'"),
        (["multi-turn", "--url", "http://127.0.0.1:9"], "no server answers there"),
        (["serving", "--random-input-len", "9-3"], "'9-3'"),
        (["serving", "--request-rate", "0"], "--request-rate is 0"),
        (["serving", "--request-rate", "nan"], "--request-rate is nan"),
        (["serving", "--goodput", "speed:1"], "--goodput 'speed:1'"),
        (["serving", "--percentile-metrics", "ttft,fun"], "'fun'"),
        (["serving", "--rows", "fun"], "invalid choice: 'fun'"),
    ],
)
def test_a_bad_flag_is_an_error_before_anything_starts(words, message, capsys) -> None:
    try:
        code = main(["bench", *words])
    except SystemExit as error:
        code = error.code
    assert code != 0 and message in capsys.readouterr().err


def test_arrivals_are_a_poisson_process_and_the_same_again() -> None:
    times = arrivals(2000, 50.0, random.Random(1))
    assert times == arrivals(2000, 50.0, random.Random(1)) and times[0] == 0.0
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 50, rel=0.1) and spread == pytest.approx(mean, rel=0.1)
    assert arrivals(3, float("inf"), random.Random(1)) == [0.0, 0.0, 0.0]


def test_prompts_share_no_block_and_come_back_from_text() -> None:
    tokenizer = Tokenizer(find_checkpoint(None))
    prompts = Prompts(tokenizer, seed=3)
    found = [prompts.new(64) for _ in range(20)]
    assert {len(tokens) for tokens in found} == {64} and len({tuple(tokens[:32]) for tokens in found}) == 20
    words = prompts.words(5)
    assert len(prompts.of_text(tokenizer.decode(words), 5)) == 5
    assert len(prompts.of_text("", 7)) == 7 and len(prompts.of_text("the cat sat on the mat", 2)) == 2


def reply(first_s: float, every_s: float, tokens: int) -> Reply:
    at = tuple(100.0 + first_s + i * every_s for i in range(tokens))
    return Reply(100.0, at, 10, 0, tokens, "", "id", "pd", {"queue": first_s * 250, "prefill": first_s * 750})


def test_percentiles_and_goodput_are_of_the_replies() -> None:
    repeats = [
        {"replies": [reply(0.1, 0.01, 5), reply(0.3, 0.02, 3)], "failed": ["HTTP 429"], "seconds": 2.0}
    ]
    found = summary(repeats, {"ttft": 200.0, "tpot": 15.0})
    assert (found["completed"], found["failed"], found["failures"]) == (2, 1, ["HTTP 429"])
    assert (found["requests_per_s"], found["goodput"], found["output_tokens_per_s"]) == (1.0, 0.5, 4.0)
    assert found["ttft"]["median"] == pytest.approx(200) and found["tpot"]["mean"] == pytest.approx(15)
    assert found["itl"]["mean"] == pytest.approx((4 * 10 + 2 * 20) / 6)
    assert found["budget_ms"] == pytest.approx({"queue": 50, "prefill": 150})
    assert found["e2el"]["p99"] == pytest.approx(340, rel=0.01)


def turn(ttft_ms: float, latency_ms: float) -> Turn:
    return Turn(1000, ttft_ms, latency_ms, 0, dict.fromkeys(multi_turn.SOURCES, 0), ["pd"])


def test_comparisons_are_of_medians_over_the_repeats() -> None:
    def way(later_ms: float, total_ms: float) -> list[list[Turn]]:
        return [[turn(50, total_ms / 2), turn(later_ms + noise, total_ms / 2)] for noise in (-1, 0, 1)]

    found = {"pd-full": way(100, 600), "pd": way(80, 500), "ppd": way(30, 300), "auto": way(31, 312)}
    rows = {(row.stage, row.name.split(";")[0]): row for row in turns.comparisons(found)}
    first = rows["first token, turn 2+", "ppd, reference pd-full"]
    assert (first.ours, first.reference, first.met) == (30, 100, True)
    assert rows["conversation", "ppd, reference pd-full"].ratio == pytest.approx(0.5)
    assert rows["conversation", "auto, reference pd"].goal == ""
    auto = rows["conversation", "auto, reference the better of pd and ppd"]
    assert (auto.ours, auto.reference, auto.met) == (312, 300, True)


def test_a_byte_too_many_between_the_meshes_fails() -> None:
    def moved(tokens: int, more: int = 0) -> SimpleNamespace:
        size = expected_bytes(load_config(find_checkpoint(None)), "bfloat8_b", tokens, 2)
        return SimpleNamespace(prompt_tokens=100, bytes=size + more, sources={"external_kv_transfer": tokens})

    good = turns.bytes_of_growth({"pd-full": [moved(100)], "pd": [moved(100)]})
    bad = turns.bytes_of_growth({"pd-full": [moved(100)], "pd": [moved(100, more=1)]})
    assert [row.failed for row in good] == [False] * 5
    assert [row.name.split(":")[0] for row in bad if row.failed] == ["pd"]
