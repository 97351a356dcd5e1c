"""The `inspect` subcommand: serves one request and shows which positions each KV head holds."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vase_vllm.tools.inspection.replay import Replay, parse_engine_arguments, replay
from vase_vllm.tools.requirements import require

if TYPE_CHECKING:
    from rich.table import Table

    from vase_vllm.config import EvictionConfig
    from vase_vllm.tools.inspection.summary import LayerSummary

DEFAULT_OUTPUT = "vase-inspect"
NUM_HEADS_DRAWN = 2
EPILOG = (
    "MODEL is a directory or a Hugging Face id. All engine arguments of `vllm serve` are accepted "
    "as well, such as --max-model-len N, --kv-eviction vase and --kv-eviction-config.budget 2048. "
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


def run_inspect(args: argparse.Namespace) -> int:
    require("inspect", ["vllm", "matplotlib"])
    from vase_vllm.tools.inspection.summary import summarise

    prompt = _read_prompt(args)
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens ({args.max_tokens}) must be at least 1")
    engine_args, config = parse_engine_arguments(args.engine_arguments, args.model_tag)
    output = Path(args.output)
    is_new = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output}: {error.strerror}") from None
    try:
        served = replay(engine_args, config, prompt, args)
    except BaseException:
        if is_new:
            output.rmdir()
        raise
    summaries = {layer: summarise(history) for layer, history in served.histories.items()}
    files = _write(output, served, summaries, engine_args.model, config)
    files += _draw(output, served, engine_args.model, config, args.kv_heads)
    _print(served, summaries, config, files)
    return 0


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    try:
        return Path(args.prompt_file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt-file {args.prompt_file}: {error}") from None


def _write(
    output: Path,
    served: Replay,
    summaries: dict[int, "LayerSummary"],
    model: str,
    config: "EvictionConfig",
) -> list[Path]:
    """Write the data files, which docs/inspect.md describes, and return their paths."""
    import numpy as np

    arrays: dict[str, Any] = {"token_ids": np.array(served.token_ids, dtype=np.int32)}
    for layer, history in served.histories.items():
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
        "prompt_tokens": served.prompt_len,
        "tokens": served.tokens,
        "layers": {layer: asdict(summary) for layer, summary in summaries.items()},
    }
    files[1].write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return files


def _draw(
    output: Path,
    served: Replay,
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
    for layer, history in served.histories.items():
        num_evictions, num_heads, num_positions = history.status.shape
        captions = Captions(
            title=f"{Path(model).name}, layer {layer}: the positions that each KV head holds",
            settings=f"{config.policy.name}, budget {config.budget}, window {config.window}: "
            f"{num_evictions} evictions over {num_positions} tokens",
            names=names,
            prompt_len=served.prompt_len,
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
    served: Replay,
    summaries: dict[int, "LayerSummary"],
    config: "EvictionConfig",
    files: list[Path],
) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    history = next(iter(served.histories.values()))
    console.print(
        f"[bold]{config.policy.name}[/], budget {config.budget}, window {config.window}: "
        f"{served.prompt_len} + {len(served.token_ids) - served.prompt_len} tokens, "
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
