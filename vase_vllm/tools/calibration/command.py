"""The `calibrate` subcommand: its arguments, and what it does in which order."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vase_vllm.errors import EvictionError
from vase_vllm.tools.evaluation.texts import HALVES, Text, own_texts, read_texts
from vase_vllm.tools.requirements import require

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

    from vase_vllm.policies.query_statistics import QueryStatistics

EPILOG = (
    "MODEL is a directory or a Hugging Face id. All engine arguments of `vllm serve` are accepted "
    "as well, such as --dtype bfloat16. The model runs in one process, eagerly and without "
    "eviction. Give the file to the policy triattention: --kv-eviction triattention "
    "--kv-eviction-config.statistics FILE."
)


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--output", required=True, metavar="FILE", help="file of the statistics, to be written")
    add("--texts", nargs="+", metavar="FILE", help="None: eight texts that come with Python")
    add(
        "--half",
        choices=HALVES,
        help="every second text only, so that `evaluate` can measure on the others",
    )
    add("--max-tokens", type=int, default=2048, metavar="N", help="most tokens of a text")
    add(
        "--convert",
        metavar="FILE",
        help="take the statistics from a file of TriAttention's authors (.pt), and only the "
        "frequencies of RoPE from the model, whose weights are then not loaded",
    )


def run_calibrate(args: argparse.Namespace) -> int:
    require("calibrate", ["vllm"])
    if args.max_tokens < 2:
        raise EvictionError(f"--max-tokens ({args.max_tokens}) must be at least 2")
    output = Path(args.output)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise EvictionError(f"--output {output}: it must be a file in a directory that exists")
    texts = [] if args.convert else _texts(args)
    engine_args = _engine_arguments(args)
    from vase_vllm.tools.calibration.measurement import convert, measure

    if args.convert:
        statistics = convert(engine_args, Path(args.convert))
    else:
        statistics = measure(engine_args, texts, args.max_tokens)
    statistics.save(output)
    _print(statistics, output)
    return 0


def _texts(args: argparse.Namespace) -> list[Text]:
    texts = read_texts(args.texts) if args.texts else own_texts()
    chosen = [text for text in texts if args.half in (None, text.half)]
    if not chosen:
        raise EvictionError(f"--half {args.half}: there is no such text; give --texts two files")
    return chosen


def _engine_arguments(args: argparse.Namespace) -> "EngineArgs":
    """vLLM's own arguments, for an engine in this process.

    Raises:
        EvictionError: one that does not go together with calibrating.
    """
    from vase_vllm.tools.in_process_engine import parse_vllm_arguments

    parsed = parse_vllm_arguments(
        "calibrate",
        args.engine_arguments,
        args.model_tag,
        enable_prefix_caching=False,
        max_model_len=None,
        use_tqdm_on_load=False,
    )
    # Now that vLLM's environment is set, which it reads when it is imported.
    from vllm.engine.arg_utils import EngineArgs

    from vase_vllm.config import EvictionConfig

    if parsed.max_model_len is not None:
        raise EvictionError(
            f"--max-model-len {parsed.max_model_len}: calibrate sets it from --max-tokens; "
            "remove it"
        )
    # The token after a text, which vLLM insists on, needs a position as well.
    limit = EngineArgs.from_cli_args(parsed).create_model_config().max_model_len
    if args.max_tokens >= limit:
        raise EvictionError(
            f"--max-tokens ({args.max_tokens}) must be below the model's context of {limit} "
            "tokens: lower it"
        )
    parsed.max_model_len = args.max_tokens + 1
    if args.convert:
        parsed.load_format = "dummy"
    engine_args = EngineArgs.from_cli_args(parsed)
    if EvictionConfig.from_additional(engine_args.additional_config) is not None:
        raise EvictionError("--kv-eviction: calibrate runs without eviction; remove it")
    if engine_args.enable_prefix_caching:
        raise EvictionError("--enable-prefix-caching: calibrate computes every token; remove it")
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        if (size := getattr(engine_args, name)) > 1:
            raise EvictionError(
                f"--{name.replace('_', '-')} {size}: calibrate sees the queries of one process "
                "only; remove it"
            )
    return engine_args


def _print(statistics: "QueryStatistics", output: Path) -> None:
    import torch

    lengths = statistics.mean_length.sum(dim=-1)
    resultant = (statistics.mean.abs().sum(dim=-1) / lengths)[lengths > 0]
    low, middle, high = torch.quantile(resultant, torch.tensor([0.1, 0.5, 0.9])).tolist()
    print(
        f"mean resultant length of the queries: {middle:.2f}, the median of {len(resultant)} query "
        f"heads ({low:.2f} to {high:.2f} from the 10th to the 90th percentile); 1 is all alike"
    )
    print(f"--kv-eviction triattention --kv-eviction-config.statistics {output}")
