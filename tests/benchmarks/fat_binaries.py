"""Made-up libraries with device code, in the layout that ``carry/fat_binary.py`` describes."""

import struct

PTX, CUBIN = 1, 2


def entry(kind, architecture, payload, header_size=64):
    header = struct.pack("<HHIQ12xI", kind, 0x101, header_size, len(payload), architecture)
    return header.ljust(header_size, b"\x11") + payload


def container(*entries):
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def code(kind, architecture, size=24):
    """A payload that is none other's."""
    return bytes([kind, architecture]) * (size // 2)
