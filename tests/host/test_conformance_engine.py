"""The conformance engine without ttnn: workers that crash, hang or never start, and differences that it must find."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from disagg_tt.conformance import run as run_module
from disagg_tt.conformance import side as side_module
from disagg_tt.conformance.case import Case, tensor
from disagg_tt.conformance.compare import (
    ACCEPTED,
    BUFFERS,
    CRASHED,
    DIFFERS,
    KNOWN_DIFFERENCE,
    REJECTED,
    verdict,
)
from disagg_tt.conformance.known import looser, stricter
from disagg_tt.conformance.run import known_table, main, make_cases, outcomes, print_report, run
from disagg_tt.conformance.side import WORKER, Side
from disagg_tt.errors import InputError

FAKE = """
import json, os, sys, time
print("noise", file=sys.stderr)
{start}
print(json.dumps({{"outcome": "ready"}}), flush=True)
for line in sys.stdin:
    case = json.loads(line)
    if case["op"] == "crash":
        print("it broke", file=sys.stderr, flush=True)
        os._exit(3)
    if case["op"] == "hang":
        time.sleep(1000)
    if case["op"] == "reject":
        print(json.dumps({{"outcome": "rejected", "error": "no"}}), flush=True)
        continue
    print(json.dumps({{"outcome": "accepted", "outputs": [case["number"], float("nan"), os.getpid()]}}), flush=True)
"""


def fake(start: str = "") -> list[str]:
    return [sys.executable, "-c", FAKE.format(start=start)]


FAKES = (("emulator", fake()), ("emulator", fake()))


def cases(*ops: str) -> list[Case]:
    return [Case(op, number=n) for n, op in enumerate(ops)]


def results(ops: Sequence[str], **options: Any) -> list[dict[str, Any]]:
    with Side("emulator", (1, 2), fake(), **options) as side:
        return list(side.results(cases(*ops)))


def test_answers_come_in_order_and_ahead_of_being_read() -> None:
    answers = results(["ok"] * 100)
    assert [a["outputs"][0] for a in answers] == list(range(100))


def test_a_crash_is_one_cases_and_the_rest_is_made_by_new_workers() -> None:
    ops = ["ok", "crash", "crash", "crash", "ok", "reject", "ok", "crash"]
    answers = results(ops)
    expected = {"ok": "accepted", "crash": "crashed", "reject": "rejected"}
    assert [a["outcome"] for a in answers] == [expected[op] for op in ops]
    assert "it broke" in answers[1]["error"]
    assert answers[0]["outputs"][2] != answers[4]["outputs"][2], "the same process before and after a crash"


def test_a_call_that_hangs_counts_as_crashed() -> None:
    answers = results(["hang", "ok"], case_seconds=0.3)
    assert [a["outcome"] for a in answers] == ["crashed", "accepted"]
    assert "no answer in 0.3 s" in answers[0]["error"]


def test_a_worker_is_replaced_after_its_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_module, "LIFE", 10)
    answers = results(["ok"] * 25)
    assert [a["outputs"][0] for a in answers] == list(range(25))
    assert len({a["outputs"][2] for a in answers}) == 3


def test_large_cases_do_not_block() -> None:
    large = [Case("ok", args=["x" * 200_000], number=n) for n in range(4)]
    with Side("emulator", (1, 2), fake()) as side:
        assert [a["outputs"][0] for a in side.results(large)] == [0, 1, 2, 3]


@pytest.mark.parametrize("start", ["sys.exit('no card')", "time.sleep(1000)"])
def test_a_worker_that_does_not_start_is_an_error_with_its_words(start: str) -> None:
    with (
        Side("emulator", (1, 2), fake(start), start_seconds=0.5) as side,
        pytest.raises(
            InputError, match="emulator worker did not open a mesh of 1x2: .*(no card|no answer in)"
        ),
    ):
        next(side.results(cases("ok")))


def children() -> set[int]:
    return {
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    }


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts processes in /proc")
def test_nothing_is_left_when_a_run_is_interrupted() -> None:
    before, files = children(), len(os.listdir("/proc/self/fd"))
    made = outcomes(cases(*["ok"] * 50), None, FAKES)
    next(made)
    assert len(children() - before) == 2
    with pytest.raises(KeyboardInterrupt):
        made.throw(KeyboardInterrupt)
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == files


OK: dict[str, Any] = {"outcome": "accepted", "outputs": [1, float("nan")]}
NO: dict[str, Any] = {"outcome": "rejected", "error": "RuntimeError: no"}
CRASH: dict[str, Any] = {"outcome": "crashed", "error": "abort"}
STRICT = stricter("op", "ours says", "because")
LOOSE = looser("op", "RuntimeError: theirs", "because")


@pytest.mark.parametrize(
    ("real", "ours", "expected"),
    [
        (OK, json.loads(json.dumps(OK)), ACCEPTED),
        (OK, {**OK, "outputs": [2, float("nan")]}, DIFFERS),
        (NO, {"outcome": "not emulated", "error": ""}, REJECTED),
        (CRASH, NO, CRASHED),
        (NO, CRASH, DIFFERS),
        (OK, CRASH, DIFFERS),
        (CRASH, OK, DIFFERS),
        (OK, NO, DIFFERS),
        (OK, {"outcome": "rejected", "error": "ours says no"}, KNOWN_DIFFERENCE),
        ({"outcome": "rejected", "error": "RuntimeError: theirs"}, OK, KNOWN_DIFFERENCE),
        ({"outcome": "rejected", "error": "Statically allocated circular buffers clash"}, OK, BUFFERS),
        (OK, {"outcome": "rejected", "error": "circular buffers"}, DIFFERS),
    ],
)
def test_verdicts(real: dict[str, Any], ours: dict[str, Any], expected: str) -> None:
    kind, known = verdict(Case("op"), real, ours, [STRICT, LOOSE])
    assert kind == expected
    assert (known is not None) == (kind == KNOWN_DIFFERENCE)
    other, _ = verdict(Case("other"), real, ours, [STRICT, LOOSE])
    assert other == (DIFFERS if kind == KNOWN_DIFFERENCE else kind), "documented for another op only"


# A worker of an emulator with a fault in each of six ops.
PLANTED = """
import os, sys
from disagg_tt.device import emulator as ttnn
from disagg_tt.conformance import worker
from disagg_tt.errors import DeviceError

