"""One import name for the kernels, in a checkout, a wheel and an sdist; torch and Triton do."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = """
import sys
from setuptools import build_meta
(_, folder) = sys.argv  # setuptools writes its own arguments there
build_meta.build_sdist(folder)
build_meta.build_wheel(folder)
"""
# As on a GPU machine that has torch and Triton and nothing else of what the plugin needs.
IMPORT = """
import importlib, sys
for name in ("vllm", "pydantic", "transformers"):
    sys.modules[name] = None
modules = "checks evict launch paged parameters philox remap ring scoring selection torch_eviction"
for name in modules.split():
    importlib.import_module(f"vase_vllm.kernels.{name}")
print(sys.modules["vase_vllm.kernels"].__file__)
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> dict[str, Path]:
    """Folders with the package as each way of shipping it lays it out."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    for name in ("vase_vllm", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-c", BUILD, str(folder)]
    subprocess.run(command, cwd=source, check=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    zipfile.ZipFile(wheel).extractall(folder / "wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (from_sdist,) = (folder / "sdist").iterdir()
    return {"checkout": ROOT, "wheel": folder / "wheel", "sdist": from_sdist}


@pytest.mark.parametrize("kind", ["checkout", "wheel", "sdist"])
def test_the_kernels_are_importable_without_vllm(unpacked, kind, tmp_path):
    root = unpacked[kind]
    result = subprocess.run(
        [sys.executable, "-c", IMPORT],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == root / "vase_vllm" / "kernels" / "__init__.py"


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_shipped_is_the_package_and_all_of_it(unpacked, kind):
    def modules(root: Path) -> set[str]:
        return {str(path.relative_to(root)) for path in root.glob("vase_vllm/**/*.py")}

    # pathlib does not follow links.
    linked = {f"vase_vllm/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert modules(unpacked[kind]) == modules(ROOT) | linked
    if kind == "wheel":
        names = {path.name for path in unpacked[kind].iterdir()}
        assert {name.partition("-")[0] for name in names} == {"vase_vllm"}
