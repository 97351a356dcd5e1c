"""Makes the environments of the peers, which need versions of transformers of their own.

    python -m benchmarks.peers.environment DIR

kvpress 0.5.5 wants transformers below 5.3, randkv 0.1.0 wants 5.16: each has an environment of its
own. Everything that is not pinned in requirements/peers-*.txt, torch above all, comes from the
environment that runs this command, so that all systems multiply matrices with the same library.
"""

import argparse
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from rich.progress import track

from benchmarks.common.paths import ROOT
from vase_vllm.errors import EvictionError

PEERS = ("kvpress", "randkv")


def python_of(directory: Path, peer: str) -> Path:
    """The interpreter of a peer.

    Raises:
        EvictionError: it has no environment there.
    """
    python = directory / peer / "bin" / "python"
    if not python.is_file():
        raise EvictionError(
            f"--peers {directory}: there is no environment of {peer}; make it with "
            f"python -m benchmarks.peers.environment {directory}"
        )
    return python


def make(directory: Path, peer: str) -> None:
    """Make the environment of a peer, or bring it to the pinned versions.

    Raises:
        CalledProcessError: pip failed; ``stderr`` says why.
    """
    place = directory / peer
    venv.create(place, symlinks=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)})
    # What the peer pins is found first.
    Path(packages, "this-environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    requirements = ROOT / "requirements" / f"peers-{peer}.txt"
    pip = [sys.executable, "-m", "pip", "--python", str(python_of(directory, peer)), "install"]
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "-r", str(requirements)]
    # Of a pip that succeeds, the words are complaints that vLLM wants another transformers.
    subprocess.run([*pip, *options], check=True, stderr=subprocess.PIPE, text=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="a folder for each peer is made in it")
    directory = parser.parse_args().directory
    for peer in track(PEERS, "environments of the peers"):
        try:
            make(directory, peer)
        except subprocess.CalledProcessError as error:
            print(f"error: requirements/peers-{peer}.txt: {error.stderr}", file=sys.stderr)
            return 1
    print(f"now run: python -m benchmarks.peers.run --peers {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