def spoil(name, spoiled):
    function = getattr(ttnn, name)
    setattr(ttnn, name, lambda *args, **kwargs: spoiled(function, *args, **kwargs))

def refuse(add, a, b):
    raise DeviceError("no")

spoil("add", lambda add, a, b: ttnn.typecast(add(a, b), ttnn.float32))
spoil("sub", lambda sub, a, b: ttnn.to_memory_config(sub(a, b), ttnn.L1_MEMORY_CONFIG))
spoil("mul", lambda mul, a, b: ttnn.reshape(mul(a, b), (1, 1, 64, 64)))
spoil("maximum", refuse)
spoil("minimum", lambda minimum, a, b: a)
spoil("div", lambda div, a, b: os._exit(1))
worker.main(sys.argv[1])
"""


def test_faults_planted_in_ops_are_found_and_sound_ops_agree() -> None:
    a, narrow = tensor([1, 1, 32, 128]), tensor([1, 1, 32, 96])
    spoiled = [Case(op, [a, a]) for op in ("add", "sub", "mul", "maximum", "div")]
    sound = [Case("eq", [a, a], number=0), Case("eq", [a, narrow], number=1)]
    sides = (("emulator", WORKER), ("emulator", [sys.executable, "-c", PLANTED]))
    report = run([*spoiled, Case("minimum", [a, narrow]), *sound], None, sides)
    found = {difference["case"]["op"] for difference in report["differences"]}
    assert found == {"add", "sub", "mul", "maximum", "div", "minimum"}
    assert report["by_op"]["eq"] == {ACCEPTED: 1, REJECTED: 1}


def test_the_report_names_what_was_documented_but_not_met_and_what_had_no_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = {"outcome": "rejected", "error": "circular buffers beyond L1"}
    made = [
        (Case("op", number=n), real, ours) for n, (real, ours) in enumerate([(OK, OK), (full, OK), (OK, NO)])
    ]
    monkeypatch.setattr(run_module, "outcomes", lambda *_: iter(made))
    monkeypatch.setattr(
        run_module, "known_differences", lambda: [stricter("op", "no$", "met"), STRICT, LOOSE]
    )
    report = run([])
    assert report["kernel_buffer_cases"] == ["op:1"]
    assert report["known_not_met"] == ["op: because", "op: because"]
    assert report["known_reasons"] == {"op: met": 1}
    print_report(report)
    printed = capsys.readouterr().out
    assert "documented but not met: op: because" in printed and "kernel buffers: op:1" in printed
    assert json.loads(printed.splitlines()[-1])["cases"] == 3


def test_a_time_budget_stops_the_run_after_every_mesh_and_the_same_of_every_op() -> None:
    many = [
        Case(op, mesh=mesh, number=n)
        for n in range(100_000)
        for op in ("a", "b")
        for mesh in ((1, 2), (2, 2))
    ]
    started = time.monotonic()
    made = list(outcomes(many, 2.0, FAKES))
    assert time.monotonic() - started < 60
    assert len(made) < len(many)
    assert {case.mesh for case, _, _ in made} == {(1, 2), (2, 2)}
    for mesh in ((1, 2), (2, 2)):
        ops = [case.op for case, _, _ in made if case.mesh == mesh]
        assert 0 <= ops.count("a") - ops.count("b") <= 1


def test_a_case_depends_on_seed_op_and_number_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def generator(rng: Random) -> Case:
        return Case("x", [rng.random()])

    monkeypatch.setattr(run_module, "generators", lambda: {"a": generator, "b": generator})
    every = make_cases("1", 20)
    assert len(every) == 20
    assert make_cases("1", 1, ["b"], number=4) == [c for c in every if c == make_cases("1", 1, ["b"], 4)[0]]
    assert make_cases("1", 4) != make_cases("2", 4)
    with pytest.raises(InputError, match="no cases are generated for c; allowed: a, b"):
        make_cases("1", 1, ["c"])


@pytest.mark.parametrize("words", [["--cases", "0"], ["--time", "0"], ["--time", "nan"]])
def test_bad_arguments_are_refused(words: list[str]) -> None:
    with pytest.raises(InputError, match="allowed"):
        main(words)


def test_the_documented_differences_are_those_of_the_docs() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
    assert docs.read_text().endswith(f"\n\n{known_table()}\n"), (
        "put the table that `disagg-tt conformance --known` prints at the end of docs/conformance.md"
    )
