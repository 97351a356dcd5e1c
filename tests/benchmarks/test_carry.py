"""Packages in archives: what is packed is what gets unpacked, and damage is named."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.serving.carry import __main__ as carry
from benchmarks.serving.carry import archives, wheels
from benchmarks.serving.carry.left_out import FA2, Selection
from benchmarks.serving.carry.unpack import extract
from tests.benchmarks.fat_binaries import CUBIN, PTX, code, container, entry

ROOT = Path(__file__).parents[2]
LIBRARY = b"host" + container(
    *(entry(kind, a, code(kind, a)) for kind, a in ((CUBIN, 80), (CUBIN, 90), (PTX, 90)))
)
METADATA = b"Metadata-Version: 2.1\nName: brought\nVersion: 1.0\nRequires-Dist: not-anywhere\n"
FILES = {
    "brought.py": b"ANSWER = 42\n",
    "brought_data/template.py": b"{{ this is no Python }}\n",
    "brought_data/device.abi3.so": LIBRARY,
    "brought-1.0.data/scripts/brought": b"#!python\n",
    "brought-1.0.data/purelib/brought_beside.py": b"ANSWER = 43\n",
    "brought-1.0.dist-info/METADATA": METADATA,
    "brought-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
    "brought-1.0.dist-info/RECORD": b"",
}


def noise(name, size):
    """Bytes that no compression makes fewer."""
    return hashlib.shake_128(name.encode()).digest(size)


def make_wheel(directory, files):
    path = directory / "brought-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


NOISE = {f"brought_data/{i}.bin": noise(f"{i}", 700 * 2**10) for i in range(3)}


@pytest.fixture
def wheel(tmp_path):
    """A small wheel with a module and a library with device code."""
    return make_wheel(tmp_path, FILES)


def pack(directory, *arguments):
    carry.main(["pack", str(directory), "--architecture", "90", *map(str, arguments)])


def pack_wheel(directory, wheel, *arguments):
    pack(directory, "--no-vllm", "--wheels", wheel, "--piece-size", 1, *arguments)


@pytest.fixture(scope="module")
def packed_once(tmp_path_factory):
    """Three archives of at most 1 MiB."""
    directory = tmp_path_factory.mktemp("packed")
    pack_wheel(directory / "carried", make_wheel(directory, FILES | NOISE))
    return directory / "carried"


@pytest.fixture
def packed(packed_once, tmp_path):
    return shutil.copytree(packed_once, tmp_path / "carried")


def files_of(site):
    return {
        str(path.relative_to(site)): path.read_bytes()
        for path in site.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def test_round_trip(packed, tmp_path):
    names = sorted(path.name for path in packed.iterdir())
    assert names == ["manifest.json", *(f"site-00{part}.tar.xz" for part in ("a", "ba", "bb"))]
    assert all(path.stat().st_size <= 2**20 for path in packed.iterdir())
    site = tmp_path / "site"
    command = [sys.executable, "-S", "-m", "benchmarks.serving.carry", "unpack", packed, site]
    # Without the site packages: the GPU machine may have none that help.
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    want = {
        name: content
        for name, content in FILES.items()
        if name.startswith(("brought.", "brought_data/", "brought-1.0.dist"))
    }
    want["brought_data/device.abi3.so"] = LIBRARY.replace(code(CUBIN, 80), bytes(24)).replace(
        code(PTX, 90), bytes(24)
    )
    want["brought_beside.py"] = b"ANSWER = 43\n"
    assert files_of(site) == want | NOISE
    assert len(list(site.glob("__pycache__/brought*.pyc"))) == 2
    script = (
        f"{said.stdout}\n{shlex.quote(sys.executable)} -c 'import brought; print(brought.__file__)'"
    )
    used = subprocess.run(["sh", "-c", script], check=True, stdout=subprocess.PIPE, text=True)
    assert used.stdout.strip() == str(site / "brought.py")


def test_archives_do_not_race_for_a_directory(packed, tmp_path, monkeypatch):
    """What is no member tarfile makes itself, and fails if another archive came first."""

    def another_came_first(path, *arguments, **options):
        raise FileExistsError(path)

    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(os, "makedirs", another_came_first)
    for archive in sorted(packed.glob("*.tar.xz")):
        extract(archive, site)
    assert NOISE.items() <= files_of(site).items()


def test_the_same_wheels_give_the_same_archives(wheel, tmp_path):
    for name in ("once", "again"):
        pack_wheel(tmp_path / name, wheel)
    manifests = [(tmp_path / name / "manifest.json").read_text() for name in ("once", "again")]
    assert manifests[0] == manifests[1]


def test_what_pip_finds_is_packed(wheel, tmp_path, monkeypatch):
    """pip is asked for the GPU machine's wheels, and not for what that has."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    requirements = tmp_path / "needed.txt"
    requirements.write_text("brought==1.0\nThere_too==2.0\n")
    present = tmp_path / "freeze.txt"
    present.write_text("there-too @ file:///somewhere\n")
    directory = tmp_path / "carried"
    pack(
        directory,
        *("--no-vllm", "--requirements", requirements, "--present", present),
        *("--python-version", "3.99"),
    )
    assert json.loads((directory / "manifest.json").read_text())["python"] == "3.99"
    assert list(directory.glob("*.tar.xz"))


