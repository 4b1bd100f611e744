"""A checkpoint folder is found, read as transformers reads it, and refused where it is damaged."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import random_checkpoint, small_tokenizer, tiny_config

from disagg_tt.errors import CheckpointError
from disagg_tt.model.checkpoint import HASH_WHOLE_BELOW, Checkpoint, find_checkpoint

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_equals_the_one_that_transformers_loads(tmp_path: Path, shards: int, tied: bool) -> None:
    from transformers import LlamaForCausalLM

    path = random_checkpoint(tmp_path, tiny_config(tie_word_embeddings=tied), seed=3, shards=shards)
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    reference = LlamaForCausalLM.from_pretrained(path).state_dict()
    assert set(reference) == set(dict(checkpoint.config.weight_shapes())) | {"lm_head.weight"}
    for name, weight in reference.items():
        assert torch.equal(checkpoint.tensor(name, torch.float32), weight), name


def test_a_checkpoint_saved_by_transformers_opens(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        eos_token_id=7,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.verify()
    assert len(checkpoint.headers) > 1
    assert checkpoint.config.parameters == sum(weight.numel() for weight in model.parameters())
    assert torch.equal(checkpoint.tensor("lm_head.weight"), model.lm_head.weight)


def test_a_tensor_comes_in_its_stored_dtype_or_the_asked_one(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(random_checkpoint(tmp_path, tiny_config(), seed=3, dtype=torch.bfloat16))
    assert checkpoint.tensor(Q_PROJ).dtype == torch.bfloat16
    assert checkpoint.tensor(Q_PROJ, torch.float32).dtype == torch.float32
    with pytest.raises(CheckpointError, match="layers.2"):
        checkpoint.tensor("model.layers.2.self_attn.q_proj.weight")


def test_the_generation_config_decides_the_eos_ids(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, tiny_config(eos_token_ids=(4,)), seed=3)
    assert Checkpoint.open(tmp_path).config.eos_token_ids == (4,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')
    assert Checkpoint.open(tmp_path).config.eos_token_ids == (1, 4)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert Checkpoint.open(tmp_path).config.eos_token_ids == (4,)


def test_tensors_that_the_model_does_not_need_are_ignored(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, tiny_config(tie_word_embeddings=True), seed=3)
    tensors = load_file(tmp_path / SINGLE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)
    tensors["lm_head.weight"] = torch.zeros(3, 3)
    tensors["counter"] = torch.zeros((), dtype=torch.int64)
    save_file(tensors, tmp_path / SINGLE)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.verify()
    assert torch.equal(checkpoint.tensor("lm_head.weight"), tensors["model.embed_tokens.weight"])


def change(name: str, value: torch.Tensor | None) -> Callable[[Path], object]:
    """A damage: the tensor `name` replaced, or left out."""

    def damage(path: Path) -> None:
        tensors = load_file(path / SINGLE)
        tensors.pop(name)
        save_file({**tensors, name: value} if value is not None else tensors, path / SINGLE)

    return damage


def header(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A damage: the header of the weights edited, the data left as it is."""

    def damage(path: Path) -> None:
        data = (path / SINGLE).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        fields = json.loads(data[8 : 8 + length])
        edit(fields)
        text = json.dumps(fields).encode()
        (path / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def raw(data: bytes) -> Callable[[Path], object]:
    """A damage: the weights' file replaced by `data`."""
    return lambda path: (path / SINGLE).write_bytes(data)


ONE = b'"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}'
TWICE = b"{" + ONE + b", " + ONE + b"}"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change(Q_PROJ, None), [Q_PROJ, "lacks"]),
        (change(Q_PROJ, torch.zeros(128, 32)), [Q_PROJ, "[128, 32]", "[128, 64]"]),
        (change(Q_PROJ, torch.zeros(8192)), [Q_PROJ, "[8192]", "[128, 64]"]),
        (change(Q_PROJ, torch.zeros(128, 64, dtype=torch.int8)), [Q_PROJ, "I8", "F32"]),
        (change("lm_head.weight", None), ["lm_head.weight"]),
        (raw(b""), ["0 bytes"]),
        (raw(b"\x01"), ["1 bytes"]),
        (raw(struct.pack("<Q", 2**62) + b"{}"), [str(2**62)]),
        (raw(struct.pack("<Q", 2) + b"[]"), ["header"]),
        (raw(struct.pack("<Q", 2) + b"{x"), ["header"]),
        (raw(struct.pack("<Q", 2) + b"\xff\xff"), ["header"]),
        (raw(struct.pack("<Q", len(TWICE)) + TWICE + bytes(4)), ["twice"]),
        (header(lambda fields: fields[Q_PROJ].pop("shape")), ["header"]),
        (header(lambda fields: fields[Q_PROJ].update(shape=[2**40, 2**40])), [Q_PROJ]),
        (header(lambda fields: fields[Q_PROJ].update(shape=[-128, -64])), [Q_PROJ]),
        (header(lambda fields: fields[Q_PROJ].update(data_offsets=[0, 2**60])), ["bytes"]),
        (header(lambda fields: fields[Q_PROJ].update(data_offsets=[-8, 8])), ["bytes"]),
        (header(lambda fields: fields.update({Q_PROJ: 3})), ["header"]),
        (header(lambda fields: fields[Q_PROJ].update(shape=[float("inf"), 64])), ["header"]),
        (lambda path: (path / SINGLE).unlink(), ["neither"]),
        (lambda path: (path / "config.json").unlink(), ["no config.json"]),
        (lambda path: (path / "config.json").write_text("{"), ["config.json", "JSON"]),
        (lambda path: (path / "config.json").write_text("[]"), ["config.json", "object"]),
        (
            lambda path: (path / "generation_config.json").write_text('{"eos_token_id": "x"}'),
            ["eos_token_id"],
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_from_its_headers(
    tmp_path: Path, damage: Callable[[Path], Any], words: list[str]
) -> None:
    damage(random_checkpoint(tmp_path, tiny_config(), seed=3))
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(tmp_path).verify()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("cut", [-1000, -1, 1])
def test_a_file_of_the_wrong_length_is_named_with_both_sizes(tmp_path: Path, cut: int) -> None:
    data = (random_checkpoint(tmp_path, tiny_config(), seed=3) / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(data[:cut] if cut < 0 else data + b"x")
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(tmp_path)
    for word in (str(tmp_path / SINGLE), str(len(data)), str(len(data) + cut)):
        assert word in str(error.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, tiny_config(), seed=3, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of the 3 shards.*model-00002-of-00003"):
        Checkpoint.open(tmp_path)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, tiny_config(), seed=3, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    for weight_map, words in (
        ({**index["weight_map"], Q_PROJ: files[1]}, Q_PROJ),
        ({**index["weight_map"], Q_PROJ: "../other.safetensors"}, "weight_map"),
        ({**index["weight_map"], Q_PROJ: 3}, "weight_map"),
        (["a"], "weight_map"),
        ({Q_PROJ: files[0]}, "model.embed_tokens.weight"),
    ):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=words):
            Checkpoint.open(tmp_path).verify()


def test_a_weight_in_two_shards_is_refused(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, tiny_config(), seed=3, shards=2)
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file({**load_file(second), Q_PROJ: torch.zeros(128, 64)}, second)
    with pytest.raises(CheckpointError, match=f"{Q_PROJ} 2 times"):
        Checkpoint.open(tmp_path).verify()


def test_the_digest_changes_with_anything_that_changes_tokens_and_with_nothing_else(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path / "tokenizer")

    def made(name: str, seed: int = 3, shards: int = 1) -> Path:
        return random_checkpoint(tmp_path / name, tiny_config(), seed, shards, tokenizer)

    first = Checkpoint.open(made("first")).digest()
    same = made("same")
    (same / "README.md").write_text("another file")
    assert Checkpoint.open(same).digest() == first
    digests = {
        first,
        Checkpoint.open(made("seed", seed=4)).digest(),
        Checkpoint.open(made("shards", shards=2)).digest(),
    }
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        path = made(file)
        (path / file).write_text((path / file).read_text() + " ")
        digests.add(Checkpoint.open(path).digest())
    flipped = made("flipped")
    data = bytearray((flipped / SINGLE).read_bytes())
    data[len(data) * 2 // 3] ^= 1
    (flipped / SINGLE).write_bytes(data)
    digests.add(Checkpoint.open(flipped).digest())
    assert len(digests) == 7


def test_the_digest_of_large_weights_samples_start_middle_and_end(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, tiny_config(), seed=3)
    save_file({**load_file(tmp_path / SINGLE), "x": torch.zeros(HASH_WHOLE_BELOW // 4)}, tmp_path / SINGLE)
    checkpoint = Checkpoint.open(tmp_path)
    digests = {checkpoint.digest()}
    size = (tmp_path / SINGLE).stat().st_size
    begin = size - HASH_WHOLE_BELOW - checkpoint.config.parameters * 4
    for offset in (begin, (begin + size) // 2, size - 1):
        with (tmp_path / SINGLE).open("r+b") as stream:
            stream.seek(offset)
            byte = stream.read(1)[0]
            stream.seek(offset)
            stream.write(bytes([byte ^ 1]))
        digests.add(checkpoint.digest())
    assert len(digests) == 4


def test_a_model_that_is_no_folder_is_refused_before_any_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def never(*_: object, **__: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    (tmp_path / "file").write_text("")
    for model in (
        str(tmp_path / "none"),
        str(tmp_path / "file"),
        "./none",
        "../a/b",
        "none",
        "",
        "a/b/c",
        "~/none",
    ):
        with pytest.raises(CheckpointError) as error:
            find_checkpoint(model)
        assert repr(model) in str(error.value)
    assert find_checkpoint(str(tmp_path)) == tmp_path


def test_a_hub_name_is_fetched_and_a_failure_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[str] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        if name == "some/absent":
            raise OSError("no network")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert find_checkpoint("some/model-1.0") == tmp_path
    with pytest.raises(CheckpointError, match="no network.*local folder"):
        find_checkpoint("some/absent")
    assert asked == ["some/model-1.0", "some/absent"]


def test_the_checkpoint_in_the_package_is_whole() -> None:
    checkpoint = Checkpoint.open(find_checkpoint(None))
    checkpoint.verify()
    for chips in (1, 2, 4):
        checkpoint.config.check_mesh(chips)
    assert torch.isfinite(checkpoint.tensor("model.norm.weight")).all()
