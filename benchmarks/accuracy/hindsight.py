"""Which of the testbed's look-ups survive a choice of tokens made in hindsight, and which do not.

    python -m benchmarks.accuracy.hindsight

At each eviction of the schedule, every KV head keeps the tokens that a later query of its solved
problem pays the most attention to, as read off the full cache. The model then reads the solution
with only those to attend to, and each token that it would have written is compared with the right
one. That is not the best choice there is, but it knows the future, which no method does: where it
fails, the model spreads its attention over more tokens than the budget holds.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.accuracy.check import MODEL
from benchmarks.accuracy.methods import COMPRESSIONS, WINDOW, budget_for, mean_length
from benchmarks.accuracy.run import RESULTS
from benchmarks.accuracy.tasks import EOS, HELD_OUT_FILE, Problem, read_jsonl
from benchmarks.common.provenance import provenance
from vase_vllm.layout.schedule import EvictionSchedule

SINKS = 4
KINDS = ("next question", "node", "mark", "next node", "count", "answer", "format")


def kinds(problem: Problem) -> list[str]:
    """What each token of the completion takes, the end-of-sequence token included."""
    found: list[str] = []
    for line in problem.chain.removesuffix(" .").split("?")[:-1]:
        steps = (len(line.split()) - 6) // 4
        found += ["next question", "format"]
        found += ["node", "mark", "next node", "count"] * steps
        found += ["format", "node", "format", "count", "format"]
    found += ["format", "format"]  # the full stop and "answer"
    found += ["node", "format", "answer"] * problem.answer.split().count("is")
    return [*found, "format", "format"]


def kept(attention: torch.Tensor, prompt: int, schedule: EvictionSchedule) -> torch.Tensor:
    """Which keys each query of one KV head may attend to.

    Args:
        attention: [tokens, tokens], of the full cache, the most of the head's queries.
        prompt: tokens of the prompt, whose prefill attends to all of them.

    Returns:
        [tokens, tokens] bool, causal.
    """
    tokens = len(attention)
    # needed[t, j]: the most attention that a query from t on pays to j.
    needed = attention.flip(0).cummax(0).values.flip(0)
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    alive = torch.zeros(tokens, dtype=torch.bool)
    alive[:prompt] = True
    first = schedule.first_eviction(prompt)
    for position in range(prompt, tokens):
        if position >= first and (position - first) % schedule.window == 0:
            candidates = alive.nonzero()[: -schedule.window, 0]
            need = needed[position, candidates]
            need[candidates < SINKS] = torch.inf
            best = candidates[need.topk(schedule.budget - schedule.window).indices]
            alive[candidates] = False
            alive[best] = True
        alive[position] = True
        mask[position] = alive
    return mask


@contextmanager
def masked(model: Any, masks: list[torch.Tensor]) -> Iterator[None]:
    """Let each layer attend only where its mask, [heads, tokens, tokens], is true."""
    handles = []
    for layer, mask in zip(model.model.layers, masks, strict=True):
        additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)

        def replace(_module: Any, args: Any, kwargs: Any, additive: Any = additive[None]) -> Any:
            return args, kwargs | {"attention_mask": additive}

        hook = layer.self_attn.register_forward_pre_hook(replace, with_kwargs=True)
        handles.append(hook)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def right_tokens(model: Any, ids: torch.Tensor, prompt: int, budget: int) -> list[bool]:
    """For each token after the prompt whether it would have been written, [1, tokens] ids."""
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    schedule = EvictionSchedule(budget, WINDOW)
    masks = []
    for attention in model(ids, output_attentions=True).attentions:
        heads = attention[0].unflatten(0, (-1, groups)).amax(1)
        own = torch.stack([kept(head, prompt, schedule) for head in heads])
        masks.append(own.repeat_interleave(groups, 0))
    with masked(model, masks):
        predicted = model(ids).logits[0, prompt - 1 : -1].argmax(-1)
    return (predicted == ids[0, prompt:]).tolist()


def measure(problems: list[Problem], budgets: dict[int, int]) -> dict[int, dict[str, float]]:
    """For each compression the share of tokens of each kind that are right, and of all."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="eager"
    )
    right: dict[int, dict[str, list[bool]]] = {c: defaultdict(list) for c in budgets}
    for problem in track(problems, "reading", transient=True):
        ids = tokenizer(f"{problem.prompt} {problem.completion} {EOS}", return_tensors="pt")
        prompt = 1 + len(problem.prompt.split())
        for compression, budget in budgets.items():
            with torch.inference_mode():
                tokens = right_tokens(model, ids.input_ids, prompt, budget)
            for kind, value in zip(kinds(problem), tokens, strict=True):
                right[compression][kind].append(value)
                right[compression]["all"].append(value)
    return {
        compression: {kind: round(sum(own) / len(own), 4) for kind, own in found.items()}
        for compression, found in right.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=64, help="so many held-out ones")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    held_out = read_jsonl(HELD_OUT_FILE)
    budgets = {c: budget_for(c, mean_length(held_out)) for c in COMPRESSIONS}
    shares = measure(held_out[: args.problems], budgets)
    result = {
        "problems": args.problems,
        "window": WINDOW,
        "budgets": budgets,
        **provenance(("torch", "transformers")),
        "right": shares,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "hindsight.json").write_text(json.dumps(result, indent=1) + "\n")
    table = Table("", *KINDS, "all", title="Tokens right, with a cache chosen in hindsight")
    for compression, found in shares.items():
        table.add_row(f"{compression}x", *(f"{found[kind]:.1%}" for kind in (*KINDS, "all")))
    Console().print(table)


if __name__ == "__main__":
    main()
