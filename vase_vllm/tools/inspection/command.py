"""The `inspect` subcommand: serves one request and shows which positions each KV head holds."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    from vase_vllm.config import EvictionConfig
    from vase_vllm.tools.inspection.kept_positions import LayerHistory
    from vase_vllm.tools.inspection.summary import LayerSummary

DEFAULT_OUTPUT = "vase-inspect"
NUM_HEADS_DRAWN = 2
EPILOG = (
    "All engine arguments of `vllm serve` are accepted as well, such as --model M, "
    "--max-model-len N, --kv-eviction vase and --kv-eviction-config.budget 2048. "
    "--enforce-eager is on."
)


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="prompt of the request")
    prompt.add_argument("--prompt-file", metavar="F", help="text file with the prompt")
    add = parser.add_argument
    add("--chat", action="store_true", help="apply the model's chat template")
    add("--max-tokens", type=int, default=2048, metavar="N", help="most generated tokens")
    add("--ignore-eos", action="store_true", help="generate exactly --max-tokens tokens")
    add("--temperature", type=float, metavar="T", help="None: as in the generation config")
    add(
        "--layers",
        type=int,
        nargs="+",
        metavar="L",
        help="layers to inspect; None: the first, middle and last that evict",
    )
    add(
        "--kv-heads",
        type=int,
        nargs="+",
        metavar="H",
        help=f"KV heads with a panel of their own; None: the first {NUM_HEADS_DRAWN}",
    )
    add("--output", default=DEFAULT_OUTPUT, metavar="DIR", help="directory of the files to write")


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


def run_inspect(args: argparse.Namespace) -> int:
    from vase_vllm.tools.inspection.summary import summarise

    for module, extra in (("vllm", "gpu"), ("matplotlib", "bench")):
        if find_spec(module) is None:
            raise ValueError(
                f"inspect needs {module}: run pip install '.[{extra}]' in a checkout of vase-vllm"
            )
    prompt = _read_prompt(args)
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens ({args.max_tokens}) must be at least 1")
    engine_args, config = _engine_arguments(args.engine_arguments)
    output = Path(args.output)
    is_new = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output}: {error.strerror}") from None
    try:
        replay = _replay(engine_args, config, prompt, args)
    except BaseException:
        if is_new:
            output.rmdir()
        raise
    summaries = {layer: summarise(history) for layer, history in replay.histories.items()}
    files = _write(output, replay, summaries, engine_args.model, config)
    files += _draw(output, replay, engine_args.model, config, args.kv_heads)
    _print(replay, summaries, config, files)
    return 0


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    try:
        return Path(args.prompt_file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt-file {args.prompt_file}: {error}") from None


def _engine_arguments(arguments: Sequence[str]) -> tuple["EngineArgs", "EvictionConfig"]:
    """Parse vLLM's own arguments, for an engine in this process.

    Raises:
        ValueError: an argument is missing, or is one that `inspect` does not support.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vase_vllm.config import EvictionConfig
    from vase_vllm.policies.registry import DEFAULT_POLICY

    load_general_plugins()
    parser = FlexibleArgumentParser(
        prog="vase-vllm inspect", usage=argparse.SUPPRESS, add_help=False
    )
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(kv_eviction=DEFAULT_POLICY, enforce_eager=True, model=None)
    parsed = parser.parse_args(list(arguments))
    if parsed.model is None:
        raise ValueError("--model is missing: give a directory or a Hugging Face id")
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


def _replay(
    engine_args: "EngineArgs", config: "EvictionConfig", prompt: str, args: argparse.Namespace
) -> Replay:
    """Serve one request and record its evictions.

    Raises:
        ValueError: the engine rejects its arguments, or nothing was evicted.
    """
    from pydantic import ValidationError
    from vllm import LLM
    from vllm.platforms import current_platform

    from vase_vllm.tools.inspection.kept_positions import KeptPositions

    if config.fused is not None and not current_platform.is_cpu():
        print(
            "The fused kernel does not report which tokens it keeps. inspect therefore evicts in "
            "plain torch, with the same policy and the same draws; rounding can change the choice "
            "between tokens of almost equal priority.",
            file=sys.stderr,
        )
    try:
        llm = LLM.from_engine_args(engine_args)
    except ValidationError as error:
        # The message of pydantic itself has many lines.
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
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


