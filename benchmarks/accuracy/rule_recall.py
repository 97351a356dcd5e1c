"""The recall suite of `vase-vllm evaluate` for the rules of rules.py: see ``--help``."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.accuracy.rules import RULES, find_rules, order_of
from benchmarks.accuracy.teacher_forcing import Llama, Reader, Rule
from benchmarks.common.provenance import provenance
from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.tools.evaluation.recall import RecallCase, recall_cases
from vase_vllm.tools.evaluation.texts import HALVES, own_texts
from vase_vllm.tools.markdown import table

WINDOW = 64


def compare(
    model: Llama, rules: dict[str, Rule], cases: Sequence[RecallCase], budget: int
) -> list[dict[str, Any]]:
    """A row of results for the full cache and for each rule."""
    limits = EvictionLimits(budget=budget, window=WINDOW)
    nlls, recalled = [], []
    for index, case in enumerate(cases):
        orders = [order_of(name) for name in rules]
        evicting = Reader(model, list(rules.values()), limits, index, orders)
        readers = (Reader(model, [], None), evicting)
        nll, is_top, _ = (
            torch.cat(found)
            for found in zip(
                *(reader.nll(case.token_ids, case.value_positions) for reader in readers),
                strict=True,
            )
        )
        nlls.append(nll.mean(dim=-1))
        recalled.append(is_top.all(dim=-1))
    means, counts = torch.stack(nlls).mean(dim=0), torch.stack(recalled).sum(dim=0)
    return [
        {"rule": name, "recalled": int(count), "NLL": round(float(mean), 3)}
        for name, count, mean in zip(("full cache", *rules), counts, means, strict=True)
    ]


def page(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    cells = [[r["rule"], str(r["recalled"]), f"{r['NLL']:.2f}"] for r in results["results"]]
    lines = [
        f"# Recall of passcodes, {results['half']} half",
        "",
        f"- command: `{results['command']}`",
        f"- date: {results['date']}",
        "",
        f"{results['cases']} cases at distance {results['distance']}, budget "
        f"{results['budget']}: how many are recalled, and the NLL of a digit in nats.",
        "",
        *table(["rule", "recalled", "NLL"], cells),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="directory of a Llama, as of vase-vllm demo-model")
    parser.add_argument("--half", choices=HALVES, default="choice")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--distance", type=int, default=512)
    parser.add_argument("--instances", type=int, default=16, help="of both halves")
    parser.add_argument(
        "--rules",
        nargs="+",
        default=sorted(RULES),
        help="of rules.py, its groups, or policies with settings, as in rkv:lambda=0.3",
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON; a page lies beside it")
    args = parser.parse_args()
    try:
        rules = find_rules(args.rules)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    made = recall_cases(own_texts(), tokenizer, [args.distance], args.instances, fact_at=64)
    cases = [case for case in made if case.kind == "passcode" and case.half == args.half]
    results = {
        **provenance(("torch", "vase-vllm")),
        **{name: getattr(args, name) for name in ("half", "budget", "distance")},
        "cases": len(cases),
        "results": compare(Llama(args.model), rules, cases, args.budget),
    }
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
