"""ttnn.cluster: what kind of machine this is, as far as the number of this process's chips tells."""

from __future__ import annotations

import enum

from disagg_tt.device.emulator.system import get_num_devices


class ClusterType(enum.Enum):
    INVALID = 0
    N150 = 1
    N300 = 2
    T3K = 3
    GALAXY = 4
    TG = 5
    P100 = 6
    P150 = 7
    P150_X2 = 8
    P150_X4 = 9
    P150_X8 = 13
    SIMULATOR_WORMHOLE_B0 = 10
    SIMULATOR_BLACKHOLE = 11
    N300_2x2 = 12
    P300 = 14
    SIMULATOR_QUASAR = 15
    BLACKHOLE_GALAXY = 16
    P300_X2 = 17
    CUSTOM = 18


_BY_CHIPS = {
    1: ClusterType.N150,
    2: ClusterType.N300,
    4: ClusterType.N300_2x2,
    8: ClusterType.T3K,
    32: ClusterType.GALAXY,
}


def get_cluster_type() -> ClusterType:
    """Return the Wormhole machine that has as many chips as this process sees, CUSTOM where none is sold."""
    return _BY_CHIPS.get(get_num_devices(), ClusterType.CUSTOM)
