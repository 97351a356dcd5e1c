"""Wheels in pieces: what is packed is what gets installed, and damage is named."""

import base64
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.serving import bring_wheels

SCRIPT = Path(bring_wheels.__file__)


@pytest.fixture
def wheel(tmp_path):
    """A wheel of more than 2 MiB that holds one module and one file of noise."""
    files = {
        "brought.py": b"ANSWER = 42\n",
        "brought_noise.bin": hashlib.shake_128(b"noise").digest(2 * 2**20 + 17),
        "brought-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n"
        b"Requires-Dist: not-a-package-anywhere\n",
        "brought-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in files.items()]
    files["brought-1.0.dist-info/RECORD"] = "\n".join(
        [*record, "brought-1.0.dist-info/RECORD,,"]
    ).encode()
    path = tmp_path / "brought-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def _digest(content):
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


@pytest.fixture
def packed(wheel, tmp_path):
    directory = tmp_path / "pieces"
    bring_wheels.main(
        ["pack", str(directory), "--no-vllm", "--wheels", str(wheel), "--piece-size", "1"]
    )
    return directory


def test_round_trip(packed, tmp_path):
    names = sorted(path.name for path in packed.iterdir())
    stem = "brought-1.0-py3-none-any.whl"
    assert names == [f"{stem}.0000", f"{stem}.0001", f"{stem}.0002", "manifest.json"]
    assert all(path.stat().st_size <= 2**20 for path in packed.iterdir())
    target = tmp_path / "site"
    command = [sys.executable, str(SCRIPT), "install", str(packed), "--target", str(target)]
    subprocess.run(command, check=True)
    assert (target / "brought.py").read_text() == "ANSWER = 42\n"


def test_join_gives_the_same_bytes(packed, wheel, tmp_path):
    (entry,) = json.loads((packed / "manifest.json").read_text())["wheels"]
    target = tmp_path / "joined"
    target.mkdir()
    assert bring_wheels.join(entry, packed, target).read_bytes() == wheel.read_bytes()


def _damage(directory):
    path = directory / "brought-1.0-py3-none-any.whl.0001"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


def _lose(directory):
    (directory / "brought-1.0-py3-none-any.whl.0002").unlink()


def _lead_out(directory):
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"brought-1.0', '"../brought-1.0', 1))


def _forget(directory):
    (directory / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_damage, "whl.0001 is damaged"),
        (_lose, "whl.0002 is missing"),
        (_lead_out, "not a plain file name"),
        (_forget, "manifest.json is missing"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_harm_is_named_and_nothing_installed(packed, tmp_path, harm, message):
    harm(packed)
    target = tmp_path / "site"
    with pytest.raises(SystemExit, match=message):
        bring_wheels.main(["install", str(packed), "--target", str(target)])
    assert not target.exists()


def test_pack_does_not_mix_with_older_pieces(packed, wheel):
    with pytest.raises(SystemExit, match="is not empty"):
        bring_wheels.main(["pack", str(packed), "--no-vllm", "--wheels", str(wheel)])


def test_the_vllm_that_is_packed_is_the_supported_one():
    assert bring_wheels.supported_vllm() == "vllm==0.32.*"
