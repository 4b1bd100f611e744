"""What the frontend does when ranks are lost, without ranks."""

from __future__ import annotations

import asyncio

import pytest

from disagg_tt.core import DECODE
from disagg_tt.errors import OverloadError
from disagg_tt.serving.frontend import Frontend
from disagg_tt.serving.generation import Generation
from disagg_tt.serving.hub import Hub
from disagg_tt.serving.ranks import Worker
from disagg_tt.serving.router import Router


def test_a_request_that_waits_for_lost_ranks_is_shown_and_told_that_the_server_stops():
    async def main():
        frontend = Frontend(Hub(), Router())
        frontend.router.join(
            Worker("decode-1", DECODE, 4, 64)
        )  # the router has not heard yet that it is gone
        stream = frontend.generate(Generation("cmpl-1-0", (1, 2, 3), 4))
        first = asyncio.create_task(anext(aiter(stream)))
        while not frontend.waiting_for_ranks:
            await asyncio.sleep(0)
        assert frontend.health()["in_flight"] == 1
        (shown,) = frontend.state()["requests"]
        assert (shown["id"], shown["phase"], shown["decode_worker"]) == ("cmpl-1-0", "waiting", "")
        frontend.stop()
        with pytest.raises(OverloadError, match="the server stops"):
            await first
        assert frontend.health()["in_flight"] == 0 and not frontend.router.requests
        await frontend.hub.close()

    asyncio.run(main())
