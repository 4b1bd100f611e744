"""disagg-tt, except that each slot's cache is saved when its prompt is in it and before any decode step.

python save_caches.py FOLDER generate ...   ->   FOLDER/<request>.pt, a list of a layer's (K, V), of the slot's pages in order
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from caches import read_pool

from disagg_tt.__main__ import main
from disagg_tt.core import whole_tiles
from disagg_tt.decode import Decode


def save_to(folder: Path) -> None:
    """Make every Decode of this process save the cache of a slot that starts."""
    start = Decode.start

    def saving(self: Decode, slot: int, first_token: int):
        rows = self.cache._rows[slot, : whole_tiles(self.slots[slot].prompt_tokens) // 32].long()
        layers = [tuple(read_pool(pool)[rows] for pool in pools) for pools in self.cache.layers]
        torch.save(layers, folder / f"{self.slots[slot].request}.pt")
        return start(self, slot, first_token)

    Decode.start = saving  # type: ignore[method-assign]


if __name__ == "__main__":
    save_to(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
