"""The endpoint over the real runtime with a mock cluster: every device call of serving ranks is accepted, under tt-run."""

from __future__ import annotations

import pytest
from deployment import MODEL, served

pytestmark = pytest.mark.timeout(400)

LONG = list(range(10, 610))  # two pieces of a prompt


def test_prompts_in_pieces_streams_reuse_and_batches_are_accepted(mock_environment):
    with served("--max-seq-len", "1024", DISAGG_TT_DEVICE="ttnn", **mock_environment) as server:

        def ask(prompt, conversation=None, **settings):
            more = {"ignore_eos": True, "conversation_id": conversation}
            answer = server.openai.completions.create(
                model=MODEL, prompt=prompt, max_tokens=6, extra_body=more, **settings
            )
            assert [choice.finish_reason for choice in answer.choices] == ["length"] * len(answer.choices)
            return answer.usage

        server.mode("pd")
        assert ask([[5, 6, 7], LONG[:40]]).completion_tokens == 12  # both at once
        assert ask(LONG, "one").prompt_tokens == 600
        server.mode("ppd")
        assert (
            ask([*LONG, 7, 8], "one").prompt_tokens_details.cached_tokens == 576
        )  # on the decode rank, over its cache
        server.mode("pd")
        usage = ask([*LONG, *LONG[:100]], temperature=0.7, logprobs=2)  # over the prefill rank's cache
        assert usage.prompt_tokens_details.cached_tokens == 576
        routes = server.http.get("/metrics").text
        assert 'route="pd"' in routes and 'route="ppd"' in routes
        server.at_rest()
