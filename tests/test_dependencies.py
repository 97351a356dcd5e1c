"""What is imported is declared in pyproject.toml, and what is said of installing works today."""

import ast
import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
WITH_VLLM = {"vllm", "torch", "triton", "transformers", "tokenizers", "safetensors"}
WITH_VLLM |= {"prometheus_client", "fastapi", "starlette"}
"""Which build of torch is right depends on the machine, so all of these come with the extras gpu
and cpu, or are there already; vLLM itself requires them."""
EXTRA_OF = {
    "vase_vllm/tools/plan/": ["plan"],
    "vase_vllm/tools/inspection/": ["inspect"],
    "vase_vllm/tools/evaluation/": ["evaluate"],
    "vase_vllm/tools/provenance.py": ["evaluate"],
    "vase_vllm/tools/demo/": ["demo"],
    "vase_vllm/tools/demo_model.py": ["demo"],
    "vase_vllm/tools/server.py": ["demo"],
    "benchmarks/": ["bench"],
    "benchmarks/accuracy/": ["bench", "accuracy"],
    "benchmarks/reasoning/": ["bench", "accuracy"],
    "benchmarks/stress/any_request.py": ["fuzz"],
}
"""Folders and files that need more than the base; the longest that fits is meant."""
REQUIREMENTS_OF = {
    "benchmarks/kernels/xformers_attention.py": ("peers-xformers.txt",),
    "benchmarks/peers/caches.py": ("peers-kvpress.txt", "peers-randkv.txt"),
}
"""Files that run in environments of their own, or with what is installed for them alone."""
DISTRIBUTIONS = packages_distributions()
NOT_IMPORTED = {"accelerate", "gguf", "pandas"}
"""Needed by what is called; pyproject.toml says by what."""


def declared(requirements: list[str]) -> set[str]:
    """Canonical names of distributions, with those of the extras that refer to each other."""
    found = set()
    for requirement in map(Requirement, requirements):
        if requirement.name == PROJECT["name"]:
            for extra in requirement.extras:
                found |= declared(EXTRAS[extra])
        else:
            found.add(canonicalize_name(requirement.name))
    return found


BASE = declared(PROJECT["dependencies"])


def sources(folder: str) -> list[Path]:
    # vase_vllm/kernels is a link, which pathlib does not follow.
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Top-level modules that a file imports anywhere, except for type checkers."""
    for node in ast.walk(for_run_time(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


def for_run_time(tree: ast.Module) -> ast.Module:
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return tree


def distributions(path: Path) -> set[str]:
    """Canonical names of the distributions that a file imports from, without our own and vLLM's."""
    own = {"vase_vllm", "benchmarks", *sys.stdlib_module_names, *WITH_VLLM}
    own |= {neighbour.stem for neighbour in path.parent.glob("*.py")}
    modules = set(imported(path)) - own
    return {canonicalize_name(DISTRIBUTIONS.get(module, [module])[0]) for module in modules}


def extras_of(path: Path) -> list[str]:
    name = path.relative_to(ROOT).as_posix()
    fitting = [prefix for prefix in EXTRA_OF if name.startswith(prefix)]
    return EXTRA_OF[max(fitting, key=len)] if fitting else []


def own_requirements(path: Path) -> list[str]:
    files = REQUIREMENTS_OF.get(path.relative_to(ROOT).as_posix(), ())
    texts = [(ROOT / "requirements" / name).read_text() for name in files]
    return [line for text in texts for line in text.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("folder", ["vase_vllm", "kernels", "benchmarks"])
def test_what_is_imported_is_declared(folder):
    undeclared = {}
    for path in sources(folder):
        extras = [requirement for extra in extras_of(path) for requirement in EXTRAS[extra]]
        if names := distributions(path) - BASE - declared(extras + own_requirements(path)):
            undeclared[str(path.relative_to(ROOT))] = sorted(names)
    assert not undeclared


def test_what_is_declared_is_imported():
    paths = [*sources("vase_vllm"), *sources("benchmarks")]
    used = {name for path in paths for name in distributions(path)}
    extras = ("plan", "inspect", "evaluate", "demo", "bench", "accuracy", "fuzz")
    everything = [requirement for extra in extras for requirement in EXTRAS[extra]]
    assert (BASE | declared(everything)) - used == NOT_IMPORTED


KINDS = {".gpu", ".lock", ".md", ".py", ".toml", ".yaml", ".yml", ""}
FROM_AN_INDEX = re.compile(
    r"""pip3? install\b[^\n;&|`]*?(?<!a checkout of)[ \t]["']?vase[-_]vllm(?![\w/-])"""
)


@pytest.mark.parametrize(
    ("text", "is_wrong"),
    [
        ('pip install "vase-vllm[bench]"', True),
        ("pip install -U vllm vase-vllm", True),
        ("uv pip install vase_vllm==0.1", True),
        ("run pip install '.[bench]' in a checkout of vase-vllm", False),
        ("pip install examples/vase-vllm-keynorm", False),
        ("pip install . && vase-vllm plan", False),
    ],
)
def test_an_installation_from_an_index_is_recognized(text, is_wrong):
    assert bool(FROM_AN_INDEX.search(text)) == is_wrong


def texts() -> Iterator[Path]:
    """Everything that a person reads or a machine runs, without what is generated."""
    for folder, folders, names in os.walk(ROOT):
        hidden = {name for name in folders if name.startswith(".")} - {".ci"}
        folders[:] = sorted(set(folders) - hidden - {"build", "dist", "results"})
        yield from (Path(folder, name) for name in names if Path(name).suffix in KINDS)


def test_nobody_is_told_to_install_from_an_index():
    """The package is on no index: it is installed from a checkout, as in pip install '.[bench]'."""
    files = list(texts())
    assert {ROOT / name for name in ("README.md", "Makefile", "docs/inspect.md")} <= set(files)
    told = {
        str(path.relative_to(ROOT)): match[0]
        for path in files
        if path != Path(__file__)
        for match in FROM_AN_INDEX.finditer(path.read_text(errors="replace"))
    }
    assert not told
