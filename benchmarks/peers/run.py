"""vLLM under eviction beside other libraries that evict, on one real model.

    python -m benchmarks.peers.environment build/peers
    python -m benchmarks.peers.run --peers build/peers

See README.md in this folder for what is measured and how to read it.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from vllm.platforms import current_platform

from benchmarks.common import paths
from benchmarks.peers import report
from benchmarks.peers.comparison import Comparison, results_file
from benchmarks.peers.environment import python_of
from benchmarks.peers.setting import Setting, System, choose
from vase_vllm.errors import EvictionError

RESULTS = paths.RESULTS / "peers"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), metavar="DIR")
    parser.add_argument("--model", type=Path, default=Path("build/demo-model"), metavar="DIR")
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="some only, by name")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], help="at once")
    parser.add_argument(
        "--serial-requests", type=int, default=1, help="that a system without batches has to run"
    )
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=320)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--texts", type=int, default=4, help="that likelihood is measured on")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every system")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--serve-arguments", default="", help="further ones of vllm serve")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for a call of vLLM")
    parser.add_argument("--note", action="append", default=[], help="to be shown with the results")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--report-only", action="store_true", help="from results already there")
    return parser.parse_args(arguments)


def chosen(args: argparse.Namespace) -> tuple[Setting, list[System]]:
    """The setting and the systems, both of which can be run here.

    Raises:
        EvictionError: one line that names what cannot, and the remedy.
    """
    for name in ("prompt_len", "output_len", "serial_requests", "rounds", "threads"):
        if getattr(args, name) < 1:
            raise EvictionError(f"--{name.replace('_', '-')}: give a number of at least 1")
    if min(args.requests) < 1 or args.requests != sorted(set(args.requests)):
        # Memory that a library keeps from a larger run would count in a smaller one.
        raise EvictionError("--requests: give different numbers of at least 1 in ascending order")
    setting = Setting(
        model=args.model.absolute(),
        prompt_len=args.prompt_len,
        output_len=args.output_len,
        budget=args.budget,
        window=args.window,
        requests=tuple(args.requests),
        serial_requests=args.serial_requests,
        texts=args.texts,
        threads=args.threads,
        dtype=args.dtype,
        device=args.device,
        serve_arguments=tuple(shlex.split(args.serve_arguments)),
    )
    setting.check()
    if (found := current_platform.device_type) != args.device:
        raise EvictionError(f"--device {args.device}: vLLM runs on {found} here; use that")
    systems = choose(args.systems)
    for system in systems:
        if system.environment is not None:
            python_of(args.peers, system.environment)
    return setting, systems


def main() -> int:
    args = parse_arguments()
    good = True
    if not args.report_only:
        # The workers inherit it; a core that vLLM had bound its threads to would be its own.
        environment = {
            "OMP_NUM_THREADS": str(args.threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TOKENIZERS_PARALLELISM": "false",
        }
        try:
            setting, systems = chosen(args)
            comparison = Comparison(
                setting, systems, args.peers.absolute(), args.timeout, args.output
            )
        except EvictionError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        with patch.dict("os.environ", environment):
            good = comparison.run(args.rounds, args.note)
    path = results_file(args.output, args.device)
    page = report.write(json.loads(path.read_text()), path)
    Console(soft_wrap=True).print(page, markup=False)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
