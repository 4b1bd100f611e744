"""A tokenizer and a backend for every test of the server."""

from __future__ import annotations

import pytest
from fake import FakeBackend, bundled_tokenizer

from disagg_tt.prompt import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return bundled_tokenizer()


@pytest.fixture
def backend(tokenizer: Tokenizer) -> FakeBackend:
    return FakeBackend(tokenizer)
