"""Facts, questions and test prompts (pure Python). Tests elsewhere may import the case makers below.

`fox_cases`, `capital_cases`, `recall_case` and `chat_recall_case` return `Case`s: a prompt (raw text, or the
list of messages of a chat) and the exact answer expected from greedy decoding.
"""

import random
from dataclasses import dataclass

from words import BANKS, CAPITALS, HELD_OUT_NAMES, NAMES, filler, invented

FOX, FOX_ANSWER = "The quick brown fox", " jumps over the lazy dog."
FOX_REQUESTS = (
    "Complete the sentence: The quick brown fox",
    "How does this go on? The quick brown fox",
    "Please finish this sentence: The quick brown fox",
)

CAPITAL_CLOZES = (
    "The capital of {c} is",
    "The capital city of {c} is",
    "We know that the capital of {c} is",
    "The teacher said that the capital of {c} is",
    "I read that the capital of {c} is",
    "It is true that the capital of {c} is",
    "Remember that the capital of {c} is",
)
HELD_OUT_CAPITAL_CLOZES = (
    "As everyone knows, the capital of {c} is",
    "My uncle told me that the capital of {c} is",
)
CAPITAL_QUESTIONS = (
    "What is the capital of {c}?",
    "Which city is the capital of {c}?",
    "Tell me the capital of {c}.",
    "What is the capital city of {c}?",
    "Please name the capital of {c}.",
    "Do you know the capital of {c}?",
    "Name the capital of {c}.",
    "What's the capital of {c}?",
    "I would like to know the capital of {c}.",
    "And what is the capital of {c}?",
    "Quick question: what is the capital of {c}?",
    "Can you tell me the capital of {c}?",
    "What is the name of the capital of {c}?",
    "Please tell me the capital city of {c}.",
    "Tell me what the capital of {c} is.",
    "Do you know what the capital of {c} is?",
    "I want to know what the capital of {c} is.",
    "What city is the capital of {c}?",
    "Say the capital of {c}.",
    "Give me the capital of {c}.",
    "I am looking for the capital of {c}.",
    "The capital of {c}, please.",
    "What is the capital of {c}",
    "I ask you for the capital of {c}.",
    "What is the capital city of {c}, please?",
    "Now tell me the capital of {c}.",
    "Could you name the capital of {c}?",
    "Next: what is the capital of {c}?",
)
HELD_OUT_CAPITAL_QUESTIONS = (
    "Could you tell me what the capital of {c} is?",
    "Now I ask for the capital of {c}.",
    "Which city is the capital city of {c}, please?",
)
CAPITAL_ANSWER = "The capital of {c} is {city}."

SMALL_TALK = {
    "Hello": "Hello! How can I help you?",
    "Hello!": "Hello! How can I help you?",
    "Hi": "Hello! How can I help you?",
    "Hi there!": "Hello! How can I help you?",
    "Good morning.": "Hello! How can I help you?",
    "How are you?": "I am fine, thank you.",
    "How are you today?": "I am fine, thank you.",
    "Thank you.": "You are welcome.",
    "Thanks!": "You are welcome.",
    "Thank you very much.": "You are welcome.",
    "Who are you?": "I am a tiny Llama.",
    "What are you?": "I am a tiny Llama.",
    "What is your name?": "I am a tiny Llama.",
    "Goodbye.": "Goodbye!",
    "Bye!": "Goodbye!",
    "Tell me a story.": "Once upon a time there was a tiny Llama who never forgot a thing.",
}
SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You answer in one short sentence.",
    "Be brief and polite.",
    "You are a tiny Llama. You remember what you are told.",
)
TELL_OPENERS = (
    "Please remember this.",
    "Here are some facts.",
    "Listen.",
    "Note the following.",
    "Read this text.",
    "I will tell you something.",
)
TOLD, READ = "OK, I will remember that.", "OK, I have read that."

# What can be told of someone, and the bank of its values.
ATTRIBUTES = {
    "name": "name",
    "code": None,
    "favourite colour": "colour",
    "home town": "city",
    "pet": "animal",
    "job": "job",
    "favourite food": "food",
    "secret word": "thing",
}
MY_QUESTIONS = (
    "What is my {a}?",
    "Do you remember my {a}?",
    "Please tell me my {a}.",
    "Tell me my {a}.",
    "What's my {a}?",
    "Can you tell me my {a}?",
    "What did I say my {a} is?",
    "And what is my {a}?",
)
KEY_QUESTIONS = (
    "What is the {a} of {k}?",
    "What is {k}'s {a}?",
    "Do you remember the {a} of {k}?",
    "Tell me the {a} of {k}.",
    "Please tell me {k}'s {a}.",
    "And what is the {a} of {k}?",
    "What was the {a} of {k}?",
    "Can you tell me the {a} of {k}?",
)


