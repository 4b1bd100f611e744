"""What `--transport` and `--kv-transfer-config` may say. The latter's names are vLLM's.

    {"kv_connector": "tcp", "kv_role": "kv_consumer", "kv_ip": "127.0.0.1", "kv_port": 14579,
     "kv_connector_extra_config": {"kv_token": "a shared secret", "verify": true}}

The consumer (decode) listens at kv_ip: the wire at kv_port, the control channel at kv_port + 1. The producer (prefill)
connects there.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from disagg_tt.core import DECODE, PREFILL
from disagg_tt.errors import InputError

WIRES = ("mpi", "tcp", "nixl", "torch")  # through host memory, see kv_stream/host_wire.py
TRANSPORTS = ("mesh_socket", "local", *WIRES)
CONNECTORS = ("mpi", "tcp", "nixl")  # those that join programs which were started separately
ROLES = {"kv_producer": PREFILL, "kv_consumer": DECODE}
TOKEN_VARIABLE = "DISAGG_TT_TOKEN"

_TYPES: dict[str, type] = {
    "kv_connector": str,
    "kv_role": str,
    "kv_ip": str,
    "kv_port": int,
    "kv_connector_extra_config": dict,
}
_EXTRA_TYPES: dict[str, type] = {"kv_token": str, "verify": bool}


@dataclass(frozen=True)
class KVTransferConfig:
    """One program's end of a transfer between two programs.

    Attributes:
        kv_connector: the wire; kv_role: what this program does.
        kv_ip, kv_port: where the consumer listens, with kv_port + 1 for the control channel.
        kv_token: what both must know; "" only where the consumer listens on loopback.
        verify: check a digest of every layer.
    """

    kv_connector: str
    kv_role: str
    kv_ip: str = "127.0.0.1"
    kv_port: int = 14579
    kv_token: str = field(default="", repr=False)
    verify: bool = True

    @property
    def role(self) -> str:
        return ROLES[self.kv_role]

    @property
    def control_address(self) -> str:
        host = f"[{self.kv_ip}]" if ":" in self.kv_ip else self.kv_ip
        return f"tcp://{host}:{self.kv_port + 1}"

    @classmethod
    def parse(cls, text: str, environ: Mapping[str, str] = {}) -> KVTransferConfig:
        """Read --kv-transfer-config; the token may be in DISAGG_TT_TOKEN instead. Raises InputError."""
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"--kv-transfer-config is {text[:80]!r}, not JSON ({error}); give an object"
            ) from None
        values = _checked("--kv-transfer-config", given, _TYPES)
        extra = _checked(
            "kv_connector_extra_config", values.pop("kv_connector_extra_config", {}), _EXTRA_TYPES
        )
        for name, allowed in (("kv_connector", CONNECTORS), ("kv_role", tuple(ROLES))):
            if values.get(name) not in allowed:
                raise InputError(
                    f"--kv-transfer-config: {name} is {values.get(name)!r}; allowed: {', '.join(allowed)}"
                )
        port = values.get("kv_port", cls.kv_port)
        if not 1 <= port <= 65534:
            raise InputError(
                f"--kv-transfer-config: kv_port is {port}; allowed: 1 to 65534, the next one free too"
            )
        if not values.get("kv_ip", cls.kv_ip):
            raise InputError("--kv-transfer-config: kv_ip is ''; give an address, such as 127.0.0.1")
        config = cls(**{"kv_token": environ.get(TOKEN_VARIABLE, ""), **values, **extra})
        if not config.kv_token and not is_loopback(config.kv_ip):
            raise InputError(
                f"--kv-transfer-config: kv_ip is {config.kv_ip}, which others reach too, and there is no token; give both programs "
                f"the same {TOKEN_VARIABLE} in the environment, or kv_token"
            )
        return config


def is_loopback(host: str) -> bool:
    """Return whether only this host's programs reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _checked(what: str, given: Any, types: Mapping[str, type]) -> dict[str, Any]:
    """Return `given`, an object whose keys are among `types` and whose values are of them; raises InputError."""
    allowed = ", ".join(f"{name} ({type_.__name__})" for name, type_ in types.items())
    if not isinstance(given, dict):
        raise InputError(f"{what} is {str(given)[:80]!r}; an object is needed, with {allowed}")
    for name, value in given.items():
        if name not in types or type(value) is not types[name]:
            raise InputError(f"{what}: {name} is {value!r}; allowed: {allowed}")
    return dict(given)
