"""What eviction costs a decode step on the CPU: its own share, and that of the wrapper around.

    python -m benchmarks.decode_step.overhead [--output FILE.json]

Two models of four layers with dummy weights and a small vocabulary, so that the output layer does
not hide anything: one has the layers of Qwen3-8B in bf16, the other next to no weights, so that
all that is done for each layer and sequence shows (``CASES``).

* share of evictions: every sequence is beyond its budget; time in evictions / time in steps, over
  whole periods of the window.
* wrapper: steps in which no eviction is due, against the same engine without the plugin, the two
  stepping in turn. Once for whole steps, the median of the ratios of neighbouring steps, less one;
  and once for what a step does beside the model's forward pass and logits (scheduling, metadata,
  sampling), the median of the differences, over a step. The plugin works there, but for one
  comparison in each layer, while the noise is in the model, which is the same for both.

Times are processor time of the process, which other jobs on the machine disturb least.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.environment import IN_PROCESS, QUIET

os.environ.update({**QUIET, **os.environ, **IN_PROCESS})

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import Qwen3Config
from vllm import LLM, SamplingParams, TokensPrompt

from benchmarks.common.provenance import provenance
from vase_vllm.worker.evictor import TorchEvictor

WINDOW, NUM_LAYERS = 64, 4
WRAPPER_STEPS, WARM_UP_STEPS, PERIODS = 300, 20, 2


@dataclass(frozen=True)
class Case:
    """A model and what decodes together.

    Attributes:
        model: entries of a Qwen3 config.
        budget: tokens that a sequence keeps.
        batch: sequences.
    """

    model: dict[str, Any]
    budget: int
    batch: int


CASES = {
    "layers of Qwen3-8B": Case(
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "dtype": "bfloat16",
        },
        budget=1024,
        batch=16,
    ),
    "small layers": Case(
        {
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "dtype": "float32",
        },
        budget=512,
        batch=24,
    ),
}


def make_config(case: Case, directory: Path) -> None:
    """Write the config of a case's model; it is loaded with dummy weights."""
    Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        num_hidden_layers=NUM_LAYERS,
        vocab_size=4096,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **case.model,
    ).save_pretrained(directory)


