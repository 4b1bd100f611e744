"""A Hugging Face checkpoint folder: found, verified from its headers, and read one tensor at a time."""

import hashlib
import importlib.resources
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from disagg_tt.config import LlamaConfig, token_ids
from disagg_tt.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What besides the weights decides the tokens that come out.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
FETCHED = [*SMALL_FILES, "model*.safetensors", INDEX]
ELEMENT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
MAX_HEADER = 100_000_000  # bytes, the safetensors library's own limit
HASH_WHOLE_BELOW = 64 * 2**20  # bytes
SAMPLE = 2**20  # bytes


def find_checkpoint(model: str | None, files: Sequence[str] = FETCHED) -> Path:
    """The folder of `model`: None is the checkpoint in the package; else a local folder, or a hub name.

    Of what a hub name stands for, `files` are fetched, unless they were before. CheckpointError where there is none.
    """
    if model is None:
        folder = Path(str(importlib.resources.files("disagg_tt") / "checkpoint"))
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"the package has no checkpoint at {folder}: reinstall it, or give --model FOLDER"
            )
        return folder
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise CheckpointError(
            f"--model is {model!r}: no such folder, and no hub name (ORGANISATION/NAME); "
            "give the folder that holds the checkpoint's config.json"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, allow_patterns=list(files)))
    except Exception as error:  # the hub raises errors of many kinds: network, rights, name, disk
        raise CheckpointError(
            f"--model is {model!r}: no such folder, and the hub did not give it ({error}); "
            "give a local folder, or check the name, the network and the access "
            "rights"
        ) from error


