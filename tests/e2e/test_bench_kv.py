"""`bench kv` runs over every transport, in every order, and says what is wrong with its flags."""

from __future__ import annotations

import json
import signal
import sys

import pytest
from runs import end_of, environment, started

from disagg_tt.__main__ import main
from disagg_tt.bench import kv
from disagg_tt.bench.kv_ends import End, Load, extents
from disagg_tt.bench.kv_ranks import measure
from disagg_tt.errors import StreamError
from disagg_tt.geometry import GEOMETRIES

SMALL = '{"name": "small", "layers": 3, "tensors": 2, "heads": 2, "head_dim": 32, "dtype": "bfloat8_b"}'
ALL = ["mpi", "tcp", "nixl", "torch", "mpi4py", "nixl_bare", "gloo_bare", "pickle"]
ONCE = ["--iterations", "1", "--warmup", "0"]


def test_all_transports_in_all_orders(tmp_path, capsys):
    file, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    words = ["--geometry", SMALL, "--seq-lengths", "40", "--transport", *ALL, "--block-order", *kv.ORDERS]
    assert main(["bench", "kv", *words, *ONCE, "--json", str(file), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found == json.loads(printed.splitlines()[-1])
    rows = {(row["transport"], row["order"]): row for row in found["rows"]}
    wires = {(name, order) for name in ALL[:4] for order in kv.ORDERS}
    assert set(rows) == wires | {(name, "contiguous") for name in ALL[4:]}
    for row in rows.values():
        assert (row["layers"], row["bytes"]) == (3, 3 * 2 * 2 * 2 * 1088)
        assert row["end_to_end_ms"] >= row["total_ms"] > 0 and row["layer_ms"] > 0 and row["of_copy"] > 0
        assert row["rate"] == pytest.approx(row["bytes"] / row["total_ms"] * 1e3, rel=0.01)
    assert "mpi4py (reference)" in printed and "not measured: pickle, 40 tokens" in printed
    assert "0.0 MiB counted by elements" in printed and picture.read_bytes()[:4] == b"\x89PNG"


def test_bulk_is_one_message_and_a_link_is_a_ceiling(capsys):
    words = [
        "--geometry",
        SMALL,
        "--seq-lengths",
        "32",
        "--transport",
        "tcp",
        "--mode",
        "bulk",
        "--link-gbps",
        "100",
    ]
    assert main(["bench", "kv", *words, *ONCE]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert (row["layers"], row["bytes"]) == (1, 3 * 2 * 2 * 1088)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--geometry", "gpt-9"], "'gpt-9' is unknown; allowed: llama-3.1-8b"),
        (["--seq-lengths", "0"], "0 tokens; allowed: 1 to"),
        (["--iterations", "0"], "--iterations is 0; allowed: 1 to"),
        (["--warmup", "-1"], "--warmup is -1; allowed: 0 to"),
        (["--link-gbps", "-3"], "--link-gbps is -3"),
        (
            ["--mode", "bulk", "--seq-lengths", "163840"],
            "--mode bulk with 163840 tokens holds 21,474,836,480 bytes",
        ),
        (["--transport", "pigeon"], "invalid choice: 'pigeon'"),
        (["--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json"),
        (["--plot", "/nowhere/at/all.png"], "--plot /nowhere/at/all.png"),
    ],
)
def test_a_bad_flag_is_an_error_before_anything_starts(words, message, capsys, monkeypatch):
    monkeypatch.setattr(kv, "run", lambda settings: pytest.fail("a job was started"))
    try:
        code = main(["bench", "kv", *words])
    except SystemExit as error:
        code = error.code
    assert code == 2 and message in capsys.readouterr().err


def test_memory_is_bounded_at_any_length():
    for geometry in GEOMETRIES.values():
        for tokens in (1024, 4096, 8192, 32_768, 163_840):
            load = Load.of(geometry, tokens, "contiguous", bulk=False)
            assert load.total_bytes == geometry.total_bytes(tokens)
            # each rank holds a ring, and decode makes two more to measure a copy
            assert (2 + 2) * load.ring * load.layer_bytes < 6e9


@pytest.mark.parametrize("order", kv.ORDERS)
def test_an_order_takes_each_block_once(order):
    import torch

    load = Load(1, 64 * 100, 100, order)
    memory = torch.arange(6400).to(torch.uint8)
    found = extents(memory, load, 3)
    assert sorted(e.data_ptr() for e in found) == ([memory.data_ptr() + i * 100 for i in range(64)] if order != "contiguous" else [memory.data_ptr()])  # fmt: skip
    touching = sum(a.data_ptr() + a.numel() == b.data_ptr() for a, b in zip(found, found[1:], strict=False))
    assert {"contiguous": touching == 0, "paged": touching >= 56, "fragmented": touching < 10}[order]


def test_ctrl_c_ends_it_with_no_rank_left():
    command = [sys.executable, "-m", "disagg_tt", "bench", "kv", "--transport", "tcp", "--iterations", "9999"]
    with started(command, environment(LOGURU_LEVEL="INFO")) as running:
        assert running.process.stderr is not None
        for line in running.process.stderr:
            if "device layer" in line:  # a rank is up
                break
        running.process.send_signal(signal.SIGINT)
        done = end_of(running)
    assert (done.code in (130, -signal.SIGINT), done.left) == (True, []), done.err


class Sent(End):
    """What a sender has."""

    def __init__(self, load):
        super().__init__(True, load)

    def stream(self, request):
        raise NotImplementedError


class Lossy(End):
    """A receiver whose first stream arrives and whose second does not."""

    def stream(self, request):
        if request == 0:
            self.memory.copy_(Sent(self.load).memory)
        return [0.0] * (self.load.layers + 2)


class Sender:
    """The other rank, which has sent."""

    def __init__(self, load):
        self.digests = Sent(load).digests()

    def barrier(self):
        pass

    def exchange(self, ours):
        return self.digests


def test_a_stream_that_does_not_arrive_is_noticed_after_one_that_did():
    load = Load(2, 4096, 1024)
    with pytest.raises(StreamError, match="what arrived differs from what was sent"):
        measure("lossy", Sender(load), Lossy(False, load), warmup=1, iterations=1)
