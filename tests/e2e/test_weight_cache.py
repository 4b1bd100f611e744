"""--weight-cache: weights are converted once, and are the same ones."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import CHECKPOINT, cli

from disagg_tt.config import Options
from disagg_tt.device import ttnn
from disagg_tt.device.mesh import open_mesh
from disagg_tt.errors import CheckpointError, InputError
from disagg_tt.model import weights
from disagg_tt.model.checkpoint import Checkpoint
from disagg_tt.model.weight_cache import WeightCache

TENSORS = 4 * 7 + 3  # of the checkpoint in the package: four layers, the embedding, the last norm, the head


@pytest.fixture
def load(tmp_path):
    """Load the checkpoint on a mesh, over a cache in tmp_path; return all chips' values and how many were converted."""

    def load(dtype="bfloat8_b", chips=2, cached=True):
        mesh, checkpoint = open_mesh((1, chips)), Checkpoint.open(CHECKPOINT)
        try:
            kind = getattr(ttnn, dtype)
            cache = WeightCache(str(tmp_path), checkpoint, mesh, kind) if cached else None
            loaded = weights.load(checkpoint, mesh, kind, cache=cache)
            tensors = [loaded.embedding, loaded.norm, loaded.lm_head]
            tensors += [tensor for layer in loaded.layers for tensor in vars(layer).values()]
            values = [[ttnn.to_torch(chip) for chip in ttnn.get_device_tensors(t)] for t in tensors]
            return values, cache and cache.converted
        finally:
            ttnn.close_mesh_device(mesh)

    return load


def same(one, other):
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return len(pairs) == 2 * TENSORS and all(torch.equal(a, b) for a, b in pairs)


def files(folder):
    return {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat8_b"])
def test_the_second_load_reads_no_weight_of_the_checkpoint_and_gives_the_same_bits(
    load, tmp_path, monkeypatch, dtype
):
    without, _ = load(dtype, cached=False)
    first, converted = load(dtype)
    assert same(first, without) and converted == TENSORS == len(files(tmp_path))

    def unread(*_):
        raise AssertionError("a weight is read")

    monkeypatch.setattr(Checkpoint, "tensor", unread)
    second, converted = load(dtype)
    assert same(second, without) and converted == 0


def test_another_dtype_mesh_or_checkpoint_has_files_of_its_own(load, tmp_path, monkeypatch):
    assert load("bfloat16")[1] == load("bfloat8_b")[1] == load("bfloat16", chips=1)[1] == TENSORS
    monkeypatch.setattr(Checkpoint, "digest", lambda self: "another")
    assert load("bfloat16")[1] == TENSORS
    assert len(files(tmp_path)) == 4 * TENSORS


def test_a_checkpoint_that_was_written_anew_has_files_of_its_own(load, tmp_path, monkeypatch):
    """Its digest samples large files, so it may be the same."""
    assert load()[1] == TENSORS
    stat = Path.stat

    def later(self, **options):
        found = stat(self, **options)
        return SimpleNamespace(
            st_size=found.st_size, st_mode=found.st_mode, st_mtime_ns=found.st_mtime_ns + 1
        )

    monkeypatch.setattr(Path, "stat", later)
    assert load()[1] == TENSORS


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(load, tmp_path):
    load()
    (folder,) = {file.parent for file in files(tmp_path).values()}
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    left = [
        folder / f".{socket.gethostname()}.{pid}.embedding.tensorbin"
        for pid in (int(ended.stdout), os.getpid())
    ]
    for file in left:
        file.write_bytes(b"half")
    load()
    assert [file.exists() for file in left] == [False, True]


def test_a_damaged_file_is_made_anew(load, tmp_path):
    values, _ = load()
    before = {name: file.read_bytes() for name, file in files(tmp_path).items()}
    for name in list(before)[:2]:
        (tmp_path / name).write_bytes(before[name][: len(before[name]) // 2])
    again, converted = load()
    assert converted == 2 and same(again, values)
    assert {name: file.read_bytes() for name, file in files(tmp_path).items()} == before


def test_a_folder_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    mesh = open_mesh((1, 2))
    with pytest.raises(CheckpointError, match="--weight-cache: .*file.* cannot be written"):
        WeightCache(str(tmp_path / "file"), Checkpoint.open(CHECKPOINT), mesh, ttnn.bfloat16)
    with pytest.raises(InputError, match="--weight-cache is empty"):
        Options(weight_cache="")


def test_two_ranks_fill_one_folder_at_once(load, tmp_path):
    flags = ["--prompt", "one", "--max-new-tokens", "2", "--weight-dtype", "bfloat8_b"]
    done = cli("generate", *flags, "--weight-cache", str(tmp_path))
    assert (done.code, done.left) == (0, []) and done.err.count("tensors converted") == 2, done.err
    assert len(files(tmp_path)) == TENSORS
    values, converted = load()
    assert converted == 0 and same(values, load(cached=False)[0])
