"""``make demo``: a server generates a long output under eviction and shows what it holds."""

import sys
import tempfile
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.tools.server import Server
from vase_vllm.tools.tiny_model import make_tiny_model

BUDGET, WINDOW, BLOCK_SIZE, NUM_TOKENS, NUM_SAMPLES = 256, 32, 32, 2000, 8
SERVE = [
    *["--enforce-eager", "--max-model-len", "8192", "--block-size", str(BLOCK_SIZE)],
    *["--kv-cache-memory-bytes", "64M"],
]
EVICT = [
    *["--kv-eviction", "vase", "--kv-eviction-config.budget", str(BUDGET)],
    *["--kv-eviction-config.window", str(WINDOW)],
]


def stream_chat(server: Server, model: Path, console: Console) -> list[tuple[int, ...]]:
    """Stream one long chat completion and print it.

    Returns:
        A few samples of (tokens generated, tokens held, evictions, blocks held).
    """
    client = OpenAI(base_url=server.url + "/v1", api_key="none")
    stream = client.chat.completions.create(
        model=str(model),
        messages=[{"role": "user", "content": "Think for a very long time."}],
        max_tokens=NUM_TOKENS,
        temperature=1.0,
        seed=1,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        extra_body={"ignore_eos": True},
    )
    samples: list[tuple[int, ...]] = []
    for chunk in stream:
        if chunk.choices and (text := chunk.choices[0].delta.content):
            console.out(text, end="", highlight=False)
        if chunk.usage is None:
            continue
        generated = chunk.usage.completion_tokens
        if len(samples) < generated * NUM_SAMPLES // (NUM_TOKENS - 2 * WINDOW):
            stats = server.eviction_stats()
            samples.append(
                (generated, stats["cached_tokens"], stats["evictions"], server.num_used_blocks())
            )
    console.print()
    return samples


def main() -> int:
    """Run the demo.

    Returns:
        The exit code, which is 1 if the server did not evict as expected.
    """
    console = Console()
    with tempfile.TemporaryDirectory(prefix="vase-demo-") as directory:
        model = make_tiny_model(Path(directory) / "model")
        console.print(f"[bold]$ vllm serve MODEL {' '.join([*SERVE, *EVICT])}[/]")
        with Server(model, [*SERVE, *EVICT]) as server:
            with console.status("starting the server"):
                server.wait_until_ready()
            console.print(f"\n[bold]A chat completion of {NUM_TOKENS} tokens (random weights):[/]")
            samples = stream_chat(server, model, console)
            bounded, bounded_concurrency = server.max_concurrency()
        console.print("\n[bold]The same server without --kv-eviction, for comparison[/]")
        with Server(model, SERVE) as server, console.status("starting the server"):
            full, full_concurrency = server.max_concurrency()

    table = Table(title=f"One sequence, budget {BUDGET} + window {WINDOW}, blocks of {BLOCK_SIZE}")
    for column in ("tokens generated", "tokens held", "evictions", "blocks held"):
        table.add_column(column, justify="right")
    for sample in samples:
        table.add_row(*map(str, sample))
    console.print(table)
    console.print(f"with eviction:    {bounded}")
    console.print(f"without eviction: {full}")

    # The state blocks hold the newest queries. This model has four query heads per KV head.
    state_blocks = RingLayout(WINDOW, group_size=4, block_size=BLOCK_SIZE).num_blocks
    max_blocks = cdiv(BUDGET + WINDOW, BLOCK_SIZE) + state_blocks
    evictions, blocks = samples[-1][2], max(sample[3] for sample in samples)
    if evictions < 24 or blocks > max_blocks or bounded_concurrency <= full_concurrency:
        console.print(
            f"[bold red]The server did not evict as expected: {evictions} evictions, "
            f"{blocks} blocks (expected at most {max_blocks})[/]"
        )
        return 1
    console.print(
        f"[bold green]{evictions} evictions, at most {blocks} blocks, and "
        f"{bounded_concurrency / full_concurrency:.1f} times the maximum concurrency[/]"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
