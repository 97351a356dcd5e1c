"""A policy from another package: the example of docs/policies.md, installed as users would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "vase-vllm-keynorm"
GENERATE = """
import sys
from tests.support.engines import engine, eviction_stats, generate, greedy, random_prompt

settings = {"policy": "keynorm", "budget": 48, "window": 16, "order": 1}
with engine(sys.argv[1], settings) as llm:
    tokens = generate(llm, [random_prompt(40, 0)], greedy(60))
    print(len(tokens[0]), eviction_stats(llm)["evictions"])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the example installed into it, entry point and all."""
    directory = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "keynorm.py"):
        (source / name).write_text((EXAMPLE / name).read_text())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([*command, "--target", str(directory), str(source)], check=True)
    return directory


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the package on its path."""
    environment = {**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT
    )


def test_its_keys_are_checked_and_documented(installed):
    result = run(installed, "-m", "vllm.entrypoints.cli.main", "serve", "--help=kvevictionconfig")
    assert "Of keynorm: `order` (2.0): Order of the norm." in " ".join(result.stdout.split())
    assert "Keeps the tokens whose keys have the smallest norm" in " ".join(result.stdout.split())
    code = "from vase_vllm.config import EvictionConfig as C; C.parse({'policy': 'keynorm', %s})"
    assert run(installed, "-c", code % "'order': 3").returncode == 0
    wrong = run(installed, "-c", code % "'order': 0")
    assert "--kv-eviction-config.order: Input should be greater than 0" in wrong.stderr


@pytest.mark.slow
def test_it_evicts_in_the_real_engine(installed, models):
    result = run(installed, "-c", GENERATE, str(models.qwen3()))
    assert result.returncode == 0, result.stderr[-3000:]
    # 40 + 60 tokens, the last of which is not computed: evictions at 64, 80 and 96.
    assert result.stdout.split()[-2:] == ["60", "3"]


def test_two_packages_of_one_name_are_refused(installed, tmp_path):
    metadata = tmp_path / "other-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[vase_vllm.policies]\nkeynorm = other:Policy\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r})\n"
    code += "from vase_vllm.policies.registry import policy_names; policy_names()"
    result = run(installed, "-c", code)
    assert result.returncode != 0
    assert "'keynorm' is defined twice" in result.stderr
    assert "uninstall one" in result.stderr
