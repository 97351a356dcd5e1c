"""The `evaluate` subcommand: its arguments, and what it does in which order."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vase_vllm.errors import EvictionError
from vase_vllm.tools.requirements import require

if TYPE_CHECKING:
    from vase_vllm.tools.evaluation.methods import Method
    from vase_vllm.tools.evaluation.samples import Sample
    from vase_vllm.tools.evaluation.texts import Text

SUITES = ("likelihood", "recall")
EPILOG = (
    "MODEL is a directory or a Hugging Face id. All engine arguments of `vllm serve` are accepted "
    "as well, such as --dtype bfloat16 and --tensor-parallel-size 2. --enforce-eager is on. An "
    "interrupted command goes on where it stopped when it is run again."
)


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add(
        "--policies",
        nargs="+",
        default=["vase"],
        metavar="NAME[:KEY=VALUE,...]",
        help="policies with their settings, as in vase:smoothing=1; the full cache is always there",
    )
    add("--budgets", nargs="+", type=int, default=[256, 512], metavar="T", help="in tokens")
    add("--window", type=int, default=64, metavar="W", help="tokens between evictions")
    add("--suite", nargs="+", choices=SUITES, default=["likelihood"], help="what is measured")
    add("--texts", nargs="+", metavar="FILE", help="None: eight texts that come with Python")
    add("--num-texts", type=int, metavar="N", help="use the first N texts only")
    add("--max-tokens", type=int, default=2048, metavar="N", help="most tokens of a text")
    add(
        "--top-logprobs",
        type=int,
        default=100,
        metavar="K",
        help="tokens per position that the KL divergence is computed from",
    )
    add(
        "--distances",
        nargs="+",
        type=int,
        default=[512, 1024],
        metavar="N",
        help="recall: tokens between a fact and the question",
    )
    add("--instances", type=int, default=16, metavar="N", help="recall: cases of each kind")
    add("--fact-at", type=int, default=64, metavar="N", help="recall: tokens in front of the fact")
    add("--note", metavar="TEXT", help="a sentence for the page of results")
    add("--output", default="vase-evaluate", metavar="DIR", help="directory of the results")


def run_evaluate(args: argparse.Namespace) -> int:
    require("evaluate", ["vllm", "matplotlib", "scipy"])
    _check_numbers(args)
    from vase_vllm.tools.evaluation.cells import CellStore
    from vase_vllm.tools.evaluation.engine import parse_engine_arguments
    from vase_vllm.tools.evaluation.fingerprint import model_fingerprint
    from vase_vllm.tools.evaluation.measurement import measure
    from vase_vllm.tools.evaluation.methods import choose_methods
    from vase_vllm.tools.evaluation.report import Evaluation
    from vase_vllm.tools.provenance import versions

    methods = choose_methods(args.policies, args.budgets, args.window)
    texts = _texts(args)
    engine_args = parse_engine_arguments(args.engine_arguments, args.model_tag)
    samples = _samples(args, methods, texts, _tokenizer(engine_args))
    longest = max(len(sample.token_ids) for sample in samples)
    if longest >= (limit := engine_args.create_model_config().max_model_len):
        raise EvictionError(
            f"a sequence of {longest} tokens, and one more, is longer than the model's context "
            f"({limit}): lower --max-tokens and --distances"
        )
    fingerprint = model_fingerprint(engine_args.model, engine_args.revision)
    output = Path(args.output)
    common = {
        "model": fingerprint,
        "engine": args.engine_arguments,
        **versions(["vllm", "vase-vllm"]),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvictionError(f"--output {output}: {error.strerror}") from None
    store = CellStore(output / "cells", common)
    measure(engine_args, methods, samples, store)
    model = {"name": engine_args.model, "fingerprint": fingerprint}
    evaluation = Evaluation.collect(model, args.note, methods, texts, samples, store)
    evaluation.write(output)
    evaluation.print(output)
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("num_texts", "max_tokens", "top_logprobs", "instances", "fact_at"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise EvictionError(f"--{name.replace('_', '-')} ({value}) must be at least 1")


def _texts(args: argparse.Namespace) -> list["Text"]:
    from vase_vllm.tools.evaluation.texts import own_texts, read_texts

    return read_texts(args.texts)[: args.num_texts] if args.texts else own_texts(args.num_texts)


def _tokenizer(engine_args: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        engine_args.tokenizer or engine_args.model,
        revision=engine_args.tokenizer_revision or engine_args.revision,
        trust_remote_code=engine_args.trust_remote_code,
    )


def _samples(
    args: argparse.Namespace, methods: Sequence["Method"], texts: Sequence["Text"], tokenizer: Any
) -> list["Sample"]:
    """The samples of the suites that were asked for.

    Raises:
        EvictionError: nothing would be evicted from one of them.
    """
    from vase_vllm.tools.evaluation.recall import recall_cases
    from vase_vllm.tools.evaluation.samples import text_samples

    samples: list[Sample] = []
    bound = max(method.first_scored for method in methods)
    if "likelihood" in args.suite:
        samples += text_samples(texts, tokenizer, args.max_tokens, bound, args.top_logprobs)
    if "recall" in args.suite:
        if args.fact_at + (shortest := min(args.distances)) < bound:
            raise EvictionError(
                f"--distances {shortest} and --fact-at {args.fact_at} are together below budget + "
                f"window ({bound}), so that nothing would be evicted before the question; raise "
                "them or lower --budgets"
            )
        samples += recall_cases(texts, tokenizer, args.distances, args.instances, args.fact_at)
    return samples
