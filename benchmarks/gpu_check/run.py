"""What a new GPU machine should run first, in the order of its value.

    make gpu-check                                      everything, half an hour
    python -m benchmarks.gpu_check.run --minutes 9      ends in time; the same command goes on

Each item runs in a process of its own, with a time limit: see ``items.py`` and README.md. The
verdicts, the items' own results and their logs are written to benchmarks/results/gpu/.
"""

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.clock import Clock
from benchmarks.common.paths import RESULTS, ROOT
from benchmarks.common.provenance import source_digest
from benchmarks.common.results import Rows
from benchmarks.gpu_check.items import ITEMS
from benchmarks.gpu_check.runner import FAILED, run_all
from vase_vllm.tools.markdown import table
from vase_vllm.tools.provenance import versions
from vase_vllm.tools.termination import sigterm_unwinds

PACKAGES = ("torch", "triton", "vllm", "flashinfer-python", "xformers")
SOURCES = ("vase_vllm", "vase_vllm/kernels", "benchmarks")


def device_name() -> str:
    """Of the first GPU.

    Raises:
        SystemExit: there is none; one line.
    """
    try:
        import torch
    except ImportError:
        raise SystemExit(
            f"no GPU to be seen: {sys.executable} has no torch; name the Python that has it with "
            "make gpu-check GPU_PYTHON=..."
        ) from None
    if not torch.cuda.is_available():
        raise SystemExit(f"no GPU: torch {torch.__version__} of {sys.executable} finds none")
    return torch.cuda.get_device_name()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [item.name for item in ITEMS]
    parser.add_argument("--items", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--minutes", type=float, help="stop in time; call again to go on")
    parser.add_argument(
        "--jobs", type=int, default=1, help="checks side by side; what times something runs alone"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / "gpu",
        help="directory of the results, read as well",
    )
    return parser.parse_args(arguments)


def page(content: dict[str, Any], source: str) -> str:
    """The verdicts as Markdown."""
    rows = [row for row in content["rows"] if row["source"] == source]
    facts = {"Python": content["python"], **content["versions"]}
    lines = [f"# First checks on a GPU: {content['device']}", ""]
    lines += [f"- {', '.join(f'{name} {version}' for name, version in facts.items())}"]
    lines += [f"- sources {source}; `{content['command']}`", ""]
    cells = [
        [
            *(row[field].replace("|", "/") for field in ("name", "verdict", "reason", "date")),
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    lines += table(["check", "verdict", "reason", "date", "s"], cells, num_left=4)
    return "\n".join(lines) + "\n"


def main() -> int:
    """1 if an item failed, or without a GPU."""
    start = time.monotonic()
    args = parse_arguments()
    device = device_name()
    args.output = args.output.absolute()
    header = {"device": device, "python": platform.python_version(), "versions": versions(PACKAGES)}
    source = source_digest(*(ROOT / folder for folder in SOURCES))
    path = args.output / f"check-{device.lower().replace(' ', '-')}.json"
    try:
        results = Rows(path, header)
    except ValueError as error:
        print(f"FAILED: {error}")
        return 1
    results.content["command"] = shlex.join(
        ["python", "-m", "benchmarks.gpu_check.run", *sys.argv[1:]]
    )
    items = [item for item in ITEMS if args.items is None or item.name in args.items]
    with sigterm_unwinds():
        outcomes = run_all(items, results, Clock(args.minutes, start), source, jobs=args.jobs)
    text = page(results.content, source)
    path.with_suffix(".md").write_text(text)
    print(f"\n{text}\nresults, page and logs are in {args.output}")
    return int(any(outcome.verdict == FAILED for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
