"""Are the tokens of a server those of one mesh? Many conversations at once, modes that change, clients that leave.

disagg-tt serve &
python examples/verify_serving.py [--url http://127.0.0.1:8000] [--conversations 64] [--turns 5] [--seed 7]

Each conversation, raw text or chat, streamed or not, says something new each turn, to its history so far; now and then its
client leaves in the middle of an answer and asks again. Every answer is then compared with that of a single mesh in this
process. Prints what was compared, one JSON line, and what the server still holds; ends with exit code 1 if that is anything,
or if more than 1 token in 1,000 differs, or one that is not a near tie: whose best two logits are within a bfloat16 step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import openai

from disagg_tt.config import Options
from disagg_tt.core import Answer
from disagg_tt.model.checkpoint import find_checkpoint
from disagg_tt.prompt import Tokenizer
from disagg_tt.rank import answer_here

MODES = ("pd", "ppd", "auto")
NEAR_TIE = 0.125  # between two logits of 16 to 32: one bfloat16 step
REST_S = 60.0  # for the server to be at rest once all have their answers
WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "Lima",
    "Oslo",
    "Paris",
    "river",
    "stone",
    "paper",
    "yes",
    "no",
    "why",
    "when",
    "and",
    "then",
    "again",
    "more",
]

Prompt = str | list[dict[str, str]]


@dataclass
class Asked:
    """One question and what came of it; `whole`: the client did not leave before the end."""

    prompt: Prompt
    text: str = ""
    whole: bool = False
    finish_reason: str = ""
    usage: dict[str, Any] = field(default_factory=dict)


class Run:
    """The conversations with one server."""

    def __init__(self, url: str, new_tokens: int, seed: int, cancel: float = 0.2):
        self.url, self.new_tokens, self.seed, self.cancel = url.rstrip("/"), new_tokens, seed, cancel
        self.asked: list[Asked] = []
        self.routes: Counter[str] = Counter()
        self._rng = random.Random(seed)

    async def converse(self, conversations: int, turns: int) -> None:
        """Have all conversations at once."""
        async with openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=600
        ) as client:
            model = [model.id async for model in client.models.list()][0]
            await asyncio.gather(*(self._conversation(client, model, n, turns) for n in range(conversations)))

    async def _conversation(self, client: openai.AsyncOpenAI, model: str, number: int, turns: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        chat = number % 2 == 0
        history: Any = [] if chat else f"Notes of talk {number}."
        for _ in range(turns):
            said = f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(5, 40)))
            prompt = [*history, {"role": "user", "content": said}] if chat else f"{history} {said}"
            if rng.random() < self.cancel:
                await self._ask(client, model, prompt, True, leave_after=rng.randrange(self.new_tokens))
            asked = await self._ask(client, model, prompt, rng.random() < 0.5)
            history = [*prompt, {"role": "assistant", "content": asked.text}] if chat else prompt + asked.text
            if self._rng.random() < 0.25:
                await client.post(f"{self.url}/mode/{self._rng.choice(MODES)}", cast_to=object)

    async def _ask(
        self,
        client: openai.AsyncOpenAI,
        model: str,
        prompt: Prompt,
        stream: bool,
        leave_after: int | None = None,
    ) -> Asked:
        asked = Asked(prompt)
        self.asked.append(asked)
        options = {"model": model, "max_tokens": self.new_tokens, "temperature": 0}
        extra = {"extra_body": {"ignore_eos": True}}
        chat = isinstance(prompt, list)
        given = {"messages": prompt} if chat else {"prompt": prompt}
        create: Any = client.chat.completions.create if chat else client.completions.create
        if not stream:
            response = await create(**options, **given, **extra)
            choice = response.choices[0]
            asked.text, asked.finish_reason = (
                choice.message.content if chat else choice.text,
                choice.finish_reason,
            )
            asked.whole, asked.usage = True, response.usage.model_dump()
            return asked
        pieces = 0
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        async with await create(**options, **given, **extra, **usage) as events:
            self.routes[events.response.headers["x-route"]] += 1
            async for event in events:
                if pieces == leave_after:
                    return asked
                if not event.choices:
                    asked.usage = event.usage.model_dump()
                    continue
                pieces += 1
                choice = event.choices[0]
                asked.text += (choice.delta.content if chat else choice.text) or ""
                asked.finish_reason = choice.finish_reason or asked.finish_reason
        asked.whole = True
        return asked


def single_mesh(prompts: Sequence[Prompt], **options: Any) -> list[Answer]:
    """Return a single mesh's answers to texts, raw, and chats; equal prompts are computed once."""
    keys = [json.dumps(prompt) for prompt in prompts]
    answers: dict[str, Answer] = {}
    for chat in (False, True):
        wanted = {k: p for k, p in zip(keys, prompts, strict=True) if isinstance(p, list) == chat}
        if wanted:
            o = Options(
                prompts=(*wanted.values(),),
                chat=chat,
                single_mesh=True,
                batch=min(32, len(wanted)),
                **options,
            )
            answers |= zip(wanted, answer_here(o, lambda event: None), strict=True)
    return [answers[key] for key in keys]


