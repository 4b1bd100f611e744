"""Which conversation a prompt continues: the one that the client names, else the one whose tokens it begins with."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from disagg_tt.blocks import BLOCK

BRANCHES = (
    8  # turns of a conversation that a prompt may go back to: an edited question, an answer asked for again
)


@dataclass
class Conversation:
    """turns: answered ones. tokens: prompt and answer of the last; prompt_tokens: its prompt alone. decode_worker: who has them, "" for none alive.

    last_used: s, of the clock of whoever calls.
    """

    id: str
    turns: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    decode_worker: str = ""
    last_used: float = 0.0


class Conversations:
    """The conversations used last, at most `limit`."""

    def __init__(self, limit: int = 4096):
        self.limit = limit
        self._by_id: OrderedDict[str, Conversation] = OrderedDict()  # the one used longest ago first
        self._ends: dict[
            bytes, dict[tuple[int, ...], str]
        ] = {}  # hash of the last full block, tokens after it: whose
        self._ends_of: dict[str, deque[tuple[bytes, tuple[int, ...]]]] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def newest_first(self) -> list[Conversation]:
        """Return all, the one used last first."""
        return [*reversed(self._by_id.values())]

    def find(self, name: str | None, tokens: Sequence[int], hashes: Sequence[bytes]) -> Conversation | None:
        """Return the conversation that a prompt continues: `name`'s, or without a name the longest that it extends."""
        if name is not None:
            return self._by_id.get(name)
        for depth in range(len(hashes), -1, -1):
            ends = self._ends.get(hashes[depth - 1] if depth else b"", {})
            rest = tuple(tokens[depth * BLOCK : (depth + 1) * BLOCK])
            for length in range(min(len(rest), BLOCK - 1), -1, -1) if ends else ():
                if (id := ends.get(rest[:length])) is not None:
                    return self._by_id[id]
        return None

    def answered(
        self,
        id: str,
        tokens: Sequence[int],
        prompt_tokens: int,
        hashes: Sequence[bytes],
        worker: str,
        now: float,
    ) -> Conversation:
        """Note one more turn of `id`: `tokens` are its prompt and answer, `hashes` their chain.

        What a next prompt must begin with to be recognised is the prompt and half the answer: an answer's end may be
        cut by the client (an EOS token, a stop string) or become other tokens when text follows it.
        """
        conversation = self._by_id.setdefault(id, Conversation(id))
        self._by_id.move_to_end(id)
        conversation.turns += 1
        conversation.prompt_tokens = prompt_tokens
        conversation.tokens, conversation.decode_worker, conversation.last_used = len(tokens), worker, now
        length = prompt_tokens + (len(tokens) - prompt_tokens) // 2
        parent = hashes[length // BLOCK - 1] if length >= BLOCK else b""
        rest = tuple(tokens[length // BLOCK * BLOCK : length])
        if (other := self._ends.get(parent, {}).get(rest)) is not None:
            self._ends_of[other].remove((parent, rest))  # with the same words, the later one is found
        self._ends.setdefault(parent, {})[rest] = id
        ends = self._ends_of.setdefault(id, deque())
        ends.append((parent, rest))
        if len(ends) > BRANCHES:
            self._forget_end(*ends.popleft())
        while len(self._by_id) > self.limit:
            oldest, _ = self._by_id.popitem(last=False)
            for end in self._ends_of.pop(oldest):
                self._forget_end(*end)
        return conversation

    def _forget_end(self, parent: bytes, rest: tuple[int, ...]) -> None:
        del self._ends[parent][rest]
        if not self._ends[parent]:
            del self._ends[parent]

    def lost(self, worker: str) -> None:
        """The worker is gone, and what it had cached."""
        for conversation in self._by_id.values():
            if conversation.decode_worker == worker:
                conversation.decode_worker = ""

    def clear(self) -> int:
        """Forget all; return how many there were."""
        count = len(self._by_id)
        self._by_id.clear()
        self._ends.clear()
        self._ends_of.clear()
        return count
