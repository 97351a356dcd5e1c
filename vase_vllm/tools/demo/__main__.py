"""Runs the demo; see :func:`main`."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

from openai import OpenAIError
from requests import RequestException
from rich.console import Console
from rich.live import Live
from rich.markup import escape

from vase_vllm.tools.demo import view
from vase_vllm.tools.demo.race import NUM_TOKENS, QUESTION, TOPICS, Side
from vase_vllm.tools.demo_model import is_complete, make_demo_model
from vase_vllm.tools.server import Server
from vase_vllm.tools.termination import sigterm_unwinds

MODEL = Path("build/demo-model")
BUDGET, WINDOW, BLOCK_SIZE, MAX_MODEL_LEN = 128, 32, 32, 640
NUM_BLOCKS = 29
"""Of the pool; the null block is one of them."""
# float32: a CPU without AVX-512 computes a step of several sequences three times as fast as with
# bfloat16. Without the prefix cache, blocks in use are those of requests alone.
SERVE = [
    *["--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN)],
    *["--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(NUM_BLOCKS)],
    *["--kv-cache-memory-bytes", "256M", "--no-enable-prefix-caching"],
]
EVICT = [
    *["--kv-eviction", "vase", "--kv-eviction-config.budget", str(BUDGET)],
    *["--kv-eviction-config.window", str(WINDOW)],
]
SAMPLE_SECONDS = 6.0
MOST_THREADS = 4
NEXT = """
[bold]Next[/]
  serve a model of yours      vllm serve MODEL --kv-eviction vase
  what fits into your GPU     vase-vllm plan MODEL --gpu-memory 80GiB --budget 2048 4096
  see what each head keeps    vase-vllm inspect build/demo-model --dtype float32 --chat \\
                                --prompt "Why is the sky blue?" --ignore-eos --max-tokens 600 \\
                                --kv-eviction-config.budget 128
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Send the same requests to two servers, and show their outputs and what they held.

    Returns:
        The exit code: 0 only if the servers did all of what is shown.
    """
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, help=f"a chat model; default {MODEL}")
    model = parser.parse_args(argv).model
    console = Console()
    try:
        with sigterm_unwinds():
            return run(model, console)
    except (OpenAIError, RequestException, RuntimeError, ValueError, OSError) as error:
        console.print(f"[red]demo:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130


def run(model: Path | None, console: Console) -> int:
    """The demo, with errors raised."""
    fetching = model is None and not is_complete(MODEL)
    console.print(
        f"[bold]The demo takes about {2 if fetching else 1.5} minutes[/] on an idle machine with "
        f"two cores, 5 GB of memory{' and 0.6 GB of disk (0.3 GB of them to keep)' * fetching}."
    )
    if model is None:
        try:
            model = make_demo_model(MODEL)
        except ConnectionError as error:
            raise ConnectionError(f"{error}, and make demo MODEL=DIR serves it") from None

    load, num_cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    # Two servers share the machine: fairly, and without threads that wait for each other.
    num_threads = min(MOST_THREADS, max(1, num_cores // 2))
    os.environ.update(OMP_NUM_THREADS=str(num_threads), VLLM_CPU_OMP_THREADS_BIND="nobind")
    serve = escape(shlex.join(["vllm", "serve", str(model), *SERVE]))
    console.print(f"\n[bold]{serve}[/]", highlight=False)
    console.print(f"the same, and [bold]{shlex.join(EVICT)}[/]\n", highlight=False)
    # The servers end first, so that no thread is left waiting for one.
    with (
        ThreadPoolExecutor(2 * len(TOPICS)) as executor,
        Server(model, SERVE) as full,
        Server(model, [*SERVE, *EVICT]) as evicting,
    ):
        with console.status("starting both servers (about half a minute)"):
            full.wait_until_ready()
            evicting.wait_until_ready()
        sides = [
            Side("full cache", full, model, is_evicting=False),
            Side("vase", evicting, model, is_evicting=True),
        ]
        console.print(
            f"{len(TOPICS)} requests to each at once, the same seed, {NUM_TOKENS} tokens each; "
            f"the first is shown:\n[bold]{QUESTION.format(TOPICS[0])}[/]\n"
        )
        race(sides, executor, console)
        code = report(sides, console)
    if load > num_cores:
        console.print(
            f"[yellow]The machine was busy before the demo began (a load of {load:.1f} on "
            f"{num_cores} cores): the two speeds are hardly comparable.[/]"
        )
    return code


def race(sides: Sequence[Side], executor: ThreadPoolExecutor, console: Console) -> None:
    """Let both servers generate until the one that evicts is done, and the other with the first."""
    futures = [future for side in sides for future in side.send_requests(executor)]
    next_sample = time.monotonic() + SAMPLE_SECONDS
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while not (sides[-1].is_done and sides[0].outputs[0].is_done):
            time.sleep(0.25)
            for future in futures:
                if future.done():
                    future.result()
            if time.monotonic() >= next_sample:
                next_sample += SAMPLE_SECONDS
                for side in sides:
                    side.take_sample()
            if console.is_terminal:
                live.update(view.progress(sides, console.height), refresh=True)
    for side in sides:
        side.stop()


def report(sides: Sequence[Side], console: Console) -> int:
    """Show what came out, check it, and return the exit code."""
    full, evicting = sides
    console.print(view.side_by_side(sides, head=14, tail=12))
    pairs = zip(*(side.outputs[0].text for side in sides), strict=False)
    num_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    console.print(
        f"The two are the same up to character {num_common}. Eviction begins at "
        f"{BUDGET + WINDOW} tokens, prompt included.\n"
    )
    console.print(
        f"Tokens generated, requests running of {len(TOPICS)}, KV blocks in use of "
        f"{NUM_BLOCKS - 1} (of {BLOCK_SIZE} tokens), and cached tokens that these requests hold:"
    )
    console.print(view.held_over_time(sides))

    evictions = evicting.wait_for_counter("vllm:kv_eviction_evictions")
    concurrency = [side.server.max_concurrency() for side in sides]
    speeds = [side.num_generated / side.seconds for side in sides]
    for side, (line, _), speed in zip(sides, concurrency, speeds, strict=True):
        preemptions = side.counter("vllm:num_preemptions")
        console.print(f"\n[bold]{side.name}[/]: {line}", highlight=False)
        console.print(
            f"{side.num_generated} tokens in {side.seconds:.0f} s: {speed:.1f} tokens per second, "
            f"{preemptions} preemptions",
            highlight=False,
        )
    most_held = len(TOPICS) * (BUDGET + WINDOW)
    happened = {
        f"{evictions} evictions, counted by /metrics": evictions > 0,
        f"under eviction no more than {len(TOPICS)} * ({BUDGET} + {WINDOW}) tokens held": all(
            sample.tokens_held <= most_held for sample in evicting.samples
        ),
        "every output of the server with eviction is complete": all(
            output.num_generated == NUM_TOKENS for output in evicting.outputs
        ),
        "the output of the full cache beside it as well": full.outputs[0].is_done,
        f"{concurrency[1][1] / concurrency[0][1]:.1f} times the full cache's maximum concurrency": (
            concurrency[1][1] > concurrency[0][1]
        ),
    }
    console.print()
    for what, is_true in happened.items():
        mark = "[green]yes[/]" if is_true else "[bold red]NO [/]"
        console.print(f"{mark}  {what}", highlight=False)
    if not all(happened.values()):
        return 1
    console.print(NEXT, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