def make_engine(case: Case, directory: Path, eviction: dict[str, Any] | None) -> LLM:
    """An in-process engine that does one thing at a time and can be stepped by hand."""
    return LLM(
        str(directory),
        load_format="dummy",
        # Else vLLM loads fp32 weights as bf16.
        dtype=case.model["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=4096,
        kv_cache_memory_bytes=1 << 30,
        max_num_batched_tokens=4096,
        # As in a server.
        disable_log_stats=False,
        additional_config={"kv_eviction": eviction} if eviction else {},
    )


def fill(llm: LLM, prompt_lengths: list[int]) -> None:
    """Start one long request for each length and run the prefill of all prompts.

    They are the beginnings of the longest, which is computed first: the others find most of theirs
    in the prefix cache. Layers as large as those of Qwen3-8B would take half an hour for them.
    """
    params = SamplingParams(temperature=0, max_tokens=3000, ignore_eos=True, detokenize=False)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    shared = [31 * position % 4000 for position in range(max(prompt_lengths))]
    longest_first = sorted(enumerate(prompt_lengths), key=lambda item: -item[1])
    for some in track((longest_first[:1], longest_first[1:]), "prefill", transient=True):
        for index, length in some:
            prompt = TokensPrompt(prompt_token_ids=[*shared[: length - 1], 4000 + index])
            llm.llm_engine.add_request(str(index), prompt, params)
        while any(r.num_output_tokens == 0 for r in scheduler.requests.values()):
            llm.llm_engine.step()


def fill_beyond_budget(llm: LLM, case: Case) -> None:
    """Fill the engine, and step until every sequence evicts once in each period."""
    # Prompts end at different points of the period: evictions spread over the steps, as in service.
    fill(llm, [case.budget + WINDOW * index // case.batch for index in range(case.batch)])
    for _ in track(range(WINDOW + 4), "reaching the steady state", transient=True):
        llm.llm_engine.step()


def clear(llm: LLM, batch: int) -> None:
    """Abort everything that the engine still has."""
    llm.llm_engine.abort_request([str(index) for index in range(batch)])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def timed_step(llm: LLM) -> float:
    """Processor seconds of one engine step."""
    start = time.process_time()
    llm.llm_engine.step()
    return time.process_time() - start


class SteppedEngine:
    """An engine whose steps are timed, with what the model computes apart.

    Attributes:
        steps: [steps] processor seconds of each.
        beside_the_model: [steps] of these, without the forward pass and the logits.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.steps: list[float] = []
        self.beside_the_model: list[float] = []
        self._in_model = 0.0
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        runner = worker.model_runner
        runner._model_forward = self._timed(runner._model_forward)
        runner.model.compute_logits = self._timed(runner.model.compute_logits)

    def step(self) -> None:
        """Run a step, and note how long it took."""
        self._in_model = 0.0
        self.steps.append(timed_step(self.llm))
        self.beside_the_model.append(self.steps[-1] - self._in_model)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._in_model += time.process_time() - start

        return timed


def measure_wrapper(full: LLM, evicting: LLM, batch: int) -> dict[str, float]:
    """Overhead of a step without evictions: neighbouring steps of the two engines, in turn."""
    for llm in (full, evicting):
        fill(llm, [32] * batch)
    base, wrapped = SteppedEngine(full), SteppedEngine(evicting)
    for _ in range(WARM_UP_STEPS):
        full.llm_engine.step()
        evicting.llm_engine.step()
    for index in track(range(WRAPPER_STEPS), "wrapper", transient=True):
        # The order alternates too, so that none always runs on the other's warm caches.
        for engine in (base, wrapped) if index % 2 else (wrapped, base):
            engine.step()
    for llm in (full, evicting):
        clear(llm, batch)
    step = np.median(base.steps)
    whole = quartiles(np.divide(wrapped.steps, base.steps) - 1)
    beside = quartiles(np.subtract(wrapped.beside_the_model, base.beside_the_model) / step)
    return {
        **{f"overhead{name}": value for name, value in whole.items()},
        **{f"overhead_beside_the_model{name}": value for name, value in beside.items()},
        "full_cache_step_ms": step * 1e3,
        "full_cache_beside_the_model_ms": np.median(base.beside_the_model) * 1e3,
    }


def quartiles(values: np.ndarray) -> dict[str, float]:
    """The median, and the quartiles by their names."""
    lower, median, upper = np.percentile(values, (25, 50, 75)).tolist()
    return {"": median, "_lower_quartile": lower, "_upper_quartile": upper}


def measure_evictions(evicting: LLM, case: Case) -> dict[str, float]:
    """Share of evictions in the steps of sequences that are all beyond their budget."""
    seconds: list[float] = []
    original = TorchEvictor.evict

    def timed_evict(*args: Any) -> int:
        start = time.process_time()
        result = original(*args)
        seconds.append(time.process_time() - start)
        return result

    fill_beyond_budget(evicting, case)
    TorchEvictor.evict = timed_evict
    try:
        steps = [
            timed_step(evicting) for _ in track(range(PERIODS * WINDOW), "evicting", transient=True)
        ]
    finally:
        TorchEvictor.evict = original
    clear(evicting, case.batch)
    assert len(seconds) == PERIODS * case.batch, "every sequence evicts once in each period"
    return {
        "share": sum(seconds) / sum(steps),
        "evictions_per_step": len(seconds) / len(steps),
        "eviction_ms": statistics.median(seconds) * 1e3,
        "step_ms": sum(steps) / len(steps) * 1e3,
    }


def measure(case: Case) -> dict[str, Any]:
    """Both costs of a case."""
    with tempfile.TemporaryDirectory() as directory:
        make_config(case, Path(directory))
        evicting = make_engine(case, Path(directory), {"budget": case.budget, "window": WINDOW})
        evictions = measure_evictions(evicting, case)
        full = make_engine(case, Path(directory), None)
        wrapper = measure_wrapper(full, evicting, case.batch)
    for llm in (full, evicting):
        llm.llm_engine.engine_core.shutdown()
    settings = {"budget": case.budget, "window": WINDOW, "batch": case.batch, "layers": NUM_LAYERS}
    return {"settings": settings, "evictions": evictions, "wrapper": wrapper}


def with_quartiles(wrapper: dict[str, float], name: str) -> str:
    """A share in percent, with its quartiles."""
    lower, upper = (wrapper[f"{name}_{which}_quartile"] for which in ("lower", "upper"))
    return f"{wrapper[name]:+.2%} ({lower:+.2%} to {upper:+.2%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    args = parser.parse_args()
    results = {name: measure(CASES[name]) for name in args.cases}
    table = Table(title="What eviction costs a decode step")
    columns = "model", "evictions", "how", "wrapper, no eviction due", "by what is beside the model"
    for column in columns:
        table.add_column(column)
    for name, result in results.items():
        settings, evictions, wrapper = (
            result[part] for part in ("settings", "evictions", "wrapper")
        )
        table.add_row(
            f"{name}, batch {settings['batch']}, budget {settings['budget']}",
            f"{evictions['share']:.1%}",
            f"{evictions['eviction_ms']:.1f} ms each, {evictions['evictions_per_step']:.2f} a step "
            f"of {evictions['step_ms']:.0f} ms",
            f"{with_quartiles(wrapper, 'overhead')} of {wrapper['full_cache_step_ms']:.0f} ms",
            with_quartiles(wrapper, "overhead_beside_the_model"),
        )
    Console().print(table)
    if args.output:
        found = {**provenance(), "threads": os.environ["OMP_NUM_THREADS"], "cases": results}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
