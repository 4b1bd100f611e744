"""Prompts become the ids that transformers makes of them; what cannot become ids is refused, by number."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import CHAT_TEMPLATE, SENTENCES, small_tokenizer

from disagg_tt.config import Message
from disagg_tt.errors import CheckpointError, InputError, PromptError
from disagg_tt.model.checkpoint import find_checkpoint
from disagg_tt.prompt import Tokenizer, encode_prompts

CHAT: list[Message] = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hällo\n😀 <b>"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Why?"},
]
# What published templates do: whitespace control, tojson, the date, loop controls, namespaces, generation.
PUBLISHED = r"""
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{#- the system message, apart #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}{{- "<|eot_id|>" }}
{% set ns = namespace(count=0) %}
{% for message in messages %}
    {% if message.role == 'tool' %}
        {% continue %}
    {% endif %}
    {% set ns.count = ns.count + 1 %}
{{ ns.count }} {{ message | tojson }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}{% endif %}
{% endfor %}
{% if messages[-1].role != 'user' %}{{ raise_exception("the last message must be the user's") }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def test_raw_text_becomes_the_ids_of_transformers_and_comes_back(folder: Path, tokenizer: Tokenizer) -> None:
    theirs, seed = reference(folder), 5
    print("seed", seed)
    rng = random.Random(seed)
    texts = SENTENCES + [
        "".join(rng.choice("aé日😀 \n.<|>{}\x00\u2028") for _ in range(rng.randint(1, 40)))
        for _ in range(100)
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert ids[0] == 0 and 0 not in ids[1:], "one BOS, in front"
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.vocab_size == len(theirs)


def test_ids_in_any_order_decode_as_in_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    theirs, seed = reference(folder), 6
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 30))]
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, PUBLISHED])
def test_a_chat_becomes_the_text_and_ids_of_transformers(tmp_path: Path, template: str) -> None:
    small_tokenizer(tmp_path, template=template)
    ours, theirs = Tokenizer(tmp_path), reference(tmp_path)
    for messages in (CHAT, CHAT[1:], CHAT[3:], [*CHAT[:3], {"role": "tool", "content": "4"}, CHAT[3]]):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.render_chat(messages) == text
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(messages) == ids
        assert ids.count(0) == 1, "one BOS"


def test_the_template_comes_from_any_place_that_transformers_reads(tmp_path: Path) -> None:
    small_tokenizer(tmp_path, template=None)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["bos_token"] = {"__type": "AddedToken", "content": config["bos_token"], "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    assert Tokenizer(tmp_path).render_chat(CHAT).startswith("<|begin_of_text|><|start_header_id|>system")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert Tokenizer(tmp_path).render_chat(CHAT) == " Be brief. "


def test_without_a_template_chat_is_refused_and_raw_text_works(tmp_path: Path) -> None:
    tokenizer = Tokenizer(small_tokenizer(tmp_path, template=None))
    assert encode_prompts(tokenizer, ["Hi"], False, 100) == [tokenizer.encode("Hi")]
    with pytest.raises(InputError, match="--raw"):
        encode_prompts(tokenizer, ["Hi"], True, 100)


def test_a_template_runs_in_a_sandbox_and_its_faults_are_typed(tmp_path: Path) -> None:
    for template, kind in (
        ("{% if %}", CheckpointError),
        ("{{ ''.__class__.__mro__ }}{{ x.y }}", PromptError),
        ("{{ raise_exception('roles must alternate') }}", PromptError),
        ("{{ messages.append(1) }}", PromptError),
        ("{{ messages[9].content }}", PromptError),
        ("{{ 1 + 'a' }}", PromptError),
        ("{{ 1 / 0 }}", PromptError),
    ):
        tokenizer = Tokenizer(small_tokenizer(tmp_path, template=template))
        with pytest.raises(kind, match="--raw") as error:
            tokenizer.encode_chat(CHAT)
        assert "alternate" not in template or "alternate" in str(error.value)


def test_text_is_one_user_message_in_chat_and_itself_when_raw(tokenizer: Tokenizer) -> None:
    messages: list[Message] = [{"role": "user", "content": "Hi"}]
    assert encode_prompts(tokenizer, ["Hi", CHAT], True, 200) == [
        tokenizer.encode_chat(messages),
        tokenizer.encode_chat(CHAT),
    ]
    assert encode_prompts(tokenizer, ["Hi"], False, 200) == [tokenizer.encode("Hi")]


@pytest.mark.parametrize("chat", [True, False])
def test_an_empty_prompt_is_refused_by_number(tokenizer: Tokenizer, chat: bool) -> None:
    for empty in ("", " \n\t"):
        with pytest.raises(PromptError, match="prompt 2 of 3 is empty"):
            encode_prompts(tokenizer, ["Hi", empty, "Hi"], chat, 100)
    with pytest.raises(PromptError, match="prompt 1 of 1 is empty"):
        encode_prompts(tokenizer, [[{"role": "user", "content": ""}]], True, 100)


@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_may_fill_the_limit_and_not_exceed_it(tokenizer: Tokenizer, chat: bool) -> None:
    length = len(encode_prompts(tokenizer, ["Why? " * 9], chat, 10**6)[0])
    assert len(encode_prompts(tokenizer, ["Why? " * 9], chat, length)[0]) == length
    with pytest.raises(
        PromptError, match=f"prompt 2 of 2 has {length} tokens.* {length - 1};.*--max-seq-len"
    ):
        encode_prompts(tokenizer, ["Why?", "Why? " * 9], chat, length - 1)


def test_what_is_not_unicode_and_messages_in_raw_mode_are_refused(tokenizer: Tokenizer) -> None:
    for chat in (True, False):
        with pytest.raises(PromptError, match="prompt 1 of 1 is not valid Unicode"):
            encode_prompts(tokenizer, ["caf\udce9"], chat, 100)
    with pytest.raises(PromptError, match="--raw"):
        encode_prompts(tokenizer, [CHAT], False, 100)


def test_a_folder_without_a_whole_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer"):
        Tokenizer(tmp_path)
    for name, text in (
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[3]"),
    ):
        small_tokenizer(tmp_path)
        (tmp_path / name).write_text(text)
        with pytest.raises(CheckpointError, match=name):
            Tokenizer(tmp_path)


def test_an_older_format_is_converted_by_transformers(tmp_path: Path) -> None:
    small_tokenizer(tmp_path / "new")
    model = json.loads((tmp_path / "new" / "tokenizer.json").read_text())["model"]
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    (old / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (old / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = Tokenizer(old)
    ids = tokenizer.encode(SENTENCES[0])
    assert ids == Tokenizer(tmp_path / "new").encode(SENTENCES[0])[1:]
    assert tokenizer.decode(ids) == SENTENCES[0]


def test_the_tokenizer_loads_neither_torch_nor_transformers(folder: Path) -> None:
    code = (
        f"import sys; from pathlib import Path; from disagg_tt.prompt import Tokenizer\n"
        f"Tokenizer(Path({str(folder)!r})).encode_chat([{{'role': 'user', 'content': 'Hi'}}])\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "[]"


def test_the_tokenizer_in_the_package_speaks_the_llama_3_template() -> None:
    folder = find_checkpoint(None)
    ours, theirs = Tokenizer(folder), reference(folder)
    assert ours.vocab_size <= 2048
    assert ours.encode_chat(CHAT) == theirs.apply_chat_template(
        CHAT, add_generation_prompt=True, return_dict=False
    )
    assert ours.render_chat(CHAT[3:]) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
