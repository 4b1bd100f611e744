"""Are the tokens of two ranks those of one mesh? Prompts of 2 to 1,500 tokens, both cache dtypes, two batches.

python examples/verify_exactness.py [--prompts 50] [--new-tokens 200] [--seed 7]

Each setting is run twice with the same command line, over two ranks and with --single-mesh, and the tokens that come
out are compared. Prompts are facts to recall (of examples/train_tiny_llama) and random text, raw and as chat. Prints
a table, then one JSON line; ends with exit code 1 if any token differs.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from disagg_tt.config import KV_DTYPES
from disagg_tt.model.checkpoint import find_checkpoint
from disagg_tt.prompt import Tokenizer

sys.path.insert(0, str(Path(__file__).parent / "train_tiny_llama"))
from data import chat_recall_case, recall_case  # noqa: E402

FORMS = ("raw", "chat")
LONGEST = 1500
KINDS = ("name", "colour", "code")


class _PlainEncode:
    """The tokenizer as data.py calls it, counting no special tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._tokenizer.encode(text)[0 if add_special_tokens else 1 :]


def prompts(count: int, longest: int, chat: bool, seed: int) -> list[dict[str, Any]]:
    """Return `count` entries of a --prompts-file, of 2 to about `longest` tokens: recall, then random text.

    The lengths of recall are spread evenly, those of random text begin with 2, `longest`, 32, 31 and 33. One token is
    BOS; the chat template adds 16.
    """
    rng, tokenizer = random.Random(seed), Tokenizer(find_checkpoint(None))
    entries: list[dict[str, Any]] = []
    recalls = count // 2
    for number in range(recalls):
        length = 40 + (longest - 40) * number // max(recalls - 1, 1)
        make = chat_recall_case if chat else recall_case
        case = make(rng, KINDS[number % len(KINDS)], length, _PlainEncode(tokenizer))
        entries.append({"messages": case.prompt} if chat else {"prompt": case.prompt})
    edges = [n for n in (2, longest, 32, 31, 33) if n <= longest]
    for number in range(count - recalls):
        length = edges[number] if number < len(edges) else rng.randint(2, longest)
        entries.append({"prompt": random_text(rng, tokenizer, length - 1)})
    return entries


def random_text(rng: random.Random, tokenizer: Tokenizer, length: int) -> str:
    """Return text of at most `length` tokens (BOS not counted), of tokens drawn at random; close to it where it can be."""
    first = 5  # behind the special tokens
    text = tokenizer.decode([rng.randrange(first, tokenizer.vocab_size) for _ in range(length)])
    while len(tokenizer.encode(text)) - 1 > length or not text.strip():
        text = text[:-1] if text.strip() else tokenizer.decode([rng.randrange(first, tokenizer.vocab_size)])
    return text


def generate(*flags: str) -> list[dict[str, Any]]:
    """Run `disagg-tt generate` and return its answers; raises CalledProcessError when it fails."""
    command = [sys.executable, "-m", "disagg_tt", "generate", "--json", *flags]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def differing(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> int:
    """Return how many tokens of two runs' answers differ, position by position; a missing token differs."""
    count = 0
    for a, b in zip(one, other, strict=True):
        longer = max(len(a["tokens"]), len(b["tokens"]))
        count += longer - sum(x == y for x, y in zip(a["tokens"], b["tokens"], strict=False))
    return count


def main(argv: list[str] | None = None) -> int:
    """Compare all settings, print the table and the JSON line, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=50, help="prompts of each form")
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--kv-dtypes", nargs="+", choices=KV_DTYPES, default=KV_DTYPES)
    arguments = parser.parse_args(argv)
    began = time.monotonic()
    print(f"{'form':6}{'cache':12}{'batch':>6}{'prompts':>9}{'lengths':>12}{'tokens':>9}{'differing':>11}")
    total = {"prompts": 0, "tokens_compared": 0, "differing_tokens": 0}
    with tempfile.TemporaryDirectory() as folder:
        for form in arguments.forms:
            file = Path(folder) / f"{form}.jsonl"
            entries = prompts(arguments.prompts, LONGEST, form == "chat", arguments.seed)
            file.write_text("\n".join(map(json.dumps, entries)))
            for dtype in arguments.kv_dtypes:
                for batch in (1, 32):
                    flags = [f"--{form}", "--prompts-file", str(file), "--ignore-eos"]
                    flags += [
                        "--max-new-tokens",
                        str(arguments.new_tokens),
                        "--kv-dtype",
                        dtype,
                        "--batch",
                        str(batch),
                    ]
                    two, one = generate(*flags), generate(*flags, "--single-mesh")
                    lengths = [answer["prompt_tokens"] for answer in one]
                    compared, wrong = sum(len(answer["tokens"]) for answer in one), differing(two, one)
                    span = f"{min(lengths)}..{max(lengths)}"
                    print(
                        f"{form:6}{dtype:12}{batch:6}{len(one):9}{span:>12}{compared:9}{wrong:11}",
                        flush=True,
                    )
                    total["prompts"] += len(one)
                    total["tokens_compared"] += compared
                    total["differing_tokens"] += wrong
    seconds = round(time.monotonic() - began, 1)
    print(
        json.dumps({"new_tokens": arguments.new_tokens, "seed": arguments.seed, **total, "seconds": seconds})
    )
    return 1 if total["differing_tokens"] else 0


if __name__ == "__main__":
    sys.exit(main())
