"""What is run and how: the model's sizes (`LlamaConfig`) and the user's choices (`Options`), both checked."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disagg_tt.errors import CheckpointError, InputError, PlanError
from disagg_tt.transfer_config import TRANSPORTS, WIRES, KVTransferConfig

TILE = 32
MAX_DEADLINE_S = 7 * 86400  # a week; poll and epoll take no more than some 24 days
MAX_BATCH = 32
KV_DTYPES = ("bfloat8_b", "bfloat16")
WEIGHT_DTYPES = ("bfloat16", "bfloat8_b", "bfloat4_b")
OVERLAPS = ("inline", "queue", "after")
DEFAULT_PROMPT = "What is the capital of France?"

Message = dict[str, str]  # {"role": ..., "content": ...}
Prompt = str | list[Message]  # text, or the messages of a chat


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched; kind is `linear`, which uses only `factor`, or `llama3`."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a LlamaForCausalLM, under the names that Hugging Face gives them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "LlamaConfig":
        """The config in a config.json of transformers 4 or 5; CheckpointError where it does not run here."""
        _check_architecture(raw)
        hidden, heads = _size(raw, "hidden_size"), _size(raw, "num_attention_heads")
        kv_heads = _size(raw, "num_key_value_heads", heads)
        head_dim = _size(raw, "head_dim", hidden // heads or 1)
        if heads % kv_heads:
            raise _refuse("num_attention_heads", heads, f"a multiple of num_key_value_heads, {kv_heads}")
        if raw.get("head_dim") is None and hidden % heads:
            raise _refuse("hidden_size", hidden, f"a multiple of num_attention_heads {heads}")
        if head_dim % 2:
            raise _refuse("head_dim", head_dim, "an even number")
        rope, max_positions = _rope_parameters(raw), _size(raw, "max_position_embeddings", 2048)
        return cls(
            vocab_size=_size(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_size(raw, "intermediate_size"),
            num_hidden_layers=_size(raw, "num_hidden_layers", most=1024),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_positive(raw, "rms_norm_eps", 1e-6),
            rope_theta=_positive(rope, "rope_theta", 10000.0),
            rope_scaling=_rope_scaling(rope, max_positions),
            tie_word_embeddings=raw.get("tie_word_embeddings") is True,
            max_position_embeddings=max_positions,
            bos_token_id=next(iter(token_ids(raw, "bos_token_id", 1)), None),
            eos_token_ids=token_ids(raw, "eos_token_id", 2),
        )

    def weight_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape, [output, input] or [hidden], of every weight of a checkpoint; tied: no lm_head."""
        hidden, ffn, vocab = self.hidden_size, self.intermediate_size, self.vocab_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        yield "model.embed_tokens.weight", (vocab, hidden)
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (hidden,)
            yield prefix + "self_attn.q_proj.weight", (queries, hidden)
            yield prefix + "self_attn.k_proj.weight", (keys, hidden)
            yield prefix + "self_attn.v_proj.weight", (keys, hidden)
            yield prefix + "self_attn.o_proj.weight", (hidden, queries)
            yield prefix + "post_attention_layernorm.weight", (hidden,)
            yield prefix + "mlp.gate_proj.weight", (ffn, hidden)
            yield prefix + "mlp.up_proj.weight", (ffn, hidden)
            yield prefix + "mlp.down_proj.weight", (hidden, ffn)
        yield "model.norm.weight", (hidden,)
        if not self.tie_word_embeddings:
            yield "lm_head.weight", (vocab, hidden)

    @property
    def parameters(self) -> int:
        """Number of weights; tied embeddings count once."""
        return sum(math.prod(shape) for _, shape in self.weight_shapes())

    def check_mesh(self, chips: int) -> None:
        """PlanError unless the model splits over `chips` tensor-parallel chips in whole heads and tiles.

        The vocabulary is padded, so any size of it will do.
        """
        if chips < 1:
            raise PlanError(f"a mesh has {chips} chips, allowed is 1 or more; mend the mesh descriptor")
        tiles = TILE * chips
        for name, divisor in (
            ("num_attention_heads", chips),
            ("num_key_value_heads", chips),
            ("head_dim", TILE),
            ("hidden_size", tiles),
            ("intermediate_size", tiles),
        ):
            size = getattr(self, name)
            if size % divisor:
                raise PlanError(
                    f"{name} is {size}, allowed on a mesh of {chips} chips are multiples of "
                    f"{divisor} (whole heads and whole tiles a chip); use another mesh or "
                    "another model"
                )
        if self.num_attention_heads > TILE * chips:
            raise PlanError(
                f"num_attention_heads is {self.num_attention_heads}, allowed on a mesh of "
                f"{chips} chips are {TILE * chips} ({TILE} a chip: one decode tile); use a mesh "
                "of more chips"
            )


LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    max_position_embeddings=131072,
    bos_token_id=128000,
    eos_token_ids=(128001, 128008, 128009),
)


def token_ids(raw: Mapping[str, Any], key: str, default: int | None = None) -> tuple[int, ...]:
    """The ids under `key` of a config.json or generation_config.json: one, a list, or null for none."""
    value = raw.get(key, default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(item) is not int or item < 0 for item in ids):
        raise CheckpointError(f"{key} is {value!r}, allowed are a token id, a list of them, or null")
    return tuple(ids)


def _refuse(key: str, value: object, allowed: str) -> CheckpointError:
    return CheckpointError(f"config.json: {key} is {value!r}, allowed is {allowed}; choose such a checkpoint")


def _check_architecture(raw: Mapping[str, Any]) -> None:
    if not (raw.get("model_type") or raw.get("architectures")):
        raise _refuse("model_type", None, "'llama'")
    for key, allowed in (
        ("model_type", "llama"),
        ("architectures", ["LlamaForCausalLM"]),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("hidden_act", "silu"),
        ("partial_rotary_factor", 1.0),
        ("quantization_config", None),
    ):
        if raw.get(key) not in (None, allowed):
            raise _refuse(key, raw[key], repr(allowed))


def _size(raw: Mapping[str, Any], key: str, default: int | None = None, most: int = 2**24) -> int:
    value = default if raw.get(key) is None else raw[key]
    if type(value) is not int or not 1 <= value <= most:
        raise _refuse(key, value, f"a whole number from 1 to {most}")
    return value