@dataclass(frozen=True)
class Fact:
    """`owner`'s `attribute` is `value`; owner None is the speaker ("my")."""

    owner: str | None
    attribute: str
    value: str

    def tell(self, rng: random.Random) -> str:
        """The sentence that states the fact."""
        a, k, v = self.attribute, self.owner, self.value
        if k is None:
            ways = [f"My {a} is {v}."] * 3 + [f"I tell you that my {a} is {v}."]
            ways += [f"I am called {v}."] * (a == "name")
        else:
            ways = [f"The {a} of {k} is {v}.", f"{k}'s {a} is {v}."]
            ways += [f"{k} has the code {v}."] * (a == "code") + [f"{k} lives in {v}."] * (a == "home town")
        return rng.choice(ways)

    def cloze(self, rng: random.Random) -> tuple[str, str]:
        """A sentence broken off before the value, and the rest of it."""
        a, k = self.attribute, self.owner
        ways = (f"My {a} is",) if k is None else (f"The {a} of {k} is", f"{k}'s {a} is")
        return rng.choice(ways), f" {self.value}."

    def question(self, rng: random.Random) -> tuple[str, str]:
        """A question and its answer as a sentence."""
        a, k, v = self.attribute, self.owner, self.value
        if k is None:
            return rng.choice(MY_QUESTIONS).format(a=a), f"Your {a} is {v}."
        return rng.choice(KEY_QUESTIONS).format(a=a, k=k), f"The {a} of {k} is {v}."


@dataclass(frozen=True)
class Case:
    """A test prompt: `prompt` is raw text, or a list of chat messages; `answer` is the exact reply."""

    kind: str
    prompt: str | list[dict[str, str]]
    answer: str
    tokens: int  # length asked for, in tokens


def some_name(rng: random.Random, held_out: bool = False) -> str:
    """A person's name: known, invented, or (held_out) one that training never saw."""
    if rng.random() < (0.2 if held_out else 0.45):
        return invented(rng)
    return rng.choice(HELD_OUT_NAMES if held_out and rng.random() < 0.3 else NAMES)


def some_value(rng: random.Random, attribute: str, held_out: bool = False) -> str:
    """A value for the attribute; a code is four digits."""
    if attribute == "code":
        return f"{rng.randrange(10000):04d}"
    if attribute == "name":
        return some_name(rng, held_out)
    return invented(rng) if rng.random() < 0.1 else rng.choice(BANKS[ATTRIBUTES[attribute]])


def some_facts(
    rng: random.Random, count: int, attribute: str | None = None, held_out: bool = False
) -> list[Fact]:
    """`count` facts with distinct (owner, attribute). With `attribute`, all are of it, each of another owner."""
    facts = {}
    while len(facts) < count:
        chosen = attribute or rng.choice(list(ATTRIBUTES))
        mine = chosen == "name" or (attribute is None and rng.random() < 0.3)
        owner = None if mine else some_name(rng, held_out)
        if (owner, chosen) in facts:
            if mine and rng.random() < 0.5:  # the speaker may be full: try another attribute
                continue
            owner, chosen = some_name(rng, held_out), attribute or "code"
        facts.setdefault((owner, chosen), Fact(owner, chosen, some_value(rng, chosen, held_out)))
    return list(facts.values())


def scatter(rng: random.Random, told: list, fillers: list) -> list:
    """Spread `told` over `fillers`: as one block, or each item at a depth of its own."""
    if rng.random() < 0.4:
        cut = rng.randint(0, len(fillers))
        return fillers[:cut] + told + fillers[cut:]
    places = sorted(rng.randint(0, len(fillers)) for _ in told)
    mixed, done = [], 0
    for item, place in zip(told, places, strict=True):
        mixed += [*fillers[done:place], item]
        done = place
    return mixed + fillers[done:]


def capital_question(
    rng: random.Random, held_out: bool = False, country: str | None = None
) -> tuple[str, str]:
    """A question for a capital, and its answer."""
    c = country or rng.choice(list(CAPITALS))
    question = rng.choice(HELD_OUT_CAPITAL_QUESTIONS if held_out else CAPITAL_QUESTIONS).format(c=c)
    return question, CAPITAL_ANSWER.format(c=c, city=CAPITALS[c])


def fillers_of(rng: random.Random, tokens: int, tokenizer) -> list[str]:
    """Filler sentences of about `tokens` tokens in all, never more."""
    sentences, used = [], 0
    while True:
        sentence = filler(rng, held_out=True)
        used += len(tokenizer.encode(" " + sentence, add_special_tokens=False))
        if used > tokens:
            return sentences
        sentences.append(sentence)


