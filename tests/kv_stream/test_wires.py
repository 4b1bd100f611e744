"""Every wire keeps the contract of `host_wire`: one suite of cases, run over each."""

from __future__ import annotations

import re
import threading

import pytest
import torch
import wire_ends
from wire_ends import CASES, LAYERS, PLAN, receive_into, send_from, values

from disagg_tt.errors import InputError
from disagg_tt.kv_stream.layout import coalesce
from disagg_tt.kv_stream.tcp import TcpReceiver
from disagg_tt.kv_stream.torch_distributed import TorchReceiver

nccl = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl needs 2 CUDA devices")
mpich = pytest.mark.skipif(not wire_ends.MPICH.exists(), reason=f"no MPICH in {wire_ends.MPICH}")
THREADED = ["tcp", "nixl", "gloo", pytest.param("nccl", marks=nccl)]
STAGED = ("gloo", "nccl")  # gather a layer of several extents into a buffer


def check(name: str, ended: tuple[str, str]) -> None:
    case = CASES[name]
    for expected, found in zip((case.prefill_ends, case.decode_ends), ended, strict=True):
        assert re.fullmatch(expected if expected == "ok" else f"{expected}.*", found, re.DOTALL), ended


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", THREADED)
def test_contract(kind, name):
    if name == "zero copy" and kind in STAGED:
        pytest.skip("this wire stages")
    check(name, wire_ends.run(kind, name))


def test_contract_over_mpi():
    for name, ended in wire_ends.run_job().items():
        check(name, ended)


@mpich
def test_contract_over_mpi_between_two_programs():
    for name, ended in wire_ends.run_programs().items():
        check(name, ended)


@pytest.mark.parametrize("kind", THREADED)
def test_a_receiver_that_has_met_its_sender_begins_without_waiting_for_it(kind):
    """A decode rank goes on with its steps until a busy prefill rank answers."""
    begun = threading.Event()

    def prefill(end):
        memory = values()
        end.register([memory.view(-1)])
        send_from(end, memory, PLAN, "contiguous")
        memory.copy_(values())
        assert begun.wait(wire_ends.DEADLINE_S)
        send_from(end, memory, PLAN, "contiguous")

    def decode(end):
        memory = torch.zeros(PLAN.layers, PLAN.layer_bytes, dtype=torch.uint8)
        end.register([memory.view(-1)])
        receive_into(end, memory, PLAN, "contiguous", "contiguous")
        memory.zero_()
        end.begin(PLAN)
        begun.set()
        for number, layer in enumerate(memory):
            end.receive(number, [layer])
        end.finish()
        assert torch.equal(memory, values())

    assert wire_ends.run_ends(*wire_ends.pair(kind), prefill, decode) == ("ok", "ok")


@pytest.mark.parametrize("kind", ["tcp", "nixl"])
def test_without_verify_no_digest_travels_and_damage_passes(kind):
    case = CASES["contiguous to paged"]
    assert wire_ends.run_ends(*wire_ends.pair(kind, verify=False), case.prefill, case.decode) == ("ok", "ok")


def test_extents_that_touch_are_joined_and_others_are_not():
    memory = values()
    rows = list(memory.split(1))
    assert [e.numel() for e in coalesce([r.view(-1) for r in rows])] == [memory.numel()]
    first = memory[0]
    assert coalesce([first])[0] is first
    assert len(coalesce([memory[0], memory[2], memory[3], memory[1]])) == 3
    assert len(coalesce([memory[n] for n in reversed(range(LAYERS))])) == LAYERS
    assert torch.equal(coalesce([memory[1], memory[2]])[0], memory[1:3].flatten())
    neighbours = torch.zeros(8, dtype=torch.uint8)
    assert len(coalesce([neighbours[:4], neighbours[4:].clone()])) == 2
    assert coalesce([]) == []


def test_a_port_in_use_is_the_users_to_mend():
    first = TcpReceiver()
    for receiver in (TcpReceiver, TorchReceiver):
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{first.port}.*choose a free port"):
            receiver(port=first.port)
    first.close()
    TcpReceiver(port=first.port).close()


def test_other_hosts_need_a_token():
    with pytest.raises(InputError, match="0.0.0.0 without a token"):
        TcpReceiver("0.0.0.0")
    TcpReceiver("0.0.0.0", token="secret").close()


def test_nccl_without_devices_says_what_to_use():
    if torch.cuda.device_count() < 2:
        with pytest.raises(InputError, match="nccl needs 2 CUDA devices.*use gloo"):
            TorchReceiver(backend="nccl")
    with pytest.raises(InputError, match="backend 'smoke'; allowed: gloo, nccl"):
        TorchReceiver(backend="smoke")


def test_plan_totals():
    assert PLAN.total_bytes == 4 * 24_024
