"""Memory that the ranks of one host share. It has no name, so nothing is left behind however a rank ends.

A rank makes a segment and tells the others its process id, descriptor and a random cookie; they open it through /proc and
check the cookie. The kernel frees it when the last rank that maps it is gone, killed or not.

Words are read and written without locks, which needs the total store order of x86; elsewhere ranks use MPI alone.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import platform
import secrets
from pathlib import Path

COOKIE_BYTES = 8


class Segment:
    """Mapped shared memory. `fd` stays open, on the side that made it, until `seal`."""

    def __init__(self, fd: int, size: int):
        self.fd, self.size = fd, size
        self.memory = mmap.mmap(fd, size)

    @property
    def cookie(self) -> int:
        return int.from_bytes(self.memory[:COOKIE_BYTES], "little")

    def seal(self) -> None:
        """Close the descriptor: from now on nobody else can map the segment."""
        os.close(self.fd)


def host() -> int:
    """Return what ranks that can share memory with this one have in common: boot and process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        text = f"{platform.node()} {boot} {os.stat('/proc/self/ns/pid').st_ino} {os.getuid()}"
    except OSError:
        return 0
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def available() -> bool:
    """Return whether this machine can share memory as this module does."""
    return hasattr(os, "memfd_create") and platform.machine() in ("x86_64", "AMD64") and host() != 0


def create(size: int) -> Segment | None:
    """Return a new segment of zeros but for its cookie, or None where there is none to be had."""
    if not available():
        return None
    try:
        fd = os.memfd_create("disagg_tt")
    except OSError:
        return None
    try:
        os.ftruncate(fd, size)
        segment = Segment(fd, size)
    except (OSError, ValueError):
        os.close(fd)
        return None
    segment.memory[:COOKIE_BYTES] = (secrets.randbits(62) + 1).to_bytes(COOKIE_BYTES, "little")
    return segment


def attach(pid: int, fd: int, cookie: int, size: int) -> Segment | None:
    """Return the segment that process `pid` made, or None if it cannot be opened or is another one."""
    if not available():
        return None
    try:
        mine = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
    except OSError:
        return None
    try:
        segment = Segment(mine, size)
    except (OSError, ValueError):
        return None
    finally:
        os.close(mine)
    return segment if segment.cookie == cookie else None
