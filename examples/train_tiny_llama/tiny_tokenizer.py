"""Trains the byte-level BPE tokenizer and writes tokenizer.json and tokenizer_config.json.

python tiny_tokenizer.py --out DIR
"""

import argparse
import json
import random
from pathlib import Path

import data
from words import filler

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
START_HEADER, END_HEADER, END_TURN = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL = [BEGIN, END, START_HEADER, END_HEADER, END_TURN]
VOCAB_SIZE = 2048

# The split of Llama 3, but with single digits, and without newlines glued to punctuation.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def corpus(seed: int, sentences: int = 60000):
    """Text lines for BPE: filler, facts and questions about them, and what is known by heart."""
    rng = random.Random(seed)
    fixed = [
        data.FOX + data.FOX_ANSWER,
        *data.FOX_REQUESTS,
        *data.SMALL_TALK,
        *data.SMALL_TALK.values(),
        *data.SYSTEM_MESSAGES,
        *data.TELL_OPENERS,
        data.TOLD,
        data.READ,
        "user",
        "assistant",
        "system",
    ]
    for country, city in data.CAPITALS.items():
        fixed += [
            rng.choice(data.CAPITAL_CLOZES).format(c=country) + f" {city}.",
            rng.choice(data.CAPITAL_QUESTIONS).format(c=country),
        ]
    for _ in range(100):
        yield from fixed
    for _ in range(sentences):
        fact = data.some_facts(rng, 1)[0]
        yield f"{filler(rng)} {fact.tell(rng)} {' '.join(fact.question(rng))}"


def train_tokenizer(seed: int):
    """A `tokenizers.Tokenizer` of VOCAB_SIZE tokens that puts bos in front of every text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


def write(folder: Path, seed: int):
    """Train the tokenizer and write its two files into `folder`."""
    tokenizer = train_tokenizer(seed)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END_TURN,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    write(args.out, args.seed)


if __name__ == "__main__":
    main()
