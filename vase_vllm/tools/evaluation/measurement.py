"""Runs the engines that are needed for the cells that are missing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vase_vllm.tools.evaluation.cells import CellStore
from vase_vllm.tools.evaluation.engine import scoring_engine
from vase_vllm.tools.evaluation.methods import Method
from vase_vllm.tools.evaluation.samples import Sample

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs


def measure(
    engine_args: "EngineArgs",
    methods: Sequence[Method],
    samples: Sequence[Sample],
    store: CellStore,
) -> None:
    """Score each sample with each method, except for what is in the store already.

    An engine is started for each method that something is missing of.
    """
    console = Console(stderr=True, highlight=False)
    longest = max(len(sample.token_ids) for sample in samples)
    most_logprobs = max(sample.top_logprobs for sample in samples)
    cells = [(method, sample) for method in methods for sample in samples]
    if outdated := sum(store.is_outdated(*cell) for cell in cells):
        console.print(
            f"{outdated} results in {store.directory} are of another model, text or setting; "
            "they are measured again",
            soft_wrap=True,
        )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("looking for finished results", total=len(cells))
        for method in methods:
            left = [sample for sample in samples if store.load(method, sample) is None]
            progress.advance(bar, len(samples) - len(left))
            if not left:
                continue
            progress.update(bar, description=f"{method.name}: starting the engine")
            # The token after the sequence, which vLLM insists on, needs a position as well.
            with scoring_engine(engine_args, method, longest + 1, most_logprobs) as engine:
                for sample in left:
                    progress.update(bar, description=f"{method.name}: {sample.name}")
                    scores = engine.score(sample.token_ids, sample.top_logprobs)
                    store.save(method, sample, scores)
                    progress.advance(bar)