def load_config(folder: Path) -> LlamaConfig:
    """The config of the checkpoint in `folder`; EOS ids from generation_config.json where it has any."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json: give --model the folder of a Hugging Face checkpoint"
        )
    config = LlamaConfig.from_hf(read_json(folder / "config.json"))
    if (folder / "generation_config.json").is_file():
        eos_ids = token_ids(read_json(folder / "generation_config.json"), "eos_token_id")
        return replace(config, eos_token_ids=eos_ids or config.eos_token_ids)
    return config


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; CheckpointError where it holds none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({error}): fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}, allowed is a JSON object")
    return value


class Entry(NamedTuple):
    """One tensor in a safetensors header: its dtype, in safetensors' words, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, Entry]:
    """Tensor name -> entry of a safetensors file; CheckpointError unless it is as long as its header says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise _damaged(
                file,
                f"its header should be {length} bytes, allowed are "
                f"{min(size - 8, MAX_HEADER)} in a file of {size} bytes",
            )
        text = stream.read(length)
    try:
        fields = json.loads(text, object_pairs_hook=_without_twins)
        fields.pop("__metadata__", None)
        entries = {
            name: Entry(str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in fields.items()
        }
        spans = {
            name: (int(entry["data_offsets"][0]), int(entry["data_offsets"][1]))
            for name, entry in fields.items()
        }
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise _damaged(file, f"its header is not readable ({type(error).__name__}: {error})") from error
    end = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        dtype, shape = entries[name]
        wanted = math.prod(shape) * ELEMENT_BYTES.get(dtype, 0)
        if start != end or stop < start or min(shape, default=0) < 0 or (wanted and stop - start != wanted):
            raise _damaged(
                file,
                f"{name}, {dtype} {list(shape)}, should be {wanted} bytes from {end}, its "
                f"header says {start} to {stop}",
            )
        end = stop
    if size != 8 + length + end:
        raise _damaged(file, f"it should be {8 + length + end} bytes long, it is {size}")
    return entries


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(fields := dict(pairs)) != len(pairs):
        raise ValueError("a name stands there twice")
    return fields


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is truncated or damaged: {what}; fetch the checkpoint again")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its config and where each tensor lies; no weight is read before `tensor`."""

    path: Path
    config: LlamaConfig
    headers: dict[str, dict[str, Entry]]  # file name -> tensor name -> entry
    weight_map: dict[str, str]  # tensor name -> file name

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read config.json and every safetensors header in the folder `path`.

        CheckpointError where a file is missing, truncated or damaged, or where the config does not run here.
        """
        config = load_config(path)
        if (path / SINGLE).is_file():
            header = read_header(path / SINGLE)
            return cls(path, config, {SINGLE: header}, dict.fromkeys(header, SINGLE))
        if not (path / INDEX).is_file():
            raise CheckpointError(
                f"{path} has neither {SINGLE} nor {INDEX}; give a checkpoint in safetensors format"
            )
        weight_map = read_json(path / INDEX).get("weight_map")
        # A shard is a plain file name: an index must not lead out of its folder.
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) and file and Path(file).name == file for file in weight_map.values()
        ):
            raise CheckpointError(
                f"{path / INDEX}: weight_map is not an object of tensor names and file "
                "names in the same folder; fetch the checkpoint again"
            )
        files = sorted(set(weight_map.values()))
        missing = [file for file in files if not (path / file).is_file()]
        if missing:
            raise CheckpointError(
                f"{path} lacks {len(missing)} of the {len(files)} shards that {INDEX} "
                f"names: {', '.join(missing[:4])}; fetch the checkpoint again"
            )
        return cls(path, config, {file: read_header(path / file) for file in files}, weight_map)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self.config.weight_shapes())

    @cached_property
    def _opened(self) -> dict[str, Any]:
        return {}  # file name -> its safe_open handle

    def verify(self) -> None:
        """CheckpointError unless every weight of the config is there once, in its shape and a float dtype.

        Looks at headers alone. Tensors that the model does not need are ignored.
        """
        for name in self._shapes:
            self._file_of(name)

    def _file_of(self, name: str) -> str:
        """The file that holds the weight `name`, after the checks of `verify` for it."""
        holders = [file for file, header in self.headers.items() if name in header]
        if not holders or self.weight_map.get(name) not in holders:
            raise CheckpointError(
                f"{self.path} lacks {name}, which config.json needs, in the file that its "
                "index gives; fetch the checkpoint again"
            )
        if len(holders) > 1:
            raise CheckpointError(
                f"{self.path} has {name} {len(holders)} times, in "
                f"{', '.join(holders[:4])}, allowed is once; fetch the checkpoint again"
            )
        dtype, shape = self.headers[holders[0]][name]
        if shape != self._shapes[name]:
            raise CheckpointError(
                f"{self.path / holders[0]}: {name} has shape {list(shape)}, config.json "
                f"makes it {list(self._shapes[name])}; give the config that belongs to "
                "these weights"
            )
        if dtype not in ELEMENT_BYTES:
            raise CheckpointError(
                f"{self.path / holders[0]}: {name} is {dtype}, allowed are "
                f"{', '.join(ELEMENT_BYTES)}; give a checkpoint that is not quantised"
            )
        return holders[0]

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight `name`, [output, input] or [hidden], in `dtype` or as stored; a tied lm_head is the
        embedding.

        It may be a view of the file: do not write to it. CheckpointError where `verify` would raise for this
        weight.
        """
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        if name not in self._shapes:
            raise CheckpointError(
                f"{name!r} is no weight of a Llama of {self.config.num_hidden_layers} layers"
            )
        file = self._file_of(name)
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(self.path / file, framework="pt")
            tensor: torch.Tensor = self._opened[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _damaged(self.path / file, f"{name} is not readable ({error})") from error
        return tensor if dtype is None else tensor.to(dtype)

    def digest(self) -> str:
        """Hex digest of config, tokenizer and weights, to find two ranks that loaded different checkpoints.

        The small files and every safetensors header count whole, and so do weights of less than 64 MiB in
        all. Above that, 1 MiB at each file's start, middle and end stands for it: this tells apart
        checkpoints trained or quantised apart, but not a copy in which a few bytes elsewhere were changed.
        """
        digest = hashlib.sha256()
        sizes = {file: (self.path / file).stat().st_size for file in sorted(self.headers)}
        whole = sum(sizes.values()) < HASH_WHOLE_BELOW
        for name in SMALL_FILES:
            if (self.path / name).is_file():
                digest.update(f"{name}\n".encode() + hashlib.sha256((self.path / name).read_bytes()).digest())
        for name, size in sizes.items():
            digest.update(f"{name} {size}\n".encode())
            with (self.path / name).open("rb") as stream:
                start = 8 + int.from_bytes(stream.read(8), "little")
                stream.seek(0)
                digest.update(stream.read(size if whole else start))
                for offset in () if whole else (start, (start + size - SAMPLE) // 2, size - SAMPLE):
                    stream.seek(max(offset, start))
                    digest.update(stream.read(SAMPLE))
        return digest.hexdigest()
