"""Serves one request in a process of its own engine, and records what each KV head holds."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vase_vllm.tools.in_process_engine import parse_vllm_arguments, start_engine

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    from vase_vllm.config import EvictionConfig
    from vase_vllm.tools.inspection.kept_positions import LayerHistory


@dataclass(frozen=True)
class Replay:
    """One request that was served under eviction.

    Attributes:
        token_ids: token ids of the prompt and the output.
        tokens: the text of each token.
        prompt_len: number of prompt tokens.
        histories: evictions of each inspected layer, by the layer's index.
    """

    token_ids: list[int]
    tokens: list[str]
    prompt_len: int
    histories: dict[int, "LayerHistory"]


def parse_engine_arguments(
    arguments: Sequence[str], model: str | None
) -> tuple["EngineArgs", "EvictionConfig"]:
    """Parse vLLM's own arguments, for an engine in this process.

    Args:
        arguments: those of ``vllm serve``.
        model: the model, if it is not among them.

    Raises:
        ValueError: an argument is missing, or is one that `inspect` does not support.
    """
    from vase_vllm.config import EvictionConfig
    from vase_vllm.policies.registry import DEFAULT_POLICY

    parsed = parse_vllm_arguments("inspect", arguments, model, kv_eviction=DEFAULT_POLICY)
    # Now that vLLM's environment is set, which it reads when it is imported.
    from vllm.engine.arg_utils import EngineArgs

    engine_args = EngineArgs.from_cli_args(parsed)
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if getattr(engine_args, name) > 1:
            raise ValueError(
                f"--{name.replace('_', '-')} ({getattr(engine_args, name)}): inspect follows the "
                "evictions of one process only; remove this option"
            )
    config = EvictionConfig.from_additional(engine_args.additional_config)
    if config is None:
        raise ValueError("--kv-eviction none: there is nothing to inspect; choose a policy")
    return engine_args, config


def replay(
    engine_args: "EngineArgs", config: "EvictionConfig", prompt: str, args: argparse.Namespace
) -> Replay:
    """Serve one request and record its evictions.

    Args:
        args: those of `inspect` itself.

    Raises:
        ValueError: the engine rejects its arguments, or nothing was evicted.
    """
    from vllm.platforms import current_platform

    from vase_vllm.tools.inspection.kept_positions import KeptPositions

    if config.fused is not None and not current_platform.is_cpu():
        print(
            "The fused kernel does not report which tokens it keeps. inspect therefore evicts in "
            "plain torch, with the same policy and the same draws; rounding can change the choice "
            "between tokens of almost equal priority.",
            file=sys.stderr,
        )
    llm = start_engine(engine_args)
    layers = _choose_layers(llm, args.layers)
    _check_kv_heads(llm, args.kv_heads)
    kept = KeptPositions(layers)
    llm.collective_rpc("observe_evictions", args=(kept,))
    params = llm.get_default_sampling_params()
    params.max_tokens, params.ignore_eos = args.max_tokens, args.ignore_eos
    if args.temperature is not None:
        params.temperature = args.temperature
    show_progress = sys.stderr.isatty()
    if args.chat:
        message: Any = {"role": "user", "content": prompt}
        (request,) = llm.chat([message], params, use_tqdm=show_progress)
    else:
        (request,) = llm.generate(prompt, params, use_tqdm=show_progress)
    prompt_ids = list(request.prompt_token_ids or ())
    token_ids = prompt_ids + list(request.outputs[0].token_ids)
    histories = {}
    for layer in layers:
        if (history := kept.history(layer)) is None:
            raise ValueError(_nothing_evicted(config, len(prompt_ids), len(token_ids)))
        histories[layer] = history
    tokenizer = llm.get_tokenizer()
    tokens = [tokenizer.decode([token]) for token in token_ids]
    return Replay(token_ids, tokens, len(prompt_ids), histories)


def _choose_layers(llm: "LLM", wanted: Sequence[int] | None) -> list[int]:
    from vllm.model_executor.models.utils import extract_layer_index

    from vase_vllm.worker.backend import full_attention_layers

    names = full_attention_layers(llm.llm_engine.vllm_config)
    evicting = sorted(extract_layer_index(name) for name in names)
    if wanted is None:
        return sorted({evicting[0], evicting[len(evicting) // 2], evicting[-1]})
    if unknown := sorted(set(wanted) - set(evicting)):
        raise ValueError(
            f"--layers {unknown[0]}: this layer does not evict; the layers that do are "
            f"{', '.join(map(str, evicting))}"
        )
    return sorted(set(wanted))


def _check_kv_heads(llm: "LLM", wanted: Sequence[int] | None) -> None:
    num_heads = llm.llm_engine.model_config.get_total_num_kv_heads()
    for head in wanted or ():
        if not 0 <= head < num_heads:
            raise ValueError(f"--kv-heads {head}: the model's KV heads are 0 to {num_heads - 1}")


def _nothing_evicted(config: "EvictionConfig", prompt_len: int, length: int) -> str:
    first = config.schedule.first_eviction(prompt_len)
    return (
        f"nothing was evicted: the sequence ended with {length} tokens, and its first eviction "
        f"comes after {first}; raise --max-tokens, set --ignore-eos or lower "
        "--kv-eviction-config.budget"
    )
