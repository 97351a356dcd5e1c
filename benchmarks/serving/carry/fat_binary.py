"""Zero the machine code for other GPUs in a library's fat binaries.

A CUDA library has its device code in containers, one for each compilation unit, and every container
has one entry for each architecture. Code that is overwritten with zeros compresses to nothing, no
offset in the library moves, and the driver takes the entry of its own architecture as before.

The layout, little-endian. NVIDIA does not document it: it was read off the libraries of vLLM 0.32,
and an H200 ran what was left of them.

    container   0x00  u32  magic 0xBA55ED50
                0x04  u16  version, 1
                0x06  u16  size of this header, 16
                0x08  u64  size of the entries that follow
    entry       0x00  u16  kind: 1 is PTX, 2 is machine code (a cubin)
                0x02  u16  version
                0x04  u32  size of this header: the payload follows
                0x08  u64  size of the payload; the next entry follows
                0x1c  u32  architecture: 90 is sm_90 and sm_90a
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

CONTAINER = struct.Struct("<4sHHQ")
MAGIC = (0xBA55ED50).to_bytes(4, "little")
VERSION, CONTAINER_SIZE = 1, CONTAINER.size
ENTRY = struct.Struct("<HHIQ12xI")
PTX, CUBIN = 1, 2


@dataclass(frozen=True)
class Entry:
    """Code for one architecture.

    Attributes:
        kind: ``PTX`` or ``CUBIN``.
        architecture: 90 for sm_90.
        start: offset of the payload in the library, in bytes.
        size: of the payload, in bytes.
    """

    kind: int
    architecture: int
    start: int
    size: int


@dataclass(frozen=True)
class Trimmed:
    """What ``trim`` did to a library.

    Attributes:
        containers: how many the library has; 0 for one without device code.
        kept: bytes of payloads that are left.
        zeroed: bytes of payloads that are gone.
    """

    containers: int
    kept: int
    zeroed: int


def containers(library: bytes | bytearray) -> Iterator[list[Entry]]:
    """The entries of each container, in the order of the file.

    Raises:
        ValueError: a container or an entry does not end where it should.
    """
    position = 0
    while (position := library.find(MAGIC, position)) >= 0:
        start = position + CONTAINER_SIZE
        # The four bytes may stand in code that reads containers.
        if start > len(library):
            return
        _, version, header_size, size = CONTAINER.unpack_from(library, position)
        if (version, header_size) != (VERSION, CONTAINER_SIZE):
            position += len(MAGIC)
            continue
        end = start + size
        if end > len(library):
            raise ValueError(f"the container of device code at {position} is cut off")
        yield list(_entries(library, start, end))
        position = end


def _entries(library: bytes | bytearray, position: int, end: int) -> Iterator[Entry]:
    while position < end:
        if position + ENTRY.size > end:
            raise ValueError(f"the entry of device code at {position} is cut off")
        kind, _, header_size, size, architecture = ENTRY.unpack_from(library, position)
        start = position + header_size
        if header_size < ENTRY.size or start + size > end:
            raise ValueError(f"the entry of device code at {position} does not fit its container")
        yield Entry(kind, architecture, start, size)
        position = start + size


def wanted(entries: list[Entry], architecture: int) -> list[Entry]:
    """What a GPU may run of a container: its own machine code, or else what stands in for it.

    Where there is none of its own, the machine code of the highest lower minor version runs too
    (sm_80 on sm_86), and the driver compiles PTX that is not for a later architecture.
    """
    cubins = {entry.architecture for entry in entries if entry.kind == CUBIN}
    if architecture in cubins:
        return [e for e in entries if e.kind == CUBIN and e.architecture == architecture]
    lower = {a for a in cubins if a // 10 == architecture // 10 and a < architecture}
    nearest = max(lower, default=None)
    return [
        entry
        for entry in entries
        if (entry.kind == CUBIN and entry.architecture == nearest)
        or (entry.kind == PTX and entry.architecture <= architecture)
    ]


def trim(library: bytearray, architecture: int) -> Trimmed:
    """Overwrite, in place, every payload that a GPU of ``architecture`` does not need.

    Raises:
        ValueError: see ``containers``.
    """
    number = kept = zeroed = 0
    for entries in list(containers(library)):
        number += 1
        keep = wanted(entries, architecture)
        for entry in entries:
            if entry in keep:
                kept += entry.size
            else:
                library[entry.start : entry.start + entry.size] = bytes(entry.size)
                zeroed += entry.size
    return Trimmed(number, kept, zeroed)
