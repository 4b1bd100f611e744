"""Which device layer runs, by the environment, and where ttnn finds its files under tt-run."""

from __future__ import annotations

from importlib.machinery import ModuleSpec

import pytest

from disagg_tt import device
from disagg_tt.errors import InputError

MOCK = {"TT_METAL_MOCK_CLUSTER_DESC_PATH": "cluster.yaml"}


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Make a host with a card or without, with a ttnn package in tmp_path or without."""

    def make(*, installed, card=False):
        package = tmp_path / "ttnn"
        (package / "tt_metal").mkdir(parents=True, exist_ok=True)
        spec = ModuleSpec("ttnn", None, origin=str(package / "__init__.py"))
        monkeypatch.setattr(device, "find_spec", lambda name: spec if installed else None)
        monkeypatch.setattr(device, "CARDS", tmp_path if card else tmp_path / "none")
        return package

    return make


@pytest.mark.parametrize(
    ("installed", "card", "environ", "kind", "why"),
    [
        (False, False, {}, "emulator", "ttnn is not installed"),
        (False, True, {}, "emulator", "though a card is here: pip install 'disagg_tt[ttnn]' with Python 3.10 or 3.12"),
        (True, False, {}, "emulator", "no Tenstorrent card is present"),
        (True, True, {}, "ttnn", "a Tenstorrent card is present"),
        (True, True, {"DISAGG_TT_DEVICE": "emulator"}, "emulator", "DISAGG_TT_DEVICE=emulator"),
        (True, False, {"DISAGG_TT_DEVICE": "ttnn"}, "ttnn", "DISAGG_TT_DEVICE=ttnn"),
        (True, False, MOCK, "mock", "TT_METAL_MOCK_CLUSTER_DESC_PATH is set"),
        (True, False, {"TT_METAL_SIMULATOR": "x"}, "ttnn", "TT_METAL_SIMULATOR is set"),
    ],
)  # fmt: skip
def test_the_device_layer_is_chosen_by_what_is_there(host, installed, card, environ, kind, why):
    host(installed=installed, card=card)
    chosen, reason = device.choose(environ)
    assert chosen == kind and why in reason


def test_what_cannot_be_is_refused(host):
    host(installed=False)
    with pytest.raises(InputError, match="'ttnn' but ttnn is not installed here"):
        device.choose({"DISAGG_TT_DEVICE": "ttnn"})
    with pytest.raises(InputError, match="DISAGG_TT_DEVICE is 'cuda'"):
        device.choose({"DISAGG_TT_DEVICE": "cuda"})


def test_a_root_without_ttnns_files_gives_way_to_the_packages(host, tmp_path):
    package = host(installed=True)
    (tmp_path / "checkout" / "tt_metal").mkdir(parents=True)
    for given, taken in (
        (tmp_path, package),  # as tt-run sets it, to the folder that it is called from
        (tmp_path / "checkout", tmp_path / "checkout"),  # a source tree, or a mock cluster's
    ):
        environ = {"TT_METAL_RUNTIME_ROOT": str(given)}
        device.find_root(environ)
        assert environ == {"TT_METAL_RUNTIME_ROOT": str(taken)}
    unset: dict[str, str] = {}
    device.find_root(unset)  # ttnn finds its own
    assert unset == {}
