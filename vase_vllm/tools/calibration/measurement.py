"""Runs the model over texts, or converts what TriAttention's authors have measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vase_vllm.policies.base import AttentionShape
from vase_vllm.policies.query_statistics import QueryStatistics
from vase_vllm.tools.calibration.authors_file import read_authors_file
from vase_vllm.tools.calibration.collector import LayerSums, QueryCollector
from vase_vllm.tools.in_process_engine import running_engine

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    from vase_vllm.tools.evaluation.texts import Text

TRIAL_TOKENS = 32
"""Tokens that show which rotation a layer has, where no text is needed."""


def measure(engine_args: "EngineArgs", texts: Sequence["Text"], max_tokens: int) -> QueryStatistics:
    """The statistics of the queries of each text's first tokens.

    Raises:
        EvictionError: the engine rejects its arguments, or the queries cannot be seen.
    """
    num_tokens = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("starting the engine", total=len(texts))
        with running_engine(engine_args) as llm:
            collector = QueryCollector(llm)
            tokenizer = llm.get_tokenizer()
            for text in texts:
                progress.update(bar, description=text.name)
                # A tokenizer warns of more tokens than its model's context.
                token_ids = tokenizer(text.content, verbose=False)["input_ids"][:max_tokens]
                _compute(llm, token_ids)
                num_tokens += len(token_ids)
                # The first text tells already whether the queries can be seen.
                sums = collector.sums(num_tokens)
                progress.advance(bar)
    origin = {
        "model": engine_args.model,
        "tokens": str(num_tokens),
        "texts": ", ".join(f"{text.name} ({text.sha256[:12]})" for text in texts),
    }
    return _means(collector.shape, sums, origin)


def convert(engine_args: "EngineArgs", file: Path) -> QueryStatistics:
    """The statistics of a file of TriAttention's authors, with the model's own rotations.

    Raises:
        EvictionError: the engine rejects its arguments, the model's rotations cannot be seen, or
            the file does not fit.
    """
    with running_engine(engine_args) as llm:
        collector = QueryCollector(llm)
        _compute(llm, range(TRIAL_TOKENS))
        seen = collector.sums(TRIAL_TOKENS)
    rotations = {index: of_layer.rotation for index, of_layer in seen.items()}
    pairs = next(iter(rotations.values())).pairs
    mean, length = read_authors_file(file, collector.shape, pairs)
    sums = {
        index: LayerSums(rotation, mean[index] * rotation.scale, length[index] * rotation.scale, 1)
        for index, rotation in rotations.items()
    }
    return _means(collector.shape, sums, {"model": engine_args.model, "converted": file.name})


def _compute(llm: "LLM", token_ids: Sequence[int]) -> None:
    """Run the model over a text, as a prompt."""
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    llm.generate([TokensPrompt(prompt_token_ids=list(token_ids))], params, use_tqdm=False)


def _means(
    shape: AttentionShape, sums: Mapping[int, LayerSums], origin: Mapping[str, str]
) -> QueryStatistics:
    """The statistics of all layers; those of layers that do not evict are 0."""
    size = (shape.num_layers, shape.num_query_heads, shape.head_size // 2)
    mean, length = torch.zeros(size, dtype=torch.complex64), torch.zeros(size)
    frequencies = torch.zeros(shape.num_layers, shape.head_size // 2, dtype=torch.float64)
    for index, of_layer in sums.items():
        mean[index] = of_layer.queries / of_layer.num_tokens
        length[index] = of_layer.lengths / of_layer.num_tokens
        frequencies[index] = of_layer.rotation.frequencies
    pairs = next(iter(sums.values())).rotation.pairs
    return QueryStatistics(mean, length, frequencies, pairs, shape.num_kv_heads, origin)
