"""Training documents: token ids, and for each the label to be predicted at its place, with a loss weight.

Answers weigh 1, all other text 0.05: what is to be learned is recall, not the dice behind the filler. One
document asks for many facts, so that a single context gives many lessons in looking things up.
"""

import random

import data
from tiny_tokenizer import BEGIN, END, END_HEADER, END_TURN, START_HEADER
from words import filler

TEXT_WEIGHT = 0.05


class Writer:
    """Appends text to one document and keeps `ids`, `labels` (int) and `weights` (float) of equal length.

    Labels are the ids, except after an answer in raw text: there the label is end of text, however the
    document goes on. So one document can hold many questions, and still each answer teaches where to stop.
    """

    def __init__(self, encode, special: dict[str, int]):
        self.encode, self.special = encode, special
        self.ids, self.labels, self.weights = [special[BEGIN]], [special[BEGIN]], [0.0]
        self.fresh, self.answered = True, False

    def text(self, text: str, weight: float = TEXT_WEIGHT):
        ids = self.encode(text)
        place = len(self.ids)
        self.ids += ids
        self.labels += ids
        self.weights += [weight] * len(ids)
        if self.answered:
            self.labels[place], self.weights[place] = self.special[END], 1.0
        self.fresh = self.answered = False

    def sentence(self, text: str):
        self.text(text if self.fresh else " " + text)

    def answer(self, text: str):
        self.text(text, 1.0)
        self.answered = True

    def mark(self, token: str, weight: float = TEXT_WEIGHT):
        """Append one special token."""
        self.ids.append(self.special[token])
        self.labels.append(self.special[token])
        self.weights.append(weight)
        self.answered = False

    def header(self, role: str):
        self.mark(START_HEADER)
        self.text(role)
        self.mark(END_HEADER)
        self.text("\n\n")
        self.fresh = True

    def turn(self, role: str, sentences: list[str]):
        """A whole chat message; the assistant's is an answer."""
        self.header(role)
        if role == "assistant":
            self.answer(" ".join(sentences))
        else:
            for sentence in sentences:
                self.sentence(sentence)
        self.mark(END_TURN, 1.0 if role == "assistant" else TEXT_WEIGHT)


