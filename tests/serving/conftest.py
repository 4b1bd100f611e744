"""A tokenizer and a backend for every test of the server; and a deployment, started once, for those that need the real thing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployment import Server, served
from fake import FakeBackend, bundled_tokenizer

from disagg_tt.prompt import Tokenizer

sys.path.append(str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return bundled_tokenizer()


@pytest.fixture
def backend(tokenizer: Tokenizer) -> FakeBackend:
    return FakeBackend(tokenizer)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """`disagg-tt serve`, at rest. Its tests are of one xdist group, "served", and leave it at rest."""
    with served("--max-seq-len", "512") as server:
        yield server
