"""A ttnn runtime root whose kernel compiler emits placeholders, for runs on a mock cluster.

The wheel lacks the SFPI compiler, which the JIT calls even on a mock cluster. The root links the wheel's own files and
adds runtime/sfpi/compiler/bin/riscv-tt-elf-g++, a script that writes one fixed RV32 ELF for every kernel and copies the
wheel's pre-compiled firmware. Nothing runs on a mock cluster, so what a kernel does never matters; that it links, loads
and fits does.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

from disagg_tt.errors import DeviceError

_WRAPPER = """#!/bin/sh
# Placeholder for the SFPI compiler: every kernel becomes the same ELF, firmware is the wheel's own.
case "$1" in --version) echo "riscv-tt-elf-g++ (tenstorrent/sfpi:{version}) 15.1.0"; exit 0;; esac
out=; previous=
for argument in "$@"; do [ "$previous" = -o ] && out=$argument; previous=$argument; done
case "$out" in
  */firmware/*.elf)
    core=$(basename "$out" .elf); core=${{core%%.*}}; image="{firmware}/$core/$core.elf"
    [ -f "$image" ] || image="{firmware}/brisc/brisc.elf"
    cp "$image" "$out";;
  *) cp "{placeholder}" "$out"; printf '%s:\\n' "$out" > "${{out%.*}}.d";;
esac
"""
_OBJCOPY = "#!/bin/sh\nexit 0\n"


def ensure_mock_root(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the runtime root, built on the first call in the cache folder and kept for each ttnn installation.

    The cache folder is DISAGG_TT_CACHE, or disagg_tt in the user's cache folder. Several processes may call at once.
    Raises DeviceError when no usable ttnn is installed.
    """
    try:
        spec = importlib.util.find_spec("ttnn")  # does not import it
        version = importlib.metadata.version("ttnn")
    except (ImportError, ValueError, importlib.metadata.PackageNotFoundError):
        spec, version = None, ""
    if spec is None or spec.origin is None:
        raise DeviceError(
            "the mock cluster needs the ttnn package, which is not installed here. It exists for Python 3.10 and 3.12 on "
            "x86-64 Linux: pip install 'disagg_tt[ttnn]', or use the emulator (DISAGG_TT_DEVICE=emulator)."
        )
    package = Path(spec.origin).resolve().parent
    user_cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(environ.get("DISAGG_TT_CACHE") or user_cache / "disagg_tt")
    key = hashlib.sha256(f"{package}\n{_WRAPPER}".encode()).hexdigest()[
        :12
    ]  # the root links into this installation
    root = cache.expanduser().absolute() / f"mock_root-{version}-{key}"
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}-"))
    try:
        _build(package, draft, root)
        draft.chmod(0o755)
        draft.rename(root)
    except OSError as error:
        if not root.is_dir():  # else another process was faster, and its root is as good
            raise DeviceError(
                f"the mock runtime root {root} cannot be built from {package}: {error}"
            ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root


def _build(package: Path, draft: Path, root: Path) -> None:
    """Fill `draft` with what works once it is renamed to `root`."""
    compiler = draft / "runtime/sfpi/compiler/bin"
    compiler.mkdir(parents=True)
    for part in ("tt_metal", "ttnn", "runtime/hw"):
        (draft / part).symlink_to(package / part)
    firmware = [
        image.parent.parent for image in sorted(package.glob("tt_metal/pre-compiled/*/brisc/brisc.elf"))
    ]
    if not firmware:
        raise DeviceError(f"ttnn in {package} has no pre-compiled firmware; known to work is ttnn 0.81.1.")
    lines = (package / "tt_metal/sfpi-version").read_text().splitlines()
    version = next((line.split("'")[1] for line in lines if line.startswith("sfpi_version=")), "unknown")
    (draft / "placeholder.elf").write_bytes(_placeholder_elf())
    wrapper = _WRAPPER.format(version=version, firmware=firmware[0], placeholder=root / "placeholder.elf")
    for tool, body in {"riscv-tt-elf-g++": wrapper, "riscv-tt-elf-objcopy": _OBJCOPY}.items():
        (compiler / tool).write_text(body)
        (compiler / tool).chmod(0o755)


def _placeholder_elf(text_addr: int = 0x6B80, data_addr: int = 0xFFB00820) -> bytes:
    """Return an ELF32 RISC-V executable: text (nop, ret) starting at the entry point, 4 bytes of data, one relocation.

    The loader asks for a first loadable segment that holds the entry point, a data segment whose load address follows
    the text, and at least one relocation section (as `ld --emit-relocs` leaves).
    """
    text = struct.pack("<4I", 0x00000013, 0x00008067, 0x00000013, 0x00000013)
    data = bytes(4)
    names = [b"", b".text", b".data", b".rela.text", b".symtab", b".strtab", b".shstrtab"]
    name_at, shstrtab = [], b""
    for name in names:
        name_at.append(len(shstrtab))
        shstrtab += name + b"\0"
    strtab = b"\0_start\0"
    symtab = bytes(16) + struct.pack("<IIIBBH", 1, text_addr, len(text), 0x12, 0, 1)
    rela = struct.pack("<IIi", text_addr, (1 << 8) | 51, 0)  # R_RISCV_RELAX against _start

    image = bytearray(52 + 2 * 32)  # ELF header and two program headers, filled in last

    def place(blob: bytes, align: int) -> int:
        image.extend(bytes(-len(image) % align))
        offset = len(image)
        image.extend(blob)
        return offset

    text_at, data_at = place(text, 16), place(data, 4)
    rela_at, symtab_at = place(rela, 4), place(symtab, 4)
    strtab_at, shstrtab_at = place(strtab, 1), place(shstrtab, 1)
    sections = [  # name, type, flags, address, offset, size, link, info, alignment, entry size
        (name_at[0], 0, 0, 0, 0, 0, 0, 0, 0, 0),
        (name_at[1], 1, 6, text_addr, text_at, len(text), 0, 0, 4, 0),
        (name_at[2], 1, 3, data_addr, data_at, len(data), 0, 0, 4, 0),
        (name_at[3], 4, 0x40, 0, rela_at, len(rela), 4, 1, 4, 12),
        (name_at[4], 2, 0, 0, symtab_at, len(symtab), 5, 1, 4, 16),
        (name_at[5], 3, 0, 0, strtab_at, len(strtab), 0, 0, 1, 0),
        (name_at[6], 3, 0, 0, shstrtab_at, len(shstrtab), 0, 0, 1, 0),
    ]
    sections_at = place(b"".join(struct.pack("<10I", *section) for section in sections), 4)
    header = struct.pack(
        "<HHIIIIIHHHHHH", 2, 243, 1, text_addr, 52, sections_at, 0, 52, 32, 2, 40, len(sections), 6
    )
    image[:52] = b"\x7fELF" + bytes([1, 1, 1]) + bytes(9) + header
    image[52:84] = struct.pack("<8I", 1, text_at, text_addr, text_addr, len(text), len(text), 5, 16)
    image[84:116] = struct.pack(
        "<8I", 1, data_at, data_addr, text_addr + len(text), len(data), len(data), 6, 16
    )
    return bytes(image)
