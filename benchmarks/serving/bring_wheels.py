"""Bring vLLM to a GPU machine that has torch but no network, in pieces small enough to carry.

    python benchmarks/serving/bring_wheels.py pack wheels/ --requirements needed.txt
    python benchmarks/serving/bring_wheels.py install wheels/

``pack`` runs on a machine with a network. It downloads the wheel of vLLM in the range that this
project supports, and those of a requirements file: one exact version a line (``name==version``),
for nothing is resolved. Each wheel is split into pieces of at most ``--piece-size`` MiB, and
``manifest.json`` has the SHA-256 sums. ``--wheels`` takes wheels that are on disk already, this
project's own for one.

``install`` runs on the machine without one. It puts the pieces together, compares every sum, and
installs all wheels without looking at an index or at dependencies: the machine's torch stays as it
is. It needs nothing but Python.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
PIECE_SIZE = 15
MIB = 2**20
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def supported_vllm() -> str:
    """The requirement that pyproject.toml states for a GPU."""
    match = re.search(r'^gpu = \["(vllm[^"]*)"\]', PYPROJECT.read_text(), re.MULTILINE)
    if match is None:
        raise SystemExit(f"{PYPROJECT} does not state the supported vLLM in its extra 'gpu'")
    return match[1]


def sha256(path: Path) -> str:
    """Checksum of a file, read in parts."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(MIB):
            digest.update(part)
    return digest.hexdigest()


def split(wheel: Path, directory: Path, piece_size: int) -> dict[str, Any]:
    """Write a wheel's pieces; returns its entry of the manifest.

    Args:
        piece_size: most bytes of a piece.
    """
    pieces: list[dict[str, str]] = []
    with wheel.open("rb") as file:
        while part := file.read(piece_size):
            piece = directory / f"{wheel.name}.{len(pieces):04d}"
            piece.write_bytes(part)
            pieces.append({"name": piece.name, "sha256": hashlib.sha256(part).hexdigest()})
    return {"name": wheel.name, "sha256": sha256(wheel), "pieces": pieces}


def join(entry: dict[str, Any], source: Path, target: Path) -> Path:
    """Put a wheel's pieces together again and compare every checksum.

    Raises:
        SystemExit: names the piece that is missing or damaged.
    """
    wheel = target / _plain(entry["name"])
    with wheel.open("wb") as file:
        for piece in entry["pieces"]:
            path = source / _plain(piece["name"])
            if not path.is_file():
                raise SystemExit(f"{path} is missing: bring it along")
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != piece["sha256"]:
                raise SystemExit(f"{path} is damaged: bring it again")
            file.write(content)
    if sha256(wheel) != entry["sha256"]:
        raise SystemExit(f"{wheel.name} is damaged: pack it again")
    return wheel


def _plain(name: str) -> str:
    """A manifest's file name, refused if it leads out of the directory."""
    if Path(name).name != name:
        raise SystemExit(f"{MANIFEST}: {name!r} is not a plain file name")
    return name


def download(options: argparse.Namespace, directory: Path) -> None:
    """Fetch wheels for the target machine with pip, without their dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory)]
    command += ["--only-binary", ":all:", "--disable-pip-version-check"]
    if options.python_version:
        command += ["--python-version", options.python_version]
    for platform in options.platform:
        command += ["--platform", platform]
    if not options.no_vllm:
        command.append(options.vllm or supported_vllm())
    if options.requirements:
        command += ["--requirement", str(options.requirements)]
    if not options.no_vllm or options.requirements:
        subprocess.run(command, check=True)


def pack(options: argparse.Namespace) -> None:
    """Download, split, and write the manifest."""
    directory = options.directory
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise SystemExit(f"{directory} is not empty: name a new directory")
    with tempfile.TemporaryDirectory() as downloads:
        download(options, Path(downloads))
        for wheel in options.wheels:
            shutil.copy(wheel, downloads)
        wheels = sorted(Path(downloads).glob("*.whl"))
        if not wheels:
            raise SystemExit("there is nothing to pack")
        entries = [split(wheel, directory, options.piece_size * MIB) for wheel in wheels]
    (directory / MANIFEST).write_text(json.dumps({"wheels": entries}, indent=1) + "\n")
    num_pieces = sum(len(entry["pieces"]) for entry in entries)
    print(f"{len(entries)} wheels in {num_pieces} pieces of at most {options.piece_size} MiB")


def install(options: argparse.Namespace) -> None:
    """Join, verify and install every wheel of the manifest."""
    path = options.directory / MANIFEST
    if not path.is_file():
        raise SystemExit(f"{path} is missing: is this a directory that pack wrote?")
    entries = json.loads(path.read_text())["wheels"]
    with tempfile.TemporaryDirectory() as directory:
        wheels = [join(entry, options.directory, Path(directory)) for entry in entries]
        command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
        command += ["--disable-pip-version-check", "--quiet"]
        if options.target:
            command += ["--target", str(options.target)]
        subprocess.run([*command, *map(str, wheels)], check=True)
    print("installed " + ", ".join(wheel.name for wheel in wheels))


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack", help="download and split, with a network")
    packing.set_defaults(run=pack)
    packing.add_argument("directory", type=Path, help="new directory for the pieces")
    packing.add_argument("--vllm", help="requirement; default: what pyproject.toml states")
    packing.add_argument("--no-vllm", action="store_true", help="without vLLM itself")
    packing.add_argument("--requirements", type=Path, help="further wheels, exact versions")
    packing.add_argument("--wheels", type=Path, nargs="+", default=[], help="wheels on disk")
    packing.add_argument("--piece-size", type=int, default=PIECE_SIZE, help="MiB")
    packing.add_argument("--python-version", help="of the GPU machine, if another")
    packing.add_argument("--platform", action="append", default=[], help="pip's tag, if another")
    installing = commands.add_parser("install", help="join, verify and install, without one")
    installing.set_defaults(run=install)
    installing.add_argument("directory", type=Path, help="directory that pack wrote")
    installing.add_argument("--target", type=Path, help="install there and not into this Python")
    options = parser.parse_args(arguments)
    if getattr(options, "piece_size", 1) < 1:
        parser.error("--piece-size must be at least 1 MiB")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