def test_a_library_without_code_for_the_gpu_is_named(tmp_path, capsys):
    library = container(entry(CUBIN, 100, code(CUBIN, 100)))
    wheel = make_wheel(tmp_path, FILES | {"brought_data/other.so.1": library})
    pack_wheel(tmp_path / "carried", wheel)
    said = capsys.readouterr().out
    assert "brought_data/other.so.1 has NO code for sm_90" in said
    assert "device.abi3.so has NO code" not in said


def test_a_library_that_cannot_be_read_is_named(tmp_path):
    wheel = make_wheel(tmp_path, {"brought.so": LIBRARY[:-1]})
    with pytest.raises(SystemExit, match=r"^brought\.so: the container of device code at 4 is cut"):
        pack_wheel(tmp_path / "carried", wheel)


def test_a_file_that_fits_no_piece_is_named(tmp_path):
    wheel = make_wheel(tmp_path, FILES | {"brought.bin": noise("large", 2**20)})
    with pytest.raises(SystemExit, match=r"^brought\.bin is 1\.0 MiB in its archive"):
        pack_wheel(tmp_path / "carried", wheel)
    assert not (tmp_path / "carried" / "manifest.json").exists()


def test_directories_join_the_packages(wheel, tmp_path):
    addition = tmp_path / "addition"
    (addition / "brought_data").mkdir(parents=True)
    (addition / "brought_data" / "built.so").write_bytes(LIBRARY)
    pack_wheel(tmp_path / "carried", wheel, "--add", addition)
    carry.main(["unpack", str(tmp_path / "carried"), str(tmp_path / "site")])
    assert (tmp_path / "site" / "brought_data" / "built.so").read_bytes() == LIBRARY


def _damage(directory):
    path = directory / "site-00a.tar.xz"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def _lose(directory):
    (directory / "site-00a.tar.xz").unlink()


def _lead_out(directory):
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"site-00a', '"../site-00a', 1))


def _forget(directory):
    (directory / "manifest.json").unlink()


def _other_python(directory):
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"python": "2.7"}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_damage, "00a.tar.xz is damaged"),
        (_lose, "00a.tar.xz is missing"),
        (_lead_out, "not a plain file name"),
        (_forget, "manifest.json is missing"),
        (_other_python, "packed for Python 2.7, and this is"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_harm_is_named_and_nothing_unpacked(packed, tmp_path, harm, message):
    harm(packed)
    with pytest.raises(SystemExit, match=message):
        carry.main(["unpack", str(packed), str(tmp_path / "site")])
    assert not list(tmp_path.glob("site*"))


def test_nothing_is_mixed_with_older_files(packed, wheel, tmp_path):
    with pytest.raises(SystemExit, match="is not empty"):
        pack_wheel(packed, wheel)
    with pytest.raises(SystemExit, match="is not empty"):
        carry.main(["unpack", str(packed), str(tmp_path)])


def test_large_files_have_archives_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "LARGE", 100)
    monkeypatch.setattr(archives, "SHARED", 120)
    for name, size in {"a.py": 80, "b.so": 101, "c.py": 70, "d.txt": 10, "e/f.py": 60}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
    assert archives.groups(tmp_path) == [["b.so"], ["a.py", "c.py"], ["e/f.py", "d.txt"]]


def test_what_is_needed_of_requirements(tmp_path):
    requirements = tmp_path / "all.lock"
    requirements.write_text(
        "# comment\ntorch==2.13.0+cpu\nruff==1.0\nopenai==3.57.0  # why\nnumpy==2\n"
    )
    present = tmp_path / "freeze.txt"
    present.write_text("NumPy==2.5.2\n-e somewhere\n")
    assert wheels.needed([requirements], present) == ["openai==3.57.0"]
    assert wheels.needed([requirements], None) == ["openai==3.57.0", "numpy==2"]
    requirements.write_text("openai>=3\n")
    with pytest.raises(SystemExit, match="'openai>=3' is not name==version"):
        wheels.needed([requirements], None)


def test_selection():
    assert FA2 not in Selection(90)
    assert FA2 in Selection(80)
    assert FA2 in Selection(90, keep=["*_fa2_C*"])
    assert "vllm/third_party/deep_gemm/include/cute/arch/a.hpp" not in Selection(90)
    assert "vllm/third_party/deep_gemm/__init__.py" in Selection(90)
    assert "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so" in Selection(90)
    kept = Selection(90, ["other/data/*"], ["other/data/csrc/*"])
    assert "other/data/csrc/a.cu" in kept
    assert "other/data/include/a.cuh" not in kept


def test_platforms_include_the_older_ones():
    tags = wheels.platforms("manylinux_2_18_x86_64")
    assert tags[:3] == ["manylinux_2_18_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]
    assert tags[-2:] == ["manylinux_2_5_x86_64", "manylinux1_x86_64"]
    assert wheels.platforms("linux_x86_64") == ["linux_x86_64"]


def test_the_vllm_that_is_packed_is_the_supported_one():
    assert wheels.supported_vllm() == "vllm==0.32.*"
