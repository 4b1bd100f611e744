"""Text or chat messages -> token ids, and back: a checkpoint's own tokenizer and chat template."""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from disagg_tt.config import Message, Prompt
from disagg_tt.errors import CheckpointError, InputError, PromptError

if TYPE_CHECKING:
    import jinja2

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")  # what a chat template may name


class Tokenizer:
    """The tokenizer in a checkpoint folder; CheckpointError where there is none, or it is damaged.

    Reads tokenizer.json with the tokenizers package alone, which loads in a moment; transformers converts
    older formats.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._settings = _read_settings(folder)
        self._tokenizer = _load_tokenizer(folder)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of raw text and of what the tokenizer itself adds: for Llama, BOS in front."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """Token ids of `messages` in the chat template, ready for the assistant's answer.

        The template writes every special token, BOS too, so the tokenizer adds none. InputError where the
        checkpoint has no template, PromptError where its template refuses these messages.
        """
        ids: list[int] = self._tokenizer.encode(self.render_chat(messages), add_special_tokens=False).ids
        return ids

    def render_chat(self, messages: list[Message]) -> str:
        """The text that the chat template makes of `messages`; raises as `encode_chat` does."""
        template = self._template
        settings = self._settings
        special = {name: _content(settings[name]) for name in SPECIAL_TOKENS if settings.get(name)}
        try:
            return template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **special
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise PromptError(
                f"the chat template of {self._folder} refuses the messages ({error}); mend "
                "them, or give --raw"
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens; bytes that make no character become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself, a special token by its name; U+FFFD where it is a part of a character."""
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    @cached_property
    def _template(self) -> "jinja2.Template":
        """The compiled chat template, in the sandbox and with the helpers that transformers gives it."""
        import jinja2

        source = _template_source(self._folder, self._settings)
        if source is None:
            raise InputError(f"{self._folder} has no chat template, so chat mode is not allowed; give --raw")
        try:
            return _template_environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(
                f"the chat template of {self._folder} is damaged ({error}); fetch the "
                "checkpoint again, or give --raw"
            ) from error


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], chat: bool, max_prompt_tokens: int
) -> list[list[int]]:
    """Token ids of each prompt: in chat mode text is one user message, else raw text.

    PromptError, saying which prompt, where one is empty, is longer than `max_prompt_tokens`, is not valid
    Unicode, or is a list of messages in raw mode.
    """
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        which = f"prompt {number} of {len(prompts)}"
        if isinstance(prompt, list) and not chat:
            raise PromptError(f"{which} is a list of messages, allowed with --raw is text; leave out --raw")
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        if not any(message["content"].strip() for message in messages):
            raise PromptError(f"{which} is empty, allowed is text of at least one character; write one")
        try:
            for message in messages:
                (message["role"] + message["content"]).encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"{which} is not valid Unicode ({error}); give it in UTF-8") from error
        ids = tokenizer.encode_chat(messages) if chat else tokenizer.encode(messages[0]["content"])
        if not 0 < len(ids) <= max_prompt_tokens:
            raise PromptError(
                f"{which} has {len(ids)} tokens, allowed are 1 to {max_prompt_tokens}; shorten "
                "it, or raise --max-seq-len"
            )
        encoded.append(ids)
    return encoded


def _load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    if (folder / "tokenizer.json").is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the package raises plain Exception
            raise CheckpointError(
                f"{folder / 'tokenizer.json'} is damaged ({error}); fetch the checkpoint again"
            ) from error
    if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json")):
        raise CheckpointError(
            f"{folder} has no tokenizer; add the tokenizer.json that belongs to the checkpoint"
        )
    try:
        from transformers import AutoTokenizer

        converted: tokenizers.Tokenizer = AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
        return converted
    except Exception as error:  # transformers raises many kinds, among them for a package that it lacks
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and transformers cannot make one ({error}); add tokenizer.json"
        ) from error


def _read_settings(folder: Path) -> dict[str, Any]:
    """special_tokens_map.json and, over it, tokenizer_config.json."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            try:
                settings |= json.loads((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError, TypeError) as error:
                raise CheckpointError(
                    f"{folder / name} is damaged ({error}); fetch the checkpoint again"
                ) from error
    return settings


def _content(token: Any) -> str:
    """A special token is written as text, or as an object with `content`."""
    return str(token["content"] if isinstance(token, dict) else token)


def _template_source(folder: Path, settings: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template


def _template_environment() -> "jinja2.Environment":
    """As transformers makes it: templates come with checkpoints, so they run in a sandbox."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training; here it only stands around it."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **kwargs: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **kwargs)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json  # jinja2's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
