"""The control channel between two programs that were started separately, at a configured address.

Each end sends a nonce and answers the other's with an HMAC-SHA256 of it under the token, which itself never travels; only
then does anything else count. The role is part of the answer, so that an end's own is of no use to a stranger.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from disagg_tt.core import DECODE, PREFILL
from disagg_tt.errors import StreamError
from disagg_tt.kv_stream.control import Control, ZmqControl, expect
from disagg_tt.transfer_config import KVTransferConfig


def connect_programs(config: KVTransferConfig, limit_s: float) -> ZmqControl:
    """Return this program's end of the channel to the other, which may start up to `limit_s` later.

    Raises PeerError when it does not come, StreamError when it does not know the token, InputError for a taken address.
    """
    ours, theirs = config.role, PREFILL if config.role == DECODE else DECODE
    control = ZmqControl(theirs, bind=ours == DECODE, address=config.control_address)
    try:
        if ours == DECODE:
            control.wait_for_peer(limit_s)
        else:
            control.connect(config.control_address)
        authenticate(control, ours, theirs, config.kv_token, limit_s)
    except Exception:
        control.close()
        raise
    return control


def authenticate(control: Control, ours: str, theirs: str, token: str, limit_s: float) -> None:
    """Show the other end that this one, in role `ours`, knows `token`, and have it shown; raises StreamError if it does not."""
    nonce, what = secrets.token_hex(32), f"comparing tokens with the {theirs} program"
    control.send("challenge", nonce=nonce)
    asked = expect(control, "challenge", limit_s, what)["nonce"]
    control.send("proof", proof=_proof(token, ours, asked))
    # As bytes: of text, which may be anything, only ASCII can be compared.
    shown = expect(control, "proof", limit_s, what)["proof"].encode(errors="surrogatepass")
    if not hmac.compare_digest(shown, _proof(token, theirs, nonce).encode()):
        raise StreamError(
            f"the {theirs} program does not know the token; give both the same DISAGG_TT_TOKEN or kv_token"
        )


def _proof(token: str, role: str, nonce: str) -> str:
    return hmac.digest(token.encode(), f"{role} {nonce}".encode(errors="surrogatepass"), hashlib.sha256).hex()
