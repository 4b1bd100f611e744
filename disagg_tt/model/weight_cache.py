"""Weights in the device's format, in files: the first start converts and writes them, later ones convert nothing.

    FOLDER/<digest of the checkpoint and of its files' times>/<device layer>-<chips>-<dtype of the matrices>/<tensor>.tensorbin

Both ranks of a host may share a folder, and start at once: a file is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

from disagg_tt.device import kind, ttnn
from disagg_tt.errors import CheckpointError

if TYPE_CHECKING:
    from disagg_tt.model.checkpoint import Checkpoint

FORMAT = 1  # of what weights.py makes of a checkpoint: one more whenever the same name means another tensor


class WeightCache:
    """The files of one checkpoint for one kind of mesh. `converted` counts the tensors that were not found there."""

    def __init__(self, folder: str, checkpoint: Checkpoint, mesh: Any, dtype: Any):
        """Raises CheckpointError where `folder` cannot be written."""
        version = kind if kind == "emulator" else f"ttnn-{importlib.metadata.version('ttnn')}"
        name = f"{version}-{FORMAT}-{mesh.get_num_devices()}-{str(dtype).rpartition('.')[2].lower()}"
        # With the times: of large files the digest sees samples, and one may have been written anew elsewhere.
        times = [(file, (checkpoint.path / file).stat().st_mtime_ns) for file in sorted(checkpoint.headers)]
        key = hashlib.sha256(f"{checkpoint.digest()} {times}".encode()).hexdigest()
        self.folder = Path(folder).expanduser() / key[:16] / name
        self.converted = 0
        self._mesh = mesh
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def _sweep(self) -> None:
        """Remove what processes of this host, killed while they wrote, have left."""
        for file in self.folder.glob(f".{socket.gethostname()}.*"):
            pid = file.name.removeprefix(f".{socket.gethostname()}.").partition(".")[0]
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                file.unlink(missing_ok=True)
            except (ValueError, OSError):
                continue  # it lives, or is none of ours

    def tensor(self, name: str, convert: Callable[[], Any]) -> Any:
        """Return the tensor `name` on the mesh, from its file; `convert` makes it, on the host, where that is not there.

        A file that cannot be read is made anew. Raises CheckpointError where one cannot be written.
        """
        file = self.folder / f"{name}.tensorbin"
        if file.is_file():
            try:
                return ttnn.load_tensor(str(file), device=self._mesh)
            except RuntimeError as error:
                logger.warning("{} is not readable and made anew: {:.300}", file, str(error))
        self.converted += 1
        host = convert()
        temporary = self.folder / f".{socket.gethostname()}.{os.getpid()}.{name}.tensorbin"
        try:
            # The default mode is a collective of all ranks, after which rank 0 alone has a file.
            ttnn.dump_tensor(str(temporary), host, mode=ttnn.DumpTensorMode.LOCAL)
            os.replace(temporary, file)
        except (OSError, RuntimeError) as error:
            raise _unwritable(file, error) from error
        finally:
            temporary.unlink(missing_ok=True)
        return ttnn.load_tensor(str(file), device=self._mesh)


def _unwritable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"--weight-cache: {path} cannot be written ({str(error)[:300]}); give a folder with room, or leave it out"
    )
