"""Bring vLLM to a GPU machine that has torch but no network.

    python -m benchmarks.serving.carry pack carried/ --python-version 3.12 --architecture 90 \
        --requirements requirements/cpu.lock --present freeze.txt --wheels own/*.whl
    python -m benchmarks.serving.carry unpack carried/ site/

``pack`` runs on a machine with a network. It downloads the wheel of vLLM in the range that this
project supports, and those of requirements files: one exact version a line (``name==version``), for
nothing is resolved. All are unpacked into one directory, without what ``left_out.py`` names and
without the machine code for other GPUs (``fat_binary.py``). It is compressed to archives of at most
``--piece-size``. ``--wheels`` takes wheels that are on disk already, this project's own for one.

``unpack`` runs on the machine without one, in this repository. It compares every checksum, unpacks,
compiles byte code and prints the PYTHONPATH to use. It needs nothing but Python.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from benchmarks.serving.carry.archives import write_archives
from benchmarks.serving.carry.left_out import Selection
from benchmarks.serving.carry.unpack import MANIFEST, MIB, python_version, sha256, unpack
from benchmarks.serving.carry.wheels import download, needed, supported_vllm, unpack_wheel

PIECE_SIZE = 64
PLATFORM = "manylinux_2_34_x86_64"


def pack(options: argparse.Namespace) -> None:
    """Download, unpack, trim, compress, and write the manifest."""
    directory = options.directory
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise SystemExit(f"{directory} is not empty: name a new directory")
    pins = needed(options.requirements, options.present)
    if not options.no_vllm:
        pins.append(options.vllm or supported_vllm())
    selection = Selection(options.architecture, options.leave_out, options.keep)
    with tempfile.TemporaryDirectory() as temporary:
        downloads, site = Path(temporary, "wheels"), Path(temporary, "site")
        downloads.mkdir()
        site.mkdir()
        if pins:
            download(pins, options.python_version, options.platform, downloads)
        wheels = [*sorted(downloads.glob("*.whl")), *options.wheels]
        for wheel in wheels:
            unpack_wheel(wheel, site, selection, options.architecture)
        for addition in options.add:
            shutil.copytree(addition, site, dirs_exist_ok=True)
        if not any(site.iterdir()):
            raise SystemExit("there is nothing to pack")
        archives = write_archives(site, directory, options.piece_size * MIB)
    manifest = {
        "python": options.python_version,
        "architecture": options.architecture,
        "archives": [{"name": path.name, "sha256": sha256(path)} for path in archives],
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in archives:
        print(f"{path.name}: {path.stat().st_size / MIB:.1f} MiB")
    size = sum(path.stat().st_size for path in archives) / MIB
    print(f"{len(wheels)} wheels in {len(archives)} archives, {size:.1f} MiB")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving.carry", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(required=True)
    packing = commands.add_parser("pack", help="download, trim and compress, with a network")
    packing.set_defaults(run=pack)
    packing.add_argument("directory", type=Path, help="new directory for the archives")
    packing.add_argument("--architecture", type=int, required=True, help="of the GPU: 90 for sm_90")
    packing.add_argument("--vllm", help="requirement; default: what pyproject.toml states")
    packing.add_argument("--no-vllm", action="store_true", help="without vLLM itself")
    packing.add_argument(
        "--requirements", type=Path, nargs="+", default=[], help="further wheels, exact versions"
    )
    packing.add_argument("--present", type=Path, help="pip freeze of the GPU machine: not brought")
    packing.add_argument("--wheels", type=Path, nargs="+", default=[], help="wheels on disk")
    packing.add_argument(
        "--add", type=Path, nargs="+", default=[], help="directories whose files join the packages"
    )
    packing.add_argument("--python-version", default=python_version(), help="of the GPU machine")
    packing.add_argument(
        "--platform",
        default=PLATFORM,
        help="newest tag of wheels that it runs, by its glibc; default: %(default)s",
    )
    packing.add_argument(
        "--leave-out", nargs="+", default=[], help="files, as patterns, beside those of left_out.py"
    )
    packing.add_argument("--keep", nargs="+", default=[], help="files that are brought after all")
    packing.add_argument("--piece-size", type=int, default=PIECE_SIZE, help="MiB of an archive")
    unpacking = commands.add_parser("unpack", help="verify, unpack and compile, without one")
    unpacking.set_defaults(run=lambda options: unpack(options.directory, options.site))
    unpacking.add_argument("directory", type=Path, help="directory that pack wrote")
    unpacking.add_argument("site", type=Path, help="new directory for the packages")
    options = parser.parse_args(arguments)
    if getattr(options, "piece_size", 1) < 1:
        parser.error("--piece-size must be at least 1 MiB")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    options.run(options)


if __name__ == "__main__":
    main()
