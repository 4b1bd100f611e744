"""After a stream the decode mesh holds what a single mesh's prefill puts into its cache: page by page, bit by bit."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from runs import CHECKPOINT, here, prompts_file, run, seeded
from save_caches import save_to

from disagg_tt.decode import Decode

LENGTHS = (1, 31, 32, 33, 100, 1000)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint with a tokenizer that puts no BOS in front: n digits are n tokens."""
    folder = tmp_path_factory.mktemp("no_bos") / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    return folder


Caches = list[list[tuple[torch.Tensor, torch.Tensor]]]  # by request and layer


def loaded(folder: Path) -> Caches:
    return [torch.load(folder / f"{number}.pt") for number in range(len(LENGTHS))]


def of_two_ranks(folder: Path, digits: list[str], model: Path, kv_dtype: str) -> Caches:
    mpirun = [str(Path(sys.executable).with_name("mpirun")), "--oversubscribe", "-n", "2"]
    script = [sys.executable, str(Path(__file__).with_name("save_caches.py")), str(folder), "generate"]
    flags = ["--raw", "--prompts-file", prompts_file(folder, digits), "--model", str(model)]
    result = run([*mpirun, *script, *flags, "--kv-dtype", kv_dtype, "--max-new-tokens", "2", "--json"])
    assert result.code == 0, result.err
    return loaded(folder)


def of_one_mesh(folder: Path, digits: list[str], model: Path, kv_dtype: str) -> Caches:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decode, "start", Decode.start)  # put back at the end
        save_to(folder)
        here(
            prompts=(*digits,), chat=False, model=str(model), kv_dtype=kv_dtype, max_new_tokens=2,
            single_mesh=True,
        )  # fmt: skip
    return loaded(folder)


def bits(values: torch.Tensor) -> torch.Tensor:
    """The bits of float32 values; -0 counts as 0, since a block float has one zero."""
    return (values + 0.0).contiguous().view(torch.int32)


@pytest.mark.parametrize("kv_dtype", ["bfloat8_b", "bfloat16"])
def test_two_ranks_fill_the_cache_as_one_mesh_does(kv_dtype, model, tmp_path):
    rng = seeded(3)
    digits = ["".join(rng.choices("0123456789", k=length)) for length in LENGTHS]
    for name in ("two", "one"):
        (tmp_path / name).mkdir()
    two = of_two_ranks(tmp_path / "two", digits, model, kv_dtype)
    one = of_one_mesh(tmp_path / "one", digits, model, kv_dtype)
    for length, ours, theirs in zip(LENGTHS, two, one, strict=True):
        assert len(ours) == len(theirs) == 4
        for layer, (mine, expected) in enumerate(zip(ours, theirs, strict=True)):
            for name, a, b in zip("KV", mine, expected, strict=True):
                assert a.shape == b.shape == (-(-length // 32), 4, 32, 64)
                for page in range(len(a)):
                    assert torch.equal(bits(a[page]), bits(b[page])), (
                        f"{length} tokens: layer {layer} {name} page {page}"
                    )
                assert a.any(dim=-1).all(), "a row of zeros"
    pages = {tuple(bits(page[0]).flatten()[:64].tolist()) for page in two[-1][0][0]}
    assert len(pages) == 32, "pages of one prompt differ from each other, so a misplaced one would show"
