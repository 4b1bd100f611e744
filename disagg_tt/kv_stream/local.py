"""The stream that goes nowhere: one mesh prefills and decodes, so K and V go straight into its cache."""

from __future__ import annotations

from typing import Any

from disagg_tt.cache import PagedCache
from disagg_tt.core import Request
from disagg_tt.kv_stream.base import KVSender, Metadata, PrefillTimes


class LocalSender(KVSender):
    """Writes each layer into blocks of this mesh's own cache: those of `row` (PagedCache.table_row)."""

    def __init__(self, layers: int, cache: PagedCache):
        super().__init__(layers)
        self._cache = cache
        self.row: Any = None

    def announce(self, request: Request) -> None:
        """The caller has set `row`."""
        self.bytes_sent = 0
        self.stream.begin(request.id)
        self.stream.streaming()

    def send_layer(self, layer: int, k: Any, v: Any) -> None:
        self.stream.layer(layer)
        self._cache.fill(layer, k, v, self.row)

    def finish(self, metadata: Metadata, times: PrefillTimes) -> None:
        self.stream.end()

    def close(self) -> None:
        """Nothing to release."""
