"""A directory as .tar.xz archives, each below a size."""

import lzma
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

from benchmarks.serving.carry.unpack import MIB, SUFFIX

# The kernels of a library are variants of one another, and all of FlashAttention 3, 165 MiB, lies
# within one dictionary. Compressing takes about eleven times as much memory, unpacking once.
DICTIONARY = 192 * MIB
# Files above this have an archive of their own, and the others share some of this size, so that
# several are unpacked at once.
LARGE = 16 * MIB
SHARED = 96 * MIB
MODIFIED = 315532800  # 1980, as in reproducible wheels: the archives depend on contents alone


def _size(site: Path, names: list[str]) -> int:
    return sum((site / name).stat().st_size for name in names)


def groups(site: Path) -> list[list[str]]:
    """The files of a directory, relative to it, by archive; files of a kind lie together."""
    names = sorted(
        (str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()),
        key=lambda name: (Path(name).suffix, name),
    )
    large = [[name] for name in names if _size(site, [name]) > LARGE]
    shared: list[list[str]] = []
    size = SHARED
    for name in names:
        if [name] in large:
            continue
        if size >= SHARED:
            shared.append([])
            size = 0
        shared[-1].append(name)
        size += _size(site, [name])
    return large + shared


def _middle(site: Path, names: list[str]) -> int:
    """How many of two or more files are about half of all bytes, and neither none nor all."""
    half = _size(site, names) / 2
    ends = accumulate(_size(site, [name]) for name in names)
    return min(sum(end <= half for end in ends) or 1, len(names) - 1)


def _normal(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.mtime = MODIFIED
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() else 0o644
    return entry


def _members(names: list[str]) -> list[str]:
    """Files, and before them the directories that they lie in.

    Archives are unpacked at the same time. tarfile makes a directory that is no member only if none
    of that name has come meanwhile, and fails otherwise; of a member it accepts what is there.
    """
    paths = [Path(name) for name in names]
    within = {str(parent) for path in paths for parent in path.parents[:-1]}
    return [*sorted(within), *names]


def _write(site: Path, names: list[str], stem: Path, most: int) -> list[Path]:
    """Archives of files; several where one would be larger than ``most`` bytes."""
    path = stem.with_name(stem.name + SUFFIX)
    members = _members(names)
    # As a tar file: a header and padding for each, and the end.
    size = _size(site, names) + 2 * tarfile.BLOCKSIZE * len(members) + tarfile.RECORDSIZE
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(size, DICTIONARY)}]
    with (
        lzma.open(path, "wb", filters=filters) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in members:
            archive.add(site / name, name, recursive=False, filter=_normal)
    if path.stat().st_size <= most:
        return [path]
    if len(names) == 1:
        packed = path.stat().st_size / MIB
        raise SystemExit(
            f"{names[0]} is {packed:.1f} MiB in its archive: allow larger pieces, or leave it out"
        )
    path.unlink()
    middle = _middle(site, names)
    return [
        *_write(site, names[:middle], stem.with_name(stem.name + "a"), most),
        *_write(site, names[middle:], stem.with_name(stem.name + "b"), most),
    ]


def write_archives(site: Path, directory: Path, most: int) -> list[Path]:
    """Archives of all files of ``site``, written to ``directory``.

    Args:
        most: bytes of an archive.

    Raises:
        SystemExit: one file alone is larger.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(_write, site, names, directory / f"site-{number:02d}", most)
            for number, names in enumerate(groups(site))
        ]
        return [path for job in jobs for path in job.result()]
