"""The real ttnn runtime without hardware: a runtime root with a placeholder compiler, and a mock cluster of two N300.

Host code is ttnn's own (validation, program creation, allocation, fabric, MeshSocket handshake); driver calls are
mocked and tensor contents are garbage. Nothing here imports ttnn.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from disagg_tt.device.mock.root import ensure_mock_root

__all__ = ["CLUSTER", "ensure_mock_root", "environment", "write_rank_mapping"]

CLUSTER = (
    Path(__file__).resolve().with_name("n300x2_cluster.yaml")
)  # four Wormhole chips on two linked N300 boards


def environment(root: Path | None = None) -> dict[str, str]:
    """The variables that make ttnn run on the mock cluster, with the runtime root at `root` (built when not given)."""
    root = root or ensure_mock_root()
    return {
        "TT_METAL_RUNTIME_ROOT": str(root),
        "TT_METAL_HOME": str(root),
        "TT_METAL_CACHE": str(root / "cache"),
        "TT_METAL_MOCK_CLUSTER_DESC_PATH": str(CLUSTER),
        "TT_LOGGER_LEVEL": "error",
        "TT_METAL_LOGGER_LEVEL": "error",
    }


def write_rank_mapping(folder: Path, ranks: int = 2) -> Path:
    """Write the file for tt-run's --mock-cluster-rank-binding: each rank sees the same cluster. Returns its path."""
    path = folder / "mock_cluster_ranks.yaml"
    path.write_text(
        yaml.safe_dump({"rank_to_cluster_mock_cluster_desc": {rank: str(CLUSTER) for rank in range(ranks)}})
    )
    return path
