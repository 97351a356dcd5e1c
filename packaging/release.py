"""Builds the sdist and the wheel, checks them, and serves from the wheel in a fresh environment.

Run by ``make dist``. What it needs beside the project's environment it installs into environments
of their own, which are removed again.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
TOOLS = ("build", "twine")
SERVE = """
import vase_vllm
from vase_vllm.tools.server import Server
from vase_vllm.tools.tiny_model import make_tiny_model

print("serving from", vase_vllm.__file__)
model = make_tiny_model("model", layers=2, dtype="float32")
arguments = ["--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", "16M"]
arguments += ["--dtype", "float32", "--kv-eviction", "vase", "--kv-eviction-config.budget", "128"]
with Server(model, [*arguments, "--served-model-name", "tiny"]) as server:
    server.wait_until_ready()
    body = {"model": "tiny", "prompt": "a", "max_tokens": 400, "ignore_eos": True}
    response = server.post("/v1/completions", body)
    response.raise_for_status()
    evictions = server.eviction_stats()["evictions"]
assert evictions > 0, "nothing was evicted"
print(response.json()["usage"]["completion_tokens"], "tokens,", evictions, "evictions")
"""


def environment(directory: Path) -> Path:
    """The Python of a fresh environment."""
    venv.create(directory, with_pip=True)
    return directory / "bin" / "python"


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Run a command; stop with its exit code if it fails."""
    print("+", *(str(part).strip().splitlines()[0] for part in command), flush=True)
    if code := subprocess.run([str(part) for part in command], cwd=cwd, check=False).returncode:
        sys.exit(code)


def beside_vllm(python: Path) -> None:
    """Let an environment see the packages of this one, vLLM among them, behind its own."""
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    found = subprocess.run([python, "-c", query], check=True, capture_output=True, text=True)
    (Path(found.stdout.strip()) / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")


def main() -> None:
    """Build, check, install, serve."""
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        tools = environment(Path(folder) / "tools")
        run(tools, "-m", "pip", "install", "-qq", *TOOLS)
        run(tools, "-m", "build", "--outdir", DIST, ROOT)
        run(tools, "-m", "twine", "check", "--strict", *sorted(DIST.iterdir()))
        fresh = environment(Path(folder) / "fresh")
        (wheel,) = DIST.glob("*.whl")
        run(fresh, "-m", "pip", "install", "-qq", "--no-deps", wheel)
        beside_vllm(fresh)
        run(fresh, "-c", SERVE, cwd=Path(folder))
    print(f"made {', '.join(path.name for path in sorted(DIST.iterdir()))} in {DIST}")


if __name__ == "__main__":
    main()