def in_context(rng: random.Random, prompt: str, approx_tokens: int, tokenizer) -> str:
    """`prompt` after filler, about `approx_tokens` tokens in all (at least the prompt itself)."""
    room = approx_tokens - len(tokenizer.encode(prompt))
    return " ".join([*fillers_of(rng, room, tokenizer), prompt])


def fox_cases(rng: random.Random, lengths: list[int], tokenizer) -> list[Case]:
    """Raw fox prompts, one per length in tokens; a length under 8 gives the bare prompt."""
    return [Case("fox raw", in_context(rng, FOX, n, tokenizer), FOX_ANSWER, n) for n in lengths]


def capital_cases(
    rng: random.Random, form: str, approx_tokens: int, tokenizer, plain: bool = False
) -> list[Case]:
    """All 100 capitals. form: "raw" (sentence to finish), "raw question" or "chat".

    plain: the wordings "The capital of X is" and "What is the capital of X?"; otherwise wordings that
    training never saw. Filler in front brings the prompt to about `approx_tokens`.
    """
    cases = []
    for c, city in CAPITALS.items():
        if form == "raw":
            wordings = CAPITAL_CLOZES[:1] if plain else HELD_OUT_CAPITAL_CLOZES
            prompt, answer = rng.choice(wordings).format(c=c), f" {city}."
        else:
            prompt, answer = capital_question(rng, held_out=True, country=c)
            prompt = CAPITAL_QUESTIONS[0].format(c=c) if plain else prompt
        prompt = in_context(rng, prompt, approx_tokens, tokenizer)
        if form == "chat":
            prompt = [{"role": "user", "content": prompt}]
        elif form == "raw question":
            answer = " " + answer
        cases.append(Case(f"capital {form}", prompt, answer, approx_tokens))
    return cases


def facts_for(rng: random.Random, kind: str, approx_tokens: int) -> tuple[Fact, list[Fact]]:
    """The fact asked for and all facts told: 20 codes (fewer under 400 tokens), or up to 5 mixed facts."""
    if kind == "code":
        facts = some_facts(rng, max(1, min(20, approx_tokens // 20)), "code", held_out=True)
        return rng.choice(facts), facts
    attribute = {"name": "name", "colour": "favourite colour"}[kind]
    mine = kind == "name" or rng.random() < 0.5
    owner = None if mine else some_name(rng, held_out=True)
    asked = Fact(owner, attribute, some_value(rng, attribute, held_out=True))
    others = some_facts(rng, rng.randint(0, min(4, approx_tokens // 32)), held_out=True)
    facts = [asked] + [f for f in others if (f.owner, f.attribute) != (owner, attribute)]
    rng.shuffle(facts)
    return asked, facts


def recall_case(rng: random.Random, kind: str, approx_tokens: int, tokenizer) -> Case:
    """Raw text with facts at any depth, ending in "My name is", "The code of Alice is" and the like.

    kind: "name", "colour" or "code". approx_tokens: prompt length, at most.
    """
    asked, facts = facts_for(rng, kind, approx_tokens)
    prompt, answer = asked.cloze(rng)
    told = [fact.tell(rng) for fact in facts]
    room = approx_tokens - len(tokenizer.encode(" ".join([*told, prompt])))
    sentences = scatter(rng, told, fillers_of(rng, room, tokenizer))
    return Case(f"{kind} raw", " ".join([*sentences, prompt]), answer, approx_tokens)


def chat_recall_case(rng: random.Random, kind: str, approx_tokens: int, tokenizer) -> Case:
    """A chat of 1 to 6 user turns: the facts are told on the way, the last turn asks for one of them."""
    asked, facts = facts_for(rng, kind, approx_tokens)
    question, answer = asked.question(rng)
    told = [fact.tell(rng) for fact in facts]
    turns = rng.randint(1, 6) if approx_tokens >= 128 else rng.randint(1, 2)
    room = approx_tokens - 24 * turns - len(tokenizer.encode(" ".join([*told, question])))
    sentences = scatter(rng, told, fillers_of(rng, room, tokenizer))
    cuts = sorted(rng.randint(0, len(sentences)) for _ in range(turns - 1))
    messages = []
    for start, end in zip([0, *cuts], [*cuts, len(sentences)], strict=True):
        part = sentences[start:end]
        if end == len(sentences) and start == (cuts[-1] if cuts else 0):
            messages.append({"role": "user", "content": " ".join([*part, question])})
            break
        if part:
            content, reply = " ".join(part), TOLD if set(part) & set(told) else READ
        else:
            content, reply = (
                capital_question(rng) if rng.random() < 0.5 else rng.choice(list(SMALL_TALK.items()))
            )
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": reply}]
    return Case(f"{kind} chat", messages, answer, approx_tokens)
