"""Wheels for another machine: which are needed, fetching them, and unpacking them."""

import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.serving.carry.fat_binary import trim
from benchmarks.serving.carry.left_out import NOT_BROUGHT, Selection
from benchmarks.serving.carry.unpack import MIB

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"
PIN = re.compile(r"([\w.-]+)==\S+")
NAME = re.compile(r"[\w.-]+")
TAG = re.compile(r"manylinux_2_(\d+)_(\w+)")
# glibc versions under their older names.
OLD_TAGS = {5: "manylinux1", 12: "manylinux2010", 17: "manylinux2014"}
LIBRARY = re.compile(r"\.so(\.\d+)*$")
CODE_IN_DATA = re.compile(r"[^/]+\.data/(?:purelib|platlib)/(.+)")


def supported_vllm() -> str:
    """The requirement that pyproject.toml states for a GPU."""
    match = re.search(r'^gpu = \["(vllm[^"]*)"\]', PYPROJECT.read_text(), re.MULTILINE)
    if match is None:
        raise SystemExit(f"{PYPROJECT} does not state the supported vLLM in its extra 'gpu'")
    return match[1]


def _lines(path: Path) -> list[str]:
    """Lines of a list of packages, without comments."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(requirements: Iterable[Path], present: Path | None) -> list[str]:
    """The pins of requirements files, without what ``left_out`` names or the machine has.

    Args:
        requirements: files of ``name==version`` lines.
        present: what ``pip freeze`` says on the machine; only the names count.

    Raises:
        SystemExit: a line is not an exact version: nothing is resolved here.
    """
    there = {
        _canonical(name[0])
        for line in (_lines(present) if present else ())
        if (name := NAME.match(line))
    }
    pins = []
    for path in requirements:
        for line in _lines(path):
            pin = PIN.fullmatch(line)
            if pin is None:
                raise SystemExit(f"{path}: {line!r} is not name==version")
            if _canonical(pin[1]) not in there | NOT_BROUGHT:
                pins.append(line)
    return pins


def platforms(tag: str) -> list[str]:
    """pip's tags of all wheels that a machine runs, of the newest one; others as they are.

    pip itself takes ``manylinux_2_28_x86_64`` literally, and not for the older ones as well.
    """
    match = TAG.fullmatch(tag)
    if match is None:
        return [tag]
    tags = []
    for minor in range(int(match[1]), 4, -1):
        tags.append(f"manylinux_2_{minor}_{match[2]}")
        if minor in OLD_TAGS:
            tags.append(f"{OLD_TAGS[minor]}_{match[2]}")
    return tags


def download(pins: list[str], python_version: str, platform: str, directory: Path) -> None:
    """Fetch wheels for the target machine with pip, without their dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory)]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--quiet"]
    command += ["--python-version", python_version]
    for tag in platforms(platform):
        command += ["--platform", tag]
    subprocess.run([*command, *pins], check=True)


def unpack_wheel(wheel: Path, site: Path, selection: Selection, architecture: int) -> None:
    """Unpack what is selected of a wheel, with the device code for one architecture.

    Prints what became of each library with device code, and which has none for it.

    Raises:
        SystemExit: a library's device code cannot be read.
    """
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if code := CODE_IN_DATA.fullmatch(member.filename):
                member.filename = code[1]
            if member.is_dir() or member.filename not in selection:
                continue
            path = Path(archive.extract(member, site))
            if LIBRARY.search(path.name):
                _trim_file(path, member.filename, architecture)


def _trim_file(path: Path, name: str, architecture: int) -> None:
    library = bytearray(path.read_bytes())
    try:
        trimmed = trim(library, architecture)
    except ValueError as error:
        raise SystemExit(f"{name}: {error}") from None
    if not trimmed.containers:
        return
    path.write_bytes(library)
    print(
        f"{name}: {trimmed.kept / MIB:.1f} MiB of device code kept, "
        f"{trimmed.zeroed / MIB:.1f} MiB for other GPUs zeroed"
    )
    if not trimmed.kept:
        print(f"{name} has NO code for sm_{architecture}: leave it out, or use another wheel")