def reference(run: Run, **options: Any) -> list[Answer]:
    """Return a single mesh's answers to all that was asked."""
    prompts = [asked.prompt for asked in run.asked]
    return single_mesh(prompts, max_new_tokens=run.new_tokens, ignore_eos=True, **options)


def agreeing(text: str, answer: Answer, tokenizer: Tokenizer) -> int:
    """Return how many of the answer's tokens begin the text."""
    for count in range(len(answer.tokens), 0, -1):
        if text.startswith(tokenizer.decode(answer.tokens[:count]).rstrip("\ufffd")):
            return count
    return 0


def compare(
    run: Run, answers: list[Answer], tokenizer: Tokenizer
) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """Return the counts, and of each answer that differs its number and how many tokens of it agree.

    What follows the first token that differs answers another text, and is not compared. Of an answer whose client left, what had come must be the beginning of the reference's.
    """
    counts: Counter[str] = Counter()
    differing = []
    for number, (asked, answer) in enumerate(zip(run.asked, answers, strict=True)):
        counts["answers" if asked.whole else "left"] += 1
        if not asked.whole:
            right = answer.text.startswith(asked.text)
        else:
            right = asked.text == answer.text and asked.finish_reason == answer.finish_reason
            right &= asked.usage["completion_tokens"] == len(answer.tokens)
            right &= asked.usage["prompt_tokens"] == answer.prompt_tokens
        same = len(answer.tokens) if right else agreeing(asked.text, answer, tokenizer)
        counts["tokens_compared"] += min(same + (not right), len(answer.tokens)) if asked.whole else 0
        if not right:
            differing.append((number, same))
    return dict(counts), differing


async def near_ties(
    run: Run, answers: list[Answer], differing: list[tuple[int, int]], tokenizer: Tokenizer
) -> int:
    """Return of how many differing answers the first differing token is a near tie, as the server's logits have it."""
    ties = 0
    async with openai.AsyncOpenAI(base_url=f"{run.url}/v1", api_key="any") as client:
        model = [model.id async for model in client.models.list()][0]
        for number, same in differing:
            if same == len(answers[number].tokens):
                print(f"answer {number} has the right text, and another end or count of tokens")
                continue
            prompt = run.asked[number].prompt
            tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)  # type: ignore[arg-type]
            response = await client.completions.create(
                model=model, prompt=[*tokens, *answers[number].tokens[:same]], max_tokens=1, temperature=0,
                logprobs=2, extra_body={"ignore_eos": True},
            )  # fmt: skip
            top = response.choices[0].logprobs
            assert top is not None and top.top_logprobs is not None
            first, second = sorted(top.top_logprobs[0].values(), reverse=True)[:2]
            begin = tokenizer.decode(answers[number].tokens[:same])
            known = any(
                run.asked[number].text.startswith((begin + t).rstrip("\ufffd")) for t in top.top_logprobs[0]
            )
            print(
                f"answer {number} differs after {same} tokens, its best two logits by {first - second:.4f}"
                + ("" if known else ", and gave neither")
            )
            ties += known and first - second <= NEAR_TIE
    return ties


async def held(url: str) -> list[str]:
    """Return what the server still holds when it has had time to rest; [] is right."""
    until = time.monotonic() + REST_S
    async with openai.AsyncOpenAI(base_url=url, api_key="any") as client:
        while True:
            state: Any = await client.get(f"{url}/state", cast_to=object)
            busy = [f"request {request['id']}" for request in state["requests"]]
            for worker in state["workers"]:
                numbers = {name: worker[name] for name in ("running", "waiting", "slots_used", "blocks_used")}
                busy += [f"{worker['name']} {numbers}"] if any(numbers.values()) else []
            if not busy or time.monotonic() > until:
                return busy
            await asyncio.sleep(0.2)


def main(argv: list[str] | None = None) -> int:
    """Converse, compare, print, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--model", help="the server's --model")
    parser.add_argument("--kv-dtype", default=Options.kv_dtype, help="the server's --kv-dtype")
    a = parser.parse_args(argv)
    run, began = Run(a.url, a.new_tokens, a.seed), time.monotonic()
    asyncio.run(run.converse(a.conversations, a.turns))
    served_s = time.monotonic() - began
    left = asyncio.run(held(run.url))
    answers, tokenizer = (
        reference(run, model=a.model, kv_dtype=a.kv_dtype),
        Tokenizer(find_checkpoint(a.model)),
    )
    counts, differing = compare(run, answers, tokenizer)
    ties = asyncio.run(near_ties(run, answers, differing, tokenizer)) if differing else 0
    result = {
        "conversations": a.conversations, "turns": a.turns, "seed": a.seed, "new_tokens": a.new_tokens,
        "answers": 0, "left": 0, "tokens_compared": 0, **counts, "differing_tokens": len(differing),
        "near_ties": ties, "streamed_by_route": dict(run.routes), "held_at_the_end": left, "served_s": round(served_s, 1),
    }  # fmt: skip
    print(json.dumps(result))
    rare = 1000 * len(differing) <= counts["tokens_compared"]
    return 0 if rare and ties == len(differing) and not left else 1


if __name__ == "__main__":
    sys.exit(main())