def _write(
    output: Path,
    replay: Replay,
    summaries: dict[int, "LayerSummary"],
    model: str,
    config: "EvictionConfig",
) -> list[Path]:
    """Write the data files, which docs/inspect.md describes, and return their paths."""
    import numpy as np

    arrays: dict[str, Any] = {"token_ids": np.array(replay.token_ids, dtype=np.int32)}
    for layer, history in replay.histories.items():
        arrays["eviction_positions"] = history.positions
        arrays[f"layer_{layer}_status"] = history.status
        arrays[f"layer_{layer}_value_range"] = history.value_range
    files = [output / "kept.npz", output / "summary.json"]
    np.savez_compressed(files[0], **arrays)
    policy = config.policy
    summary = {
        "model": model,
        "kv_eviction": policy.name,
        "kv_eviction_config": config.model_dump(exclude={"policy"})
        | policy.model_dump(by_alias=True),
        "prompt_tokens": replay.prompt_len,
        "tokens": replay.tokens,
        "layers": {layer: asdict(summary) for layer, summary in summaries.items()},
    }
    files[1].write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return files


def _draw(
    output: Path,
    replay: Replay,
    model: str,
    config: "EvictionConfig",
    kv_heads: Sequence[int] | None,
) -> list[Path]:
    from vase_vllm.tools.inspection.kept_positions import Status
    from vase_vllm.tools.inspection.plots import Captions, draw_layer

    names = {
        Status.SINK: "sink",
        Status.PROTECTED: "protected",
        Status.RANKED: _how_the_rest_stays(config),
        Status.WINDOW: "window (newest)",
        Status.ABSENT: "evicted",
    }
    files = []
    for layer, history in replay.histories.items():
        num_evictions, num_heads, num_positions = history.status.shape
        captions = Captions(
            title=f"{Path(model).name}, layer {layer}: the positions that each KV head holds",
            settings=f"{config.policy.name}, budget {config.budget}, window {config.window}: "
            f"{num_evictions} evictions over {num_positions} tokens",
            names=names,
            prompt_len=replay.prompt_len,
        )
        heads = kv_heads or range(min(num_heads, NUM_HEADS_DRAWN))
        files += draw_layer(history, heads, captions, output / f"layer-{layer}.png")
    return files


def _how_the_rest_stays(config: "EvictionConfig") -> str:
    is_drawn = (
        getattr(config.policy, "sampling", None) == "gumbel" or config.policy.name == "random"
    )
    return "drawn at random" if is_drawn else "ranked highest"


def _print(
    replay: Replay,
    summaries: dict[int, "LayerSummary"],
    config: "EvictionConfig",
    files: list[Path],
) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    history = next(iter(replay.histories.values()))
    console.print(
        f"[bold]{config.policy.name}[/], budget {config.budget}, window {config.window}: "
        f"{replay.prompt_len} + {len(replay.token_ids) - replay.prompt_len} tokens, "
        f"{len(history.positions)} evictions, the last after {history.positions[-1]} tokens"
    )
    console.print(_table(summaries, config))
    console.print(
        "[dim]All values are means over the KV heads after the last eviction. The overlap of two "
        "heads is the number\nof tokens that both hold over the number that either holds, without "
        "sinks and window (in brackets:\nthe overlap of heads that choose uniformly at random). "
        "Large values are the tenth of the older tokens\nwith the largest value ranges.[/]"
    )
    for path in files:
        console.print(str(path), markup=False)


def _table(summaries: dict[int, "LayerSummary"], config: "EvictionConfig") -> "Table":
    """A table with one column per layer."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    columns = []
    for layer, summary in summaries.items():
        table.add_column(f"layer {layer}", justify="right")
        columns.append(_column(summary, config))
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    return table


def _column(summary: "LayerSummary", config: "EvictionConfig") -> dict[str, str]:
    overlap = "-" if summary.overlap is None else f"{summary.overlap:.0%}"
    return {
        "sinks, of the tokens held": f"{summary.sinks / config.budget:.1%}",
        "protected": f"{summary.protected / config.budget:.1%}",
        _how_the_rest_stays(config): f"{summary.ranked / config.budget:.1%}",
        "window": f"{summary.window / config.budget:.1%}",
        "mean age, tokens": f"{summary.mean_age:,.0f}",
        "overlap of two heads": f"{overlap} ({summary.overlap_by_chance:.0%})",
        "older tokens that are held": f"{summary.held:.0%}",
        "of those with large values": f"{summary.large_held:.0%}",
    }