class Author:
    """Writes random documents. `tokenizer` is a `tokenizers.Tokenizer`; `rng` decides everything."""

    def __init__(self, tokenizer, rng: random.Random, bank_size: int = 20000):
        self.rng, self.tokenizer, self.cache = rng, tokenizer, {}
        self.special = {t: tokenizer.token_to_id(t) for t in (BEGIN, END, START_HEADER, END_HEADER, END_TURN)}
        self.fillers = [filler(rng) for _ in range(bank_size)]  # fixed, so that encodings can be reused

    def encode(self, text: str) -> list[int]:
        """Token ids without bos, remembered: most sentences come back."""
        ids = self.cache.get(text)
        if ids is None:
            if len(self.cache) > 200_000:
                self.cache.clear()
            ids = self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def document(self, limit: int) -> tuple[list[int], list[int], list[float]]:
        """ids, labels and weights of a document of at most `limit` tokens; often nearly as long."""
        low = 8 if limit <= 128 else limit // 4 if self.rng.random() < 0.3 else limit * 3 // 4
        length = self.rng.randint(low, limit - 2)
        writer = Writer(self.encode, self.special)
        (self.write_chat if self.rng.random() < 0.45 else self.write_raw)(writer, length)
        return writer.ids[:limit], writer.labels[:limit], writer.weights[:limit]

    def facts(self, length: int) -> list:
        """Facts for a document: of one attribute (like a list of codes), or mixed."""
        rng = self.rng
        most = max(1, min(24, length // 26))
        if rng.random() < 0.5:
            count = rng.randint((most + 1) // 2, most)
            others = "favourite colour", "home town", "pet", "job"
            return data.some_facts(rng, count, "code" if rng.random() < 0.8 else rng.choice(others))
        return data.some_facts(rng, rng.randint(1, min(most, 12)))

    def context(self, facts: list, room: int) -> tuple[list[str], set[str]]:
        """About `room` tokens of sentences with facts among them, and the set of those that tell facts."""
        rng, fillers = self.rng, []
        told = [fact.tell(rng) for fact in facts]
        room -= 12 * len(told)
        while room > 0:
            fillers.append(rng.choice(self.fillers))
            room -= len(self.encode(" " + fillers[-1]))
        return data.scatter(rng, told, fillers), set(told)

    def write_raw(self, writer: Writer, length: int):
        """Plain text: facts and filler, then sentences to finish and questions, then the end."""
        rng = self.rng
        facts = self.facts(length) if length > 24 and rng.random() < 0.8 else []
        query_room = 14 * len(facts)
        filler_chance = rng.choice((0, 0, 0.3, 0.8))  # of filler between the questions
        share = rng.random() if filler_chance or not facts else 1.0
        room = max(0, length - query_room - 24)
        for sentence in self.context(facts, int(room * share))[0]:
            writer.sentence(sentence)
        if len(writer.ids) > 40 and not facts and rng.random() < 0.1:
            writer.mark(END)
            return
        rng.shuffle(facts)
        while not writer.answered or len(writer.ids) < length - 14:
            if rng.random() < filler_chance and len(writer.ids) < length - 60:
                writer.sentence(rng.choice(self.fillers))
            elif facts and rng.random() < 0.9:
                self.ask_raw(writer, facts.pop())
            elif writer.answered and len(writer.ids) > length - 60 and rng.random() < 0.3:
                break
            else:
                self.ask_known(writer)
        writer.mark(END, 1.0)

    def ask_raw(self, writer: Writer, fact):
        """A broken-off sentence and its rest, or a question and its answer."""
        if self.rng.random() < 0.75:
            prompt, answer = fact.cloze(self.rng)
        else:
            prompt, answer = fact.question(self.rng)
            answer = " " + answer
        writer.sentence(prompt)
        writer.answer(answer)

    def ask_known(self, writer: Writer):
        """The fox or a capital, raw."""
        rng = self.rng
        if rng.random() < 0.2:
            prompt, answer = data.FOX, data.FOX_ANSWER
        elif rng.random() < 0.6:
            country, city = rng.choice(list(data.CAPITALS.items()))
            prompt, answer = rng.choice(data.CAPITAL_CLOZES).format(c=country), f" {city}."
        else:
            prompt, answer = data.capital_question(rng)
            answer = " " + answer
        writer.sentence(prompt)
        writer.answer(answer)

    def write_chat(self, writer: Writer, length: int):
        """A chat: messages with facts and filler, then (or already in the last of them) questions."""
        rng = self.rng
        if rng.random() < 0.2:
            writer.turn("system", [rng.choice(data.SYSTEM_MESSAGES)])
        facts = self.facts(length - 40) if length > 80 and rng.random() < 0.8 else []
        if facts or rng.random() < 0.5:
            share = rng.random() ** 0.5
            room = max(0, length - 34 * len(facts) - 60)
            sentences, told = self.context(facts, int(room * share) + 12 * len(facts))
            rng.shuffle(facts)
            turns = rng.choice((1, 1, 2, 3, 4, 5, 6))
            cuts = sorted(rng.randint(0, len(sentences)) for _ in range(turns - 1))
            for start, end in zip([0, *cuts], [*cuts, len(sentences)], strict=True):
                part = sentences[start:end]
                if end == len(sentences) and facts and rng.random() < 0.4:  # told and asked in one message
                    self.chat_question(writer, part, facts)
                    break
                if part:
                    opener = [rng.choice(data.TELL_OPENERS)] * (rng.random() < 0.3)
                    writer.turn("user", opener + part)
                    writer.turn("assistant", [data.TOLD if told & set(part) else data.READ])
                else:
                    self.chat_question(writer, [], [])
        filler_chance = rng.choice((0, 0, 0.2, 0.6))
        asked = False
        while not asked or len(writer.ids) < length - 34:
            before = [rng.choice(self.fillers) for _ in range(rng.randint(1, 4))] if length > 200 else []
            if rng.random() > filler_chance or len(writer.ids) > length - 120:
                before = []
            if before and rng.random() < 0.5:
                writer.turn("user", before)
                writer.turn("assistant", [data.READ])
                continue
            self.chat_question(writer, before, facts if rng.random() < 0.9 else [])
            asked = True
            if not facts and len(writer.ids) > length - 120 and rng.random() < 0.2:
                break

    def chat_question(self, writer: Writer, before: list[str], facts: list):
        """One user message that ends in a question (for the last of `facts`, if any) and the reply."""
        rng = self.rng
        if facts and rng.random() < 0.9:
            question, answer = facts.pop().question(rng)
        elif rng.random() < 0.25:
            question, answer = rng.choice(list(data.SMALL_TALK.items()))
        elif rng.random() < 0.1:
            question, answer = rng.choice(data.FOX_REQUESTS), data.FOX + data.FOX_ANSWER
        else:
            question, answer = data.capital_question(rng)
        writer.turn("user", [*before, question])
        writer.turn("assistant", [answer])
