"""--transport and --kv-transfer-config: what is allowed, and that everything else is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from disagg_tt.__main__ import options_of, parser
from disagg_tt.config import Options
from disagg_tt.errors import InputError
from disagg_tt.transfer_config import TRANSPORTS, KVTransferConfig

PLAIN = {"kv_connector": "tcp", "kv_role": "kv_consumer"}


def parse(given: Any, environ: dict[str, str] | None = None) -> KVTransferConfig:
    return KVTransferConfig.parse(given if isinstance(given, str) else json.dumps(given), environ or {})


def test_vllms_names_are_taken_and_the_rest_has_defaults():
    config = parse(PLAIN)
    assert (config.role, config.kv_ip, config.kv_port, config.kv_token, config.verify) == (
        "decode", "127.0.0.1", 14579, "", True,
    )  # fmt: skip
    config = parse(
        {
            "kv_connector": "nixl",
            "kv_role": "kv_producer",
            "kv_ip": "::1",
            "kv_port": 5000,
            "kv_connector_extra_config": {"kv_token": "s", "verify": False},
        }
    )
    assert (config.kv_connector, config.role, config.verify) == ("nixl", "prefill", False)
    assert config.control_address == "tcp://[::1]:5001"


def test_the_token_may_be_in_the_environment_and_is_not_shown():
    environ = {"DISAGG_TT_TOKEN": "of the environment"}
    config = parse({**PLAIN, "kv_ip": "10.0.0.1"}, environ)
    assert config.kv_token == "of the environment"
    assert "of the environment" not in repr(config)
    given = {**PLAIN, "kv_connector_extra_config": {"kv_token": "given"}}
    assert parse(given, environ).kv_token == "given"


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not JSON"),
    "a deep one": ("[" * 100_000, "not JSON"),
    "a list": ([1], "an object is needed, with kv_connector"),
    "unknown": ({**PLAIN, "kv_rank": 0}, "kv_rank is 0; allowed: kv_connector .str., kv_role .str., kv_ip"),
    "a port as text": ({**PLAIN, "kv_port": "14579"}, "kv_port is '14579'; allowed: .*kv_port .int."),
    "a port as truth": ({**PLAIN, "kv_port": True}, "kv_port is True"),
    "a port out of range": ({**PLAIN, "kv_port": 65535}, "kv_port is 65535; allowed: 1 to 65534"),
    "no connector": ({"kv_role": "kv_consumer"}, "kv_connector is None; allowed: mpi, tcp, nixl"),
    "another connector": (
        {**PLAIN, "kv_connector": "torch"},
        "kv_connector is 'torch'; allowed: mpi, tcp, nixl",
    ),
    "another role": (
        {**PLAIN, "kv_role": "kv_both"},
        "kv_role is 'kv_both'; allowed: kv_producer, kv_consumer",
    ),
    "no address": ({**PLAIN, "kv_ip": ""}, "kv_ip is ''"),
    "an unknown extra": (
        {**PLAIN, "kv_connector_extra_config": {"lease": 1}},
        "kv_connector_extra_config: lease is 1; allowed: kv_token .str., verify .bool.",
    ),
    "an extra of another type": ({**PLAIN, "kv_connector_extra_config": {"verify": 1}}, "verify is 1"),
    "open to others": (
        {**PLAIN, "kv_ip": "0.0.0.0"},
        "kv_ip is 0.0.0.0, which others reach too.*DISAGG_TT_TOKEN",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_everything_else_is_refused_by_name(name):
    given, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        parse(given)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_each_transport_is_a_choice(transport):
    assert Options(transport=transport).in_one_process == (transport == "local")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another": (
        {"transport": "smoke"},
        "--transport is 'smoke', allowed are mesh_socket, local, mpi, tcp, nixl, torch",
    ),
    "queue": ({"transport": "tcp", "overlap": "queue"}, "--overlap queue is a socket's.*use inline or after"),
    "fifo": ({"transport": "torch", "direct": False}, "--fifo is a socket's"),
    "one mesh": ({"transport": "mpi", "single_mesh": True}, "joins two processes"),
    "one process": ({"transport": "nixl", "one_process": True}, "joins two processes"),
    "a connector": (
        {"transport": "nixl", "kv_transfer": KVTransferConfig("tcp", "kv_producer")},
        "leave --transport out",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_choices_that_do_not_go_together_are_refused(name):
    options, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        Options(**options)


def test_the_command_line_gives_the_connector_as_transport(monkeypatch):
    monkeypatch.setenv("DISAGG_TT_TOKEN", "secret")
    options = options_of(parser().parse_args(["generate", "--kv-transfer-config", json.dumps(PLAIN)]))
    assert (options.transport, options.kv_transfer) == (
        "tcp",
        KVTransferConfig("tcp", "kv_consumer", kv_token="secret"),
    )
    assert options_of(parser().parse_args(["generate"])).transport == "mesh_socket"
