"""Device code for one GPU stays in its place, and nothing else of it stays."""

import pytest

from benchmarks.serving.carry.fat_binary import Trimmed, trim
from tests.benchmarks.fat_binaries import CUBIN, PTX, code, container, entry

HOST = b"\x7fELF of the host" * 3


def library(*containers):
    """Containers of (kind, architecture) between code of the host."""
    made = [
        container(*(entry(kind, a, code(kind, a), 64 if a < 100 else 112) for kind, a in each))
        for each in containers
    ]
    return bytearray(HOST + HOST.join(made) + HOST)


def expected(content, gone):
    for payload in gone:
        assert payload in content
        content = content.replace(payload, bytes(len(payload)))
    return content


EVERYTHING = ((CUBIN, 80), (CUBIN, 86), (CUBIN, 90), (CUBIN, 100), (PTX, 80), (PTX, 90))


@pytest.mark.parametrize(
    ("entries", "architecture", "kept"),
    [
        (EVERYTHING, 90, {(CUBIN, 90)}),
        (EVERYTHING, 80, {(CUBIN, 80)}),
        # sm_89 runs the machine code of sm_86, and what the driver makes of PTX for sm_80.
        (EVERYTHING, 89, {(CUBIN, 86), (PTX, 80)}),
        (((CUBIN, 80), (PTX, 80)), 90, {(PTX, 80)}),
        (((CUBIN, 80), (PTX, 100)), 90, set()),
        (((PTX, 80), (PTX, 90)), 90, {(PTX, 80), (PTX, 90)}),
        # Another major version's machine code is of no use, and neither is a later minor one's.
        (((CUBIN, 86), (CUBIN, 103)), 100, set()),
    ],
)
def test_what_stays(entries, architecture, kept):
    trimmed = library(entries)
    gone = [code(*each) for each in entries if each not in kept]
    want = expected(bytes(trimmed), gone)
    summary = trim(trimmed, architecture)
    assert bytes(trimmed) == want
    assert summary == Trimmed(1, 24 * len(kept), 24 * len(gone))


def test_each_container_is_judged_alone():
    trimmed = library([(CUBIN, 90), (PTX, 80)], [(CUBIN, 100), (PTX, 80)], [(CUBIN, 100)])
    assert trim(trimmed, 90) == Trimmed(3, 48, 72)
    assert trimmed.count(code(PTX, 80)) == 1
    assert code(CUBIN, 90) in trimmed
    assert code(CUBIN, 100) not in trimmed


def test_a_library_without_device_code_stays_as_it_is():
    # Code that reads containers has their magic number in it, here without and with bytes behind.
    content = HOST + b"\x50\xed\x55\xba" + HOST + b"\x50\xed\x55\xba"
    trimmed = bytearray(content)
    assert trim(trimmed, 90) == Trimmed(0, 0, 0)
    assert trimmed == content


def test_no_code_for_the_architecture_leaves_nothing():
    assert trim(library([(CUBIN, 100)], [(CUBIN, 80)]), 90).kept == 0


def _cut(made):
    return made[:-1]


def _cut_entry(made):
    return container(made[16:46])


def _long_entry(made):
    return container(made[16:-1])


def _no_header(made):
    return made[:20] + b"\0\0\0\0" + made[24:]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_cut, "the container of device code at 0 is cut off"),
        (_cut_entry, "the entry of device code at 16 is cut off"),
        (_long_entry, "the entry of device code at 16 does not fit its container"),
        (_no_header, "the entry of device code at 16 does not fit its container"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_a_damaged_container_is_refused_and_nothing_changed(harm, message):
    made = bytearray(harm(container(entry(CUBIN, 80, code(CUBIN, 80)))))
    before = bytes(made)
    with pytest.raises(ValueError, match=f"^{message}$"):
        trim(made, 90)
    assert made == before
