"""An engine whose steps are replays of recorded CUDA graphs, in a process of its own.

Each run generates twice: without graphs, and with graphs that are captured anew. Then the same with
faults in our code that only graphs show.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from vllm.config import CUDAGraphMode

from tests.support import cuda_graphs, faster_interpreter
from tests.support.compilation_keys import CompilationKeys
from tests.support.cuda_graphs import RecordedGraph
from tests.support.engines import engine, generate, greedy, random_prompt
from tests.support.interpreted import environment, use_triton_attention
from vase_vllm.kernels.launch import Launch
from vase_vllm.kernels.ring import TritonRingWrite
from vase_vllm.worker import triton_path
from vase_vllm.worker.triton_path import TritonPath
from vase_vllm.worker.warm_up import KernelWarmUp

VOCABULARY = 1024
EVICTION = {"budget": 12, "window": 4, "sinks": 1}
OPTIONS = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_AND_PIECEWISE",
        # Of decodes the first two are full graphs; the last is for prompts.
        "cudagraph_capture_sizes": [2, 4, 24],
    },
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "enable_prefix_caching": False,
}
# Three rows in a graph of four, then two, then one row in a graph of two. Each request evicts, at
# position 16 or 20.
PROMPTS = [random_prompt(length, length, VOCABULARY) for length in (14, 18, 9)]
LENGTHS = (4, 6, 10)
# Of what faults are shown with; its eviction needs queries that decode steps have stored.
ONE_PROMPT = slice(1, 2)


def run_replayed(model: Path) -> dict[str, Any]:
    """Run :func:`report` under the interpreter, with the Triton attention backend."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.replayed", str(model)],
        env=environment() | {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def _other_lengths() -> Any:
    """Let the lengths that attention sees be another tensor in every step."""

    def prepare(self: TritonPath, *arguments: Any) -> Any:
        self._num_cached = self._num_cached.clone()
        return original(self, *arguments)

    original = TritonPath.prepare
    return mock.patch.object(TritonPath, "prepare", prepare)


def _copied_positions() -> Any:
    """Give the ring a copy of the step's positions."""

    def ring_write(**tensors: Any) -> TritonRingWrite:
        return TritonRingWrite(**tensors | {"positions": tensors["positions"].clone()})

    return mock.patch.object(triton_path, "TritonRingWrite", ring_write)


def _number_of_the_host() -> Any:
    """Tell the ring's kernel how many rows are in use, which differs from step to step."""

    def launch(self: TritonRingWrite, *tensors: Any) -> Launch:
        whole = original(self, *tensors)
        in_use = np.count_nonzero(self.block_table.numpy()[:, 0])
        return replace(whole, arguments=whole.arguments | {"num_rows": int(in_use)})

    original = TritonRingWrite.launch
    return mock.patch.object(TritonRingWrite, "launch", launch)


FAULTS: dict[str, Callable[[], Any]] = {
    "lengths in another tensor": _other_lengths,
    "a copy of the positions": _copied_positions,
    "a number of the host": _number_of_the_host,
}


def report(model: str) -> dict[str, Any]:
    """Tokens with and without graphs, with and without faults; what the graphs hold.

    Returns:
        {"tokens": of each prompt, without graphs, "replayed": the same with them, "graphs": kind
        and size of a graph to {"kernels", "replays"}, "faults": name to [tokens, replayed] of one,
        "warm_up": kernels that were compiled before any graph, "later": those that were after}.
    """
    with _compilations() as compiled, engine(model, EVICTION, **OPTIONS) as llm:
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        runner, manager = worker.model_runner, worker.model_runner.cudagraph_manager

        def tokens(with_graphs: bool, which: slice = slice(None)) -> list[list[int]]:
            manager._graphs_captured = with_graphs
            return generate(llm, PROMPTS[which], [greedy(length) for length in LENGTHS[which]])

        graphs = _graphs(manager)
        result: dict[str, Any] = {"tokens": tokens(False)}
        # The self-check has replayed some.
        before = {name: parts[0].num_replays for name, parts in graphs.items()}
        result["replayed"] = tokens(True)
        result["graphs"] = {
            name: {
                "kernels": sorted({kernel for part in parts for kernel in part.kernels}),
                "replays": parts[0].num_replays - before[name],
            }
            for name, parts in graphs.items()
        }
        result["faults"] = {}
        # Piecewise graphs hold nothing of ours, and need not be captured again.
        del manager._capture_descs[CUDAGraphMode.PIECEWISE]
        for name, fault in FAULTS.items():
            with fault():
                manager.graphs.clear()
                runner.capture_model()
                faulty = [tokens(with_graphs, ONE_PROMPT)[0] for with_graphs in (False, True)]
                result["faults"][name] = faulty
        return result | compiled


def _graphs(manager: Any) -> dict[str, list[RecordedGraph]]:
    """Kind and tokens of a step to its graph, or to the pieces of it."""
    full = {f"full {desc.num_tokens}": [graph] for desc, graph in manager.graphs.items()}
    piecewise = {
        f"piecewise {batch.num_tokens}": [
            # Between the pieces there are functions.
            run.__self__
            for run in entry.capture.segments
            if isinstance(getattr(run, "__self__", None), RecordedGraph)
        ]
        for batch, entry in manager.breakable_cg_runner.entries.items()
    }
    return full | piecewise


@contextmanager
def _compilations() -> Iterator[dict[str, list[str]]]:
    """Kernels of ours that Triton would have compiled until the warm-up's end, and after it."""
    key_of, keys, compiled = CompilationKeys(), set(), {"warm_up": [], "later": []}

    def run(self: Launch) -> None:
        key = key_of(self)
        if key not in keys:
            keys.add(key)
            compiled["later"].append(key[0])
        original_run(self)

    def warm_up(self: KernelWarmUp, runner: Any) -> None:
        original_warm_up(self, runner)
        compiled["warm_up"], compiled["later"] = compiled["later"], []

    original_run, original_warm_up = Launch.run, KernelWarmUp.run
    with mock.patch.object(Launch, "run", run), mock.patch.object(KernelWarmUp, "run", warm_up):
        yield compiled


def main() -> None:
    faster_interpreter.install()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    use_triton_attention()
    cuda_graphs.install()
    print(json.dumps(report(sys.argv[1])))


if __name__ == "__main__":
    main()
