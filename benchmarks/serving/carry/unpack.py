"""On the GPU machine: archives into a directory of packages. The standard library is enough."""

import compileall
import hashlib
import json
import shutil
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
SUFFIX = ".tar.xz"
MIB = 2**20
REPOSITORY = Path(__file__).resolve().parents[3]


def python_version() -> str:
    """As pip writes it: 3.12."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def sha256(path: Path) -> str:
    """Checksum of a file, read in parts."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(MIB):
            digest.update(part)
    return digest.hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """What ``pack`` says that it wrote.

    Raises:
        SystemExit: there is none, or it is for another Python.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise SystemExit(f"{path} is missing: is this a directory that pack wrote?")
    manifest = json.loads(path.read_text())
    if manifest["python"] != python_version():
        raise SystemExit(f"packed for Python {manifest['python']}, and this is {python_version()}")
    return manifest


def checked(directory: Path, entry: dict[str, str]) -> Path:
    """An archive that is what it was.

    Raises:
        SystemExit: names the archive that is missing or damaged.
    """
    path = directory / _plain(entry["name"])
    if not path.is_file():
        raise SystemExit(f"{path} is missing: bring it along")
    if sha256(path) != entry["sha256"]:
        raise SystemExit(f"{path} is damaged: bring it again")
    return path


def _plain(name: str) -> str:
    """A manifest's file name, refused if it leads out of the directory."""
    if Path(name).name != name:
        raise SystemExit(f"{MANIFEST}: {name!r} is not a plain file name")
    return name


def extract(archive: Path, site: Path) -> None:
    """Unpack one archive; the filter refuses paths that lead out of ``site``."""
    with tarfile.open(archive, "r|xz") as stream:
        stream.extractall(site, filter="data")


def unpack(directory: Path, site: Path) -> None:
    """Verify all archives, unpack them beside one another, compile, and say how to use the result.

    Raises:
        SystemExit: ``site`` has files already, or see ``read_manifest`` and ``checked``.
    """
    if site.exists() and any(site.iterdir()):
        raise SystemExit(f"{site} is not empty: name a new directory")
    manifest = read_manifest(directory)
    archives = [checked(directory, entry) for entry in manifest["archives"]]
    # Under another name until it is whole: what is cut off is not mistaken for a site.
    part = site.with_name(site.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with ProcessPoolExecutor(len(archives)) as pool:
        list(pool.map(extract, archives, repeat(part)))
    part.replace(site)
    # Templates among the packages are not Python, so that not all files can be compiled.
    compileall.compile_dir(str(site), quiet=2, workers=0)
    print(f"export PYTHONPATH={REPOSITORY}:{site.resolve()}${{PYTHONPATH:+:$PYTHONPATH}}")
    if not (site / "flashinfer").exists() and find_spec("flashinfer") is None:
        print("export VLLM_USE_FLASHINFER_SAMPLER=0")
