"""Where our own code spends processor time in a CPU decode step.

    python -m benchmarks.decode_step.profile [--case NAME] [--output FILE.json] [--label NAME]
    py-spy record --format raw --output stacks.txt -- python -m benchmarks.decode_step.profile

An engine in this process decodes sequences that are all beyond their budget: a case of
``overhead.py``, by default the one whose model is small enough for our code to show. The functions
named in ``COSTS`` are timed with the process's processor time (the engine runs on one thread); the
second form finds out which lines they spend it on. With ``--label`` the numbers are added to the
file beside others.
"""

import argparse
import functools
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.environment import IN_PROCESS, QUIET

os.environ.update({**QUIET, **os.environ, **IN_PROCESS})

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common.provenance import provenance
from benchmarks.decode_step.overhead import (
    CASES,
    NUM_LAYERS,
    PERIODS,
    WINDOW,
    Case,
    fill_beyond_budget,
    make_config,
    make_engine,
)
from vase_vllm.policies import candidates, draws, vase
from vase_vllm.worker import backend, cpu_path, evictor, pages, query_ring, worker

COSTS: tuple[tuple[Any, str], ...] = (
    (cpu_path.CPUPath, "prepare"),
    (cpu_path.CPUPath, "_evict"),
    (cpu_path.CPUPath, "_write_slots"),
    (query_ring.TorchRingWrite, "plan"),
    (query_ring.TorchRingWrite, "store"),
    (evictor, "load_queries"),
    (draws.Draws, "gumbel"),
    (candidates, "attention_scores"),
    (candidates.Candidates, "of_values"),
    (vase, "vase_priority"),
    (evictor, "largest"),
    (evictor, "plan_moves"),
    (pages.CandidatePages, "keys"),
    (pages.PackedPages, "copy"),
    (backend, "wrap_layers"),
    (worker, "wrap_layers"),
    (cpu_path, "cpu_page_layout"),
)


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, which notes its processor time; nested calls count in both."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.process_time() - start)

    return wrapper


def instrument() -> dict[str, list[float]]:
    """Time the functions of ``COSTS`` from now on."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for owner, name in COSTS:
        label = f"{owner.__name__.removeprefix('vase_vllm.')}.{name}"
        original = vars(owner)[name]
        if isinstance(original, classmethod):
            wrapped: Any = classmethod(timed(original.__func__, seconds[label]))
        else:
            wrapped = timed(original, seconds[label])
        setattr(owner, name, wrapped)
    return seconds


def measure(case: Case) -> dict[str, Any]:
    """Milliseconds of each function in a decode step, and in start-up."""
    seconds = instrument()
    with tempfile.TemporaryDirectory() as directory:
        make_config(case, Path(directory))
        before = time.process_time()
        llm = make_engine(case, Path(directory), {"budget": case.budget, "window": WINDOW})
        start_up = {name: 1e3 * sum(values) for name, values in seconds.items() if values}
        start_up["LLM(...), all of it"] = 1e3 * (time.process_time() - before)
    fill_beyond_budget(llm, case)
    for values in seconds.values():
        values.clear()
    num_steps = PERIODS * WINDOW
    before = time.process_time()
    for _ in track(range(num_steps), "decoding", transient=True):
        llm.llm_engine.step()
    step = {"the whole step": 1e3 * (time.process_time() - before) / num_steps}
    for name, values in seconds.items():
        if values:
            step[name] = 1e3 * sum(values) / num_steps
    llm.llm_engine.engine_core.shutdown()
    return {
        "start_up_ms": {name: round(value, 2) for name, value in start_up.items()},
        "step_ms": {name: round(value, 4) for name, value in step.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="small layers")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON, or add to them")
    parser.add_argument("--label", default="now", help="what they are numbers of")
    args = parser.parse_args()
    case = CASES[args.case]
    result = {**provenance(), "case": args.case, **measure(case)}
    title = f"{args.case}: {case.batch} sequences, {NUM_LAYERS} layers, budget {case.budget}"
    table = Table(title=f"{title}, window {WINDOW}")
    table.add_column("function, with all that it calls")
    table.add_column("ms per step", justify="right")
    for name, value in sorted(result["step_ms"].items(), key=lambda item: -item[1]):
        table.add_row(name, f"{value:.3f}")
    Console().print(table)
    Console().print("start-up, ms:", result["start_up_ms"])
    if args.output:
        known = json.loads(args.output.read_text()) if args.output.exists() else {}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(known | {args.label: result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