def _positive(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = default if raw.get(key) is None else raw[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise _refuse(key, value, "a number above 0")
    return float(value)


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """One dict for both forms: `rope_parameters` (transformers 5), or `rope_scaling` beside `rope_theta`."""
    parameters = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise _refuse("rope_scaling", parameters, "an object or null")
    return {"rope_theta": raw.get("rope_theta"), **parameters}


def _rope_scaling(rope: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor") not in (None, 1.0):
        raise _refuse("rope_scaling", dict(rope), "the type default, linear or llama3, over the whole head")
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", _positive(rope, "factor"))
    low, high = _positive(rope, "low_freq_factor"), _positive(rope, "high_freq_factor")
    if low >= high:
        raise _refuse("low_freq_factor", low, f"a number below high_freq_factor, {high}")
    return RopeScaling(
        "llama3",
        _positive(rope, "factor"),
        low,
        high,
        _size(rope, "original_max_position_embeddings", max_positions),
    )


@dataclass(frozen=True)
class Options:
    """One run's choices; the command line's defaults are these. InputError where a value is not allowed.

    model: folder or hub name, None for the checkpoint in the package. max_seq_len: tokens a slot, None for as
    many as needed. weight_cache: folder of weights in the device's format, None for none. batch: decode slots, None for one a prompt. threads: torch threads a rank on the emulator.
    deadline_s: seconds that any wait for the other rank may last. kv_transfer: this is one of two programs that were
    started separately; transport is then its connector.
    """

    prompts: tuple[Prompt, ...] = (DEFAULT_PROMPT,)
    chat: bool = True
    model: str | None = None
    max_new_tokens: int = 64
    max_seq_len: int | None = None
    kv_dtype: str = "bfloat8_b"
    weight_dtype: str | None = None
    weight_cache: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    batch: int | None = None
    transport: str = "mesh_socket"
    kv_transfer: KVTransferConfig | None = None
    overlap: str = "inline"
    direct: bool = True
    enable_trace: bool = False
    rank_binding: str | None = None
    single_mesh: bool = False
    one_process: bool = False
    json: bool = False
    per_layer: bool = False
    trace: str | None = None
    threads: int | None = None
    deadline_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("no prompt: give --prompt TEXT or --prompts-file FILE")
        for prompt in self.prompts:
            check_prompt(prompt)
        check_number("--max-new-tokens", self.max_new_tokens, 1, 2**24)
        for name, value, most in (
            ("--max-seq-len", self.max_seq_len, 2**24),
            ("--batch", self.batch, MAX_BATCH),
            ("--threads", self.threads, 1024),
        ):
            if value is not None:
                check_number(name, value, 1, most)
        if not 0 < self.deadline_s <= MAX_DEADLINE_S:
            raise InputError(
                f"--deadline-s is {self.deadline_s!r}, allowed are seconds above 0 up to {MAX_DEADLINE_S}; give 60"
            )
        if self.trace and not Path(self.trace).absolute().parent.is_dir():
            raise InputError(
                f"--trace is {self.trace!r}, in a folder that is not there; make it, or name another file"
            )
        for name, choice, allowed in (
            ("--kv-dtype", self.kv_dtype, KV_DTYPES),
            ("--weight-dtype", self.weight_dtype, (None, *WEIGHT_DTYPES)),
            ("--transport", self.transport, TRANSPORTS),
            ("--overlap", self.overlap, OVERLAPS),
        ):
            if choice not in allowed:
                raise InputError(f"{name} is {choice!r}, allowed are {', '.join(map(str, allowed))}")
        if self.weight_cache == "":
            raise InputError("--weight-cache is empty; give a folder, or leave it out")
        self._check_transport()
        check_sampling(self.temperature, self.top_p, self.top_k, self.seed)
        if not all(self.stop):
            raise InputError(f"--stop is {list(self.stop)!r}, allowed are texts that are not empty; mend it")

    @property
    def in_one_process(self) -> bool:
        """Whether this process prefills and decodes."""
        return self.single_mesh or self.one_process or self.transport == "local"

    def _check_transport(self) -> None:
        """InputError where the transport does not go with the other choices."""
        staged = self.transport in WIRES
        if self.kv_transfer is not None and self.transport != self.kv_transfer.kv_connector:
            raise InputError(
                f"--transport is {self.transport}, kv_connector {self.kv_transfer.kv_connector!r}; leave --transport out"
            )
        if staged and (self.single_mesh or self.one_process):
            raise InputError(
                f"--transport {self.transport} joins two processes; leave --single-mesh and --one-process out"
            )
        if staged and self.overlap == "queue":
            raise InputError(
                f"--overlap queue is a socket's: over --transport {self.transport} K and V leave by a thread of the host, which "
                "overlaps already; use inline or after"
            )
        if staged and not self.direct:
            raise InputError(f"--fifo is a socket's: --transport {self.transport} has none; leave it out")


def check_number(name: str, value: object, least: int, most: int) -> None:
    """InputError unless `value` is a whole number from `least` to `most`."""
    if type(value) is not int or not least <= value <= most:
        raise InputError(f"{name} is {value!r}, allowed are whole numbers from {least} to {most}; give one")


def check_sampling(temperature: float, top_p: float, top_k: int, seed: int) -> None:
    """InputError unless the four sampling settings are within their ranges."""
    if type(temperature) not in (int, float) or not 0 <= temperature < math.inf:
        raise InputError(f"--temperature is {temperature!r}, allowed are numbers of 0 or more; 0 is greedy")
    if type(top_p) not in (int, float) or not 0 < top_p <= 1:
        raise InputError(f"--top-p is {top_p!r}, allowed are numbers above 0 up to 1; 1 keeps every token")
    check_number("--top-k", top_k, 0, 2**24)
    check_number("--seed", seed, 0, 2**63 - 1)


def check_prompt(prompt: object, where: str = "a prompt") -> None:
    """InputError unless `prompt` is text, or a list of messages with a role and a content, both text."""
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    for message in messages or [None]:
        fields = message if isinstance(message, dict) else {}
        if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), str):
            raise InputError(
                f"{where} is {repr(prompt)[:200]}, allowed are text and messages such as "
                '{"role": "user", "content": "Hello"}; mend it'
            )


def resolve_prompts(
    prompt_flags: list[str] | None, prompts_file: str | None, environ: Mapping[str, str]
) -> tuple[Prompt, ...]:
    """A run's prompts: --prompt, then --prompts-file's; without either the variable PROMPT, else the default.

    A PROMPT that is empty counts as not set.
    """
    if not prompt_flags and prompts_file is None:
        return (environ.get("PROMPT") or DEFAULT_PROMPT,)
    return (*(prompt_flags or ()), *(read_prompts(prompts_file) if prompts_file is not None else ()))


def read_prompts(file: str) -> list[Prompt]:
    """The prompts in a file, one a line: text, or in a .jsonl file an object with `prompt` or `messages`.

    Blank lines are skipped. InputError, with the line's number, where a line is not allowed.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"--prompts-file is {file!r} ({error}), allowed is a text file in UTF-8") from error
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"--prompts-file {file}, line {number}"
            prompts.append(_json_prompt(line, where) if Path(file).suffix == ".jsonl" else line)
    if not prompts:
        raise InputError(f"--prompts-file {file} holds no prompt; write one a line")
    return prompts


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is {line[:80]!r}, not JSON ({error}); write one object a line") from error
    kinds = {"prompt": str, "messages": list}
    given = [key for key in kinds if isinstance(entry, dict) and key in entry]
    if len(given) != 1 or not isinstance(entry[given[0]], kinds[given[0]]):
        raise InputError(
            f"{where} is {line[:80]!r}, allowed is an object with either the text prompt or the "
            "list messages; mend it"
        )
    prompt: Prompt = entry[given[0]]
    check_prompt(prompt, where)
    return prompt
